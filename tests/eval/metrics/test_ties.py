"""Metrics of tied scores: means over random orders, and independent of the order of items."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score

from eval.metrics.caption_choice import _chances, _group_hits
from eval.metrics.intervals import Bootstrap
from eval.metrics.linear_probe import Probe, accuracy_of
from eval.metrics.multi_label import classify_labels, resampled_precisions
from eval.metrics.zero_shot import classification_result, classify, rank_scores


def tied_scores(num_items=60, num_classes=5, *, levels=3, seed=0):
    """Draws scores with many ties, float32 [num_items, num_classes], and targets."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(levels, size=(num_items, num_classes)).astype(np.float32)
    return scores, generator.integers(num_classes - 1, size=num_items)


def classified(scores, targets):
    ranked = rank_scores([torch.from_numpy(scores.copy())], targets=targets)
    return classification_result(ranked, targets=targets)


def test_confusion_matrix_is_the_mean_over_orders_of_tied_classes():
    scores, targets = tied_scores()
    result = classified(scores, targets)
    generator = np.random.default_rng(1)
    total = np.zeros((5, 5))
    for _ in range(4000):
        predictions = (scores + 0.5 * generator.random(scores.shape)).argmax(axis=1)
        np.add.at(total, (targets, predictions), 1)
    np.testing.assert_allclose(result.confusion, total / 4000, atol=0.2)
    assert result.confusion.sum() == pytest.approx(60)
    hits = np.diagonal(result.confusion).sum() / 60
    assert result.scores["top_1_accuracy"].value == pytest.approx(hits)
    is_best = scores == scores.max(axis=1, keepdims=True)
    assert ((result.predictions == -1) == (is_best.sum(axis=1) > 1)).all()


def test_no_metric_depends_on_the_order_of_classes_or_items():
    scores, targets = tied_scores(seed=3)
    generator = np.random.default_rng(0)
    expected = classified(scores, targets)
    for _ in range(5):
        classes, items = generator.permutation(5), generator.permutation(60)
        result = classified(scores[items][:, classes], np.argsort(classes)[targets[items]])
        for metric, score in expected.scores.items():
            found = result.scores[metric]
            assert found.value == pytest.approx(score.value), metric
            assert (found.low, found.high) == (pytest.approx(score.low), pytest.approx(score.high))
        np.testing.assert_allclose(result.confusion, expected.confusion[classes][:, classes])


def test_without_ties_macro_f1_and_confusion_are_scikit_learns():
    generator = np.random.default_rng(0)
    scores, targets = generator.random((80, 6)).astype(np.float32), generator.integers(5, size=80)
    result = classified(scores, targets)
    assert result.confusion.dtype == np.int64
    expected = f1_score(
        targets, scores.argmax(axis=1), labels=np.unique(targets), average="macro", zero_division=0
    )
    assert result.scores["macro_f1"].value == pytest.approx(expected)


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_a_constant_model_has_macro_f1_of_chance(largest):
    targets = np.array([largest] * 40 + [0, 1, 2] * 5)
    media, classes = torch.ones(len(targets), 1), torch.ones(3, 1)
    score = classify(media, classes, targets=targets).scores["macro_f1"]
    # Precisions 45 / 55 and twice 5 / 55, recalls 1 / 3
    f1 = [2 * precision / 3 / (precision + 1 / 3) for precision in (45 / 55, 5 / 55, 5 / 55)]
    expected = np.mean(f1)
    assert score.value == pytest.approx(score.chance) == pytest.approx(expected)


def test_worst_group_of_equal_accuracies_is_the_smallest():
    targets = np.array([0, 1] * 6)
    media = torch.eye(2)[targets]
    for groups in (["a"] * 8 + ["b"] * 4, ["b"] * 8 + ["a"] * 4):
        result = classify(media, torch.eye(2), targets=targets, groups=groups)
        score = result.scores["worst_group_top_1_accuracy"]
        assert (score.value, score.num_queries, score.low) == (1, 4, None)


