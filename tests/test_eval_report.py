import numpy as np
import torch
from torch.nn.functional import normalize

from eval.report_charts import confusion_chart, training_charts
from eval.report_gallery import nearest, shown_queries


def test_shown_queries_start_with_the_hardest():
    first_ranks = np.array([1, 9, 2, 1, 30, 1, 1, 1])
    assert shown_queries(first_ranks, num_queries=4) == [4, 1, 0, 7]
    assert sorted(shown_queries(first_ranks, num_queries=100)) == list(range(8))
    assert shown_queries(first_ranks[:1], num_queries=2) == [0]


def test_queries_with_equal_words_are_shown_once():
    first_ranks = np.array([3, 9, 8, 1])
    shown = shown_queries(first_ranks, num_queries=4, labels=["a", "b", "b", "c"])
    assert sorted(shown) == [0, 1, 3]


def test_nearest_lists_at_most_five_best_first():
    gallery = normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1)
    assert nearest(gallery[:1], gallery) == [[0, 1, 2]]
    assert len(nearest(gallery[:1], gallery.repeat(4, 1))[0]) == 5


def test_confusion_chart_shows_counts_while_they_are_readable():
    confusion = np.diag([41, 42])
    assert ">41<" in confusion_chart(confusion, ["cat", "dog & co"])
    many = confusion_chart(np.eye(40, dtype=np.int64) * 77, [f"class {n}" for n in range(40)])
    assert ">77<" not in many
    assert "data:image/png" in many


def test_training_charts_leave_out_what_was_not_logged():
    html = training_charts([{"step": 1, "loss": {"image-text": 2.0}}])
    assert "image-text" in html
    assert "learning rate" not in html
    assert "validation" not in html
