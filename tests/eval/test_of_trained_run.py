import json

import yaml

from data_prep.command import run_command
from eval.config import EvaluateConfig
from eval.evaluate import dry_run, run
from pretrain.train import pretrain
from tests.support.toy_run import toy_config


def test_run_folder_evaluates_on_images_and_audio(toy_data, tmp_path):
    streams = toy_config(toy_data, tmp_path / "run").model_dump(mode="json")["streams"]
    streams["image-text"]["objectives"]["image-text"]["matryoshka_dims"] = [4]
    pretrain(toy_config(toy_data, tmp_path / "run", schedule={"num_steps": 3}, streams=streams))
    config = {
        "checkpoint": str(tmp_path / "run"),
        "output": str(tmp_path / "out"),
        "bootstrap_samples": 100,
        "evaluations": {
            "colors": {"task": "retrieval", "dataset": str(toy_data / "more_colors")},
            "tones": {"task": "retrieval", "dataset": str(toy_data / "tones")},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    commands = {"run": run, "dry_run": dry_run, "description": ""}
    assert run_command(EvaluateConfig, arguments=[str(path)], **commands) == 0

    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["checkpoint"]["step"] == 3
    assert len(record["checkpoint"]["model_sha256"]) == 64
    for evaluation in record["evaluations"].values():
        assert "dim4_mean_recall@1" in evaluation["scores"]
        for score in evaluation["scores"].values():
            if score["low"] is not None:
                assert score["low"] <= score["value"] <= score["high"]
    page = (tmp_path / "out/report.html").read_text()
    assert "learning rate" in page
    assert record["checkpoint"]["model_sha256"] in page