def test_validation_accuracy_is_the_mean_over_orders_of_tied_classes():
    probe = Probe(torch.zeros(4, 2).double(), torch.tensor([1.0, 1, 1, 0]).double(), 0, 1)
    accuracy = accuracy_of(probe, torch.zeros(4, 2), torch.tensor([0, 1, 2, 3]))
    assert accuracy == pytest.approx(3 * (1 / 3) / 4)


# ----------------------------------------------------------------------------------- multi-label


def average_precision_of_copies(scores, is_relevant, times):
    """Averages the precision of each drawn item over all orders of its ties, copy by copy."""
    total = 0.0
    units = [(item, copy) for item, drawn in enumerate(times) for copy in range(drawn)]
    for item in np.flatnonzero(is_relevant):
        if not times[item]:
            continue
        others = [unit for unit in units if unit[0] != item]
        above = [unit for unit in others if scores[unit[0]] > scores[item]]
        tied = [unit for unit in others if scores[unit[0]] == scores[item]]
        values = []
        for order in itertools.permutations([*tied, (item, 0)]):
            earlier = above + list(order[: order.index((item, 0))])
            values.append((sum(is_relevant[i] for i, _ in earlier) + 1) / (len(earlier) + 1))
        total += times[item] * np.mean(values)
    num_relevant = (times * is_relevant).sum()
    return total / num_relevant if num_relevant else np.nan


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_resampled_precisions_are_means_over_all_orders(levels):
    generator = np.random.default_rng(levels)
    scores = generator.integers(levels, size=(3, 6)).astype(np.float32)
    of_class = generator.random((3, 6)) < 0.5
    of_class[:, 0] = True
    found = resampled_precisions(scores, of_class, Bootstrap(10, seed=5))
    draws = np.random.default_rng(5)
    for sample in range(10):
        times = np.bincount(draws.integers(6, size=6), minlength=6)
        expected = [
            average_precision_of_copies(row, is_relevant, times)
            for row, is_relevant in zip(scores, of_class, strict=True)
        ]
        np.testing.assert_allclose(found[:, sample], expected, rtol=1e-12)


def test_average_precision_of_tied_items_is_the_mean_over_orders():
    generator = np.random.default_rng(0)
    embeddings = torch.from_numpy(generator.integers(-1, 2, size=(50, 2)).astype(np.float32))
    is_of_class = generator.random((50, 2)) < 0.4
    result = classify_labels(embeddings, torch.eye(2), is_of_class=is_of_class)
    for column in range(2):
        drawn = [
            average_precision_score(
                is_of_class[:, column], embeddings[:, column].numpy() + 0.5 * generator.random(50)
            )
            for _ in range(80)
        ]
        assert result.average_precisions[column] == pytest.approx(np.mean(drawn), abs=0.03)


# --------------------------------------------------------------------------------- caption choice


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_group_scores_are_the_means_over_orders_of_tied_similarities(size):
    generator = np.random.default_rng(size)
    for levels in (1, 2, 3):
        scores = generator.integers(levels, size=(size, size)).astype(float)
        scores[np.diag_indices(size)] = levels - 1  # own pairs tie with others or are first
        noisy = scores + 0.5 * generator.random((60_000, size, size))
        own = np.diagonal(noisy, axis1=1, axis2=2)
        text, image = ((own == noisy.max(axis=axis)).all(axis=1) for axis in (2, 1))
        expected = [each.mean() for each in (text, image, text & image)]
        assert _group_hits(scores, seed=0) == pytest.approx(expected, abs=0.008)
        order = generator.permutation(size)
        moved = _group_hits(scores[order][:, order], seed=1)
        assert moved == pytest.approx(_group_hits(scores, seed=0), rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_group_scores_of_a_constant_model_are_exactly_chance(size):
    found = _group_hits(np.zeros((size, size)), seed=0)
    assert found == pytest.approx(_chances(size), rel=1e-9)
