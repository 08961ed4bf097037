"""A new benchmark is one new file: evaluate, compare and the report run with a toy task."""

import json
import sys

import pyarrow.parquet
import pytest
import yaml

from data_prep.command import run_command
from data_prep.config_file import read_config
from data_prep.errors import ConfigError, InputError
from eval import compare, comparison, evaluate, tasks
from eval.comparison import shared_evaluations
from eval.config import CompareConfig, EvaluateConfig
from eval.metrics.intervals import Bootstrap
from eval.tasks import task
from tests.eval.test_compare import load_worse_model
from tests.support.toy_evaluation import (
    COLORS,
    load_toy_model,
    picture_sample,
    write_dataset,
    write_toy_run,
)

NEW_TASK = '''
"""Odd one out: one of the media items of each group is least like the mean of the group."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.datasets.labels import read_texts, value_of
from eval.tasks.task import EvaluationSection, Task


class OddOneOutSection(EvaluationSection):
    """Finds the item of each group that differs from the others."""

    task: Literal["odd_one_out"]
    group_size: int = 4
    odd: str = "is_odd"  # key in .json


@dataclass(frozen=True)
class OddOneOutResult:
    scores: dict
    hits: np.ndarray  # [groups]


@dataclass(frozen=True)
class OddOneOutTask(Task, section=OddOneOutSection):
    group_size: int
    odd: np.ndarray  # int64 [groups], index within the group

    main_metrics = ("odd_accuracy",)
    conditions = ("group_size",)

    @classmethod
    def read(cls, name, section, dataset, *, sets, seed):
        samples = list(read_texts(dataset))
        flags = [value_of(sample, section.odd) == "True" for sample in samples]
        odd = np.array(flags).reshape(-1, section.group_size).argmax(axis=1)
        return cls(name, dataset, [each.key for each in samples], section.group_size, odd)

    def method(self):
        return "odd one out"

    def details(self):
        return f"{len(self.odd)} groups of {self.group_size}"

    def measure(self, media, embeddings, *, bootstrap):
        from eval.metrics.intervals import mean_score

        groups = media.unflatten(0, (-1, self.group_size))  # [groups, group_size, D]
        means = groups.mean(dim=1, keepdim=True)
        likeness = (groups * means).sum(dim=-1)
        found = likeness.argmin(dim=-1).cpu().numpy()
        hits = (found == self.odd).astype(float)
        score = mean_score(hits, chance=1 / self.group_size)
        return OddOneOutResult({"odd_accuracy": score}, hits), means[:, 0]

    def record(self, outcome):
        return {"num_queries": len(self.odd), "group_size": self.group_size}

    def predictions(self, outcome):
        return {"": {"key": self.keys[:: self.group_size], "hit": outcome.result.hits}}

    @classmethod
    def differences(cls, pair):
        yield from pair.mean_differences({"hit": "odd_accuracy"})

    def report_section(self, outcome, *, num_queries):
        from data_prep.report import html
        from eval.report.gallery import MediaViews, card, cards

        views = MediaViews(self.dataset)
        shown = [card(views.of(n), f"odd <{n}>", kind="good") for n in range(num_queries)]
        return html.Section(self.name, [cards(shown)], note=self.description())
'''


# Only what every task must have.
SHORT_TASK = NEW_TASK.partition("    def record(")[0]


@pytest.fixture
def new_task(tmp_path, monkeypatch):
    """The name of a task whose file is in a folder that is added to eval/tasks for the test."""
    monkeypatch.setattr(task, "_TASKS", dict(task.task_types()))
    (tmp_path / "more_tasks").mkdir()
    (tmp_path / "more_tasks" / "odd_one_out.py").write_text(NEW_TASK)
    folders = [*tasks.__path__, str(tmp_path / "more_tasks")]
    monkeypatch.setattr(tasks, "__path__", folders)
    yield "odd_one_out"
    sys.modules.pop("eval.tasks.odd_one_out", None)
    vars(tasks).pop("odd_one_out", None)


