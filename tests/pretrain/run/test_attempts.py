import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from pretrain.checkpoint import newest_checkpoint
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.store import open_store
from pretrain.run.attempts import (
    SupersededError,
    claim_attempt,
    read_attempts,
    read_metrics,
    restarts_of_job,
    write_attempt,
)
from pretrain.run.folder import RunFolder
from tests.support.toy_state import ToyEngine, writer_of


def claim(folder, *, from_step=None, outcome="running"):
    attempt = claim_attempt(
        folder, world_size=1, strategy="ddp", num_micro_batches=1, hosts=["b", "a", "b"]
    )
    attempt.from_step, attempt.outcome = from_step, outcome
    write_attempt(folder, attempt)
    return attempt


def write_rows(folder, attempt, rows):
    (folder / "metrics").mkdir(exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics" / f"{attempt.attempt}.jsonl").write_text(content)


def run_of(folder, attempt):
    return RunFolder(folder, attempt, num_steps=6, is_writer=True)


def test_attempts_that_start_at_once_never_share_a_number(tmp_path):
    with ThreadPoolExecutor(16) as threads:
        claimed = list(threads.map(lambda _: claim(tmp_path).attempt, range(64)))
    assert sorted(claimed) == [f"{number:04d}" for number in range(1, 65)]
    assert [each.attempt for each in read_attempts(tmp_path)] == sorted(claimed)


def test_an_attempt_that_died_is_told_from_one_that_runs(tmp_path):
    claim(tmp_path, outcome="stopped")
    claim(tmp_path)
    (tmp_path / "attempts" / "0003.json").touch()  # died as it claimed
    claim(tmp_path)
    told = [(each.attempt, each.outcome) for each in read_attempts(tmp_path)]
    assert told == [("0001", "stopped"), ("0002", "did not end"), ("0004", "running")]
    assert read_attempts(tmp_path)[0].hosts == ["a", "b"]


def test_rows_count_up_to_the_step_from_which_a_newer_attempt_began(tmp_path):
    """Reads four attempts: the second resumed before the first's last checkpoint, and died at once;
    the third began late; the fourth has only just started."""
    first, second, third, _ = (claim(tmp_path, from_step=step) for step in (0, 4, 5, None))
    for attempt, steps in ((first, range(1, 9)), (second, (5, 6)), (third, (6, 7))):
        rows = [{"step": step, "by": attempt.attempt} for step in steps]
        write_rows(
            tmp_path, attempt, [*rows, {"step": steps[-1], "validation": {attempt.attempt: {}}}]
        )
    counted = [(row["step"], row.get("by")) for row in read_metrics(tmp_path)]
    by_first = [(step, "0001") for step in (1, 2, 3, 4)]
    assert counted == [*by_first, (5, "0002"), (6, "0003"), (7, "0003"), (7, None)]


def test_an_older_attempt_says_nothing_more_and_its_late_checkpoint_does_not_count(tmp_path):
    old = run_of(tmp_path, claim(tmp_path, from_step=0))
    old.write_status("running")
    old.refuse_if_superseded()
    assert not old.is_superseded()
    for step in (10, 15):
        writer = writer_of(ToyEngine(seed=step), tmp_path / "checkpoints", attempt="0001")
        writer.save(RunState(step, num_updates=step))
        writer.finish()
    new = run_of(tmp_path, claim(tmp_path, from_step=10))
    new.write_status("running")
    old.write_status("failed")
    assert json.loads((tmp_path / "status.json").read_text())["attempt"] == "0002"
    assert old.is_superseded()
    with pytest.raises(SupersededError, match="attempt 0001 was still running"):
        old.refuse_if_superseded()
    store = open_store(tmp_path / "checkpoints")
    assert newest_checkpoint(store).record.state.step == 15
    assert newest_checkpoint(store, is_of_run=new.includes_checkpoint).record.state.step == 10


def test_how_an_attempt_ended_is_written_down(tmp_path):
    run = run_of(tmp_path, claim(tmp_path))
    with pytest.raises(ZeroDivisionError), run.recorded():
        run.begin_from(3, has_checkpoint=True)
        raise ZeroDivisionError
    [attempt] = read_attempts(tmp_path)
    assert (attempt.from_step, attempt.to_step) == (3, 3)
    assert attempt.outcome == "failed: ZeroDivisionError()"
    run = run_of(tmp_path, claim(tmp_path))
    with run.recorded():
        run.begin_from(3, has_checkpoint=True)
        run.num_steps_done, run.stop_cause = 6, "SIGTERM"  # the last, but not validated
    attempt = read_attempts(tmp_path)[1]
    assert (attempt.outcome, attempt.stop_cause) == ("stopped", "SIGTERM")


def test_slurm_counts_no_restart_of_a_job_that_never_restarted():
    assert restarts_of_job({"SLURM_RESTART_COUNT": "2"}) == 2
    for environment in ({}, {"SLURM_RESTART_COUNT": ""}, {"SLURM_RESTART_COUNT": "0"}):
        assert restarts_of_job(environment) == 0
