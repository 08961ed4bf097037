from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import permute, sample_random
from pretrain.sampling.mixing import StreamChoice
from pretrain.sampling.order import (
    Segment,
    SourceOrder,
    StreamOrder,
    digest_halves,
    format_digest,
    lanes_of_rank,
)

LANES = 8


def make_source(name="a", shard_sizes=(100, 50, 33), lanes=LANES, window=10, seed=0):
    return SourceOrder(name, shard_sizes=shard_sizes, lanes=lanes, window=window, seed=seed)


def make_stream(sources=None, weights=(1.0,), batch=32, seed=0, segments=()):
    return StreamOrder(
        "image-text",
        sources=sources or [make_source(seed=seed)],
        segments=[Segment(0, weights), *segments],
        global_batch_size=batch,
        seed=seed,
    )


def global_step(stream, step, world_size):
    """Returns [(slot, source, epoch, ordinal)] of a step, joined over ranks."""
    rows = []
    for rank in range(world_size):
        lanes = lanes_of_rank(rank, world_size=world_size, lanes=stream.lanes)
        samples = stream.samples_of_step(step, lanes=lanes)
        columns = (samples.slots, samples.sources, samples.epochs, samples.ordinals)
        rows += list(zip(*(column.tolist() for column in columns), strict=True))
    return rows


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), sizes=size, keys=key)) == list(range(size))


