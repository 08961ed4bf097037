"""A rank's share of each step: sample order -> bytes -> rows of tensors.

Which samples are in a step, and what is drawn from each, is settled before anything is read: so it
makes no difference who fills which row of a step's buffers. Who does is in pretrain.data.loaders.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.subset import KeptSamples
from pretrain.cache.node import NodeShare
from pretrain.config import (
    PairingName,
    PretrainConfig,
    media_of_pairing,
)
from pretrain.data.batch import PairBuffers, PairLayout, StepBatch
from pretrain.data.datasets import build_cache
from pretrain.data.pairing_reader import PairingReader
from pretrain.data.transforms import build_transforms
from pretrain.model.tokenizer import Tokenizer
from pretrain.sampling.mixing import PairingChoice
from pretrain.sampling.order import (
    SourceOrder,
    lanes_of_rank,
)


class StepDataset:
    """Item t is this rank's share of step t, in memory of its own.

    Args:
        config: the whole config.
        tokenizer: of captions.
        rank: this process's number.
        world_size: number of processes.
        node_ranks: those of this machine; None: this one alone.

    Raises:
        InputError: a dataset cannot be used, or there are more processes than lanes.
        RunError: a dataset behind a URL cannot be reached now.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        node_ranks: Sequence[int] | None = None,
    ) -> None:
        transforms = build_transforms(config)
        self.lanes = lanes_of_rank(rank, world_size=world_size, lanes=config.lanes)
        self.num_steps = config.schedule.num_steps
        self.cache = build_cache(config.loading)
        self.choice = PairingChoice(
            {name: pairing.weight for name, pairing in config.pairings.items()},
            takes_all=config.pairings_per_step == "all",
        )
        self.pairings = {
            name: PairingReader(
                name,
                config=config,
                transform=transforms[media_of_pairing(name)],
                tokenizer=tokenizer,
                choice=self.choice,
                cache=self.cache,
            )
            for name in config.pairings
        }
        self.node = NodeShare(
            rank, ranks=node_ranks or [rank], world_size=world_size, lanes=config.lanes
        )

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> StepBatch | InputError | OSError:
        """The batch, or the error that prevents it: raised in a worker process, its message would
        arrive wrapped in a traceback."""
        try:
            return self.load(step)
        except (InputError, OSError) as error:
            return error

    def load(self, step: int) -> StepBatch:
        """This rank's share of a step.

        Raises:
            InputError, OSError: as PairReader.read_training.
        """
        batches = {}
        for name, reader in self.pairings.items():
            samples = reader.samples_of_step(step, lanes=self.lanes)
            buffers = PairBuffers.new(reader.layout, num_rows=len(samples))
            bad_samples, num_read = reader.fill(buffers, samples, range(len(samples)))
            batches[name] = buffers.to_batch(
                first_slot=self.first_slot(name),
                digest=reader.digest(samples),
                bad_samples=bad_samples,
                num_read=num_read,
            )
        return StepBatch(step, batches, self.choice.pairings_of_step(step))

    def first_slot(self, pairing: PairingName) -> int:
        """In the global batch, of this rank's first pair; the others follow one after another."""
        return self.lanes.start * self.pairings[pairing].order.slots_per_lane

    @property
    def sources(self) -> list[tuple[SourceOrder, KeptSamples]]:
        """Order and samples of every source of every pairing."""
        return [
            (order, reader.samples)
            for pairing in self.pairings.values()
            for order, reader in zip(pairing.order.sources, pairing.readers, strict=True)
        ]

    def lane_positions(self, step: int) -> list[np.ndarray]:
        """[sources] int64 [lanes]: samples that every lane has given before one of the steps."""
        return [
            column
            for pairing in self.pairings.values()
            for column in pairing.order.lane_positions(pairing.num_steps_taken(step)).T
        ]

    @property
    def layouts(self) -> dict[PairingName, tuple[PairLayout, int]]:
        """(layout, most rows of a step) of every pairing."""
        return {
            name: (reader.layout, len(self.lanes) * reader.order.slots_per_lane)
            for name, reader in self.pairings.items()
        }

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return sum(len(r.samples) for p in self.pairings.values() for r in p.readers)

    def samples_seen(self, num_steps: int) -> int:
        """Pairs that the run's first steps take, of all pairings together."""
        taken = self.choice.num_taken(num_steps)
        return sum(taken[n] * each.order.global_batch_size for n, each in self.pairings.items())

    def epochs_seen(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Pairing -> source -> how often its samples were drawn, on average, in that many steps."""
        return {
            name: reader.order.epochs_seen(reader.num_steps_taken(num_steps))
            for name, reader in self.pairings.items()
        }

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each source's samples, under "<pairing>/<source>"."""
        return {
            f"{name}/{reader.source}": reader.samples.fingerprint
            for name, pairing in self.pairings.items()
            for reader in pairing.readers
        }
