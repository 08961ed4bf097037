"""The schedule of a run: streams, samples and digests of any step, in closed form.

Everything is a pure function of config values, shard sizes and the step. No file is read, and no
rank appears: callers name the lanes that they carry. `pretrain.data.step_loader` reads the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from pretrain.sampling.mixing import StreamChoice
from pretrain.sampling.order import (
    KeptOrdinals,
    Segment,
    SourceOrder,
    StepSamples,
    StreamOrder,
    digest_halves,
    source_key,
)
from pretrain.settings.data import Source, Stream, StreamName


class SourceSamples(KeptOrdinals, Protocol):
    """Samples of one source, as `data_prep.shards.subset.KeptSamples` has them."""

    @property
    def shard_sizes(self) -> np.ndarray:
        """int64 [shards]: kept samples of each shard."""


class RunSchedule:
    """Samples of every step of a run, over all streams.

    Args:
        orders: sample order of each stream, over the steps that take the stream.
        choice: streams that each step takes.
        num_steps: steps of the whole run.
    """

    def __init__(
        self,
        orders: Mapping[StreamName, StreamOrder],
        *,
        choice: StreamChoice,
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

    def streams_of_step(self, step: int) -> list[StreamName]:
        """Returns the streams whose loss is part of a step."""
        return self.choice.streams_of_step(step)

    def samples_of_step(self, stream: StreamName, step: int, *, lanes: range) -> StepSamples:
        """Returns the samples that some lanes hold; none if the step does not take the stream."""
        order = self.orders[stream]
        if stream not in self.streams_of_step(step):
            return order.samples_of_step(0, lanes=lanes[:0])
        return order.samples_of_step(self.num_steps_taken(stream, step), lanes=lanes)

    def digest(self, stream: StreamName, samples: StepSamples) -> np.ndarray:
        """Returns int64 [2], the `digest_halves` of some samples of a step."""
        return digest_halves(samples, source_keys=self._source_keys[stream])

    def first_slot(self, stream: StreamName, *, lanes: range) -> int:
        """Returns the slot in the global batch of the first pair that some lanes hold.

        Their other pairs follow without a gap.
        """
        return lanes.start * self.orders[stream].slots_per_lane

    def num_rows(self, stream: StreamName, *, lanes: range) -> int:
        """Returns the number of pairs that some lanes hold in a step that takes the stream."""
        return len(lanes) * self.orders[stream].slots_per_lane

    # ------------------------------------------------------------------------ the steps before one

    def num_steps_taken(self, stream: StreamName, num_steps: int) -> int:
        """Returns how many of the run's first `num_steps` steps take a stream."""
        return self.choice.num_taken(num_steps)[stream]

    def samples_seen(self, num_steps: int) -> int:
        """Returns the pairs that the run's first steps take, summed over the streams."""
        taken = self.choice.num_taken(num_steps)
        return sum(taken[name] * order.global_batch_size for name, order in self.orders.items())

    def samples_drawn(self, stream: StreamName, num_steps: int) -> list[int]:
        """Returns [sources], the samples of each source in the run's first steps."""
        return self.orders[stream].samples_drawn(self.num_steps_taken(stream, num_steps))

    def samples_drawn_of_epoch(
        self, stream: StreamName, num_steps: int, *, source: int, epoch: int
    ) -> int:
        """Returns the samples of one epoch of a source that the run's first steps draw."""
        return self.orders[stream].samples_drawn_of_epoch(
            self.num_steps_taken(stream, num_steps), source=source, epoch=epoch
        )

    def epochs_seen(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Returns stream -> source -> mean number of times that its samples were drawn."""
        return {
            name: order.epochs_seen(self.num_steps_taken(name, num_steps))
            for name, order in self.orders.items()
        }

    def lane_positions(self, step: int) -> list[np.ndarray]:
        """Returns [sources] int64 [lanes], the samples that every lane drew before a step.

        The sources of all streams follow one another.
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

    def whole_epochs(self, stream: StreamName, num_steps: int, *, source: int) -> int:
        """Returns the number of epochs of a source that every lane leaves in the first steps."""
        order = self.orders[stream]
        positions = order.lane_positions(self.num_steps_taken(stream, num_steps))[:, source]
        return int(positions.min()) // order.sources[source].lane_length

    def steps_to_end_of(self, stream: StreamName, *, source: int, epoch: int) -> float:
        """Returns the steps after which every lane has left an epoch of a source.

        Infinite if no later segment uses the source.
        """
        own_steps = self.orders[stream].steps_to_end_of(source=source, epoch=epoch)
        return math.inf if own_steps is None else self.choice.steps_until(stream, own_steps)


def distinct_sources(stream: Stream) -> list[Source]:
    """Returns each source once: those of the first step, then those that segments add."""
    sources: dict[str, Source] = {}
    for source in stream.all_sources:
        sources.setdefault(source.name, source)
    return list(sources.values())


def build_schedule(
    streams: Mapping[StreamName, Stream],
    samples: Mapping[StreamName, Sequence[SourceSamples]],
    *,
    streams_per_step: Literal["all", "one"],
    lanes: int,
    window: int,
    seed: int,
    num_steps: int,
) -> RunSchedule:
    """Builds the schedule of a run.

    Args:
        streams: sections of the config, by name.
        samples: samples of the `distinct_sources` of each stream.
        streams_per_step: "all", or "one" chosen by weight.
        lanes: number of lanes.
        window: samples of a lane that are shuffled among themselves.
        seed: the run's seed.
        num_steps: steps of the whole run.

    Raises:
        InputError: if a source has fewer samples than lanes, a stream has too many sources, or a
            weight is too small.
    """
    choice = StreamChoice(
        {name: stream.weight for name, stream in streams.items()},
        takes_all=streams_per_step == "all",
    )
    orders = {}
    for name, stream in streams.items():
        sources = [
            SourceOrder(
                source.name,
                shard_sizes=each.shard_sizes,
                lanes=lanes,
                window=window,
                seed=seed,
                samples=each,
            )
            for source, each in zip(distinct_sources(stream), samples[name], strict=True)
        ]
        orders[name] = StreamOrder(
            name,
            sources=sources,
            segments=_segments(name, stream, choice),
            global_batch_size=stream.global_batch_size,
            seed=seed,
        )
    return RunSchedule(orders, choice=choice, num_steps=num_steps)


def _segments(name: StreamName, stream: Stream, choice: StreamChoice) -> list[Segment]:
    """Weights of a stream's distinct sources, from each step at which they change.

    Steps of a `Segment` are counted among those that take the stream.
    """
    by_step = [(0, stream.sources)]
    by_step += [(segment.from_step, segment.sources) for segment in stream.segments]
    segments = []
    for from_step, used in by_step:
        weights = {source.name: source.weight for source in used}
        segments.append(
            Segment(
                choice.num_taken(from_step)[name],
                [weights.get(source.name, 0.0) for source in distinct_sources(stream)],
            )
        )
    return segments
