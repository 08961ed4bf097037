import logging
from collections import Counter

import numpy as np
import pytest

from data_prep.errors import InputError
from pretrain.sampling.repeats import check_repeats, measure_repeats, repeated_fraction
from pretrain.sampling.schedule import build_schedule
from pretrain.settings.data import Source, Stream


class Shards:
    """All samples of a source with some shards."""

    def __init__(self, *sizes):
        self.shard_sizes = np.array(sizes)

    def ordinals_of(self, ranks):
        return ranks


def stream_of(batch, *weights, **settings):
    sources = [
        Source(name=f"s{n}", dataset=f"d{n}", weight=weight) for n, weight in enumerate(weights)
    ]
    objectives = {"image-text": settings.pop("objective", {})}
    return Stream(global_batch_size=batch, sources=sources, objectives=objectives, **settings)


def schedule_of(stream, *samples, num_steps, lanes=4):
    return build_schedule(
        {"image-text": stream},
        {"image-text": samples},
        streams_per_step="all",
        lanes=lanes,
        window=8,
        seed=3,
        num_steps=num_steps,
    )


def slow_fraction(order, step, datasets):
    """Counts the pairs whose sample was seen before, one by one."""
    samples, seen, repeats = order.samples_of_step(step, lanes=range(order.lanes)), set(), 0
    for source, ordinal in zip(samples.sources, samples.ordinals, strict=True):
        repeats += (datasets[source], ordinal) in seen
        seen.add((datasets[source], ordinal))
    return repeats / len(samples)


@pytest.mark.parametrize("datasets", [["a", "b"], ["a", "a"]], ids=["two", "one"])
@pytest.mark.parametrize("size", [5, 16, 17, 31, 32, 60, 150])
def test_repeats_equal_those_counted_one_by_one(size, datasets):
    schedule = schedule_of(stream_of(32, 3, 1), Shards(size), Shards(size, 2), num_steps=12)
    order = schedule.orders["image-text"]
    numbers = np.array([datasets.index(name) for name in datasets])
    expected = [slow_fraction(order, step, datasets) for step in range(12)]
    for step, fraction in enumerate(expected):
        samples = order.samples_of_step(step, lanes=range(4))
        assert repeated_fraction(samples, datasets=numbers) == pytest.approx(fraction)
    # A run of at most 16 steps is measured whole.
    [repeats] = measure_repeats(order, num_steps=12, datasets=datasets)
    assert repeats.fraction == pytest.approx(np.mean(expected))
    assert repeats.drawn == pytest.approx((24, 8), abs=1)


@pytest.mark.parametrize("batch", [16, 32, 64, 128, 512])
def test_a_batch_beyond_the_source_repeats_at_least_the_difference(batch):
    schedule = schedule_of(stream_of(batch, 1), Shards(16), num_steps=1000)
    [repeats] = measure_repeats(schedule.orders["image-text"], num_steps=1000, datasets=["a"])
    assert repeats.fraction == pytest.approx(1 - 16 / batch)  # lanes divide 16: whole epochs


def test_each_segment_is_measured_and_the_worst_counts(caplog):
    later = {"from_step": 10, "sources": [Source(name="s1", dataset="d1")]}
    stream = stream_of(32, 1, segments=[later])
    samples = Shards(10_000), Shards(8)
    schedule = schedule_of(stream, *samples, num_steps=20)
    first, second = measure_repeats(
        schedule.orders["image-text"], num_steps=20, datasets=["a", "b"]
    )
    assert (first.fraction, first.drawn) == (0, (32, 0))
    assert (second.fraction, second.drawn) == (0.75, (0, 32))
    with pytest.raises(InputError, match=r"75\.0 % .*'s1': 32\.0 drawn a step, of 8 samples"):
        check(stream, schedule, "a", "b")
    # A run that ends before has no such steps.
    check(stream, schedule_of(stream, *samples, num_steps=10), "a", "b")
    assert not caplog.records


def check(stream, schedule, *datasets, is_new_run=True):
    check_repeats(
        {"image-text": stream},
        schedule,
        datasets={"image-text": datasets},
        is_new_run=is_new_run,
    )


@pytest.mark.parametrize(
    ("size", "settings", "is_new_run", "outcome"),
    [
        (3200, {}, True, None),
        (128, {}, True, None),  # a quarter a step: 1 % where epochs meet, if they do within a step
        (24, {}, True, "consider streams.image-text.objectives.image-text.duplicates=masked"),
        (16, {}, True, "refused"),  # exactly half
        (8, {}, True, "refused"),
        (8, {"max_repeated_fraction": 0.8}, True, "and are its negatives"),
        (4, {"max_repeated_fraction": 0.8}, True, "refused"),
        (4, {"max_repeated_fraction": 1}, True, "87.5 %"),
        (8, {"objective": {"duplicates": "masked"}}, True, "no objective contrasts them"),
        (8, {"objective": {"duplicates": "positives"}}, True, "no objective contrasts them"),
        (8, {}, False, "75.0 % of a step's pairs repeat a sample of the same step"),
    ],
)
def test_few_repeats_are_silent_more_are_reported_and_half_refused(
    caplog, size, settings, is_new_run, outcome
):
    stream = stream_of(32, 1, **settings)
    schedule = schedule_of(stream, Shards(size), num_steps=100)
    caplog.set_level(logging.WARNING)
    if outcome == "refused":
        with pytest.raises(InputError, match=r"allow it with .*max_repeated_fraction=1"):
            check(stream, schedule, "a", is_new_run=is_new_run)
        return
    check(stream, schedule, "a", is_new_run=is_new_run)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (outcome is not None)
    assert all(outcome in message for message in messages)


def test_a_small_source_of_a_small_weight_is_reported(caplog):
    """Its samples are in each step several times, though they are a small part of the batch."""
    stream = stream_of(1024, 127, 1)
    schedule = schedule_of(stream, Shards(1_000_000), Shards(4), num_steps=5)
    [repeats] = measure_repeats(schedule.orders["image-text"], num_steps=5, datasets=["a", "b"])
    counts = Counter(schedule.orders["image-text"].samples_of_step(0, lanes=range(4)).sources)
    assert counts[1] > 4
    assert 0 < repeats.fraction < 0.01
    assert repeats.drawn[1] == pytest.approx(8, abs=1)
    check(stream, schedule, "a", "b")
    assert "source 's1': 8.0 drawn a step, of 4 samples" in caplog.text


def test_segments_that_begin_at_the_same_step_of_a_rare_stream_are_measured_once():
    sources = [[{"name": f"s{n}", "dataset": f"d{n}"}] for n in range(2)]
    segments = [
        {"from_step": step, "sources": sources[n]} for step, n in ((103, 1), (104, 0), (299, 1))
    ]
    rare = Stream(
        global_batch_size=16,
        weight=0.01,
        sources=sources[0],
        segments=segments,
        objectives={"image-text": {}},
    )
    schedule = build_schedule(
        {"image-text": rare, "audio-text": stream_of(8, 1)},
        {"image-text": [Shards(20), Shards(30)], "audio-text": [Shards(20)]},
        streams_per_step="one",
        lanes=4,
        window=8,
        seed=3,
        num_steps=300,
    )
    order = schedule.orders["image-text"]
    num_steps = schedule.num_steps_taken("image-text", 300)
    assert len({step for step in order.segment_steps if step < num_steps}) < 4
    with np.errstate(all="raise"):
        measured = list(measure_repeats(order, num_steps=num_steps, datasets=["a", "b"]))
    assert [each.drawn for each in measured] == [(16, 0), (16, 0)]
