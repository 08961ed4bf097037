"""The log lines of commands reach standard error, under the names of their modules."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from data_prep.config_file import to_yaml
from pretrain.train import pretrain
from tests.eval.test_embed import damage
from tests.support.toy_duplicates import wav, write_dataset
from tests.support.toy_run import toy_config

ROOT = Path(__file__).parents[2]


def log_of(folder, command, config):
    """Returns the standard error of a command, run as a user would."""
    path = folder / f"{command}.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    finished = subprocess.run(
        [sys.executable, "-m", command, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def test_no_command_names_its_logger_main():
    for package in ("data_prep", "pretrain", "eval"):
        for path in (ROOT / package).glob("*.py"):
            text = path.read_text()
            is_command = 'if __name__ == "__main__"' in text
            assert not (is_command and "getLogger(__name__)" in text), path


def test_each_commands_lines_are_shown(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path / "run", schedule={"num_steps": 2})
    pretrain(config)
    log = log_of(tmp_path, "pretrain.train", to_yaml(config))
    assert "INFO pretrain.run.resume:" in log
    assert "nothing is left to do" in log

    noise = wav(np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 16_000)
    write_dataset(
        tmp_path / "sounds", [("wav", noise, ["a"]), ("wav", noise, ["b"])], media="audio"
    )
    search = {"datasets": [str(tmp_path / "sounds")], "output": str(tmp_path / "duplicates")}
    log = log_of(tmp_path, "data_prep.find_duplicates", search)
    assert "INFO data_prep.find_duplicates: exact: " in log

    folder = shutil.copytree(toy_data / "colors", tmp_path / "colors")
    damage(folder, [2])
    embedding = {"checkpoint": str(tmp_path / "run"), "dataset": str(folder)}
    log = log_of(
        tmp_path,
        "eval.embed",
        embedding | {"output": str(tmp_path / "out"), "max_bad_fraction": 0.03},
    )
    assert "WARNING eval.embed: skipped: " in log

    evaluation = {"task": "retrieval", "dataset": str(toy_data / "more_colors")}
    watching = {
        "checkpoint": str(tmp_path / "run"),
        "output": str(tmp_path / "watched"),
        "evaluations": {"colors": evaluation | {"goals": {"media_to_text_recall@1": 1.0}}},
        "bootstrap_samples": 100,
        "wait": False,
    }
    log = log_of(tmp_path, "eval.watch", watching)
    assert "WARNING eval.watch: step 2: " in log
