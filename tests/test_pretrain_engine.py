import os
import stat

import pytest
from toy_run import toy_config

from data_prep.config_file import InputError
from pretrain.engine import check_engine, start_accelerator
from pretrain.launcher import adopt_slurm_environment


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


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    config = toy_config(tmp_path, tmp_path, engine={"device": "cuda"})
    with pytest.raises(InputError, match=r"engine\.device=cuda: torch sees no GPU"):
        start_accelerator(config)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    config = toy_config(tmp_path, tmp_path)
    run = config.run.model_copy(update={"trackers": ["wandb"]})
    config = config.model_copy(update={"run": run})
    with pytest.raises(InputError, match="wandb is not installed; pip install"):
        check_engine(config)
