import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_prep.config_file import to_yaml
from pretrain.run.attempts import read_attempts, read_metrics
from pretrain.run.requests import Request, RunRequests
from tests.pretrain.test_train import STEPS, assert_same_run, steps_of, train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_requests_a_stop_and_previous_handlers_are_restored(tmp_path, number):
    before = signal.getsignal(number)
    with RunRequests(tmp_path) as requests:
        assert requests.all_reduce(device=CPU) == Request()
        os.kill(os.getpid(), number)
        assert requests.all_reduce(device=CPU) == Request(stop_cause=number.name)
    assert signal.getsignal(number) == before


def test_files_are_acknowledged_once_and_only_where_they_are_looked_for(tmp_path):
    clock = Clock()
    requests = RunRequests(tmp_path, clock=clock)
    elsewhere = RunRequests(tmp_path, clock=clock, polls_files=False)
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    assert requests.all_reduce(device=CPU) == Request()  # no look at every step
    clock.now = 1.0
    request = requests.all_reduce(device=CPU)
    assert request == Request(saves=True, stop_cause="file STOP")
    assert elsewhere.all_reduce(device=CPU) == Request()
    requests.acknowledge(request)
    assert not list(tmp_path.iterdir())
    clock.now = 2.0
    assert requests.all_reduce(device=CPU) == Request()


def test_the_clock_asks_for_a_save_every_so_many_minutes_since_the_last(tmp_path):
    clock = Clock()
    requests = RunRequests(tmp_path, save_every_minutes=2, clock=clock)
    due = []
    for second in range(0, 421, 30):
        clock.now = float(second)
        request = requests.all_reduce(device=CPU)
        if request.saves or second == 150:  # then a save for another reason
            requests.acknowledge(request)
            due.append((second, request.saves))
    assert due == [(120, True), (150, False), (270, True), (390, True)]


def test_a_second_sigterm_ends_the_process_at_once(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pretrain.run.requests import RunRequests\n"
        "with RunRequests(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('never')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "goes on\n")


# --------------------------------------------------------------------------------- whole runs


def train_and_hear(config, step, number):
    """Trains, and sends rank 1 alone a signal during a step; with step 0, before its start."""
    from pretrain import train as starting
    from pretrain.training import loop

    take_step, start = loop.train_step, starting.start_accelerator

    def hearing_step(engine, objective, batch, **others):
        if batch.step + 1 == step and engine.accelerator.process_index == 1:
            os.kill(os.getpid(), number)
        return take_step(engine, objective, batch, **others)

    def hearing_start(*arguments, **others):
        if step == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return start(*arguments, **others)

    loop.train_step, starting.start_accelerator = hearing_step, hearing_start
    train(config)


def test_one_rank_that_hears_a_signal_stops_all_and_the_run_goes_on_as_if_it_had_not(
    toy_data, tmp_path
):
    run_in_processes(1, train, toy_config(toy_data, tmp_path / "whole", schedule=STEPS))
    folder = tmp_path / "run"
    config = toy_config(toy_data, folder, schedule=STEPS)
    run_in_processes(2, train_and_hear, config, 7, signal.SIGUSR2)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000007"]
    run_in_processes(2, train_and_hear, config, 0, signal.SIGTERM)
    assert len(steps_of(folder)) == 7
    (folder / "STOP").touch()
    run_in_processes(1, train, config)
    attempts = read_attempts(folder)
    seen = [(each.to_step, each.outcome, each.stop_cause) for each in attempts]
    assert seen[:2] == [(7, "stopped", "SIGUSR2"), (7, "stopped", "SIGTERM")]
    if seen[2][1] == "stopped":  # a second had passed before the last step
        assert seen[2][2] == "file STOP"
        assert not (folder / "STOP").exists()
        run_in_processes(1, train, config)
    assert_same_run(folder, tmp_path / "whole")


def catches(process, number):
    """Returns whether a process has a handler for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status).group(1), 16) >> (number - 1) & 1


def test_a_signal_that_comes_during_imports_is_not_lost(toy_data, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(to_yaml(toy_config(toy_data, folder)))
    command = [sys.executable, "-m", "pretrain.train", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not catches(process, signal.SIGUSR2):
            time.sleep(0.005)
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR2)
        _, told = process.communicate()
    assert process.returncode == 0, told
    [attempt] = read_attempts(folder)
    assert (attempt.to_step, attempt.outcome, attempt.stop_cause) == (0, "stopped", "SIGUSR2")


def train_and_hear_in_validation(config):
    """Trains, and sends rank 1 a signal in the second batch of a validation."""
    from pretrain.distributed.collectives import rank
    from pretrain.training import validation

    inputs_of = validation._objective_inputs
    calls = []

    def hearing_inputs(*arguments):
        calls.append(None)
        if rank() == 1 and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs_of(*arguments)

    validation._objective_inputs = hearing_inputs
    train(config)


def test_a_signal_within_validation_stops_it_and_the_next_attempt_validates_first(
    toy_data, tmp_path
):
    validation = {
        "every_steps": 3,
        "streams": {"image-text": {"dataset": toy_data / "more_colors", "batch_size": 10}},
    }
    sections = {"schedule": {"num_steps": 6, "warmup_steps": 2}, "validation": validation}
    config = toy_config(toy_data, tmp_path / "run", **sections)
    run_in_processes(2, train_and_hear_in_validation, config)
    [attempt] = read_attempts(tmp_path / "run")
    assert (attempt.to_step, attempt.outcome, attempt.stop_cause) == (3, "stopped", "SIGTERM")
    assert all("validation" not in row for row in read_metrics(tmp_path / "run"))
    run_in_processes(2, train_and_hear_in_validation, config)  # at once, before any step
    run_in_processes(1, train, config)
    rows = read_metrics(tmp_path / "run")
    told = [(row["step"], "validation" in row) for row in rows]
    assert told == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (6, 0), (6, 1)]
    assert [each.to_step for each in read_attempts(tmp_path / "run")] == [3, 3, 6]
    run_in_processes(1, train, toy_config(toy_data, tmp_path / "whole", **sections))
    whole = read_metrics(tmp_path / "whole")
    for row, expected in zip(rows, whole, strict=True):
        if "validation" in row:
            key = "image-text/image-text"
            figures = pytest.approx(expected["validation"][key], rel=1e-4)
            assert row["validation"][key] == figures
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert_tracked_once(tmp_path / "run", rows)


def assert_tracked_once(folder, rows):
    """Asserts that TensorBoard shows each row once, although attempts overlapped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "isopair")).Reload()
    losses = [(row["step"], row["total_loss"]) for row in rows if "validation" not in row]
    shown = [(event.step, event.value) for event in events.Scalars("total_loss")]
    assert [step for step, _ in shown] == [step for step, _ in losses]
    assert [value for _, value in shown] == pytest.approx([loss for _, loss in losses])
    validations = events.Scalars("validation/image-text/image-text/loss")
    assert [event.step for event in validations] == [3, 6]
