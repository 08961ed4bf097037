"""One rank's rows of each step: samples of the schedule -> bytes -> rows of tensors.

The schedule settles which samples a step holds, and their random numbers, before anything is read.
So any thread may fill any row of a step's buffers; `pretrain.data.loaders` starts those threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.cache.node import NodeShare
from pretrain.cache.shard_cache import ShardCache
from pretrain.data.batch import StepBatch, StreamBuffers, StreamLayout, step_bytes
from pretrain.data.stream_reader import StreamReader
from pretrain.sampling.order import lanes_of_rank
from pretrain.sampling.schedule import RunSchedule
from pretrain.settings.data import StreamName
from pretrain.settings.segments import value_at


class StepLoader:
    """Reader of one rank's rows of any step. It can be pickled.

    Args:
        schedule: samples of every step.
        readers: reader of each stream, with the sources in the schedule's order.
        later_readers: number of steps done -> readers of the same samples from then on, in other
            sizes.
        cache: this machine's cache, for datasets behind URLs.
        rank: this process's number.
        world_size: number of processes.
        node_ranks: ranks of this machine; None for this one alone.

    Raises:
        InputError: if there are more processes than lanes.
    """

    def __init__(
        self,
        schedule: RunSchedule,
        readers: Mapping[StreamName, StreamReader],
        *,
        cache: ShardCache | None,
        rank: int,
        world_size: int,
        node_ranks: Sequence[int] | None = None,
        later_readers: Mapping[int, Mapping[StreamName, StreamReader]] | None = None,
    ) -> None:
        self.schedule = schedule
        self.readers = dict(readers)
        self._readers_from = {0: self.readers, **(later_readers or {})}
        self.lanes = lanes_of_rank(rank, world_size=world_size, lanes=schedule.lanes)
        self.node = NodeShare(
            rank,
            ranks=node_ranks or [rank],
            world_size=world_size,
            cache=cache,
            schedule=schedule,
            samples=[each.samples for reader in readers.values() for each in reader.sources],
        )

    def load(self, step: int) -> StepBatch:
        """Returns this rank's rows of a step, in new memory.

        Raises:
            InputError, OSError: as `SampleReader.decode_training`.
        """
        batches = {}
        for name, reader in self.readers_at(step).items():
            samples = self.schedule.samples_of_step(name, step, lanes=self.lanes)
            buffers = StreamBuffers.new(reader.layout, num_rows=len(samples))
            bad_samples, num_read = reader.fill(buffers, samples, range(len(samples)))
            batches[name] = buffers.to_batch(
                first_slot=self.first_slot(name),
                digest=self.schedule.digest(name, samples),
                bad_samples=bad_samples,
                num_read=num_read,
            )
        return StepBatch(step, batches, self.schedule.streams_of_step(step))

    @property
    def changes(self) -> list[int]:
        """Numbers of steps done from which rows have another layout; the first is 0."""
        return list(self._readers_from)

    def readers_at(self, step: int) -> Mapping[StreamName, StreamReader]:
        """Returns the reader of each stream in a step."""
        return value_at(self._readers_from, step)

    def first_slot(self, stream: StreamName) -> int:
        """Returns the slot in the global batch of this rank's first pair."""
        return self.schedule.first_slot(stream, lanes=self.lanes)

    @property
    def cache(self) -> ShardCache | None:
        """This machine's cache, for datasets behind URLs."""
        return self.node.cache

    @property
    def layouts(self) -> dict[StreamName, tuple[StreamLayout, int]]:
        """(layout, largest number of rows in a step) of every stream, with the largest images."""
        return max(map(self.layouts_at, self._readers_from), key=step_bytes)

    def layouts_at(self, step: int) -> dict[StreamName, tuple[StreamLayout, int]]:
        """Returns (layout, largest number of rows in a step) of every stream in a step."""
        return {
            name: (reader.layout, self.schedule.num_rows(name, lanes=self.lanes))
            for name, reader in self.readers_at(step).items()
        }

    def fingerprints(self) -> dict[str, str]:
        """Returns the fingerprint of each source's samples, under "<stream>/<source>"."""
        return {
            f"{name}/{each.source}": each.samples.fingerprint
            for name, reader in self.readers.items()
            for each in reader.sources
        }
