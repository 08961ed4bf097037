import random
from functools import partial
from statistics import median

import pytest

from pretrain.config import Watch
from pretrain.monitoring.anomalies import (
    Spike,
    SpikeDetector,
    StepWatch,
    reason_to_stop,
)
from pretrain.monitoring.timing import PhaseTimer, slowest_rank
from tests.pretrain.test_train import steps_of, train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config


def test_a_spike_is_far_above_the_median_of_the_values_before():
    values = [random.Random(step).uniform(1, 2) for step in range(300)]
    values[10] = values[90] = values[91] = 9.0  # the first comes before there is a level
    detector = SpikeDetector(factor=3, window=50)
    spikes = [detector.record(step, value) for step, value in enumerate(values)]
    found = [spike for spike in spikes if spike is not None]
    assert found == [Spike(step, 9.0, median(values[step - 50 : step])) for step in (90, 91)]


def test_skipped_steps_are_counted_over_the_last_ones():
    watch = Watch(on_non_finite="skip", max_skipped_steps=2, skip_window_steps=10)
    assert reason_to_stop(watch, skipped_steps=[3, 10, 11, 20]) is None
    assert "one of 3 within 10 steps" in reason_to_stop(watch, skipped_steps=[3, 11, 12, 20])
    assert reason_to_stop(Watch(), skipped_steps=[3]) == "watch.on_non_finite=stop"


def test_spikes_are_marked_and_said_also_right_after_a_resume():
    rows = [{"step": step, "total_loss": 1.0, "grad_norm": 2.0} for step in range(1, 30)]
    watch = StepWatch(Watch(), rows=[*rows, {"step": 30, "validation": {}}])
    assert watch.record(31, values={"total_loss": 1.5, "grad_norm": 2.0}, seconds=1.0) == []
    [line] = watch.record(32, values={"total_loss": 3.0, "grad_norm": 9.0}, seconds=1.0)
    assert line == "total_loss 3 is a spike: 3.0 times its median 1"
    spike = {"of": "total_loss", "step": 32, "value": 3.0, "median": 1.0}
    assert watch.take_row() == {"spikes": [spike]}
    assert watch.take_row() == {}


def test_steps_that_stay_slow_are_told_once_with_the_rank_that_makes_them_so():
    watch = StepWatch(Watch(slow_steps=5, slow_step_factor=2.0), rows=[])
    slowest = {"rank": 3, "host": "n2", "phase": "data", "seconds": 4.0, "mean_seconds": 1.5}
    told = []
    for step in range(1, 60):
        # A single slow step is nothing; of those from 40 on, each takes five times the usual.
        watch.record(step, values={}, seconds=5.0 if step == 30 or 40 <= step < 50 else 1.0)
        lines = watch.lines_on_pace({"data": 1.5, "forward": 0.5, "save": 0.0}, slowest)
        told += [(step, line) for line in lines]
    assert [step for step, _ in told] == [44, 50]
    assert told[0][1] == (
        "5 consecutive steps took more than 2 times the median of 1.00 s; seconds per step: "
        "data 1.50 s, forward 0.50 s; slowest is rank 3 on n2, in data: 4.00 s, mean over ranks "
        "1.50 s"
    )
    assert told[1][1] == "the pace of steps has recovered"


def test_the_slowest_rank_is_judged_by_its_own_work():
    waiting = {"data": 0.1, "forward": 1.0, "gather": 3.0, "backward": 2.0}
    late = {"data": 0.1, "forward": 3.5, "gather": 0.1, "backward": 2.0}
    phases = {"optimizer": 0.0, "validation": 0.0, "save": 0.0}
    slowest = slowest_rank([waiting | phases, late | phases, waiting | phases])
    assert (slowest.rank, slowest.phase, slowest.seconds) == (1, "forward", 3.5)
    assert slowest.mean_seconds == pytest.approx(5.5 / 3)
    assert slowest_rank([waiting]) is None


def train_with_a_late_rank(config):
    """Trains while rank 2 reads slowly at first, and rank 1 computes slowly later."""
    from pretrain.data.step_loader import StepLoader
    from pretrain.distributed.collectives import rank
    from pretrain.distributed.engine import Engine
    from pretrain.training import loop

    load, forward, step = StepLoader.load, Engine.forward, [0]
    seconds = [0.0]

    def clock():
        seconds[0] += 0.001
        return seconds[0]

    def slow_load(loader, number):
        step[0] = number + 1
        if rank() == 2 and number < 4:
            seconds[0] += 0.4
        return load(loader, number)

    def slow_forward(engine, *arguments, **options):
        if rank() == 1 and step[0] > 4:
            seconds[0] += 0.4
        return forward(engine, *arguments, **options)

    StepLoader.load, Engine.forward = slow_load, slow_forward
    loop.PhaseTimer = partial(PhaseTimer, clock=clock)
    train(config)


def test_the_rank_that_the_others_wait_for_is_named_with_what_it_does(toy_data, tmp_path):
    run_in_processes(3, train_with_a_late_rank, toy_config(toy_data, tmp_path / "run"))
    rows = steps_of(tmp_path / "run")[2:]
    told = [(row["slowest_rank"]["rank"], row["slowest_rank"]["phase"]) for row in rows]
    assert told == [(2, "data")] * 2 + [(1, "forward")] * 2
    for row in rows:
        seconds, slowest = row["seconds"], row["slowest_rank"]
        assert slowest["seconds"] >= 0.4 > slowest["mean_seconds"]
        assert seconds[slowest["phase"]] == slowest["mean_seconds"]
        assert all(seconds[name] > 0 for name in ("data", "forward", "gather", "backward"))
        assert slowest["host"]
