import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torch.nn.functional import normalize

from eval.metrics.zero_shot import classify


def random_classification(num_media=200, num_classes=12, width=6, seed=0):
    generator = np.random.default_rng(seed)
    classes = generator.standard_normal((num_classes, width))
    targets = generator.integers(num_classes - 2, size=num_media)  # two classes stay absent
    media = classes[targets] + generator.standard_normal((num_media, width))
    return (*(normalize(torch.tensor(rows).float(), dim=-1) for rows in (media, classes)), targets)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_accuracies_equal_scikit_learn():
    media, classes, targets = random_classification()
    result = classify(media, classes, targets=targets)
    scores = (media.double() @ classes.double().T).numpy()
    predictions = scores.argmax(axis=1)
    np.testing.assert_array_equal(result.predictions, predictions)
    labels = range(len(classes))
    for name, expected in {
        "top_1_accuracy": (predictions == targets).mean(),
        "top_5_accuracy": top_k_accuracy_score(targets, scores, k=5, labels=labels),
        "mean_per_class_recall": balanced_accuracy_score(targets, predictions),
    }.items():
        score = result.scores[name]
        assert score.value == pytest.approx(expected)
        assert score.low < expected < score.high
    np.testing.assert_array_equal(
        result.confusion, confusion_matrix(targets, predictions, labels=labels)
    )


def test_classes_without_items_have_no_recall():
    media, classes, targets = random_classification()
    result = classify(media, classes, targets=targets)
    assert result.class_recalls.shape == (12,)
    assert np.isnan(result.class_recalls[-2:]).all()
    assert np.isfinite(result.class_recalls[:-2]).all()


def test_collapsed_model_scores_exactly_chance():
    media, classes = normalize(torch.ones(50, 7), dim=-1), normalize(torch.ones(10, 7), dim=-1)
    targets = np.arange(50) % 9
    result = classify(media, classes, targets=targets)
    for name, chance in {
        "top_1_accuracy": 0.1,
        "top_5_accuracy": 0.5,
        "mean_per_class_recall": 0.1,
    }.items():
        assert result.scores[name].value == pytest.approx(chance), name
        assert result.scores[name].chance == pytest.approx(chance), name


def test_top_5_of_three_classes_counts_as_top_3():
    media, classes, _ = random_classification(num_classes=4)
    targets = np.zeros(len(media), dtype=np.int64)
    result = classify(media, classes[:3], targets=targets)
    assert result.scores["top_5_accuracy"].value == 1
    assert result.scores["top_5_accuracy"].chance == 1


def test_embeddings_that_are_not_finite_raise():
    media, classes, targets = random_classification()
    media[5] = torch.nan
    with pytest.raises(ValueError, match=r"media_embeddings: 1 of 200 .* row 5"):
        classify(media, classes, targets=targets)
