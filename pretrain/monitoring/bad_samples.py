"""Records substituted samples across ranks and aborts above a limit."""

from __future__ import annotations

from collections import Counter

import torch

from data_prep.errors import RunError
from pretrain.data.batch import BadSample, StepBatch
from pretrain.data.step_loader import StepLoader
from pretrain.distributed.collectives import gather_objects, on_main_process, sum_over_ranks
from pretrain.run.folder import RunFolder
from pretrain.settings.data import Loading

# Tag of a run with substituted shards: its result depends on the state of the storage.
BAD_SHARD_TAG = "substituted_shards"


class BadSampleLedger:
    """Ledger of substitutions in the run folder; every rank must make every call.

    Args:
        run: run folder; entries of earlier attempts count too.
        loader: reader of the run's sources.
        loading: config section `loading`, with the limits. A single bad sample never stops a run.
    """

    def __init__(self, run: RunFolder, loader: StepLoader, *, loading: Loading) -> None:
        self.run = run
        self.loading = loading
        self.num_samples = loader.schedule.num_samples
        self.readers = {
            f"{name}/{reader.source}": reader
            for name, stream in loader.readers.items()
            for reader in stream.sources
        }
        self._known: set[tuple[str, int]] = set()
        self._per_shard: Counter[tuple[str, str]] = Counter()
        for stream, bad in on_main_process(run.read_bad_samples):
            self._count(stream, bad)
        # (stream, source, epoch) -> substitutions of this attempt
        self.num_substituted: Counter[tuple[str, str, int]] = Counter()

    def record(self, batch: StepBatch, *, device: torch.device) -> None:
        """Records the substitutions of a step.

        Raises:
            RunError: if too many samples are bad, in total or in one shard.
        """
        own = [(name, bad) for name, stream in batch.streams.items() for bad in stream.bad_samples]
        if not sum_over_ranks(torch.tensor([len(own)], device=device)).item():
            return
        entries = [entry for rank_entries in gather_objects(own) for entry in rank_entries]
        self.run.write_bad_samples(batch.step + 1, entries)
        for stream, bad in entries:
            self.num_substituted[stream, bad.source, bad.epoch] += 1
            self._count(stream, bad)
            if bad.is_shard_bad:
                self.run.add_tag(BAD_SHARD_TAG)
        for stream, bad in entries:
            self._check_limits(stream, bad)

    def _count(self, stream: str, bad: BadSample) -> None:
        """Counts each sample once, even if several epochs substitute it. Samples of bad shards do
        not count."""
        source = f"{stream}/{bad.source}"
        if bad.is_shard_bad or (source, bad.ordinal) in self._known:
            return
        self._known.add((source, bad.ordinal))
        self._per_shard[source, bad.shard] += 1

    def _check_limits(self, stream: str, bad: BadSample) -> None:
        source = f"{stream}/{bad.source}"
        advice = f"all are listed in {self.run.folder / 'bad_samples'}; the last: {bad.reason}"
        if "verify_shards" not in advice:
            advice += "; check the dataset with python -m data_prep.verify_shards"
        limit = self.loading.max_bad_fraction
        if len(self._known) > max(1.0, limit * self.num_samples):
            raise RunError(
                f"{len(self._known)} of {self.num_samples} samples are unreadable, above "
                f"loading.max_bad_fraction={limit:g}; {advice}"
            )
        limit, num_bad = self.loading.max_bad_fraction_per_shard, self._per_shard[source, bad.shard]
        dataset = self.readers[source].dataset
        shard_samples = int(dataset.shard_sizes[dataset.locate(bad.ordinal)[0]])
        if num_bad > max(1.0, limit * shard_samples):
            raise RunError(
                f"{num_bad} of the {shard_samples} samples in shard {bad.shard} of {source} "
                f"({dataset.folder}) are unreadable, above "
                f"loading.max_bad_fraction_per_shard={limit:g}; {advice}"
            )
