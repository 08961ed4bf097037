"""Commands answer --help and refuse wrong configs before anything slow is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import COMMANDS

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "transformers", "deepspeed", "accelerate", "timm", "open_clip", "numpy", "pyarrow")
# Runs every command in one process, and prints its exit status and the slow modules it loaded.
RUN_ALL = """
import contextlib, io, json, runpy, sys

commands, arguments, slow = json.loads(sys.argv[1])
for command in commands:
    sys.argv = [command, *arguments]
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(error):
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
            status = "did not exit"
        except SystemExit as exit:
            status = exit.code
    loaded = [name for name in slow if name in sys.modules]
    print(json.dumps([command, status, loaded, out.getvalue() + error.getvalue()]))
    if loaded:
        break
"""


def run_all(*arguments):
    """[(command, exit status, slow modules loaded, output)] of every command."""
    given = json.dumps([COMMANDS, arguments, SLOW])
    finished = subprocess.run(
        [sys.executable, "-c", RUN_ALL, given], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in finished.stdout.splitlines()]


def test_help_loads_nothing_slow():
    results = run_all("--help")
    assert [command for command, *_ in results] == list(COMMANDS)
    for command, status, loaded, output in results:
        assert status == 0, command
        assert not loaded, f"{command} loads {loaded}"
        assert output.startswith("usage:"), command


def test_a_wrong_config_is_refused_before_anything_slow_is_loaded(tmp_path):
    (tmp_path / "wrong.yaml").write_text("no_such_key: 1\n")
    for command, status, loaded, output in run_all(str(tmp_path / "wrong.yaml")):
        assert not loaded, f"{command} loads {loaded}"
        # pretrain.status takes a run, not a config, and fails on what is none.
        assert status == (1 if command == "pretrain.status" else 2), command
        assert output.startswith("error:"), command


@pytest.mark.parametrize("module", ["pretrain.config", "eval.config"])
def test_front_doors_load_neither_deepspeed_nor_accelerate(module):
    code = f"import sys, {module}; sys.exit(str({{'deepspeed', 'accelerate'}} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.stderr.strip() == "set()"


@pytest.mark.parametrize("key", ["output", "run.folder"])
def test_a_url_as_output_is_refused_before_a_folder_of_its_name_appears(tmp_path, key):
    (tmp_path / "empty.yaml").write_text("{}\n")
    fault = f"{key}: expected a local path, found the URL 's3://bucket/out'; settings that may"
    refused = {
        (command, status)
        for command, status, _, output in run_all(
            str(tmp_path / "empty.yaml"), f"{key}=s3://bucket/out"
        )
        if fault in output
    }
    trains = {"pretrain.preflight", "pretrain.requeue", "pretrain.train"}
    # These two write nothing, or into the folder of their dataset.
    prepares = set(COMMANDS) - trains - {"pretrain.status", "data_prep.verify_shards"}
    assert refused == {(each, 2) for each in (prepares if key == "output" else trains)}
    assert not (ROOT / "s3:").exists()
