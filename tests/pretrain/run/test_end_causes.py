"""Causes of an attempt's end, from its ranks and from Slurm."""

import os
import signal

import pytest

from data_prep.errors import RunError
from pretrain.requeue import check_starts_without_attempt
from pretrain.run.attempts import claim_attempt, read_attempts, write_attempt
from pretrain.run.end_causes import causes_of_end, lost_nodes
from pretrain.status import main
from tests.pretrain.test_train import train
from tests.support.gloo_processes import ProcessGroup
from tests.support.toy_run import toy_config


def train_and_end(config, how):
    """Trains, and ends rank 1 at its third step."""
    from pretrain.distributed.collectives import rank
    from pretrain.training import loop

    take_step = loop.train_step

    def last_step(engine, objective, batch, **others):
        if rank() == 1 and batch.step == 2:
            if how == "raise":
                raise ValueError("no such picture")
            os.kill(os.getpid(), getattr(signal, how))
        return take_step(engine, objective, batch, **others)

    loop.train_step = last_step
    train(config)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", "ValueError: no such picture"),
        ("SIGKILL", "exited without a traceback (SIGKILL, out of memory, or node failure)"),
        ("SIGSEGV", "Fatal Python error: Segmentation fault"),
    ],
)
def test_the_cause_is_of_the_rank_that_died_first(toy_data, tmp_path, capsys, how, expected):
    folder = tmp_path / "run"
    outcomes = ProcessGroup(2, train_and_end, toy_config(toy_data, folder), how).outcomes()
    assert not any(is_done for is_done, _ in outcomes)
    [attempt] = attempts = read_attempts(folder)
    assert "another process died" in attempt.outcome  # all that rank 0 can know
    [cause] = causes_of_end(folder, attempts, 0)
    assert cause.startswith(f"rank 1 on {os.uname().nodename}: {expected}")
    assert main([str(folder)]) == 0
    assert cause in capsys.readouterr().out
    if how == "raise":
        [written] = (folder / "failures" / "0001").iterdir()
        assert 'raise ValueError("no such picture")' in written.read_text()


def claim(folder, **fields):
    return claim_attempt(
        folder,
        world_size=2,
        strategy="ddp",
        num_micro_batches=1,
        hosts=["node2", "node1"],
        **fields,
    )


def test_slurm_is_asked_for_the_machines_of_an_attempt_that_did_not_finish(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show node -o node1,node2" ] || exit 1\n'
        'echo "NodeName=node1 Arch=x86_64 State=IDLE ThreadsPerCore=1"\n'
        'echo "NodeName=node2 State=DOWN+NOT_RESPONDING Reason=Not responding [slurm@10:00] X=1"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    attempt = claim(tmp_path)
    environment = {"SLURM_JOB_ID": "7"}
    told = lost_nodes(read_attempts(tmp_path), environment)
    assert told == "node2 is DOWN+NOT_RESPONDING (Not responding [slurm@10:00])"
    assert lost_nodes(read_attempts(tmp_path), {}) is None
    claim(tmp_path, lost_machines=told)
    attempts = read_attempts(tmp_path)
    assert causes_of_end(tmp_path, attempts, 0) == [told]
    assert causes_of_end(tmp_path, attempts, 1) == []  # it runs
    attempt.outcome = "stopped"  # at the signal with which Slurm ended the job
    write_attempt(tmp_path, attempt)
    assert causes_of_end(tmp_path, read_attempts(tmp_path), 0) == [told]
    attempt.outcome = "finished"
    assert lost_nodes([attempt], environment) is None


def test_a_job_whose_starts_do_not_come_to_the_run_is_not_queued_for_ever(tmp_path):
    claim(tmp_path, job="7", job_restarts=1)
    attempts = read_attempts(tmp_path)
    for job, restarts in (("7", "3"), ("8", "1"), (None, "9")):
        environment = {"SLURM_RESTART_COUNT": restarts} | ({"SLURM_JOB_ID": job} if job else {})
        check_starts_without_attempt(attempts, environment)
    for job, restarts in (("7", "4"), ("8", "2")):
        environment = {"SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": job}
        with pytest.raises(
            RunError, match=f"last 3 starts of job {job} ended before the run started"
        ):
            check_starts_without_attempt(attempts, environment)