@pytest.fixture
def config_path(tmp_path, new_task):
    """A config with the new task and an existing one."""
    samples = []
    for number in range(16):  # of each four, one is blue, at another index each time
        is_odd = number % 4 == number // 4
        sample = picture_sample("blue" if is_odd else "red", seed=number)
        metadata = json.loads(sample["json"]) | {"is_odd": is_odd}
        samples.append(sample | {"json": json.dumps(metadata).encode()})
    folder = str(write_dataset(tmp_path / "pictures", samples))
    config = {
        "checkpoint": str(write_toy_run(tmp_path / "run")),
        "output": str(tmp_path / "results"),
        "bootstrap_samples": 100,
        "evaluations": {
            "odd": {"task": new_task, "dataset": folder},
            "colors": {
                "task": "zero_shot_classification",
                "dataset": folder,
                "class_names": list(COLORS),
                "prompt_templates": ["a {} picture"],
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_evaluate(path, *overrides):
    return run_command(
        EvaluateConfig,
        run=evaluate.run,
        dry_run=evaluate.dry_run,
        description="",
        arguments=[str(path), *overrides],
    )


def test_evaluate_compare_and_report_run_with_a_task_of_one_new_file(
    config_path, tmp_path, monkeypatch, capsys
):
    assert run_evaluate(config_path, "--dry-run") == 0
    assert "odd: odd one out, 16 image items, 4 groups of 4" in capsys.readouterr().out

    results = {}
    for name, load in (("good", load_toy_model), ("worse", load_worse_model)):
        monkeypatch.setattr("eval.models.encoder.load_model", load)
        assert run_evaluate(config_path, f"output={tmp_path / name}") == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    record = results["good"]["evaluations"]["odd"]
    assert (record["task"], record["num_queries"], record["group_size"]) == ("odd_one_out", 4, 4)
    assert record["scores"]["odd_accuracy"]["value"] == 1
    assert record["scores"]["odd_accuracy"]["chance"] == 0.25
    assert results["good"]["config"]["evaluations"]["odd"]["group_size"] == 4
    assert results["good"]["averages"]["all"]["value"] == 1  # of both evaluations
    rows = (tmp_path / "good" / "results.csv").read_text().splitlines()
    assert any(row.startswith("odd,odd_accuracy,1.0,") for row in rows)
    predictions = pyarrow.parquet.read_table(tmp_path / "good/predictions/odd.parquet").to_pydict()
    assert predictions == {"key": ["0000", "0004", "0008", "0012"], "hit": [1.0] * 4}
    page = (tmp_path / "good" / "report.html").read_text()
    assert "odd accuracy" in page
    assert "odd &lt;0&gt; &#10003;" in page  # the task's own part, escaped

    path = tmp_path / "compare.yaml"
    folders = f"[{tmp_path / 'good'}, {tmp_path / 'worse'}]"
    path.write_text(f"results: {folders}\noutput: {tmp_path / 'compared'}\n")
    status = run_command(
        CompareConfig,
        run=compare.run,
        dry_run=compare.dry_run,
        description="",
        arguments=[str(path)],
    )
    assert status == 0
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text())
    differences = compared["compared"][str(tmp_path / "worse")]
    [odd] = [each for each in differences if each["evaluation"] == "odd"]
    worse = results["worse"]["evaluations"]["odd"]["scores"]["odd_accuracy"]["value"]
    assert odd["metric"] == "odd_accuracy"
    assert odd["difference"] == pytest.approx(worse - 1)

    values = results["worse"]
    values["evaluations"]["odd"]["group_size"] = 8
    (tmp_path / "worse" / "results.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="group_size is 4 in"):
        shared_evaluations(tmp_path / "good", tmp_path / "worse")


def test_parts_that_a_task_leaves_out_have_defaults(config_path, tmp_path, monkeypatch):
    (tmp_path / "more_tasks" / "odd_one_out.py").write_text(SHORT_TASK)
    monkeypatch.setattr("eval.models.encoder.load_model", load_toy_model)
    assert run_evaluate(config_path) == 0
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["evaluations"]["odd"]["scores"]["odd_accuracy"]["value"] == 1
    page = (tmp_path / "results" / "report.html").read_text()
    assert "odd: odd one out, 16 image items, 4 groups of 4" in page
    found = comparison.compare(tmp_path / "results", tmp_path / "results", bootstrap=Bootstrap(100))
    assert {each.evaluation for each in found} == {"colors"}


def test_the_keys_of_a_new_task_are_checked(config_path):
    with pytest.raises(
        ConfigError, match=r"evaluations\.odd: unknown key 'group_sise'.*group_size"
    ):
        read_config(EvaluateConfig, config_path, overrides=["evaluations.odd.group_sise=3"])
    with pytest.raises(ConfigError, match=r"evaluations\.odd\.group_size: .* integer"):
        read_config(EvaluateConfig, config_path, overrides=["evaluations.odd.group_size=many"])


@pytest.mark.parametrize("name", ["odd_two_out", "null", "[retrieval]"])
def test_an_unknown_task_is_refused_with_the_names_of_all(config_path, name):
    overrides = [f"evaluations.odd.task={name}"]
    with pytest.raises(ConfigError, match=r"odd: task: expected one of association, .*, odd_one"):
        read_config(EvaluateConfig, config_path, overrides=overrides)


def test_results_of_an_unknown_task_are_refused_with_the_names_of_all(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        record = {"task": "odd_two_out", "dataset": {"fingerprint": "1"}}
        content = json.dumps({"evaluations": {"odd": record}})
        (tmp_path / name / "results.json").write_text(content)
    with pytest.raises(
        InputError, match=r"evaluation odd: expected one of .*; found 'odd_two_out'"
    ):
        shared_evaluations(tmp_path / "first", tmp_path / "second")


def test_every_task_is_in_a_module_of_its_name():
    for name, each in task.task_types().items():
        assert each.__module__ == f"eval.tasks.{name}"
        assert each.section_type.__module__ == each.__module__
