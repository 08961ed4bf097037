"""results.json is read by every JSON parser, whatever the values."""

import json

import numpy as np
import pytest

from eval.metrics.intervals import Score, wilson_interval
from eval.report.averages import mean_of_scores
from eval.report.markdown_table import markdown_table
from eval.report.results import json_text, score_cells


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_numbers_that_json_lacks_become_null(value):
    record = {"a": [value, {"b": value}, (value, 1.5)], "c": 2}
    found = json.loads(json_text(record), parse_constant=refuse)
    assert found == {"a": [None, {"b": None}, [None, 1.5]], "c": 2}


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
