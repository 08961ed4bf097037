"""Goals of the demo: `make check-demo` checks them, `make test` does not."""

import json
from pathlib import Path

import pytest

from pretrain.run.attempts import read_metrics

DEMO = Path(__file__).parents[2] / "demo"
DIRECTIONS = ("image_to_audio", "audio_to_image")


def score_of(evaluation, metric, *, results="results"):
    record = json.loads((DEMO / results / "results.json").read_text())
    return record["evaluations"][evaluation]["scores"][metric]


@pytest.mark.parametrize(
    ("evaluation", "metric", "goal"),
    [
        ("digits", "top_1_accuracy", 0.95),
        ("sounds", "top_1_accuracy", 0.95),
        ("scenes", "media_to_text_recall@1", 0.80),
        ("scenes", "text_to_media_recall@1", 0.80),
        ("scenes among all", "media_to_text_recall@1", 0.60),
    ],
)
def test_the_demo_reaches(evaluation, metric, goal):
    score = score_of(evaluation, metric)
    assert score["value"] >= goal
    assert score["low"] > 2 * score["chance"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_images_find_sounds_through_text_alone_and_better_if_trained_directly(direction):
    metric = f"{direction}_recall@1"
    through_text, directly = (
        score_of("objects", metric, results=results) for results in ("results", "results_objects")
    )
    assert through_text["low"] > through_text["chance"]
    assert directly["value"] >= 0.4
    assert directly["low"] > through_text["high"]


def test_the_loss_falls():
    rows = [row for row in read_metrics(DEMO / "run") if "validation" not in row]
    for stream in ("image-text/image-text", "audio-text/audio-text"):
        first, last = ([row["loss"][stream] for row in part] for part in (rows[:5], rows[-5:]))
        assert sum(last) < 0.6 * sum(first)


def test_the_report_needs_no_network():
    report = (DEMO / "results" / "report.html").read_text()
    assert 'src="http' not in report
    assert 'href="http' not in report
