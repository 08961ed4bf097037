import re

import numpy as np
import pytest
import scipy.stats
import torch
from markupsafe import Markup
from torch.nn.functional import normalize

from eval.metrics.embedding_space import embedding_space
from eval.metrics.relevance import relevance_of_owners
from eval.report.charts import confusion_chart, training_charts
from eval.report.gallery import card, cards, nearest, scored_captions, shown_queries, text_answers
from eval.report.spectrogram import spectrogram_picture


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


def test_answers_mark_the_right_ones_and_escape_their_texts():
    texts = ["a <cat>", "a dog", "two dogs"]
    assert text_answers(texts, [0, 1], right=[1]) == (
        '<ol class="answers"><li>a &lt;cat&gt;</li><li class="good">a dog &#10003;</li></ol>'
    )
    missed = text_answers(texts, [1], right=[0, 2])
    assert missed.endswith('</ol><p class="missed">missed: a &lt;cat&gt;</p>')
    assert scored_captions(texts[:2], [0.25, 0.5]) == (
        '<ol class="answers"><li class="good">a &lt;cat&gt; <small>0.250</small></li>'
        '<li class="">a dog <small>0.500</small></li></ol>'
    )


def test_cards_escape_labels_but_not_views():
    shown = [card(Markup("<img>"), "<b>", kind="good"), card(Markup("<hr>"), "b")]
    assert cards(shown) == (
        '<div class="cards"><div class="card good"><img>&lt;b&gt; &#10003;</div>'
        '<div class="card "><hr>b</div></div>'
    )


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


def test_training_charts_show_every_recall_of_validation():
    of_pair = {"image_to_text_recall@1": 0.5, "text_to_image_recall@1": 0.25}
    of_views = {"text.title_to_scan_recall@1": 0.75, "caption_token_accuracy": 0.5}
    validation = {"pairs/image-text": of_pair | {"loss": 2.0}, "clips/titles": of_views}
    nested = {f"dim4_{name}": value for name, value in of_pair.items()}
    validation["pairs/image-text"] |= nested
    html = training_charts(
        [{"step": 10, "validation": validation}, {"step": 10, "validation_ema": validation}]
    )
    shown = re.findall(r">([^<>]* to [^<>]*)</text>", html)
    names = [
        "pairs/image-text, image to text",
        "pairs/image-text, text to image",
        "clips/titles, text.title to scan",
    ]
    assert "validation recall@1" in html
    assert shown == names + [f"{name}, EMA" for name in names]


def test_metrics_of_the_shared_space_are_those_of_their_papers():
    generator = torch.Generator().manual_seed(0)
    media = normalize(torch.randn(40, 6, generator=generator), dim=-1)
    other = normalize(media.repeat_interleave(2, dim=0) + 0.3, dim=-1)
    pairs = relevance_of_owners(np.arange(80) // 2)
    space = embedding_space(media, other, pairs)
    rows, columns = media.double().numpy(), other.double().numpy()
    gap = np.linalg.norm(rows.mean(axis=0) - columns.mean(axis=0))
    assert space.modality_gap == pytest.approx(gap)
    squares = ((rows[:, None] - columns[None]) ** 2).sum(axis=-1)
    assert space.alignment == pytest.approx(np.mean([squares[n // 2, n] for n in range(80)]))
    inner = ((rows[:, None] - rows[None]) ** 2).sum(axis=-1)[np.triu_indices(40, 1)]
    assert space.uniformity[0] == pytest.approx(np.log(np.exp(-2 * inner).mean()))
    nearest_ten = np.argsort(squares, axis=1)[:, :10]
    counts = np.bincount(nearest_ten.ravel(), minlength=80)
    np.testing.assert_array_equal(space.hubness[0].occurrences, counts)
    assert space.hubness[0].skewness == pytest.approx(scipy.stats.skew(counts))
    assert space.record()["other_most_found"] == counts.max() / 40


def test_a_spectrogram_shows_where_the_sound_is():
    time = np.arange(16_000) / 16_000
    low, high = (
        spectrogram_picture(np.sin(2 * np.pi * hz * time).astype(np.float32)) for hz in (300, 5000)
    )
    assert low.shape == high.shape == (48, 160, 3)
    loudest = [int(each.sum(axis=(1, 2)).argmax()) for each in (low, high)]
    assert loudest[0] > loudest[1] + 10  # lower in the picture
    assert spectrogram_picture(np.zeros(3, np.float32)).shape == (48, 160, 3)
