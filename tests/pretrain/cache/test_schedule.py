import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import KeptSamples, Subset
from pretrain.cache.schedule import NEVER, bytes_of_two_windows, shard_runs_of_epoch, shard_uses
from pretrain.sampling.order import SourceOrder
from tests.support.toy_shards import write_toy_dataset


@st.composite
def orders(draw):
    lanes = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(0, 25), min_size=1, max_size=10))
    sizes[0] += lanes
    window = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 1000))
    return SourceOrder("a", shard_sizes=sizes, lanes=lanes, window=window, seed=seed)


@st.composite
def some_lanes(draw, order):
    first = draw(st.integers(0, order.lanes - 1))
    return range(first, draw(st.integers(first + 1, order.lanes)))


def shards_read(order, lane, epoch, window):
    """Returns the shards that a lane reads in one window, read off the order itself."""
    first = window * order.window
    last = min(first + order.window, order.lane_length)
    positions = epoch * order.lane_length + np.arange(first, last)
    _, ordinals = order.samples_at(np.full(len(positions), lane), positions)
    ends = np.cumsum(order.shard_sizes)
    return {int(np.searchsorted(ends, ordinal, side="right")) for ordinal in ordinals}


def num_windows(order):
    return -(-order.lane_length // order.window)


def uses_by_reading(order, positions, lanes):
    """Returns (next use by shard, shards of current windows, of next ones), window by window."""
    next_uses, current, after = {}, set(), set()
    for lane, position in zip(lanes, positions.tolist(), strict=True):
        epoch, place = divmod(position, order.lane_length)
        windows = [(e, w) for e in (epoch, epoch + 1) for w in range(num_windows(order))][
            place // order.window :
        ]
        for nth, (e, w) in enumerate(windows):
            distance = max(0, e * order.lane_length + w * order.window - position)
            for shard in shards_read(order, lane, e, w):
                next_uses[shard] = min(next_uses.get(shard, NEVER), distance)
                if nth < 2:
                    (current, after)[nth].add(shard)
    return next_uses, current, after


def assert_uses_are_those_read(order, positions, lanes):
    uses = shard_uses(order, positions, lanes=lanes)
    next_uses, current, after = uses_by_reading(order, positions, lanes)
    found = {s: use for s, use in enumerate(uses.next_uses.tolist()) if use < NEVER}
    assert found == next_uses
    assert set(np.flatnonzero(uses.is_current).tolist()) == current
    assert set(np.flatnonzero(uses.is_next).tolist()) == after
    assert all(uses.next_uses[list(current)] == 0)


@given(data=st.data())
@settings(max_examples=60)
def test_shards_and_their_next_use_are_those_that_reading_finds(data):
    order = data.draw(orders())
    lanes = data.draw(some_lanes(order))
    start = data.draw(st.integers(0, 3 * order.lane_length))
    ahead = data.draw(
        st.lists(st.integers(0, order.lane_length), min_size=len(lanes), max_size=len(lanes))
    )
    assert_uses_are_those_read(order, start + np.array(ahead), lanes)


@given(data=st.data())
@settings(max_examples=40)
def test_bytes_of_two_windows_are_the_most_that_reading_finds(data):
    order = data.draw(orders())
    lanes = data.draw(some_lanes(order))
    shard_bytes = np.arange(1, len(order.shard_sizes) + 1) * 1000
    windows = [(0, window) for window in range(num_windows(order))] + [(1, 0)]
    read = [{s for lane in lanes for s in shards_read(order, lane, *w)} for w in windows]
    pairs = [a | b for a, b in itertools.pairwise(read)]
    most = max(int(shard_bytes[list(pair)].sum()) for pair in pairs)
    found = bytes_of_two_windows(order, 0, lanes=lanes, shard_bytes=shard_bytes)
    assert found == most
    assert found <= shard_bytes.sum()


@given(data=st.data())
@settings(max_examples=40)
def test_runs_cover_every_index_of_every_lane_once(data):
    order = data.draw(orders())
    lanes = data.draw(some_lanes(order))
    runs = shard_runs_of_epoch(order, 1, lanes=lanes)
    covered = np.zeros((len(lanes), order.lane_length), dtype=int)
    for lane, begin, end in zip(runs.lanes, runs.begins, runs.ends, strict=True):
        assert begin < end
        covered[lane, begin:end] += 1
    assert (covered == 1).all()
    assert len(runs.shards) <= len(order.shard_sizes) + len(lanes) + 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = write_toy_dataset(
        tmp_path_factory.mktemp("subset") / "a", num_samples=60, samples_per_shard=4
    )
    bitmap = np.random.default_rng(0).random(60) < 0.5
    bitmap[8:12] = False  # nothing of this shard is kept
    subset = Subset.from_bitmap(Dataset(folder).info, bitmap, preparation={})
    subset.write(folder / "half.subset")
    return KeptSamples(folder, subset=folder / "half.subset")


@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_shards_of_a_subset_are_those_that_its_samples_are_in(kept, window):
    order = SourceOrder(
        "a", shard_sizes=kept.shard_sizes, lanes=3, window=window, seed=1, samples=kept
    )
    for position in range(0, 2 * order.lane_length, 2):
        lane = position % 3
        uses = shard_uses(order, np.array([position]), lanes=range(lane, lane + 1))
        epoch, place = divmod(position, order.lane_length)
        first = place // window * window
        places = np.arange(first, min(first + window, order.lane_length))
        lanes = np.full(len(places), lane)
        _, ordinals = order.samples_at(lanes, epoch * order.lane_length + places)
        shards = {kept.dataset.locate(ordinal)[0] for ordinal in ordinals.tolist()}
        assert set(np.flatnonzero(uses.is_current).tolist()) == shards
    assert not uses.is_current[2]
