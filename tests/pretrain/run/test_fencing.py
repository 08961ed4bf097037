"""Two attempts alive at once at one run: the older was lost from the network, and comes back."""

import json
import os
import signal
import time
from pathlib import Path

from pretrain.checkpoints.record import read_record
from pretrain.run.attempts import read_attempts
from tests.pretrain.test_train import assert_same_run, train
from tests.support.gloo_processes import ProcessGroup, run_in_processes
from tests.support.toy_run import toy_config

STEPS = {"num_steps": 8, "warmup_steps": 2}


def train_and_freeze(config, step):
    """Trains, and freezes rank 0 before a step; training waits for earlier checkpoints."""
    from pretrain.checkpoints.writer import CheckpointWriter
    from pretrain.training import loop

    take_step, begin_save = loop.train_step, CheckpointWriter.save

    def freezing_step(engine, objective, batch, **others):
        if batch.step + 1 == step and engine.is_main_process:
            os.kill(os.getpid(), signal.SIGSTOP)
        return take_step(engine, objective, batch, **others)

    def save(writer, state):
        begin_save(writer, state)
        writer.finish()

    loop.train_step, CheckpointWriter.save = freezing_step, save
    train(config)


def wait_until_frozen(pid):
    while (state := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
        assert state in "RSD", f"process {pid} ended before it froze"
        time.sleep(0.05)


def test_the_older_of_two_attempts_stops_and_leaves_no_trace(toy_data, tmp_path):
    config, whole = (
        toy_config(toy_data, tmp_path / name, schedule=STEPS, run={"checkpoint_every_steps": 3})
        for name in ("run", "whole")
    )
    older = ProcessGroup(2, train_and_freeze, config, 6)
    wait_until_frozen(older.pids[0])
    run_in_processes(1, train, config)
    ended = (tmp_path / "run" / "status.json").read_bytes()
    os.kill(older.pids[0], signal.SIGCONT)
    for is_done, told in older.outcomes():
        assert not is_done
        assert "SupersededError" in told
        assert "a newer attempt at this run began while attempt 0001 was still running" in told
    attempts = read_attempts(tmp_path / "run")
    seen = [(each.attempt, each.from_step, each.to_step, each.outcome) for each in attempts]
    assert seen == [("0001", 0, 6, "superseded"), ("0002", 3, 8, "finished")]
    assert (tmp_path / "run" / "status.json").read_bytes() == ended
    assert json.loads(ended)["state"] == "finished"
    # The result is that of a run by one process which was sent back to step 3.
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    told = [
        (read_record(path).state.step, read_record(path).written_by["attempt"])
        for path in checkpoints
    ]
    assert told == [(3, "0001"), (6, "0002"), (8, "0002")]
    run_in_processes(1, train, whole)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
