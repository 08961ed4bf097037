"""Loads a rank's share of each step: sample order -> bytes -> tensors.

The dataset that torch's DataLoader sees has one item per step, so that workers divide steps between
them and who loads what never changes what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_prep.config_file import InputError, RunError
from pretrain.config import PairingName, PretrainConfig, media_of_pairing
from pretrain.keyed_random import key_of, sample_random
from pretrain.media_transforms import MediaTransform, build_transforms
from pretrain.pair_batch import PairingBatch, StepBatch
from pretrain.sample_order import (
    PairingOrder,
    Segment,
    SourceOrder,
    StepSamples,
    digest_halves,
    lanes_of_rank,
)
from pretrain.shard_reader import BadSample, PairReader
from pretrain.source_datasets import open_samples
from pretrain.tokenizer import Tokenizer, token_keys


class PairingReader:
    """All sources of one pairing, in their order."""

    def __init__(
        self,
        name: PairingName,
        *,
        config: PretrainConfig,
        transform: MediaTransform,
        tokenizer: Tokenizer,
    ) -> None:
        pairing = config.pairings[name]
        self.seed = config.seed
        self.transform = transform
        self.tokenizer = tokenizer
        self.readers = [
            PairReader(
                source.name,
                samples=open_samples(source.dataset, subset=source.subset),
                kind=media_of_pairing(name),
                transform=transform,
                window=config.loading.window,
            )
            for source in pairing.sources
        ]
        self.source_keys = [key_of("source", name, source.name) for source in pairing.sources]
        self.order = PairingOrder(
            name,
            sources=[
                SourceOrder(
                    reader.source,
                    shard_sizes=reader.samples.shard_sizes,
                    lanes=config.lanes,
                    window=config.loading.window,
                    seed=config.seed,
                    samples=reader.samples,
                )
                for reader in self.readers
            ],
            segments=[Segment(0, [source.weight for source in pairing.sources])],
            global_batch_size=pairing.global_batch_size,
            seed=config.seed,
        )

    def load(self, step: int, *, lanes: range) -> PairingBatch:
        """The pairs that the given lanes hold in one step."""
        samples = self.order.samples_of_step(step, lanes=lanes)
        media, captions, bad_samples = [], [], []
        for pair_media, caption, bad in self._pairs(samples):
            media.append(pair_media)
            captions.append(caption)
            bad_samples.extend(bad)
        tokens = self.tokenizer(captions)
        return PairingBatch(
            media=torch.stack(media),
            stripes=torch.zeros(len(media), 0, 2, dtype=torch.int32),
            tokens=tokens,
            caption_lengths=self.tokenizer.lengths(tokens),
            media_keys=torch.zeros(len(media), dtype=torch.int64),
            caption_keys=token_keys(tokens),
            digest=digest_halves(samples, source_keys=self.source_keys),
            bad_samples=bad_samples,
        )

    def _pairs(self, samples: StepSamples) -> Iterator[tuple[Tensor, str, list[BadSample]]]:
        rows = zip(
            samples.sources.tolist(),
            samples.epochs.tolist(),
            samples.ordinals.tolist(),
            strict=True,
        )
        for source, epoch, ordinal in rows:
            reader = self.readers[source]
            pair, bad = reader.read(ordinal)
            rng = sample_random(self.seed, source=reader.source, epoch=epoch, ordinal=ordinal)
            caption = pair.captions[int(rng.random() * len(pair.captions))]
            yield self.transform.augment(pair.media, rng), caption, bad


class StepDataset(TorchDataset):
    """Item t is this rank's share of step t."""

    def __init__(
        self, config: PretrainConfig, *, tokenizer: Tokenizer, rank: int, world_size: int
    ) -> None:
        transforms = build_transforms(config)
        self.lanes = lanes_of_rank(rank, world_size=world_size, lanes=config.lanes)
        self.num_steps = config.schedule.num_steps
        self.pairings = {
            name: PairingReader(
                name,
                config=config,
                transform=transforms[media_of_pairing(name)],
                tokenizer=tokenizer,
            )
            for name in config.pairings
        }

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> StepBatch | InputError | OSError:
        """The batch, or the error that prevents it: raised in a worker process, its message would
        arrive wrapped in a traceback."""
        try:
            return StepBatch(
                step,
                {
                    name: reader.load(step, lanes=self.lanes)
                    for name, reader in self.pairings.items()
                },
            )
        except (InputError, OSError) as error:
            return error

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return sum(len(r.samples) for p in self.pairings.values() for r in p.readers)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each source's samples, under "<pairing>/<source>"."""
        return {
            f"{name}/{reader.source}": reader.samples.fingerprint
            for name, pairing in self.pairings.items()
            for reader in pairing.readers
        }


def load_steps(
    dataset: StepDataset, *, first_step: int, last_step: int, num_workers: int
) -> Iterator[StepBatch]:
    """Steps first_step to last_step - 1, in order, loaded ahead by worker processes.

    Raises:
        InputError: samples and their substitutes cannot be decoded.
        RunError: a shard cannot be read.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_use_one_thread,
    )
    for batch in loader:
        if isinstance(batch, OSError):
            raise RunError(
                f"cannot read a shard: {batch}; nothing was skipped: start again when it can be "
                "read, and the run goes on from its newest checkpoint"
            )
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
