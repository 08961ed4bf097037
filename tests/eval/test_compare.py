"""Comparison of two models that embed pictures differently and sounds alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch.nn.functional import normalize

from data_prep.command import run_command
from data_prep.errors import InputError
from eval.compare import comparison_table, dry_run, run
from eval.comparison import compare
from eval.config import CompareConfig
from eval.metrics.intervals import Bootstrap
from eval.report.differences import Difference
from tests.eval.test_evaluate import config_path, evaluate  # noqa: F401  a fixture
from tests.support.toy_evaluation import ToyModel, load_toy_model


class WorseModel(ToyModel):
    """Embeds some pictures as if they were red."""

    def encode_media(self, kind, batch):
        embeddings = super().encode_media(kind, batch)
        if kind == "image":
            embeddings[::2, 0] += 2.0
        return normalize(embeddings, dim=-1)


def load_worse_model(folder, *, device="cpu", weights="plain"):
    return WorseModel().eval(), *load_toy_model(folder)[1:]


@pytest.fixture
def results(config_path, monkeypatch):  # noqa: F811
    """Folders of results of a good model and of a worse one."""
    good, worse = (config_path.parent / name for name in ("good", "worse"))
    assert evaluate(config_path, f"output={good}") == 0
    monkeypatch.setattr("eval.models.encoder.load_model", load_worse_model)
    assert evaluate(config_path, f"output={worse}") == 0
    return good, worse


def scores_of(folder):
    record = json.loads((folder / "results.json").read_text())["evaluations"]
    return {
        (name, metric): score["value"]
        for name, each in record.items()
        for metric, score in each["scores"].items()
    }


def test_differences_are_those_of_the_metrics_with_paired_intervals(results):
    good, worse = results
    found = compare(good, worse, bootstrap=Bootstrap(400))
    assert {each.evaluation for each in found} == {
        "associated",
        "choice",
        "colors",
        "few",
        "grouped",
        "matched",
        "neighbours",
        "probed",
        "published",
        "tints",
        "pictures",
        "tones",
    }
    first, second = scores_of(good), scores_of(worse)
    for each in found:
        key = (each.evaluation, each.metric)
        assert each.baseline == pytest.approx(first[key])
        assert each.value == pytest.approx(second[key])
        assert each.difference == pytest.approx(second[key] - first[key])
        if each.metric.endswith("_rank"):
            assert (each.low, each.high, each.is_clear) == (None, None, False)
        elif each.low is not None:
            assert each.low <= each.difference <= each.high
        if each.evaluation == "tones":  # the models hear alike
            assert (each.num_better, each.num_worse, each.is_clear) == (0, 0, False)
            if each.low is not None:
                assert -each.high == pytest.approx(each.low)
                assert each.low < -0.3  # six sounds cannot prove that models are equal
    [colors] = [each for each in found if each.evaluation == "colors"]
    # The first, third and fifth of each batch of five, unless they are red.
    wrong = [n for n in range(12) if n % 5 % 2 == 0 and n % 3]
    assert colors.num_worse == len(wrong)
    assert colors.worse == [f"{n:04d}" for n in wrong]
    assert (colors.num_better, colors.is_clear) == (0, False)  # 12 items are too few
    assert (colors.low, colors.interval) == (None, "none: fewer than 30 items")
    backwards = compare(worse, good, bootstrap=Bootstrap(400))
    assert [each.difference for each in backwards] == [-each.difference for each in found]
    assert [each.num_better for each in backwards] == [each.num_worse for each in found]


def test_paired_intervals_separate_models_whose_own_intervals_overlap():
    # Half of the queries fail for both models; one in fifty of all fail for the second one as well.
    from eval.metrics.intervals import mean_interval, paired_interval

    rng = np.random.default_rng(0)
    first = (rng.random(2000) < 0.5).astype(float)
    second = np.where(rng.random(2000) < 0.02, 0.0, first)
    clusters = np.arange(2000)
    intervals = [mean_interval([(hits, clusters)])[:2] for hits in (first, second)]
    assert intervals[0][0] < intervals[1][1]
    _, high, _ = paired_interval(second - first, clusters=clusters)
    assert high < 0


def test_the_table_marks_clear_differences_and_says_why_an_interval_is_missing():
    baseline = ("good", 0.5, 0.4, -0.1)
    clear, unknown = (
        Difference("colors", *baseline, *interval, 100, 0, 10, [], ["a"])
        for interval in ((-0.17, -0.05, "Tango"), (None, None, "none: fewer than 6 items changed"))
    )
    assert (clear.is_clear, unknown.is_clear) == (True, False)
    table = comparison_table(Path("a"), Path("b"), [clear, unknown])
    assert table.startswith("b compared with a: 1 of 2 metrics differ (*)\n")
    assert "| -0.1 *     | -0.17 to -0.05 " in table
    assert "| -0.1       | none: fewer than 6 items changed |" in table


def compare_command(*arguments):
    return run_command(
        CompareConfig, run=run, dry_run=dry_run, description="", arguments=list(arguments)
    )


def test_the_command_writes_a_table_and_refuses_other_samples(results, tmp_path, capsys):
    good, worse = results
    path = tmp_path / "compare.yaml"
    path.write_text(f"results: [{good}, {worse}]\noutput: {tmp_path / 'compared'}\n")
    assert compare_command(str(path)) == 0
    assert capsys.readouterr().out.startswith(f"{worse} compared with {good}: ")
    table = (tmp_path / "compared" / "compare.md").read_text()
    assert "| colors     | top_1_accuracy " in table
    record = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert len(record["compared"][str(worse)]) == table.count("\n| ") - 1

    values = json.loads((worse / "results.json").read_text())
    values["evaluations"]["few"]["strength"] = values["evaluations"]["few"].pop("l2")
    (worse / "results.json").write_text(json.dumps(values))  # the key's name in older results
    assert compare_command(str(path), "--dry-run") == 0
    values["evaluations"]["colors"]["dataset"]["fingerprint"] = "another"
    (worse / "results.json").write_text(json.dumps(values))
    assert compare_command(str(path), "--dry-run") == 1
    error = capsys.readouterr().err
    assert "evaluation colors: fingerprint is" in error
    assert "and 'another' in" in error
    values["evaluations"] = {"else": values["evaluations"]["colors"]}
    (worse / "results.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"expected evaluations of .*; found else"):
        compare(good, worse, bootstrap=Bootstrap())
