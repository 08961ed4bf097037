import os
import signal
import subprocess
import sys

import pytest
import torch
from gloo_processes import run_in_processes
from test_pretrain_train import STEPS, assert_same_run, steps_of, train
from toy_run import toy_config

from pretrain.run_folder import read_rows
from pretrain.run_requests import Request, RunRequests

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_former_handlers_come_back(tmp_path, number):
    before = signal.getsignal(number)
    with RunRequests(tmp_path) as requests:
        assert requests.agreed(device=CPU) == Request()
        os.kill(os.getpid(), number)
        assert requests.agreed(device=CPU) == Request(stop_cause=number.name)
    assert signal.getsignal(number) == before


def test_files_are_heeded_once_and_only_where_they_are_looked_for(tmp_path):
    clock = Clock()
    requests = RunRequests(tmp_path, clock=clock)
    elsewhere = RunRequests(tmp_path, clock=clock, looks_at_files=False)
    (tmp_path / "SAVE").touch()
    (tmp_path / "STOP").touch()
    assert requests.agreed(device=CPU) == Request()  # no look at every step
    clock.now = 1.0
    request = requests.agreed(device=CPU)
    assert request == Request(saves=True, stop_cause="file STOP")
    assert elsewhere.agreed(device=CPU) == Request()
    requests.heeded(request)
    assert not list(tmp_path.iterdir())
    clock.now = 2.0
    assert requests.agreed(device=CPU) == Request()


def test_the_clock_asks_for_a_save_every_so_many_minutes_since_the_last(tmp_path):
    clock = Clock()
    requests = RunRequests(tmp_path, save_every_minutes=2, clock=clock)
    due = []
    for second in range(0, 421, 30):
        clock.now = float(second)
        request = requests.agreed(device=CPU)
        if request.saves or second == 150:  # then a save for another reason
            requests.heeded(request)
            due.append((second, request.saves))
    assert due == [(120, True), (150, False), (270, True), (390, True)]


def test_a_second_sigterm_ends_the_process_at_once(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pretrain.run_requests import RunRequests\n"
        "with RunRequests(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('never')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "goes on\n")


# --------------------------------------------------------------------------------- whole runs


def train_and_hear(config, step, number):
    """Rank 1 alone hears a signal while it takes the step; with step 0, before its start."""
    import pretrain.train as training

    take_step, start = training.train_step, training.start_accelerator

    def hearing_step(config, engine, batch, *others):
        if batch.step + 1 == step and engine.accelerator.process_index == 1:
            os.kill(os.getpid(), number)
        return take_step(config, engine, batch, *others)

    def hearing_start(config):
        if step == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)
        return start(config)

    training.train_step, training.start_accelerator = hearing_step, hearing_start
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
    attempts = read_rows(folder / "attempts.jsonl")
    seen = [(row["to_step"], row["outcome"], row.get("stop_cause")) for row in attempts]
    assert seen[:2] == [(7, "stopped", "SIGUSR2"), (7, "stopped", "SIGTERM")]
    if seen[2][1] == "stopped":  # a second had passed before the last step
        assert seen[2][2] == "file STOP"
        assert not (folder / "STOP").exists()
        run_in_processes(1, train, config)
    assert_same_run(folder, tmp_path / "whole")
