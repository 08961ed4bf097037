"""What the demo must reach: `make check-demo` runs it, `make test` does not."""

import json
from pathlib import Path

import pytest

from pretrain.run.attempts import read_metrics

DEMO = Path(__file__).parents[2] / "demo"


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
    results = json.loads((DEMO / "results" / "results.json").read_text())
    score = results["evaluations"][evaluation]["scores"][metric]
    assert score["value"] >= goal
    assert score["low"] > 2 * score["chance"]


def test_the_loss_falls():
    rows = [row for row in read_metrics(DEMO / "run") if "validation" not in row]
    for stream in ("image-text/image-text", "audio-text/audio-text"):
        first, last = ([row["loss"][stream] for row in part] for part in (rows[:5], rows[-5:]))
        assert sum(last) < 0.6 * sum(first)


def test_the_report_needs_no_network():
    report = (DEMO / "results" / "report.html").read_text()
    assert 'src="http' not in report
    assert 'href="http' not in report
