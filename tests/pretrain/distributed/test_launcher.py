import os
import stat

import pytest

from data_prep.errors import InputError
from pretrain.distributed.launcher import (
    adopt_environment,
    adopt_slurm_environment,
    refuse_lone_start,
    refuse_unfit_processes,
)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that expands every node list to two hosts."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nprintf 'node3\\nnode4\\n'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_srun_alone_is_enough(scontrol):
    environment = dict(SRUN)
    adopt_slurm_environment(environment)
    assert {key: environment[key] for key in environment.keys() - SRUN.keys()} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "20812",
    }


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0", **SRUN}, {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}],
    ids=["no Slurm", "a launcher inside srun", "the batch script itself"],
)
def test_otherwise_the_environment_is_left_alone(environment):
    adopted = dict(environment)
    adopt_slurm_environment(adopted)
    assert adopted == environment


def test_accelerate_launch_that_starts_one_process_of_several_is_refused():
    environment = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(InputError, match="asked for several processes and has started one"):
        refuse_lone_start(environment)
    refuse_lone_start(environment | {"RANK": "0"})
    refuse_lone_start({"ACCELERATE_USE_CPU": "True"})  # one was asked for


def test_one_process_can_be_a_group_and_one_of_many_is_not_changed():
    environment = {}
    adopt_environment(environment, needs_group=False)
    assert environment == {}
    adopt_environment(environment, needs_group=True)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    launched = {"RANK": "1", "WORLD_SIZE": "2"}
    adopt_environment(launched, needs_group=True)
    assert launched == {"RANK": "1", "WORLD_SIZE": "2"}


FITTING = {
    "strategy": "zero2",
    "device": ("cpu", "cpu"),
    "num_processes": (2, 2),
    "distributed_type": "DEEPSPEED",
    "accumulation_steps": 1,
}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"num_processes": (2, 1)}, "WORLD_SIZE=2 processes, Accelerate sees 1; start with"),
        ({"accumulation_steps": 4}, "gradient_accumulation_steps=4 .*; unset it"),
        (
            {"distributed_type": "MULTI_CPU"},
            "distributed_type=MULTI_CPU; expected one of DEEPSPEED",
        ),
        ({"strategy": "ddp"}, "distributed_type=DEEPSPEED; expected one of NO, MULTI_CPU"),
        ({"device": ("cpu", "cuda")}, "engine.device=cpu .* uses cuda; hide the GPUs"),
    ],
)
def test_processes_that_would_take_another_gradient_are_refused(found, expected):
    refuse_unfit_processes(**FITTING)
    with pytest.raises(InputError, match=expected):
        refuse_unfit_processes(**FITTING | found)
