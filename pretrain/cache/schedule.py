"""Next uses of shards, computed from a source's order: when some lanes read which shards.

In an epoch, a lane owns a range of the epoch's axis, on which the shards lie end to end. So the
axis falls into runs of samples of one shard in one lane. The position of a run in its lane tells in
which windows the shard is read. There are at most as many runs as shards and lanes together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.sampling.order import SourceOrder

NEVER = np.iinfo(np.int64).max  # not before the end of the next epoch


@dataclass(frozen=True)
class ShardRuns:
    """Runs of samples of one shard that some lanes read in one epoch; all int64 [runs]."""

    shards: np.ndarray  # index of the shard
    lanes: np.ndarray  # lane, counted from the first of these lanes
    begins: np.ndarray  # first index in the lane
    ends: np.ndarray  # index after the last one


@dataclass(frozen=True)
class ShardUses:
    """Next uses of the shards of a source by some lanes, seen from their current positions."""

    # int64 [shards]: samples that a lane reads before it enters a window with samples of the shard;
    # the least over the lanes, 0 if a lane is in such a window
    next_uses: np.ndarray
    is_current: np.ndarray  # bool [shards]: in the current window of some lane
    is_next: np.ndarray  # bool [shards]: in the next window of some lane


def shard_runs_of_epoch(order: SourceOrder, epoch: int, *, lanes: range) -> ShardRuns:
    """Returns the runs of samples that some lanes read in an epoch."""
    shard_order, axis_starts, rotation = order.epoch_axis(epoch)
    length, num_samples = order.lane_length, order.num_samples
    lane_starts = np.arange(lanes.start, lanes.stop, dtype=np.int64) * length
    # Indices are counted from the rotation on, as lanes are.
    begins = np.union1d((axis_starts - rotation) % num_samples, lane_starts)
    begins = begins[(begins >= lane_starts[0]) & (begins < lanes.stop * length)]
    ends = np.append(begins[1:], lanes.stop * length)
    nth = np.searchsorted(axis_starts, (begins + rotation) % num_samples, side="right") - 1
    lane_numbers = begins // length
    first_indices = lane_numbers * length
    return ShardRuns(
        shard_order[nth],
        lane_numbers - lanes.start,
        begins - first_indices,
        ends - first_indices,
    )


def shard_uses(order: SourceOrder, positions: np.ndarray, *, lanes: range) -> ShardUses:
    """Computes when each shard is read next.

    Args:
        order: order of the source.
        positions: int64 [lanes], samples of this source that each lane has read.
        lanes: the lanes.
    """
    num_shards = len(order.shard_sizes)
    uses = ShardUses(
        np.full(num_shards, NEVER), np.zeros(num_shards, bool), np.zeros(num_shards, bool)
    )
    epochs, indices = np.divmod(positions, order.lane_length)
    for epoch in np.unique(epochs).tolist():
        _record_uses(uses, order, epoch, np.where(epochs == epoch, indices, -1), lanes)
    return uses


def _record_uses(
    uses: ShardUses, order: SourceOrder, epoch: int, indices: np.ndarray, lanes: range
) -> None:
    """Records what the lanes in an epoch read until the end of the next one.

    Args:
        indices: int64 [lanes], positions of the lanes in this epoch; -1 if in another epoch.
    """
    window, length = order.window, order.lane_length
    for later in (0, 1):
        runs = shard_runs_of_epoch(order, epoch + later, lanes=lanes)
        here = indices[runs.lanes]
        current = here // window
        next_window = np.where((current + 1) * window < length, current + 1, 0)
        is_ahead = next_window > 0  # else the next window is the first of the next epoch
        first, last = runs.begins // window, (runs.ends - 1) // window
        is_left = (here >= 0) & ((later == 1) | (last >= current))
        is_current = is_left & (later == 0) & (first <= current)
        is_next = is_left & (first <= next_window) & (next_window <= last)
        is_next &= is_ahead == (later == 0)
        distance = np.maximum(later * length + first * window - here, 0)
        np.minimum.at(uses.next_uses, runs.shards[is_left], distance[is_left])
        uses.is_current[runs.shards[is_current]] = True
        uses.is_next[runs.shards[is_next]] = True


def bytes_of_two_windows(
    order: SourceOrder, epoch: int, *, lanes: range, shard_bytes: np.ndarray
) -> int:
    """Computes the most bytes that any two consecutive windows of an epoch need.

    Args:
        order: order of the source.
        epoch: the epoch; its last window is paired with the first one of the next epoch.
        lanes: the lanes, all in the same window.
        shard_bytes: int64 [shards], bytes of each shard.
    """
    num_pairs = -(-order.lane_length // order.window)
    here, after = (shard_runs_of_epoch(order, e, lanes=lanes) for e in (epoch, epoch + 1))
    is_first = after.begins < order.window
    # Pair k is windows k and k + 1: a run in windows a to b is in pairs a - 1 to b.
    shards = np.concatenate([here.shards, after.shards[is_first]])
    last_pairs = np.full(is_first.sum(), num_pairs - 1)
    firsts = np.concatenate([np.maximum(here.begins // order.window - 1, 0), last_pairs])
    lasts = np.concatenate([(here.ends - 1) // order.window, last_pairs])
    shards, firsts, lasts = _merge_ranges(shards, firsts, lasts, num_values=num_pairs)
    change = np.zeros(num_pairs + 1, dtype=np.int64)
    np.add.at(change, firsts, shard_bytes[shards])
    np.subtract.at(change, lasts + 1, shard_bytes[shards])
    return int(np.cumsum(change).max())


def _merge_ranges(
    groups: np.ndarray, firsts: np.ndarray, lasts: np.ndarray, *, num_values: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Joins overlapping ranges of each group, so that a value is in one range of its group."""
    row = np.lexsort((firsts, groups))
    groups = groups[row]
    base = groups * (num_values + 1)  # ranges of different groups do not meet
    firsts, lasts = firsts[row] + base, lasts[row] + base
    reached = np.maximum.accumulate(lasts)
    is_new = np.append(True, firsts[1:] > reached[:-1])
    starts = np.flatnonzero(is_new)
    ends = np.append(starts[1:], len(groups)) - 1
    return groups[starts], firsts[starts] - base[starts], reached[ends] - base[starts]
