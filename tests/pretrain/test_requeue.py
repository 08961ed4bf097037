"""Requeueing: which runs continue and which do not."""

from dataclasses import replace

import pytest

from data_prep.config_file import to_yaml
from data_prep.errors import RunError
from pretrain.requeue import main, reason_to_continue
from pretrain.run.attempts import Attempt, write_attempt
from tests.support.toy_run import toy_config


def attempt(number, outcome, *, steps=(0, 10), stop_cause=None):
    return Attempt(
        attempt=f"{number:04d}",
        started="2026-11-27T12:00:00+00:00",
        world_size=2,
        strategy="ddp",
        num_micro_batches=1,
        hosts=["node1", "node2"],
        from_step=steps[0],
        to_step=steps[1],
        outcome=outcome,
        stop_cause=stop_cause,
    )


STUCK = attempt(1, "failed: OSError()", steps=(10, 10))
DIED_EARLY = attempt(1, "did not end", steps=(None, None))


def reason_of(attempts):
    """Returns the reason, with a checkpoint at the last step of all attempts."""
    return reason_to_continue(
        attempts, last_checkpoint=max((a.to_step or 0 for a in attempts), default=0)
    )


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([attempt(1, "stopped", stop_cause="SIGUSR2")], "stopped by SIGUSR2 at step 10"),
        ([attempt(1, "stopped", stop_cause="SIGTERM", steps=(5, 5))], "stopped by SIGTERM"),
        ([attempt(1, "failed: RuntimeError('a peer died')")], "attempt 0001: failed: Runtime"),
        ([attempt(1, "running")], "attempt 0001: running"),  # was killed
        ([STUCK, STUCK], "failed: OSError"),
        ([STUCK, attempt(2, "running", steps=(10, 20)), DIED_EARLY], "did not end"),
    ],
)
def test_a_run_that_may_come_further_goes_on(attempts, reason):
    assert reason in reason_of(attempts)


@pytest.mark.parametrize(
    ("attempts", "reason"),
    [
        ([], "no attempt has claimed the run"),
        ([attempt(1, "finished")], "has finished"),
        ([attempt(1, "superseded")], "a newer attempt is running"),
        ([attempt(1, "stopped", stop_cause="file STOP")], "was stopped by file STOP"),
        ([attempt(1, "stopped")], "was stopped by its config"),
        (
            [attempt(1, "failed: DivergedError('step 5: loss of image-text is nan')")],
            "cannot continue without a change",
        ),
        ([STUCK, DIED_EARLY, STUCK], "none of the last 3 attempts saved a later step"),
        ([attempt(n, "stopped", stop_cause="SIGTERM", steps=(5, 5)) for n in range(4)], "none of"),
    ],
)
def test_a_run_that_cannot_or_shall_not_go_on_does_not(attempts, reason):
    with pytest.raises(RunError, match=reason):
        reason_of(attempts)


@pytest.mark.parametrize(
    ("outcomes", "status", "printed"),
    [
        (("failed: OSError()",), 0, "requeued: attempt 0001: failed: OSError()"),
        (("stopped", "finished"), 3, "not requeued: the run has finished"),
        (("superseded",), 1, "not requeued: a newer attempt is running"),
        ((), 1, "not requeued: no attempt has claimed the run"),
    ],
)
def test_the_command_answers_by_its_exit_status(
    toy_data, tmp_path, monkeypatch, capsys, outcomes, status, printed
):
    config = toy_config(toy_data, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    for number, outcome in enumerate(outcomes, start=1):
        write_attempt(tmp_path / "run", attempt(number, outcome))
    arguments = ["requeue", str(tmp_path / "config.yaml")]
    monkeypatch.setattr("sys.argv", arguments)
    try:
        ended = main()
    except SystemExit as end:
        ended = end.code
    assert ended == status
    assert printed in capsys.readouterr().out


def test_a_job_that_came_to_no_attempt_has_not_finished_the_run(
    toy_data, tmp_path, monkeypatch, capsys
):
    config = toy_config(toy_data, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    write_attempt(tmp_path / "run", replace(attempt(1, "finished"), job="7", job_restarts=1))
    monkeypatch.setattr("sys.argv", ["requeue", str(tmp_path / "config.yaml")])
    for job, restarts, status in (("7", "1", 3), ("7", "2", 1), ("8", "1", 1)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == status
    assert "not requeued: the run has finished" in capsys.readouterr().out


def test_a_fork_is_asked_for_itself(toy_data, tmp_path, monkeypatch, capsys):
    config = toy_config(toy_data, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    write_attempt(tmp_path / "run", attempt(1, "finished"))
    arguments = ["requeue", str(tmp_path / "config.yaml"), "run.fork=true", "seed=7"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        main()
    assert "_fork_" in capsys.readouterr().out


def test_progress_is_what_was_saved():
    killed = [attempt(n, "did not end", steps=(100 * n, None)) for n in range(1, 4)]
    assert "did not end" in reason_to_continue(killed, last_checkpoint=400)
    again = [attempt(n, "failed: OSError()", steps=(100, 150)) for n in range(3)]
    with pytest.raises(RunError, match="none of the last 3 attempts saved a later step"):
        reason_to_continue(again, last_checkpoint=100)
