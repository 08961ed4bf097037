"""The schedule of a run without any dataset: sizes alone, against slow enumeration step by step."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import key_of
from pretrain.sampling.mixing import StreamChoice
from pretrain.sampling.order import digest_halves, format_digest, lanes_of_rank
from pretrain.sampling.schedule import build_schedule, distinct_sources
from pretrain.settings.data import Stream

LANES, NUM_STEPS = 4, 60
SIZES = {"a": (20, 7, 14), "b": (25,), "c": (9, 9), "tones": (18, 5)}


@dataclass(frozen=True)
class Sizes:
    """A source known by the sizes of its shards alone."""

    shard_sizes: np.ndarray

    def ordinals_of(self, ranks):
        return ranks


def source(name, weight=1.0):
    return {"name": name, "dataset": f"nowhere/{name}", "weight": weight}


def make_streams():
    images = {
        "global_batch_size": 16,
        "weight": 2.0,
        "objectives": {"image-text": {}},
        "sources": [source("a", 3.0), source("b")],
        "segments": [{"from_step": 9, "sources": [source("c"), source("a")]}],
    }
    sounds = {
        "global_batch_size": 8,
        "objectives": {"audio-text": {}},
        "sources": [source("tones")],
    }
    values = {"image-text": images, "audio-text": sounds}
    return {name: Stream.model_validate(each) for name, each in values.items()}


@pytest.fixture(params=["all", "one"])
def schedule(request):
    streams = make_streams()
    samples = {
        name: [Sizes(np.array(SIZES[each.name])) for each in distinct_sources(stream)]
        for name, stream in streams.items()
    }
    return build_schedule(
        streams,
        samples,
        streams_per_step=request.param,
        lanes=LANES,
        window=6,
        seed=3,
        num_steps=NUM_STEPS,
    )


def rows_of_step(schedule, step, *, world_size=1):
    """Returns [(stream, slot, source, epoch, ordinal)] of a step, joined over ranks."""
    rows = []
    for rank in range(world_size):
        lanes = lanes_of_rank(rank, world_size=world_size, lanes=LANES)
        for name in schedule.orders:
            found = schedule.samples_of_step(name, step, lanes=lanes)
            columns = (found.slots, found.sources, found.epochs, found.ordinals)
            for row, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                assert values[0] == schedule.first_slot(name, lanes=lanes) + row
                rows.append((name, *values))
            assert len(found) in (0, schedule.num_rows(name, lanes=lanes))
    return sorted(rows)


def sources_of(schedule):
    return [(n, k) for n, order in schedule.orders.items() for k in range(len(order.sources))]


def test_what_was_seen_before_a_step_is_what_the_steps_before_it_hold(schedule):
    seen, lane_counts = Counter(), Counter()
    for step in range(NUM_STEPS):
        taken = Counter(name for name, *_ in seen.elements())
        assert schedule.samples_seen(step) == sum(seen.values())
        for name, order in schedule.orders.items():
            own_steps = taken[name] // order.global_batch_size
            assert schedule.num_steps_taken(name, step) == own_steps
        positions = schedule.lane_positions(step)
        for (name, number), lanes in zip(sources_of(schedule), positions, strict=True):
            assert lanes.tolist() == [lane_counts[name, number, lane] for lane in range(LANES)]
            drawn = sum(count for key, count in seen.items() if key[:2] == (name, number))
            assert schedule.samples_drawn(name, step)[number] == drawn
            each = schedule.orders[name].sources[number]
            assert schedule.epochs_seen(step)[name][each.name] == drawn / each.num_samples
            for epoch in range(4):
                of_epoch = sum(c for key, c in seen.items() if key[:3] == (name, number, epoch))
                found = schedule.samples_drawn_of_epoch(name, step, source=number, epoch=epoch)
                assert found == of_epoch
        rows = rows_of_step(schedule, step)
        assert list(dict.fromkeys(name for name, *_ in rows)) == sorted(
            schedule.streams_of_step(step)
        )
        for name, slot, number, epoch, ordinal in rows:
            seen[name, number, epoch, ordinal] += 1
            lane_counts[name, number, slot // schedule.orders[name].slots_per_lane] += 1
    assert max(seen.values()) == 1  # a sample comes once in an epoch


def test_epochs_end_where_the_last_lane_leaves_them(schedule):
    for name, number in sources_of(schedule):
        length = schedule.orders[name].sources[number].lane_length
        index = sources_of(schedule).index((name, number))
        whole = [
            int(schedule.lane_positions(step)[index].min()) // length
            for step in range(NUM_STEPS + 1)
        ]
        assert whole == [
            schedule.whole_epochs(name, step, source=number) for step in range(NUM_STEPS + 1)
        ]
        for epoch in range(whole[-1] + 1):
            end = schedule.steps_to_end_of(name, source=number, epoch=epoch)
            if epoch < whole[-1]:
                assert end == next(step for step, each in enumerate(whole) if each > epoch)
            else:
                assert end > NUM_STEPS
    assert schedule.steps_to_end_of("image-text", source=1, epoch=9) == math.inf


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_and_its_digest_do_not_depend_on_the_number_of_ranks(schedule, world_size):
    for step in (0, 8, 9, 31):
        rows = rows_of_step(schedule, step)
        assert rows_of_step(schedule, step, world_size=world_size) == rows
        for name, order in schedule.orders.items():
            whole = schedule.samples_of_step(name, step, lanes=range(LANES))
            keys = [key_of("source", name, each.name) for each in order.sources]
            halves = [
                schedule.digest(
                    name,
                    schedule.samples_of_step(
                        name, step, lanes=lanes_of_rank(rank, world_size=world_size, lanes=LANES)
                    ),
                )
                for rank in range(world_size)
            ]
            expected = format_digest(digest_halves(whole, source_keys=keys))
            assert format_digest(sum(halves)) == expected


def test_counts_of_the_whole_run(schedule):
    assert schedule.num_samples == sum(map(sum, SIZES.values()))
    assert schedule.num_steps == NUM_STEPS


def test_a_stream_with_a_vanishing_weight_is_refused_if_steps_take_one():
    with pytest.raises(InputError, match=r"stream 'audio-text': its weight is less than a 1,000"):
        StreamChoice({"image-text": 1.0, "audio-text": 1e-12}, takes_all=False)
    StreamChoice({"image-text": 1.0, "audio-text": 1e-12}, takes_all=True)
