"""Status of runs that are running, stopped, finished or silent."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from pretrain.status import in_words, main, read_status, status_lines
from pretrain.train import pretrain
from tests.support.toy_run import toy_config

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)


def write_run(folder, *, state, seconds_ago, attempts=({},)):
    """Writes a run of 1,000 steps of 64 samples, at step 400, with 3,200 samples per second."""
    (folder / "attempts").mkdir(parents=True)
    (folder / "metrics").mkdir()
    (folder / "config.yaml").write_text("engine: {timeout_seconds: 600}\nrun: {}\n")
    started = {"started": "2026-11-27T11:00:00+00:00", "world_size": 8, "strategy": "zero1"}
    started |= {"micro_batches": 1, "hosts": ["node1"] * 4 + ["node2"] * 4, "from_step": 0}
    for number, values in enumerate(attempts, start=1):
        row = started | {"attempt": f"{number:04d}"} | values
        (folder / "attempts" / f"{number:04d}.json").write_text(json.dumps(row))
    updated = (NOW - timedelta(seconds=seconds_ago)).isoformat()
    status = {"state": state, "attempt": f"{len(attempts):04d}", "step": 400, "num_steps": 1000}
    (folder / "status.json").write_text(json.dumps(status | {"updated": updated}))
    rows = [
        {
            "step": step,
            "samples_seen": 64 * step,
            "loss": {"image-text": 1.5},
            "samples_per_second": 3200.0,
            "data_wait_share": 0.02,
        }
        for step in range(10, 410, 10)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics" / f"{len(attempts):04d}.jsonl").write_text(content)
    return folder


def lines_of(folder):
    return status_lines(read_status(folder, at=NOW), at=NOW)


def test_a_run_that_lives_has_a_projected_end(tmp_path):
    stopped = {"outcome": "stopped", "stop_cause": "SIGUSR2", "to_step": 200}
    folder = write_run(
        tmp_path / "run", state="running", seconds_ago=5, attempts=(stopped, {"from_step": 200})
    )
    (folder / "checkpoints" / "step_00000300").mkdir(parents=True)
    lines = lines_of(folder)
    assert lines[0] == f"{folder}: running"
    # 600 steps at 50 a second.
    assert lines[1].startswith("  step 400 of 1,000 (40.0 %) as of 5 s ago; ends in 12 s, 2026-")
    assert lines[2] == "  image-text loss 1.5, 3,200 samples/s, waiting for data 2 %"
    assert lines[3] == "  checkpoints: step 300"
    assert lines[4] == "attempts: 2"
    assert lines[5].endswith(
        "8 processes, zero1, on node1, node2: steps 0 to 200, stopped by SIGUSR2"
    )
    assert lines[6].endswith("steps 200 to ..., running")


@pytest.mark.parametrize(
    ("seconds_ago", "attempts", "expected"),
    [
        (890, ({},), "running"),
        (910, ({},), "silent: attempt 0001 has written nothing for 15 min 10 s: its nodes"),
        (10, ({"outcome": "failed: ValueError('x')"},), "failed: ValueError('x')"),
        (10, ({"outcome": "stopped", "stop_cause": "STOP"},), "stopped: by STOP"),
        (10, (), "not started: no attempt has claimed the run"),
    ],
)
def test_the_state_is_that_of_the_newest_attempt(tmp_path, seconds_ago, attempts, expected):
    folder = write_run(
        tmp_path / "run", state="running", seconds_ago=seconds_ago, attempts=attempts
    )
    assert lines_of(folder)[0].startswith(f"{folder}: {expected}")


def test_an_attempt_that_has_done_no_step_is_starting(tmp_path):
    begun = {"started": (NOW - timedelta(minutes=2)).isoformat(), "from_step": None}
    folder = write_run(tmp_path / "run", state="stopped", seconds_ago=3600, attempts=({}, begun))
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"attempt": "0001"}))
    lines = lines_of(folder)
    assert lines[0] == f"{folder}: starting: attempt 0002 has not finished a step yet"
    assert "; ends" not in lines[1]
    assert lines[-1].endswith("node2: no step, running")


def test_a_real_run_is_told_of_without_torch(toy_data, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = {"schedule": {"num_steps": 4, "warmup_steps": 0}}
    pretrain(toy_config(toy_data, folder, run={"stop_after_step": 2}, **settings))
    assert main([str(folder)]) == 0
    assert "stopped" in capsys.readouterr().out
    pretrain(toy_config(toy_data, folder, **settings))
    code = (
        "import sys; from pretrain.status import main; status = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code]
    finished = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == f"{folder}: finished"
    assert "step 4 of 4 (100.0 %)" in lines[1]
    assert [line.split(": ")[-1].split(",")[0] for line in lines[-2:]] == [
        "steps 0 to 2",
        "steps 2 to 4",
    ]
    finished = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "expected a run folder, found no config.yaml" in finished.stderr


def test_spans_of_time_are_told_in_two_units():
    spans = {5: "5 s", 65: "1 min 5 s", 7200: "2 h", 100_000: "1 d 3 h", -3: "0 s"}
    assert {s: in_words(timedelta(seconds=s)) for s in spans} == spans
