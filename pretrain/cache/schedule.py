"""Which shards some lanes read, and when: worked out from a source's order, without reading it.

In an epoch a lane owns a range of places on the epoch's axis, and the shards lie end to end on it:
so the axis falls into pieces, each of one shard and one lane, whose place in the lane says in which
windows the shard is read. There are at most as many pieces as shards and lanes together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.sampling.order import SourceOrder

NEVER = np.iinfo(np.int64).max  # not before the end of the next epoch


@dataclass(frozen=True)
class Pieces:
    """The shards that some lanes read in one epoch; all int64 [pieces]."""

    shards: np.ndarray
    lanes: np.ndarray  # counted from the first of them
    begins: np.ndarray  # first place in the lane that the shard fills
    ends: np.ndarray  # place behind the last one


@dataclass(frozen=True)
class ShardUses:
    """When the shards of a source are read by some lanes that have come somewhere."""

    # int64 [shards]: samples that a lane still gives before it enters a window with samples of the
    # shard; the least over the lanes, 0 where one is in such a window
    next_uses: np.ndarray
    is_current: np.ndarray  # bool [shards]: in the window that some lane is in
    is_next: np.ndarray  # bool [shards]: in the window after it


def pieces_of_epoch(order: SourceOrder, epoch: int, *, lanes: range) -> Pieces:
    """The pieces into which an epoch of these lanes falls."""
    shard_order, axis_starts, rotation = order.epoch_axis(epoch)
    length, num_samples = order.lane_length, order.num_samples
    lane_starts = np.arange(lanes.start, lanes.stop, dtype=np.int64) * length
    # Places are counted from the rotation on, as lanes are.
    begins = np.union1d((axis_starts - rotation) % num_samples, lane_starts)
    begins = begins[(begins >= lane_starts[0]) & (begins < lanes.stop * length)]
    ends = np.append(begins[1:], lanes.stop * length)
    nth = np.searchsorted(axis_starts, (begins + rotation) % num_samples, side="right") - 1
    lane_numbers = begins // length
    first_places = lane_numbers * length
    return Pieces(
        shard_order[nth],
        lane_numbers - lanes.start,
        begins - first_places,
        ends - first_places,
    )


def shard_uses(order: SourceOrder, positions: np.ndarray, *, lanes: range) -> ShardUses:
    """When each shard is read from here on.

    Args:
        order: of the source.
        positions: int64 [lanes], samples of this source that each lane has given.
        lanes: numbers of the lanes.
    """
    num_shards = len(order.shard_sizes)
    uses = ShardUses(
        np.full(num_shards, NEVER), np.zeros(num_shards, bool), np.zeros(num_shards, bool)
    )
    epochs, places = np.divmod(positions, order.lane_length)
    for epoch in np.unique(epochs).tolist():
        _note_uses(uses, order, epoch, np.where(epochs == epoch, places, -1), lanes)
    return uses


def _note_uses(
    uses: ShardUses, order: SourceOrder, epoch: int, places: np.ndarray, lanes: range
) -> None:
    """Notes what the lanes that are in this epoch read until the end of the next one.

    Args:
        places: int64 [lanes], where the lanes are in their epoch; -1: in another epoch.
    """
    window, length = order.window, order.lane_length
    for later in (0, 1):
        pieces = pieces_of_epoch(order, epoch + later, lanes=lanes)
        here = places[pieces.lanes]
        current = here // window
        next_window = np.where((current + 1) * window < length, current + 1, 0)
        is_ahead = next_window > 0  # else the next window is the first of the next epoch
        first, last = pieces.begins // window, (pieces.ends - 1) // window
        is_left = (here >= 0) & ((later == 1) | (last >= current))
        is_current = is_left & (later == 0) & (first <= current)
        is_next = is_left & (first <= next_window) & (next_window <= last)
        is_next &= is_ahead == (later == 0)
        distance = np.maximum(later * length + first * window - here, 0)
        np.minimum.at(uses.next_uses, pieces.shards[is_left], distance[is_left])
        uses.is_current[pieces.shards[is_current]] = True
        uses.is_next[pieces.shards[is_next]] = True


def bytes_of_two_windows(
    order: SourceOrder, epoch: int, *, lanes: range, shard_bytes: np.ndarray
) -> int:
    """The most bytes that any two windows of an epoch, one after the other, need.

    Args:
        order: of the source.
        epoch: the epoch; its last window is taken with the first one of the next epoch.
        lanes: numbers of the lanes, all in the same window.
        shard_bytes: int64 [shards].
    """
    num_pairs = -(-order.lane_length // order.window)
    here, after = (pieces_of_epoch(order, e, lanes=lanes) for e in (epoch, epoch + 1))
    is_first = after.begins < order.window
    # Pair k is windows k and k + 1: a piece in windows a to b is in pairs a - 1 to b.
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
    """Joins the ranges of a group that share values, so that each value is in one of them."""
    row = np.lexsort((firsts, groups))
    groups = groups[row]
    base = groups * (num_values + 1)  # ranges of different groups do not meet
    firsts, lasts = firsts[row] + base, lasts[row] + base
    reached = np.maximum.accumulate(lasts)
    is_new = np.append(True, firsts[1:] > reached[:-1])
    starts = np.flatnonzero(is_new)
    ends = np.append(starts[1:], len(groups)) - 1
    return groups[starts], firsts[starts] - base[starts], reached[ends] - base[starts]
