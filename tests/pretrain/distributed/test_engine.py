import os

import pytest
import torch

from data_prep.errors import InputError
from pretrain.distributed.start import (
    check_engine,
    start_accelerator,
)
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    config = toy_config(tmp_path, tmp_path, engine={"device": "cuda"})
    with pytest.raises(InputError, match=r"engine\.device=cuda: torch finds no GPU"):
        start_accelerator(config.engine, run=config.run)


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    config = toy_config(tmp_path, tmp_path)
    run = config.run.model_copy(update={"trackers": ["wandb"]})
    config = config.model_copy(update={"run": run})
    with pytest.raises(InputError, match="wandb is not installed; pip install"):
        check_engine(config.engine, trackers=config.run.trackers)


def deterministic_step(config):
    """Returns the settings of torch after a run of two steps."""
    from pretrain.train import pretrain

    pretrain(config)
    return torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_deterministic_operators_are_asked_for_and_enough_to_train_with(toy_data, tmp_path):
    config = toy_config(
        toy_data, tmp_path / "run", engine={"deterministic": True}, schedule={"num_steps": 2}
    )
    assert run_in_processes(1, deterministic_step, config) == [(True, ":4096:8")]
