"""Ranks that hang: every one ends, and writes its stacks if it can."""

import os
import re
import signal
import socket
import time

import pytest

from pretrain.monitoring.hang_watch import HangWatch
from pretrain.run.attempts import read_attempts
from pretrain.run.end_causes import causes_of_end
from tests.pretrain.run.test_fencing import train_and_freeze, wait_until_frozen
from tests.pretrain.test_train import train
from tests.support.gloo_processes import ProcessGroup
from tests.support.toy_run import toy_config

TIMEOUT_SECONDS = 16  # a step of a healthy run is far shorter, also on a slow machine


def train_and_sleep(config):
    """Trains, and lets rank 1 wait for its data without end from the third step on."""
    from pretrain.data.step_loader import StepLoader
    from pretrain.distributed.collectives import rank

    load = StepLoader.load

    def sleepless_load(loader, number):
        if rank() == 1 and number == 2:
            time.sleep(1000)
        return load(loader, number)

    StepLoader.load = sleepless_load
    train(config)


def test_no_rank_stays_for_ever_and_each_says_where_it_is(toy_data, tmp_path):
    engine = {"timeout_seconds": TIMEOUT_SECONDS}
    config = toy_config(toy_data, tmp_path / "run", engine=engine)
    [first, second] = ProcessGroup(2, train_and_sleep, config).outcomes()
    assert "LostPeerError: step 3: another process died, or did not respond within" in first[1]
    assert second == (False, "rank 1 exited without a traceback")  # it ended itself
    stacks = tmp_path / "run" / "stacks" / "0001"
    for number, function in ((0, "compute_losses"), (1, "sleepless_load")):
        written = (stacks / f"rank_{number:05d}.txt").read_text()
        head = rf"rank {number} on {re.escape(socket.gethostname())}\nno step ended for (\d+) s\n"
        assert int(re.match(head, written)[1]) >= 0.8 * TIMEOUT_SECONDS
        assert function in written
    [attempt] = read_attempts(tmp_path / "run")
    assert (attempt.to_step, attempt.outcome[:23]) == (2, "failed: LostPeerError('")
    # Rank 0 waited for rank 1, which hung: the causes name both places.
    [cause] = causes_of_end(tmp_path / "run", [attempt], 0)
    assert re.search(r"no step ended for \d+ s", cause)
    assert "(and 1 other ranks)" in cause


@pytest.mark.slow
def test_a_frozen_rank_frees_the_others_and_ends_when_it_wakes(toy_data, tmp_path):
    engine = {"timeout_seconds": TIMEOUT_SECONDS}
    config = toy_config(toy_data, tmp_path / "run", engine=engine)
    group = ProcessGroup(2, train_and_freeze, config, 3)
    wait_until_frozen(group.pids[0])
    assert group.pipes[1].poll(600)
    os.kill(group.pids[0], signal.SIGCONT)
    [first, second] = group.outcomes()
    assert not first[0]
    assert "LostPeerError: step 3: another process died, or did not respond within" in second[1]
    assert "compute_losses" in (tmp_path / "run/stacks/0001/rank_00001.txt").read_text()


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_signs_of_life_keep_it_quiet_and_nothing_is_left_behind(tmp_path):
    clock, limits = Clock(), {"timeout_seconds": 500, "start_timeout_seconds": 500}
    with HangWatch(tmp_path, "0001", **limits, clock=clock) as watch:
        for _ in range(8):
            clock.seconds += 100
            assert watch.check() == 300  # until 0.8 of the time-out
            watch.heartbeat()
    assert not list((tmp_path / "stacks" / "0001").iterdir())


def test_a_start_may_take_longer_than_a_step(tmp_path):
    clock, limits = Clock(), {"timeout_seconds": 300, "start_timeout_seconds": 60_000}
    with HangWatch(tmp_path, "0001", **limits, clock=clock) as watch:
        clock.seconds += 600
        assert watch.check() == 240  # by then the limit may be that of a step
        assert watch.timeout_key == "engine.start_timeout_seconds"
        assert "no step ended" not in watch.path.read_text()
        watch.heartbeat()
        assert watch.timeout_key == "engine.timeout_seconds"
        clock.seconds += 350
        for _ in range(2):
            assert watch.check() == 30
        watch.heartbeat(is_slow=True)
        clock.seconds += 600
        watch.check()
        assert watch.path.read_text().count("no step ended") == 1
