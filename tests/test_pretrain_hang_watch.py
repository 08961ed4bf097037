"""Ranks that hang: none stays for ever, and all that can say where they are."""

import os
import signal
import time

import pytest
from gloo_processes import ProcessGroup
from test_pretrain_fencing import train_and_freeze, wait_until_frozen
from test_pretrain_train import train
from toy_run import toy_config

from pretrain.attempts import read_attempts
from pretrain.hang_watch import HangWatch

TIMEOUT_SECONDS = 8


def train_and_sleep(config):
    """Rank 1 waits for its data for ever, from the third step on."""
    from pretrain.gather import rank
    from pretrain.pair_loader import StepDataset

    load = StepDataset.load

    def sleepless_load(dataset, number):
        if rank() == 1 and number == 2:
            time.sleep(1000)
        return load(dataset, number)

    StepDataset.load = sleepless_load
    train(config)


def test_no_rank_stays_for_ever_and_each_says_where_it_is(toy_data, tmp_path):
    engine = {"timeout_seconds": TIMEOUT_SECONDS}
    config = toy_config(toy_data, tmp_path / "run", engine=engine)
    [first, second] = ProcessGroup(2, train_and_sleep, config).outcomes()
    assert "RunError: step 3: another process died, or did not come within" in first[1]
    assert second == (False, "rank 1 died without a word")  # it ended itself
    stacks = tmp_path / "run" / "stacks" / "0001"
    for number, function in ((0, "take_losses"), (1, "sleepless_load")):
        written = (stacks / f"rank_{number:05d}.txt").read_text()
        assert written.startswith("no step ended for 6 s\n")
        assert function in written
    [attempt] = read_attempts(tmp_path / "run")
    assert (attempt.to_step, attempt.outcome[:18]) == (2, "failed: RunError('")


@pytest.mark.slow
def test_a_frozen_rank_frees_the_others_and_ends_when_it_wakes(toy_data, tmp_path):
    engine = {"timeout_seconds": TIMEOUT_SECONDS}
    config = toy_config(toy_data, tmp_path / "run", engine=engine)
    group = ProcessGroup(2, train_and_freeze, config, 3)
    wait_until_frozen(group.pids[0])
    group.pipes[1].poll(3 * TIMEOUT_SECONDS)
    os.kill(group.pids[0], signal.SIGCONT)
    [first, second] = group.outcomes()
    assert not first[0]
    assert "RunError: step 3: another process died, or did not come within" in second[1]
    assert "take_losses" in (tmp_path / "run/stacks/0001/rank_00001.txt").read_text()


def test_signs_of_life_keep_it_quiet_and_nothing_is_left_behind(tmp_path):
    with HangWatch(tmp_path, "0001", timeout_seconds=0.5) as watch:
        for _ in range(8):
            time.sleep(0.1)
            watch.sign_of_life()
    assert not list((tmp_path / "stacks" / "0001").iterdir())
