"""Results are compared only if all that makes their metrics comparable is equal."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config_file import read_config
from data_prep.errors import ConfigError, InputError
from eval.comparison import compare
from eval.config import EvaluateConfig
from eval.metrics.intervals import Bootstrap
from eval.report.predictions import predictions_file
from eval.tasks.task import task_types

NAME = "captions"
KEYS = ["a", "b", "c", "d"]


def write_results(folder, *, task="retrieval", ks=(1, 5), columns=None, **changes):
    """Writes results of one evaluation by hand, with predictions of one direction."""
    record = {key: f"value of {key}" for key in task_types()[task].conditions}
    record |= {"task": task, "dataset": {"fingerprint": "f"}, "scores": {}}
    record |= {"directions": ["media_to_text"]} | changes
    suffix = ".media_to_text" if task == "retrieval" else ""
    path = predictions_file(folder, NAME, suffix)
    path.parent.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"evaluations": {NAME: record}}))
    table = {"key": KEYS, "rank": [1.0, 2.0, 3.0, 9.0]} | (columns or {})
    table |= {f"hit@{k}": [float(rank <= k) for rank in table["rank"]] for k in ks}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return folder


def compared(first, second):
    return compare(first, second, bootstrap=Bootstrap(100))


TASKS = sorted(name for name in task_types() if name != "odd_one_out")


@pytest.mark.parametrize("task", TASKS)
def test_every_condition_is_checked_both_ways(tmp_path, task):
    first = write_results(tmp_path / "first", task=task)
    conditions = task_types()[task].conditions
    assert conditions
    for key in conditions:
        other = write_results(tmp_path / key, task=task, **{key: "another value"})
        for pair in ((first, other), (other, first)):
            with pytest.raises(InputError, match=f"evaluation {NAME}: {key} is"):
                compared(*pair)
    other = write_results(tmp_path / "other", task=task, dataset={"fingerprint": "g"})
    with pytest.raises(InputError, match=f"evaluation {NAME}: fingerprint is"):
        compared(first, other)


def test_prompts_distractors_pairs_and_labels_are_conditions():
    wanted = {
        "zero_shot_classification": {"class_names", "prompts_sha256"},
        "multi_label_classification": {"class_names", "prompts_sha256"},
        "retrieval": {"captions_sha256", "distractor_captions_sha256", "equal_captions"},
        "media_retrieval": {"other_fingerprint", "right_pairs_sha256"},
        "association": {"cues_sha256", "right_sha256"},
        "caption_choice": {"captions_sha256", "num_groups"},
        "linear_probe": {"train_fingerprint", "validation_fingerprint", "configured_l2"},
        "nearest_neighbours": {"train_fingerprint", "num_neighbours", "temperature"},
        "few_shot": {"train_fingerprint", "l2", "shots", "num_draws", "seed"},
    }
    for name, conditions in wanted.items():
        assert conditions <= set(task_types()[name].conditions), name


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("key", ["b", "a", "c", "d"]),
        ("key", ["a", "b", "c", "e"]),
        ("caption", ["1", "2", "3", "other"]),
        ("class_name", ["cat", "cat", "cat", "dog"]),
        ("class_names", [["cat"], [], ["cat"], ["dog"]]),
        ("cue", ["1", "2", "3", "other"]),
    ],
)
def test_other_queries_or_another_order_are_refused(tmp_path, column, values):
    own = {"key": KEYS, "caption": ["1", "2", "3", "4"], "class_name": ["cat"] * 4}
    own |= {"class_names": [["cat"]] * 4, "cue": ["1", "2", "3", "4"]}
    first = write_results(tmp_path / "first", columns=own)
    other = write_results(tmp_path / "other", columns=own | {column: values})
    for pair in ((first, other), (other, first)):
        with pytest.raises(InputError, match=f"expected the column {column} of .*same order"):
            compared(*pair)


def test_different_depths_are_compared_where_both_have_them(tmp_path):
    first = write_results(tmp_path / "first", ks=(1, 5, 10))
    second = write_results(tmp_path / "second", ks=(1, 2, 5))
    for pair in ((first, second), (second, first)):
        metrics = [each.metric for each in compared(*pair)]
        assert metrics == [
            f"media_to_text_{name}" for name in ("recall@1", "recall@5", "mean_rank")
        ]


@pytest.mark.parametrize("metric", ["text_to_media_median_rank", "media_to_text_mean_rank"])
def test_a_rank_is_not_averaged_with_fractions(tmp_path, metric):
    path = tmp_path / "config.yaml"
    evaluation = f"{{task: retrieval, dataset: d, main_metric: {metric}}}"
    path.write_text(f"checkpoint: c\noutput: o\nevaluations: {{toy: {evaluation}}}\n")
    with pytest.raises(ConfigError, match=f"found the rank {metric}"):
        read_config(EvaluateConfig, path)
