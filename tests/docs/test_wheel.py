"""The wheel holds everything: installed in an empty environment, it works from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.train import pretrain
from tests.support.commands import COMMANDS
from tests.support.toy_run import toy_config

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
LOAD = """
import sys
from pretrain.checkpoint import load_model

model, transforms, tokenizer = load_model(sys.argv[1])
print(tuple(model.encode_text(tokenizer(["a red picture"])).shape), sorted(transforms))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of an environment that holds the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for package in ("data_prep", "pretrain", "eval"):
        shutil.copytree(ROOT / package, folder / package)
    run(UV, "build", "--wheel", "--out-dir", folder, folder)  # leaves files where it builds
    [wheel] = folder.glob("*.whl")
    run(UV, "venv", "--python", sys.executable, folder / "environment")
    python = folder / "environment/bin/python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(UV, "pip", "install", "--python", python, *constraints, f"{wheel}[demo]")
    return python


def run(*command, cwd=None):
    """Standard output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_folder(installed, toy_data, tmp_path):
    for command in COMMANDS:
        assert run(installed, "-m", command, "--help", cwd=tmp_path).startswith("usage:")

    pretrain(toy_config(toy_data, tmp_path / "run", schedule={"num_steps": 2}))
    assert run(installed, "-c", LOAD, tmp_path / "run", cwd=tmp_path) == (
        "(1, 16) ['audio', 'image']\n"
    )

    sheet = {"dataset": str(toy_data / "colors"), "output": str(tmp_path / "sheet.html")}
    (tmp_path / "describe.yaml").write_text(yaml.safe_dump(sheet))
    run(installed, "-m", "data_prep.describe", "describe.yaml", cwd=tmp_path)
    assert "<html" in (tmp_path / "sheet.html").read_text()

    evaluations = {"colors": {"task": "retrieval", "dataset": str(toy_data / "more_colors")}}
    config = {"checkpoint": "run", "output": "results", "evaluations": evaluations}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(config | {"bootstrap_samples": 100}))
    run(installed, "-m", "eval.evaluate", "evaluate.yaml", cwd=tmp_path)
    assert "<html" in (tmp_path / "results/report.html").read_text()