@given(size=st.integers(1, 10**10), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permute_of_a_large_domain_stays_inside_it_without_collisions(size, key):
    indices = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    permuted = permute(indices, sizes=size, keys=key)
    assert permuted.min() >= 0
    assert permuted.max() < size
    assert len(np.unique(permuted)) == len(indices)


def test_permute_shuffles_well_enough():
    size = 10_000
    permuted = permute(np.arange(size), sizes=size, keys=5)
    lag_one = np.corrcoef(permuted[:-1], permuted[1:])[0, 1]
    assert abs(lag_one) < 0.04  # 4 standard deviations of a random permutation
    assert abs(np.corrcoef(np.arange(size), permuted)[0, 1]) < 0.04


@pytest.mark.parametrize("shard_sizes", [(183,), (100, 50, 33), (3,) * 61, (0, 90, 0, 93)])
@pytest.mark.parametrize("window", [1, 10, 10_000])
def test_every_epoch_draws_each_sample_once_but_for_fewer_than_one_per_lane(shard_sizes, window):
    source = make_source(shard_sizes=shard_sizes, window=window)
    left_over = []
    for epoch in range(3):
        positions = epoch * source.lane_length + np.arange(source.lane_length)
        lanes = np.repeat(np.arange(LANES), source.lane_length)
        epochs, ordinals = source.samples_at(lanes, np.tile(positions, LANES))
        assert set(epochs.tolist()) == {epoch}
        assert len(set(ordinals.tolist())) == LANES * source.lane_length
        assert set(ordinals.tolist()) <= set(range(183))
        left_over.append(frozenset(range(183)) - set(ordinals.tolist()))
    assert all(len(missing) == 183 % LANES for missing in left_over)
    assert len(set(left_over)) > 1  # they rotate


def test_a_window_of_one_reads_shards_in_sequence():
    source = make_source(shard_sizes=(50, 50, 50, 50), window=1)
    _, ordinals = source.samples_at(np.zeros(25, dtype=np.int64), np.arange(25))
    steps = np.diff(ordinals)
    assert (steps == 1).sum() >= 23  # at most one jump, to the next shard


def test_epochs_and_seeds_give_different_orders():
    lanes, positions = np.zeros(20, dtype=np.int64), np.arange(20)
    orders = [
        make_source(seed=seed).samples_at(lanes, positions + offset)[1].tolist()
        for seed, offset in ((0, 0), (1, 0), (0, 22))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_a_step_does_not_depend_on_the_number_of_ranks():
    sources = [make_source("a"), make_source("b", shard_sizes=(400,), window=64)]
    stream = make_stream(sources, weights=(1, 3))
    for step in (0, 5, 1023, 1024, 5000):
        alone = global_step(stream, step, 1)
        assert [row[0] for row in alone] == list(range(32))
        for world_size in (2, 3, 4, 7, 8):
            assert global_step(stream, step, world_size) == alone


def test_mixed_sources_still_draw_each_sample_once_per_epoch():
    sources = [make_source("a"), make_source("b", shard_sizes=(400,))]
    stream = make_stream(sources, weights=(1, 1))
    drawn = Counter()
    for step in range(100):
        drawn.update(row[1:] for row in global_step(stream, step, 1))
    assert max(drawn.values()) == 1
    first_epoch_of_a = [row for row in drawn if row[:2] == (0, 0)]
    assert len(first_epoch_of_a) == 183 // LANES * LANES


@pytest.mark.parametrize("world_size", [1, 3, 7, 24, 64])
def test_three_shards_and_one_are_enough_for_any_number_of_ranks(world_size):
    for shard_sizes in ((100, 50, 70), (220,)):
        stream = make_stream([make_source(shard_sizes=shard_sizes, lanes=64)], batch=64)
        drawn = [row for step in range(6) for row in global_step(stream, step, world_size)]
        first_epoch = [ordinal for _, _, epoch, ordinal in drawn if epoch == 0]
        assert len(first_epoch) == len(set(first_epoch)) == 220 // 64 * 64
        assert drawn == [row for step in range(6) for row in global_step(stream, step, 1)]


def test_sources_and_weights_change_at_a_step_and_nothing_before_it_does():
    sources = [make_source(name, shard_sizes=(400,), window=16) for name in "abc"]
    before = make_stream(sources, weights=(1, 3, 0))
    changed = make_stream(sources, weights=(1, 3, 0), segments=[Segment(11, (2, 0, 1))])
    for step in range(11):
        assert global_step(changed, step, 3) == global_step(before, step, 1)
    later = [row for step in range(11, 41) for row in global_step(changed, step, 1)]
    counts = Counter(source for _, source, _, _ in later)
    assert counts[1] == 0
    assert counts[0] == pytest.approx(30 * 32 * 2 / 3, abs=LANES)
    # Sources go on where they were: the first epoch still draws each sample once.
    drawn = Counter(row[1:] for step in range(60) for row in global_step(changed, step, 1))
    assert max(drawn.values()) == 1


def test_positions_of_the_lanes_follow_what_was_drawn_through_segments():
    sources = [make_source("a"), make_source("b", shard_sizes=(400,)), make_source("c")]
    segments = [Segment(3, (5, 1, 2)), Segment(1030, (0, 1, 0)), Segment(1040, (1, 1, 1))]
    stream = make_stream(sources, weights=(1, 2, 0), segments=segments)
    counted = np.zeros((LANES, 3), dtype=np.int64)
    per_epoch = Counter()
    for step in range(1100):
        if step in (0, 1, 3, 4, 1024, 1030, 1035, 1041, 1099):
            assert np.array_equal(stream.lane_positions(step), counted)
            assert stream.samples_drawn(step) == counted.sum(axis=0).tolist()
        for slot, source, epoch, _ in global_step(stream, step, 1):
            counted[slot // stream.slots_per_lane, source] += 1
            per_epoch[source, epoch] += 1
    for (source, epoch), count in per_epoch.items():
        assert stream.samples_drawn_of_epoch(1100, source=source, epoch=epoch) == count
    for source, epoch in [(0, 0), (0, 3), (1, 0), (1, 20), (2, 0), (2, 11)]:
        end = stream.steps_to_end_of(source=source, epoch=epoch)
        length = stream.sources[source].lane_length
        for step, has_ended in ((end - 1, False), (end, True)):
            least = stream.lane_positions(step)[:, source].min()
            assert (least >= (epoch + 1) * length) == has_ended
    seen = stream.epochs_seen(1100)
    assert seen["b"] == counted[:, 1].sum() / 400


def test_a_source_that_no_later_segment_uses_never_ends_its_epoch():
    sources = [make_source("a"), make_source("b")]
    stream = make_stream(sources, weights=(1, 1), segments=[Segment(2, (0, 1))])
    assert stream.steps_to_end_of(source=0, epoch=0) is None
    assert stream.steps_to_end_of(source=1, epoch=0) is not None


def test_a_small_source_starts_its_next_epochs_by_itself():
    small, large = make_source("small", shard_sizes=(19,)), make_source("large", shard_sizes=(900,))
    stream = make_stream([small, large], weights=(1, 1))
    epochs = {(s, e) for step in range(12) for _, s, e, _ in global_step(stream, step, 1)}
    assert {epoch for source, epoch in epochs if source == 0} >= set(range(12))
    assert {epoch for source, epoch in epochs if source == 1} == {0}


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0, "c": 0.7}])
def test_one_stream_per_step_comes_by_weight_exactly_and_evenly(weights):
    choice = StreamChoice(weights, takes_all=False)
    total, counts = sum(weights.values()), Counter()
    for step in range(3000):
        assert choice.num_taken(step) == {name: counts[name] for name in weights}
        [name] = choice.streams_of_step(step)
        counts[name] += 1
        for each, weight in weights.items():
            assert abs(counts[each] - weight / total * (step + 1)) < 2
        assert choice.steps_until(name, counts[name]) == step + 1
    assert choice.num_taken(10**12)["a"] == pytest.approx(weights["a"] / total * 10**12, rel=1e-8)


