"""Configs that an earlier version wrote, with keys that have been removed since."""

import pytest

from data_prep.config_file import read_config, read_stored_config, to_yaml
from data_prep.errors import ConfigError
from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.train import pretrain
from tests.support.toy_run import toy_config


def with_removed_key(config):
    """The config as a version with `loading.runtime` wrote it."""
    text = to_yaml(config)
    assert text.count("\nloading:\n") == 1
    return text.replace("\nloading:\n", "\nloading:\n  runtime: processes\n")


def test_a_run_begun_with_a_removed_key_goes_on_and_its_checkpoint_is_read(
    toy_data, tmp_path, monkeypatch
):
    def config(**run):
        return toy_config(toy_data, tmp_path / "run", run={"folder": tmp_path / "run"} | run)

    with monkeypatch.context() as earlier_version:
        for module in ("pretrain.checkpoint", "pretrain.stored_config"):
            earlier_version.setattr(f"{module}.to_yaml", with_removed_key)
        pretrain(config(stop_after_step=2))
    for path in (tmp_path / "run").rglob("config.yaml"):
        assert "  runtime: processes\n" in path.read_text()
    load_model(tmp_path / "run")
    pretrain(config(stop_after_step=3))


def test_a_removed_key_is_refused_in_a_users_config_and_left_out_of_a_stored_one(
    toy_data, tmp_path
):
    config = toy_config(toy_data, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(with_removed_key(config))
    assert read_stored_config(PretrainConfig, path) == config
    with pytest.raises(ConfigError, match=r"config\.yaml: loading: 'runtime' was removed: every"):
        read_config(PretrainConfig, path)
    path.write_text(to_yaml(config).replace("\nloading:\n", "\nloading:\n  runtimes: x\n"))
    with pytest.raises(ConfigError, match="unknown key 'runtimes'"):
        read_stored_config(PretrainConfig, path)
