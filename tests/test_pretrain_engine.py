import pytest
from toy_run import toy_config

from data_prep.config_file import InputError
from pretrain.engine import check_engine, start_accelerator


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
