import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup.groups import Pairs, first_connected, group_samples

NUM = 12
PAIRS = st.lists(st.tuples(st.integers(0, NUM - 1), st.integers(0, NUM - 1)), max_size=20)


def components(num, pairs):
    """Returns the least member of each number's set, joining sets until nothing changes."""
    label = list(range(num))
    for _ in range(num):
        for first, second in pairs:
            low, high = sorted((label[first], label[second]))
            label = [low if number == high else number for number in label]
    return label


def grouped(pairs, *, rank=None, num_queries=NUM, similarity=None):
    pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    if similarity is None:
        similarity = np.ones(len(pairs))
    rank = np.zeros(NUM) if rank is None else np.array(rank, dtype=float)
    as_float = np.array(similarity, dtype=np.float32)
    found = Pairs(pairs[:, 0], pairs[:, 1], as_float)
    return group_samples(found, rank=rank, num_queries=num_queries)


@settings(max_examples=200)
@given(PAIRS)
def test_components_are_those_of_joining_sets(pairs):
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    assert first_connected(NUM, first, second).tolist() == components(NUM, pairs)


def test_a_long_chain_is_one_component():
    order = np.random.default_rng(0).permutation(100_000)
    label = first_connected(len(order), order[:-1], order[1:])
    assert not label.any()


@settings(max_examples=200)
@given(PAIRS, st.lists(st.integers(0, 3), min_size=NUM, max_size=NUM), st.integers(1, NUM))
def test_one_of_a_group_is_kept_or_only_its_evaluation_samples(pairs, rank, num_queries):
    pairs = [pair for pair in pairs if pair[0] != pair[1] and min(pair) < num_queries]
    groups = grouped(pairs, rank=rank, num_queries=num_queries)
    label = components(NUM, pairs)
    assert set(groups.sample.tolist()) == {sample for pair in pairs for sample in pair}
    for number in range(groups.group.max(initial=-1) + 1):
        members = groups.sample[groups.group == number].tolist()
        kept = groups.sample[(groups.group == number) & groups.is_kept].tolist()
        assert members == [n for n in range(NUM) if label[n] == label[members[0]]]
        evaluation = [n for n in members if n >= num_queries]
        assert kept == (evaluation or [min(members, key=lambda n: (rank[n], n))])
    for sample, match, is_kept in zip(groups.sample, groups.match, groups.is_kept, strict=True):
        partners = {n for pair in pairs if sample in pair for n in pair} - {sample}
        assert (match == -1) if is_kept else (match in partners)


def test_a_match_is_the_evaluation_sample_then_the_kept_one_then_the_most_similar():
    pairs = [(0, 1), (1, 2), (0, 2), (2, 3), (1, 11)]
    similarity = [0.8, 0.99, 0.9, 0.7, 0.71]
    groups = grouped(pairs, similarity=similarity, num_queries=11)
    matches = dict(zip(groups.sample.tolist(), groups.match.tolist(), strict=True))
    assert matches == {0: 2, 1: 11, 2: 1, 3: 2, 11: -1}
    without = grouped(pairs[:4], similarity=similarity[:4])
    assert dict(zip(without.sample.tolist(), without.match.tolist(), strict=True)) == {
        0: -1,
        1: 0,
        2: 0,
        3: 2,
    }
    assert np.isnan(without.similarity[0]) and without.similarity[3] == np.float32(0.7)


def test_groups_do_not_depend_on_the_order_of_pairs():
    rng = np.random.default_rng(0)
    pairs = rng.permuted(np.stack([np.arange(11), np.arange(1, 12)], axis=1), axis=1)
    similarity = rng.random(11)
    order = rng.permutation(11)
    first = grouped(pairs, similarity=similarity)
    second = grouped(pairs[order][:, ::-1], similarity=similarity[order])
    for name in ("sample", "group", "is_kept", "match", "similarity"):
        assert np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True)
