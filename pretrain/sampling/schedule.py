"""The schedule of a run: pairings, samples and digests of any step, in closed form.

Everything is a pure function of config values, shard sizes and the step. No file is read, and no
rank appears: callers name the lanes that they carry. `pretrain.data.step_loader` reads the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from pretrain.config import Pairing, PairingName, Source
from pretrain.sampling.mixing import PairingChoice
from pretrain.sampling.order import (
    KeptOrdinals,
    PairingOrder,
    Segment,
    SourceOrder,
    StepSamples,
    digest_halves,
    source_key,
)


class SourceSamples(KeptOrdinals, Protocol):
    """Samples of one source, as `data_prep.shards.subset.KeptSamples` has them."""

    @property
    def shard_sizes(self) -> np.ndarray:
        """int64 [shards]: kept samples of each shard."""


class RunSchedule:
    """Samples of every step of a run, over all pairings.

    Args:
        orders: sample order of each pairing, over the steps that take the pairing.
        choice: pairings that each step takes.
        num_steps: steps of the whole run.
    """

    def __init__(
        self,
        orders: Mapping[PairingName, PairingOrder],
        *,
        choice: PairingChoice,
        num_steps: int,
    ) -> None:
        self.orders = dict(orders)
        self.choice = choice
        self.num_steps = num_steps
        self.lanes = next(iter(self.orders.values())).lanes
        self._source_keys = {
            name: [source_key(name, source.name) for source in order.sources]
            for name, order in self.orders.items()
        }

    # ------------------------------------------------------------------------------------ a step

    def pairings_of_step(self, step: int) -> list[PairingName]:
        """Returns the pairings whose loss is part of a step."""
        return self.choice.pairings_of_step(step)

    def samples_of_step(self, pairing: PairingName, step: int, *, lanes: range) -> StepSamples:
        """Returns the samples that some lanes hold; none if the step does not take the pairing."""
        order = self.orders[pairing]
        if pairing not in self.pairings_of_step(step):
            return order.samples_of_step(0, lanes=lanes[:0])
        return order.samples_of_step(self.num_steps_taken(pairing, step), lanes=lanes)

    def digest(self, pairing: PairingName, samples: StepSamples) -> np.ndarray:
        """Returns int64 [2], the `digest_halves` of some samples of a step."""
        return digest_halves(samples, source_keys=self._source_keys[pairing])

    def first_slot(self, pairing: PairingName, *, lanes: range) -> int:
        """Returns the slot in the global batch of the first pair that some lanes hold.

        Their other pairs follow without a gap.
        """
        return lanes.start * self.orders[pairing].slots_per_lane

    def num_rows(self, pairing: PairingName, *, lanes: range) -> int:
        """Returns the number of pairs that some lanes hold in a step that takes the pairing."""
        return len(lanes) * self.orders[pairing].slots_per_lane

    # ------------------------------------------------------------------------ the steps before one

    def num_steps_taken(self, pairing: PairingName, num_steps: int) -> int:
        """Returns how many of the run's first `num_steps` steps take a pairing."""
        return self.choice.num_taken(num_steps)[pairing]

    def samples_seen(self, num_steps: int) -> int:
        """Returns the pairs that the run's first steps take, summed over the pairings."""
        taken = self.choice.num_taken(num_steps)
        return sum(taken[name] * order.global_batch_size for name, order in self.orders.items())

    def samples_drawn(self, pairing: PairingName, num_steps: int) -> list[int]:
        """Returns [sources], the samples of each source in the run's first steps."""
        return self.orders[pairing].samples_drawn(self.num_steps_taken(pairing, num_steps))

    def samples_drawn_of_epoch(
        self, pairing: PairingName, num_steps: int, *, source: int, epoch: int
    ) -> int:
        """Returns the samples of one epoch of a source that the run's first steps draw."""
        return self.orders[pairing].samples_drawn_of_epoch(
            self.num_steps_taken(pairing, num_steps), source=source, epoch=epoch
        )

    def epochs_seen(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Returns pairing -> source -> mean number of times that its samples were drawn."""
        return {
            name: order.epochs_seen(self.num_steps_taken(name, num_steps))
            for name, order in self.orders.items()
        }

    def lane_positions(self, step: int) -> list[np.ndarray]:
        """Returns [sources] int64 [lanes], the samples that every lane drew before a step.

        The sources of all pairings follow one another.
        """
        return [
            column
            for name, order in self.orders.items()
            for column in order.lane_positions(self.num_steps_taken(name, step)).T
        ]

    # ------------------------------------------------------------------------------------- epochs

    @property
    def num_samples(self) -> int:
        """Samples of all sources together."""
        return sum(each.num_samples for order in self.orders.values() for each in order.sources)

    def whole_epochs(self, pairing: PairingName, num_steps: int, *, source: int) -> int:
        """Returns the number of epochs of a source that every lane leaves in the first steps."""
        order = self.orders[pairing]
        positions = order.lane_positions(self.num_steps_taken(pairing, num_steps))[:, source]
        return int(positions.min()) // order.sources[source].lane_length

    def steps_to_end_of(self, pairing: PairingName, *, source: int, epoch: int) -> float:
        """Returns the steps after which every lane has left an epoch of a source.

        Infinite if no later segment uses the source.
        """
        own_steps = self.orders[pairing].steps_to_end_of(source=source, epoch=epoch)
        return math.inf if own_steps is None else self.choice.steps_until(pairing, own_steps)


def distinct_sources(pairing: Pairing) -> list[Source]:
    """Returns each source once: those of the first step, then those that segments add."""
    sources: dict[str, Source] = {}
    for source in pairing.all_sources:
        sources.setdefault(source.name, source)
    return list(sources.values())


def build_schedule(
    pairings: Mapping[PairingName, Pairing],
    samples: Mapping[PairingName, Sequence[SourceSamples]],
    *,
    pairings_per_step: Literal["all", "one"],
    lanes: int,
    window: int,
    seed: int,
    num_steps: int,
) -> RunSchedule:
    """Builds the schedule of a run.

    Args:
        pairings: sections of the config, by name.
        samples: samples of the `distinct_sources` of each pairing.
        pairings_per_step: "all", or "one" chosen by weight.
        lanes: number of lanes.
        window: samples of a lane that are shuffled among themselves.
        seed: the run's seed.
        num_steps: steps of the whole run.

    Raises:
        InputError: if a source has fewer samples than lanes, a pairing has too many sources, or a
            weight is too small.
    """
    choice = PairingChoice(
        {name: pairing.weight for name, pairing in pairings.items()},
        takes_all=pairings_per_step == "all",
    )
    orders = {}
    for name, pairing in pairings.items():
        sources = [
            SourceOrder(
                source.name,
                shard_sizes=each.shard_sizes,
                lanes=lanes,
                window=window,
                seed=seed,
                samples=each,
            )
            for source, each in zip(distinct_sources(pairing), samples[name], strict=True)
        ]
        orders[name] = PairingOrder(
            name,
            sources=sources,
            segments=_segments(name, pairing, choice),
            global_batch_size=pairing.global_batch_size,
            seed=seed,
        )
    return RunSchedule(orders, choice=choice, num_steps=num_steps)


def _segments(name: PairingName, pairing: Pairing, choice: PairingChoice) -> list[Segment]:
    """Weights of a pairing's distinct sources, from each step at which they change.

    Steps of a `Segment` are counted among those that take the pairing.
    """
    by_step = [(0, pairing.sources)]
    by_step += [(segment.from_step, segment.sources) for segment in pairing.segments]
    segments = []
    for from_step, used in by_step:
        weights = {source.name: source.weight for source in used}
        segments.append(
            Segment(
                choice.num_taken(from_step)[name],
                [weights.get(source.name, 0.0) for source in distinct_sources(pairing)],
            )
        )
    return segments