def test_all_streams_per_step_are_taken_in_every_step():
    choice = StreamChoice({"a": 1.0, "b": 0.1}, takes_all=True)
    assert choice.streams_of_step(7) == ["a", "b"]
    assert choice.num_taken(9) == {"a": 9, "b": 9}


def test_a_source_smaller_than_the_lanes_is_refused_with_what_to_set():
    with pytest.raises(InputError, match="'a' has 5 samples, fewer than lanes=8; set lanes to at"):
        make_source(shard_sizes=(5,))


def test_more_processes_than_lanes_are_refused():
    with pytest.raises(InputError, match="9 processes for lanes=8"):
        lanes_of_rank(0, world_size=9, lanes=8)


def test_lanes_are_dealt_in_neighbouring_runs_of_nearly_equal_length():
    runs = [lanes_of_rank(rank, world_size=3, lanes=8) for rank in range(3)]
    assert [lane for run in runs for lane in run] == list(range(8))
    assert sorted(map(len, runs)) == [2, 3, 3]


def test_the_digest_adds_up_over_ranks_and_sees_every_change():
    stream = make_stream()
    keys = [7]

    def digest(step, world_size):
        halves = sum(
            digest_halves(
                stream.samples_of_step(
                    step, lanes=lanes_of_rank(rank, world_size=world_size, lanes=LANES)
                ),
                source_keys=keys,
            )
            for rank in range(world_size)
        )
        return format_digest(halves)

    assert digest(3, 1) == digest(3, 5)
    assert digest(3, 1) != digest(4, 1)


def test_the_randomness_of_a_sample_depends_on_seed_source_epoch_ordinal_and_view_alone():
    def draw(**changes):
        place = {"seed": 0, "source": "a", "epoch": 2, "ordinal": 5, "view": "image"} | changes
        return sample_random(place.pop("seed"), **place).random()

    assert draw() == draw()
    others = [draw(seed=1), draw(source="b"), draw(epoch=3), draw(ordinal=6), draw(view="image.2")]
    assert len({draw(), *others}) == 6


@pytest.mark.parametrize(
    ("num_sources", "expected"),
    [(1, "72bdc93df6eda06c"), (2, "dc6f079f3102ac4a")],
    ids=["one", "mixed"],
)
def test_the_order_has_not_changed(num_sources, expected):
    """Pins digests: of one source since the first release, of two since MIXING_VERSION 2.

    A change here breaks every run that is resumed; that of mixed sources needs a new version.
    """
    sources = [make_source("a"), make_source("b", shard_sizes=(400,), window=64)][:num_sources]
    stream = make_stream(sources, weights=(1, 3)[:num_sources])
    samples = stream.samples_of_step(1234, lanes=range(LANES))
    assert format_digest(digest_halves(samples, source_keys=[1, 2])) == expected
