"""k-NN, few-shot, caption choice and groups, compared with slow code and scikit-learn."""

import decimal
import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from eval.metrics.association import associate, expected_jaccard
from eval.metrics.caption_choice import _chances, choose_captions, choose_in_groups
from eval.metrics.few_shot import classify_from_few
from eval.metrics.knn import neighbour_votes
from eval.metrics.relevance import clusters_of_equal_values, relevance_of_equal_values
from eval.metrics.retrieval import retrieve
from eval.metrics.zero_shot import classify, rank_scores


def unit_rows(count, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, dim, generator=generator), dim=-1)


def labelled_rows(count, num_classes, seed):
    """Draws embeddings around one centre per class."""
    targets = np.arange(count) % num_classes
    noise = 0.7 * unit_rows(count, seed=seed)
    return normalize(unit_rows(num_classes, seed=99)[targets] + noise, dim=-1), targets


def test_votes_of_neighbours_are_those_of_scikit_learn():
    train, train_targets = labelled_rows(300, 5, seed=1)
    test, targets = labelled_rows(90, 5, seed=2)
    votes = neighbour_votes(
        test,
        train,
        torch.from_numpy(train_targets),
        num_classes=5,
        num_neighbours=20,
        temperature=0.07,
    )
    found = torch.cat(list(votes)).exp()
    slow = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    slow.fit(train.numpy(), train_targets)
    expected = slow.predict_proba(test.numpy())
    probabilities = found / found.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-5)
    ranked = rank_scores([found], targets=targets)
    assert (ranked.predictions == slow.predict(test.numpy())).all()
    assert ranked.ranks.hits_at(1).mean() == pytest.approx(slow.score(test.numpy(), targets))
    # With more neighbours than training items, all vote.
    every = neighbour_votes(
        test,
        train[:7],
        torch.from_numpy(train_targets[:7]),
        num_classes=5,
        num_neighbours=20,
        temperature=1.0,
    )
    assert torch.cat(list(every)).exp().gt(0).sum(dim=1).eq(5).all()


def test_neighbours_that_are_equally_near_share_the_votes():
    train = torch.eye(3)[[0, 1, 1, 1, 2]]
    query = normalize(torch.tensor([[0.8, 0.6, 0.0]]), dim=-1)
    arguments = {"num_classes": 3, "num_neighbours": 2, "temperature": 1.0}
    targets = torch.tensor([0, 0, 1, 2, 2])
    votes = torch.cat(list(neighbour_votes(query, train, targets, **arguments)))[0]
    # Divided by the weight of the nearest, exp(0.8)
    expected = np.array([1 + np.exp(-0.2) / 3, np.exp(-0.2) / 3, np.exp(-0.2) / 3])
    np.testing.assert_allclose(votes.exp(), expected, rtol=1e-6)
    order = [4, 3, 1, 0, 2]
    again = torch.cat(list(neighbour_votes(query, train[order], targets[order], **arguments)))[0]
    assert torch.equal(again, votes)


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e-3, 0.01, 0.07, 1.0, 1e3])
def test_no_temperature_overflows_or_underflows(temperature):
    """Compares the ranks of classes with votes in decimal numbers of 60 digits."""
    train, train_targets = labelled_rows(40, 8, seed=1)
    test, targets = labelled_rows(30, 8, seed=2)
    arguments = {"num_classes": 8, "num_neighbours": 20, "temperature": temperature}
    votes = neighbour_votes(test, train, torch.from_numpy(train_targets), **arguments)
    ranked = rank_scores(votes, targets=targets)
    cosines = (test.double() @ train.double().T).float().numpy()
    context = decimal.Context(prec=60, Emin=-(10**9), Emax=10**9)
    for item, row in enumerate(cosines):
        slow = [decimal.Decimal(0)] * 8
        for neighbour in np.argsort(-row)[:20]:
            exponent = decimal.Decimal(float(row[neighbour]) - 1) / decimal.Decimal(temperature)
            slow[train_targets[neighbour]] += context.exp(exponent)
        own = slow[targets[item]]
        assert ranked.ranks.num_above[item] == sum(each > own for each in slow)
        assert ranked.ranks.num_tied[item] == sum(each == own for each in slow) - 1
        assert slow[ranked.predictions[item]] == max(slow)


