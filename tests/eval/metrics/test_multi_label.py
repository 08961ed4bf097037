import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from eval.metrics.intervals import Bootstrap
from eval.metrics.multi_label import average_precisions, classify_labels, difference_interval


def embeddings(num_items, num_classes, *, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        normalize(torch.randn(count, width, generator=generator), dim=-1)
        for count in (num_items, num_classes)
    )


def some_labels(num_items, num_classes, *, share=0.2, seed=0):
    return np.random.default_rng(seed).random((num_items, num_classes)) < share


def test_average_precisions_are_scikit_learns_and_absent_classes_do_not_count():
    media, classes = embeddings(200, 70)
    is_of_class = some_labels(200, 70)
    is_of_class[:, [3, 40]] = False
    result = classify_labels(media, classes, is_of_class=is_of_class)
    scores = (media.double() @ classes.double().T).numpy()
    present = [k for k in range(70) if k not in (3, 40)]
    expected = [average_precision_score(is_of_class[:, k], scores[:, k]) for k in present]
    np.testing.assert_allclose(result.average_precisions[present], expected, rtol=1e-6)
    assert np.isnan(result.average_precisions[[3, 40]]).all()
    score = result.scores["mean_average_precision"]
    assert score.value == pytest.approx(np.mean(expected), rel=1e-6)
    assert (score.low, score.high, score.interval) == (None, None, "none: biased")
    assert score.num_queries == 200


def test_a_model_that_knows_nothing_scores_chance():
    media, classes = (torch.ones(count, 4) / 2 for count in (50, 5))
    is_of_class = some_labels(50, 5, share=0.5)
    result = classify_labels(media, classes, is_of_class=is_of_class)
    score = result.scores["mean_average_precision"]
    assert score.value == pytest.approx(score.chance, rel=1e-12)
    rng = np.random.default_rng(0)
    drawn = [
        np.mean([average_precision_score(is_of_class[:, k], rng.random(50)) for k in range(5)])
        for _ in range(300)
    ]
    assert score.chance == pytest.approx(np.mean(drawn), abs=0.01)


def test_differences_of_precisions_have_no_interval_for_few_labels_or_changes():
    generator = np.random.default_rng(0)
    of_class = np.arange(200) % 10 < 2  # 40 items
    first, second = generator.normal(size=(2, 1, 200)).astype(np.float32) + of_class
    low, high, method = difference_interval(first, second, of_class[None], Bootstrap(100))
    difference = average_precisions(second, of_class[None]) - average_precisions(
        first, of_class[None]
    )
    assert low < difference[0] < high
    assert method == "expanded bootstrap percentiles"
    for num_items, reason in ((4, "a class of fewer than 5 items"), (19, "fewer than 20 labels")):
        few = np.arange(200) < num_items
        found = difference_interval(first, second, few[None], Bootstrap(100))
        assert found == (None, None, f"none: {reason}")
    many = np.arange(200) % 41 == np.arange(6)[:, None]  # six classes
    found = difference_interval(*np.repeat([first, second], 6, axis=1), many, Bootstrap(100))
    assert found == (None, None, "none: biased for more than 5 classes")
    changed = first.copy()
    changed[0, 0] += 10  # one item rises to the top
    for other in (first, changed):
        found = difference_interval(first, other, of_class[None], Bootstrap(400))
        assert found == (None, None, "none: few items changed")
