"""Metrics of a whole evaluation, compared with clip_benchmark 1.6.2 on the same files."""

import json
from pathlib import Path

import pytest
import yaml

from data_prep.config_file import read_config
from eval.config import EvaluateConfig
from eval.evaluate import run
from tests.support.clip_benchmark_oracle import SETS, write_model_and_sets

STORED = Path(__file__).parents[1] / "support" / "clip_benchmark_metrics.json"
TASKS = {
    "single": "zero_shot_classification",
    "several": "multi_label_classification",
    "captions": "retrieval",
}
# (set, clip_benchmark's name) -> our name of the same metric
OURS = {
    ("single", "acc1"): "top_1_accuracy",
    ("single", "acc5"): "top_5_accuracy",
    ("single", "mean_per_class_recall"): "mean_per_class_recall",
    ("several", "mean_average_precision"): "mean_average_precision",
} | {
    ("captions", f"{theirs}_recall@{k}"): f"{ours}_recall@{k}"
    for theirs, ours in (("image_retrieval", "text_to_media"), ("text_retrieval", "media_to_text"))
    for k in (1, 5, 10)
}


def test_metrics_are_those_of_clip_benchmark(tmp_path):
    write_model_and_sets(tmp_path)
    config = {
        "checkpoint": f"local-dir:{tmp_path / 'tiny'}",
        "output": str(tmp_path / "out"),
        "evaluations": {n: {"task": TASKS[n], "dataset": str(tmp_path / n)} for n in SETS},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run(read_config(EvaluateConfig, tmp_path / "config.yaml"))
    found = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]
    for name, metrics in json.loads(STORED.read_text()).items():
        for metric, value in metrics.items():
            ours = found[name]["scores"][OURS[name, metric]]["value"]
            assert ours == pytest.approx(value, abs=1e-6), (name, metric)