@pytest.mark.parametrize("temperature", [1e-290, 1e-300, 1e-302, 1e-310, 5e-324])
def test_the_least_temperatures_follow_the_nearest_neighbour(temperature):
    train, targets = labelled_rows(40, 8, seed=1)
    test, _ = labelled_rows(30, 8, seed=2)
    arguments = {"num_classes": 8, "num_neighbours": 5, "temperature": temperature}
    votes = torch.cat(list(neighbour_votes(test, train, torch.from_numpy(targets), **arguments)))
    nearest = (test @ train.T).topk(5, dim=-1).indices.numpy()
    assert votes.isfinite().all()
    assert votes.argmax(dim=-1).tolist() == targets[nearest[:, 0]].tolist()
    lowest = torch.finfo(torch.float64).min
    for row, voters in zip(votes, nearest, strict=True):
        assert set((row > lowest).nonzero().flatten().tolist()) == set(targets[voters].tolist())


def test_few_shot_probes_learn_from_as_many_items_as_they_say():
    train, train_targets = labelled_rows(60, 3, seed=1)
    test, targets = labelled_rows(45, 3, seed=2)
    arguments = {
        "targets": targets,
        "num_classes": 3,
        "num_draws": 2,
        "l2": 3.0,
    }
    labels = torch.from_numpy(train_targets)
    result = classify_from_few(test, (train, labels), shots=[1, 20], seed=0, **arguments)
    assert list(result.scores) == ["top_1_accuracy@1_shot", "top_1_accuracy@20_shot"]
    # 20 shots are all items of each class in any draw, so the probe is scikit-learn's on all items.
    slow = LogisticRegression(C=1 / 3, max_iter=1000, tol=1e-8).fit(train.double(), train_targets)
    expected = slow.predict(test.double()) == targets
    np.testing.assert_array_equal(result.hits[20], expected)
    assert set(np.unique(result.hits[1])) <= {0, 0.5, 1}
    again = classify_from_few(test, (train, labels), shots=[1], seed=0, **arguments)
    np.testing.assert_array_equal(again.hits[1], result.hits[1])
    other = classify_from_few(test, (train, labels), shots=[1], seed=1, **arguments)
    assert (other.hits[1] != result.hits[1]).any()
    assert result.scores["top_1_accuracy@1_shot"].chance == pytest.approx(1 / 3)


def test_an_item_is_right_if_its_own_caption_is_nearest():
    media, captions = unit_rows(40, seed=1), unit_rows(100, seed=2)
    num_captions = [2, 3] * 20
    result = choose_captions(media, captions, num_captions=num_captions)
    scores = (media.double() @ captions.double().T).numpy()
    starts = np.cumsum([0, *num_captions])
    expected = [
        scores[n, starts[n]] == scores[n, starts[n] : starts[n + 1]].max() for n in range(40)
    ]
    np.testing.assert_array_equal(result.hits["caption_accuracy"], expected)
    score = result.scores["caption_accuracy"]
    assert score.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert score.low < score.value < score.high
    collapsed = choose_captions(torch.ones(40, 1), torch.ones(100, 1), num_captions=num_captions)
    assert collapsed.scores["caption_accuracy"].value == pytest.approx(score.chance)


def test_group_scores_are_winogrounds():
    media, captions = unit_rows(61, seed=1), unit_rows(61, seed=2)
    captions = normalize(captions + 0.5 * media, dim=-1)
    groups = [*([n, n + 1] for n in range(0, 58, 2)), [58, 60, 59]]
    result = choose_in_groups(media, captions, groups=groups)
    scores = (media.double() @ captions.double().T).numpy()
    for number, group in enumerate(groups):
        pairs = list(itertools.permutations(group, 2))
        text = all(scores[i, i] > scores[i, j] for i, j in pairs)
        image = all(scores[i, i] > scores[j, i] for i, j in pairs)
        found = [result.hits[f"{name}_score"][number] for name in ("text", "image", "group")]
        assert found == [text, image, text and image]
    collapsed = choose_in_groups(torch.ones(60, 1), torch.ones(60, 1), groups=groups[:29])
    for name, chance in (("text_score", 1 / 4), ("image_score", 1 / 4), ("group_score", 1 / 6)):
        assert collapsed.scores[name].chance == pytest.approx(chance, abs=0.01)
        assert collapsed.scores[name].value == pytest.approx(chance, abs=0.05)


