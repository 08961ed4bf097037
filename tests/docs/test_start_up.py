"""Commands answer --help and refuse wrong configs before anything slow is imported."""

import json
import os
import re
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
    trains = {command for command in COMMANDS if command.startswith("pretrain.")}
    trains.remove("pretrain.status")
    # These two write nothing, or into the folder of their dataset.
    prepares = set(COMMANDS) - trains - {"pretrain.status", "data_prep.verify_shards"}
    assert refused == {(each, 2) for each in (prepares if key == "output" else trains)}
    assert not (ROOT / "s3:").exists()


@pytest.fixture
def closed_pipe():
    """The end of a pipe to write to, whose reader has gone, as after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    return tmp_path


PRINTING = {
    "data_prep.make_demo_data": ["configs/data_prep/demo_data.yaml", "--dry-run"],
    "pretrain.train": ["--help"],
    "pretrain.status": ["RUN"],
    "eval.evaluate": ["--help"],
}


@pytest.mark.parametrize("command", PRINTING)
def test_a_closed_standard_output_ends_a_command_quietly(run_folder, closed_pipe, command):
    words = [str(run_folder) if word == "RUN" else word for word in PRINTING[command]]
    finished = subprocess.run(
        [sys.executable, "-m", command, *words],
        cwd=ROOT,
        stdout=closed_pipe,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_full_disk_behind_standard_output_is_reported(run_folder):
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            [sys.executable, "-m", "pretrain.status", str(run_folder)],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    expected = "error: standard output cannot be written: No space left on device\n"
    assert (finished.returncode, finished.stderr) == (1, expected)


def test_every_command_prints_through_say():
    """So each of them ends quietly; see the tests above."""
    for command in COMMANDS:
        source = (ROOT / command.replace(".", "/")).with_suffix(".py").read_text()
        assert "run_command(" in source or "parse_arguments(" in source, command
    for package in ("data_prep", "pretrain", "eval"):
        for path in (ROOT / package).rglob("*.py"):
            if path != ROOT / "data_prep/command.py":
                assert "print(" not in re.sub(r"\w+print\(", "", path.read_text()), path
