import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup.minhash import (
    bands_for,
    jaccard_of_pairs,
    near_caption_pairs,
    read_shingles,
)
from data_prep.dedup.shingles import shingles_of

WORDS = ["a", "b", "c", "dog", "cat", "on", "under", "table"]


def words_of(caption):
    return re.findall(r"[^\W_]+", caption.casefold())


def set_of(caption, length):
    """Computes the set of shingles the obvious way."""
    words = words_of(caption)
    if not words:
        return frozenset()
    runs = [tuple(words[n : n + length]) for n in range(len(words) - length + 1)]
    return frozenset(runs or [tuple(words)])


def jaccard(first, second):
    return len(first & second) / len(first | second)


def shingle_sets(captions, folder, *, shingle_words=3, permutations=128):
    return read_shingles(
        [captions[:5], captions[5:]],
        folder,
        shingle_words=shingle_words,
        permutations=permutations,
    )


def random_captions(num, *, num_edits=2):
    """Draws captions in groups of three, where two are edits of the first."""
    rng = np.random.default_rng(0)
    captions = []
    for _ in range(num // 3):
        words = [f"w{n}" for n in rng.integers(0, 3000, rng.integers(3, 25))]
        captions.append(" ".join(words))
        for _ in range(2):
            edited = list(words)
            for place in rng.integers(0, len(words), rng.integers(0, num_edits + 1)):
                edited[place] = f"w{rng.integers(3000)}"
            captions.append(" ".join(edited))
    return captions


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), max_size=9),
    st.integers(1, 4),
)
def test_shingles_are_the_runs_of_words(captions, length):
    values, counts = shingles_of(captions, shingle_words=length)
    expected = [set_of(caption, length) for caption in captions]
    assert counts.tolist() == [len(runs) for runs in expected]
    starts = np.cumsum(counts) - counts
    found = [set(values[a : a + n].tolist()) for a, n in zip(starts, counts, strict=True)]
    number_of = {run: set() for runs in expected for run in runs}
    for runs, numbers in zip(expected, found, strict=True):
        for run in runs:
            number_of[run] |= numbers
    for first in range(len(captions)):
        for second in range(first):
            shared = len(expected[first] & expected[second])
            assert len(found[first] & found[second]) == shared


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A dog, running!", "a DOG running"),
        ("line\nbreak  here now", "line break here now"),
        ("\u00c9t\u00e9 \u2014 \u00e0 Paris", "\u00e9t\u00e9 \u00e0 paris"),
        ("\u732b\u304c\u3044\u308b\u3002", "\u732b \u304c\u3044\u308b"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(first, second):
    values, counts = shingles_of([first, second], shingle_words=2)
    assert counts[0] == counts[1] > 0
    assert values[: counts[0]].tolist() == values[counts[0] :].tolist()


def test_a_place_in_the_batch_does_not_change_a_hash():
    alone = shingles_of(["one two three four"], shingle_words=3)[0]
    later = shingles_of(["x" * 1000, "", "one two three four"], shingle_words=3)[0]
    assert set(alone.tolist()) < set(later.tolist())


def test_captions_without_words_have_no_shingles():
    assert shingles_of(["", " ... ", "\u2014"], shingle_words=3)[1].tolist() == [0, 0, 0]
    assert shingles_of([], shingle_words=3)[1].tolist() == []


def test_equal_min_hashes_are_as_frequent_as_the_jaccard_similarity(tmp_path):
    captions = random_captions(90)
    sets = shingle_sets(captions, tmp_path, permutations=1024)
    for first in range(0, 90, 3):
        expected = jaccard(set_of(captions[first], 3), set_of(captions[first + 1], 3))
        found = np.mean(sets.min_hashes[first] == sets.min_hashes[first + 1])
        assert abs(found - expected) < 0.08  # five standard deviations of 1024 draws


@pytest.mark.parametrize("min_jaccard", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_are_those_of_the_double_loop(tmp_path, min_jaccard):
    captions = random_captions(450)
    sets = shingle_sets(captions, tmp_path)
    runs = [set_of(caption, 3) for caption in captions]
    expected = {
        (first, second): jaccard(runs[first], runs[second])
        for second in range(len(captions))
        for first in range(second)
        if jaccard(runs[first], runs[second]) >= min_jaccard
    }
    first, second, similarity = near_caption_pairs(sets, min_jaccard=min_jaccard)
    found = dict(zip(zip(first.tolist(), second.tolist(), strict=True), similarity, strict=True))
    assert len(expected) > 30
    assert set(found) <= set(expected)
    assert groups(found, len(captions)) == groups(expected, len(captions)) or (
        len(set(expected) - set(found)) <= 0.03 * len(expected)
    )
    for pair, value in found.items():
        assert value == pytest.approx(expected[pair])


def groups(pairs, num):
    group = list(range(num))
    for first, second in sorted(pairs):
        old, new = group[second], group[first]
        group = [new if number == old else number for number in group]
    return {frozenset(n for n in range(num) if group[n] == g) for g in set(group)}


def test_pairs_among_what_is_not_queried_are_left_out(tmp_path):
    captions = ["", "one two three", "one two three", "four five six", "four five six", "..."]
    sets = shingle_sets(captions, tmp_path)
    first, second, _ = near_caption_pairs(sets, min_jaccard=0.8, num_queries=2)
    assert (first.tolist(), second.tolist()) == ([1], [2])


def test_a_caption_that_stands_everywhere_gives_few_pairs(tmp_path):
    captions = ["a photo of a thing"] * 5000
    captions += [f"this is a long caption that differs in one word only {n}" for n in range(300)]
    sets = shingle_sets(captions, tmp_path)
    first, second, _ = near_caption_pairs(sets, min_jaccard=0.7)
    assert len(first) < 4999 + 300 * 299 / 2
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    assert {(0, n) for n in range(1, 5000)} <= pairs
    assert {(n, n + 1) for n in range(5000, 5299)} <= pairs


def test_exact_similarity_of_given_pairs(tmp_path):
    sets = shingle_sets(["a b c d", "a b c e", "a b"], tmp_path, shingle_words=1)
    pairs = np.array([[0, 1], [0, 2], [2, 2]])
    assert jaccard_of_pairs(sets, pairs).tolist() == [3 / 5, 2 / 4, 1.0]


@pytest.mark.parametrize("min_jaccard", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_are_long_but_miss_little(min_jaccard):
    num_bands, num_rows = bands_for(min_jaccard, permutations=128)
    assert num_bands * num_rows <= 128
    share = 1 - (1 - min_jaccard**num_rows) ** num_bands
    assert share >= 0.99 or num_rows == 1
