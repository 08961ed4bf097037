"""Keeps account of substituted samples over all ranks, and stops a run that has too many."""

from __future__ import annotations

import torch

from data_prep.config_file import RunError
from pretrain.gather import gather_objects, sum_over_ranks
from pretrain.pair_batch import StepBatch
from pretrain.pair_loader import StepDataset
from pretrain.run_folder import RunFolder
from pretrain.shard_reader import BadSample


class BadSampleLedger:
    """Enters each step's substitutions into the run folder.

    Args:
        run: the run folder.
        dataset: what the run reads.
        max_bad_fraction: distinct bad samples, as a share of all sources' samples, that stop the
            run; a single one never does.
    """

    def __init__(self, run: RunFolder, dataset: StepDataset, *, max_bad_fraction: float) -> None:
        self.run = run
        self.num_samples = dataset.num_samples
        self.max_bad_fraction = max_bad_fraction
        self._distinct: set[tuple[str, int]] = set()

    def enter(self, batch: StepBatch, *, device: torch.device) -> None:
        """Records a step's substitutions; every rank must call it.

        Raises:
            RunError: too many samples are bad.
        """
        own = [bad for pairing in batch.pairings.values() for bad in pairing.bad_samples]
        if not sum_over_ranks(torch.tensor([len(own)], device=device)).item():
            return
        bad_samples: list[BadSample] = [bad for of_rank in gather_objects(own) for bad in of_rank]
        self.run.write_bad_samples(batch.step + 1, bad_samples)
        self._distinct |= {(bad.source, bad.ordinal) for bad in bad_samples}
        limit = max(1.0, self.max_bad_fraction * self.num_samples)
        if len(self._distinct) > limit:
            raise RunError(
                f"{len(self._distinct)} of {self.num_samples} samples are unreadable, above "
                f"loading.max_bad_fraction={self.max_bad_fraction:g}; the last: "
                f"{bad_samples[-1].reason}; all are listed in {self.run.folder / 'bad_samples'}; "
                "check the dataset with python -m data_prep.verify_shards"
            )