def test_group_scores_at_chance_are_those_of_random_similarities():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 4):
        scores = generator.random((40_000, size, size))
        own = np.diagonal(scores, axis1=1, axis2=2)
        is_text_right, is_image_right = (
            (own == scores.max(axis=axis)).all(axis=1) for axis in (2, 1)
        )
        is_right = (is_text_right, is_image_right, is_text_right & is_image_right)
        found = [each.mean() for each in is_right]
        assert _chances(size) == pytest.approx(found, abs=0.01)
    assert _chances(2) == pytest.approx((1 / 4, 1 / 4, 1 / 6))
    assert 0 < _chances(40)[2] < 1e-60  # as fast for large groups


def test_the_jaccard_index_is_the_mean_over_all_orders_of_ties():
    generator = np.random.default_rng(0)
    for _ in range(30):
        count = generator.integers(2, 7)
        right = generator.permutation(np.arange(count) < generator.integers(1, count + 1))
        scores = generator.integers(0, 3, count).astype(float)
        k, values = right.sum(), []
        for order in itertools.permutations(range(count)):
            chosen = np.zeros(count, dtype=bool)
            chosen[sorted(order, key=lambda index: -scores[index])[:k]] = True
            values.append((chosen & right).sum() / (chosen | right).sum())
        assert expected_jaccard(scores, right) == pytest.approx(np.mean(values))
    media, cues = unit_rows(20, seed=1), unit_rows(4, seed=2)
    groups = [[*range(5 * n, 5 * n + 5)] for n in range(4)]
    right = np.arange(20) % 5 < 2
    result = associate(media, cues, groups=groups, is_correct=right)
    cosines = (cues.double() @ media.double().T).numpy()
    for n, group in enumerate(groups):
        best = set(np.argsort(-cosines[n, group])[:2])
        assert result.jaccard[n] == pytest.approx(len(best & {0, 1}) / len(best | {0, 1}))
    # Two of five chosen at random: none is right with 3/10, one with 6/10, both with 1/10.
    assert result.scores["jaccard"].chance == pytest.approx(0.6 / 3 + 0.1)


def test_the_worst_group_and_macro_f1_are_those_of_scikit_learn():
    media, targets = labelled_rows(120, 4, seed=3)
    classes = unit_rows(6, seed=99)  # two of them have no items
    groups = [("north", "south", "west")[n % 7 % 3] for n in range(120)]
    result = classify(media, classes, targets=targets, groups=groups)
    hits = result.predictions == targets
    by_group = {g: hits[np.array(groups) == g].mean() for g in set(groups)}
    assert result.group_accuracies == pytest.approx(by_group)
    worst = result.scores["worst_group_top_1_accuracy"]
    assert worst.value == min(by_group.values())
    assert worst.num_queries == groups.count(min(by_group, key=by_group.get))
    f1 = result.scores["macro_f1"]
    expected = f1_score(targets, result.predictions, labels=np.unique(targets), average="macro")
    assert f1.value == pytest.approx(expected)
    assert (f1.low, f1.high, f1.interval) == (None, None, "none: biased")


def test_media_find_media_of_another_kind():
    images, sounds = unit_rows(40, seed=1), unit_rows(50, seed=2)
    names, other_names = [str(n % 35) for n in range(40)], [str(n % 35) for n in range(50)]
    relevance = relevance_of_equal_values(names, other_names)
    clusters = clusters_of_equal_values(relevance)
    for first, second in itertools.product(range(40), range(50)):
        is_same = names[first] == other_names[second]
        assert (clusters[0][first] == clusters[1][second]) == is_same
    result = retrieve(
        images,
        sounds,
        relevance=relevance,
        clusters=clusters,
        ks=(1, 5),
        directions=("image_to_audio", "audio_to_image"),
    )
    scores = (images.double() @ sounds.double().T).numpy()
    right = np.equal.outer(names, other_names)
    for direction, matrix, is_correct in (
        ("image_to_audio", scores, right),
        ("audio_to_image", scores.T, right.T),
    ):
        order = np.argsort(-matrix, axis=1)[:, :5]
        expected = np.take_along_axis(is_correct, order, axis=1).any(axis=1).mean()
        assert result.scores[f"{direction}_recall@5"].value == pytest.approx(expected)
    both = [result.scores[f"{d}_recall@5"].value for d in ("image_to_audio", "audio_to_image")]
    mean = result.scores["mean_recall@5"]
    assert mean.value == pytest.approx(np.mean(both))
    assert mean.low < mean.value < mean.high
