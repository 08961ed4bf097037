"""Matching pairs against loops over all items, and their limit before memory is used."""

import tracemalloc

import numpy as np
import pytest

from eval.metrics.relevance import (
    SampleItems,
    relevance_of_equal_captions,
    relevance_of_equal_contents,
    relevance_of_equal_values,
    relevance_of_samples,
)


def pairs_of(relevance):
    assert relevance.media.dtype == relevance.texts.dtype == np.int64
    return list(zip(relevance.texts.tolist(), relevance.media.tolist(), strict=True))


def numbered(values):
    """Returns numbers from 0 without gaps."""
    return np.unique(values, return_inverse=True)[1]


def draw_items(rng, *, num_samples, num_contents, extra):
    """Draws items such that every sample has at least one, in any order."""
    samples = np.concatenate([np.arange(num_samples), rng.integers(num_samples, size=extra)])
    rng.shuffle(samples)
    return SampleItems(samples, numbered(rng.integers(num_contents, size=len(samples))))


@pytest.mark.parametrize("num_contents", [1, 3, 300])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_a_loop(seed, num_contents):
    rng = np.random.default_rng(seed)
    sizes = {"num_samples": 1 + 4 * seed, "num_contents": num_contents}
    left, right = (draw_items(rng, **sizes, extra=extra) for extra in (seed, 9))
    samples_of_left = [set(left.samples[left.contents == each]) for each in left.contents]
    samples_of_right = [set(right.samples[right.contents == each]) for each in right.contents]
    assert pairs_of(relevance_of_equal_contents(left, right)) == [
        (text, item)
        for text, of_text in enumerate(samples_of_right)
        for item, of_item in enumerate(samples_of_left)
        if of_text & of_item
    ]
    assert pairs_of(relevance_of_samples(left, right)) == [
        (text, item)
        for text, of_text in enumerate(right.samples)
        for item, of_item in enumerate(left.samples)
        if of_text == of_item
    ]


@pytest.mark.parametrize("seed", range(5))
def test_equal_captions_and_values_match(seed):
    rng = np.random.default_rng(seed)
    owners = np.sort(rng.integers(6, size=12))
    captions = [f"caption {number}" for number in rng.integers(5, size=12)]
    own = [{captions[n] for n in np.flatnonzero(owners == item)} for item in range(6)]
    assert pairs_of(relevance_of_equal_captions(owners, captions)) == [
        (text, item)
        for text, caption in enumerate(captions)
        for item in range(6)
        if caption in own[item]
    ]
    values = [f"value {number}" for number in [*range(5), *rng.integers(5, size=seed)]]
    others = [values[number] for number in rng.permutation(len(values))]
    assert pairs_of(relevance_of_equal_values(values, others)) == [
        (text, item)
        for text, other in enumerate(others)
        for item, value in enumerate(values)
        if value == other
    ]


def relevance_of_classes(kind, numbers):
    """Pairs items of equal numbers by one of the functions."""
    items = SampleItems(numbers, np.arange(len(numbers)))
    names = [str(number) for number in numbers]
    return {
        "contents": lambda: relevance_of_equal_contents(items, items),
        "equal contents": lambda: relevance_of_equal_contents(
            *[SampleItems(np.arange(len(numbers)), numbers)] * 2
        ),
        "samples": lambda: relevance_of_samples(items, items),
        "captions": lambda: relevance_of_equal_captions(np.arange(len(numbers)), names),
        "values": lambda: relevance_of_equal_values(names, names),
    }[kind]()


@pytest.mark.parametrize("kind", ["contents", "equal contents", "samples", "captions", "values"])
def test_too_many_pairs_are_refused_before_they_are_built(monkeypatch, kind):
    monkeypatch.setattr("eval.metrics.relevance.MAX_PAIRS", 1_000_000)
    assert len(relevance_of_classes(kind, np.arange(3000) % 10).media) == 10 * 300**2
    tracemalloc.start()
    with pytest.raises(ValueError, match="at most 1,000,000 matching pairs, found at least 1,6"):
        relevance_of_classes(kind, np.arange(4000) % 10)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
