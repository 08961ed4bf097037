"""results.json is read by every JSON parser, whatever the values."""

import json

import numpy as np
import pytest

from eval.metrics.intervals import Bootstrap, Score, wilson_interval
from eval.models.encoder import load_encoder
from eval.models.encoding import EncodingConfig
from eval.report.averages import mean_of_scores
from eval.report.html import write_report
from eval.report.markdown_table import markdown_table
from eval.report.results import json_text, results_record, score_cells
from tests.support.toy_evaluation import load_toy_model, write_toy_run


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_numbers_that_json_lacks_become_null(value):
    record = {"a": [value, {"b": value}, (value, 1.5)], "c": 2}
    found = json.loads(json_text(record), parse_constant=refuse)
    assert found == {"a": [None, {"b": None}, [None, 1.5]], "c": 2}


@pytest.mark.parametrize("weights", ["plain", "ema"])
def test_results_name_the_weights_and_the_page_those_that_are_not_plain(
    tmp_path, monkeypatch, weights
):
    checkpoint = write_toy_run(tmp_path / "run") / "checkpoints/step_00000040"
    monkeypatch.setattr("eval.models.encoder.find_checkpoint", lambda path, weights: checkpoint)
    monkeypatch.setattr("eval.models.encoder.load_model", load_toy_model)
    encoder = load_encoder(EncodingConfig(checkpoint=tmp_path / "run", weights=weights))
    record = results_record(
        [],
        averages={},
        encoder=encoder,
        long_clips="windows",
        bootstrap=Bootstrap(100),
        skipped={},
        seconds=1.0,
        config={},
    )
    assert record["checkpoint"]["weights"] == weights
    page = write_report(tmp_path, [], record=record).read_text()
    assert ("step 40, weights ema" in page) == (weights == "ema")
    assert (">weights<" in page) == (weights == "ema")


def test_a_metric_without_an_interval_is_shown_without_one():
    score = Score(0.5, None, None, 0.1, 20, "none: biased")
    assert score_cells("macro_f1", score) == ("50.0 %", "none: biased", "10.0 %", "20")
    average = mean_of_scores([score, Score(0.7, 0.6, 0.8, 0.1, 20, "Wilson")])
    assert (average.value, average.low, average.high) == (0.6, None, None)
    assert average.interval == "none: an evaluation has no interval"


def test_the_average_of_good_evaluations_is_no_surer_than_its_parts():
    """Tests five perfect evaluations of 40 items: together they are like one of 200."""
    scores = [Score(1.0, *wilson_interval(40, 40), 0.1, 40, "Wilson")] * 5
    average = mean_of_scores(scores)
    assert (average.low, average.high) == pytest.approx(wilson_interval(200, 200))


def test_names_do_not_break_a_markdown_table():
    table = markdown_table(["name", "value"], [["x|y", "1"], ["new\nline", "2"], ["plain", "3"]])
    assert table.splitlines() == [
        "| name     | value |",
        "|----------|-------|",
        "| x\\|y     | 1     |",
        "| new line | 2     |",
        "| plain    | 3     |",
    ]
