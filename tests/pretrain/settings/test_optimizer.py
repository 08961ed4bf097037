"""Settings of optimizers: defaults by name, options, and what an engine can run."""

import pytest
from pydantic import TypeAdapter

from pretrain.config import PretrainConfig
from pretrain.settings.optimizer import Optimizer
from pretrain.settings.optimizers import OPTIMIZERS
from tests.support.toy_run import toy_config


def section(**settings):
    return Optimizer.model_validate({"learning_rate": 1e-3} | settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_optimizer_and_survive_storing(name):
    config, row = section(name=name), OPTIMIZERS[name]
    assert (config.betas, config.eps) == (row.betas, row.eps)
    assert Optimizer.model_validate(config.model_dump(mode="json")) == config
    for option in row.options.values():
        TypeAdapter(option.type).validate_python(option.default, strict=True)


def test_a_config_of_earlier_versions_is_that_of_adamw():
    stored = {"betas": [0.9, 0.98], "eps": 1e-06, "weight_decay": 0.2, "gradient_clipping": 1.0}
    assert section(**stored) == section() == section(name="adamw")


BAD = [
    ({"name": "lion", "eps": 1e-8}, r"eps=1e-08: lion has none; settings of lion: betas"),
    ({"name": "adafactor", "betas": [0.9, 0.9]}, "adafactor has none; .* options.momentum"),
    ({"name": "adan", "betas": [0.9, 0.9]}, r"adan has 3, with the defaults \[0.98, 0.92, 0.99\]"),
    ({"eps": None}, "eps=null: adamw needs it; its default is 1e-06"),
    ({"options": {"fused": False}}, "adamw has no such option; settings of adamw: betas, eps"),
    ({"name": "adan", "options": {"no_proxy": True}}, "did you mean 'no_prox'"),
    ({"name": "lion", "options": {"caution": True}}, "options.caution: lion has no such option"),
    ({"name": "adan", "options": {"no_prox": 1}}, "options.no_prox=1: .*valid boolean"),
    ({"name": "adopt", "options": {"clip_exp": -1}}, "options.clip_exp=-1: .*; default: 0.333"),
    ({"name": "muon", "options": {"ns_steps": 2.5}}, "options.ns_steps=2.5"),
    ({"name": "adam"}, "'adamw', 'lion'"),
    ({"ema": {"decay": 1.0}}, "less than 1"),
    ({"ema": {"decay": 0}}, "greater than 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_the_optimizer_does_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        section(**settings)


@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_strategies_refuse_optimizers_that_need_whole_tensors(tmp_path, strategy):
    values = toy_config(tmp_path, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    for name, row in OPTIMIZERS.items():
        changes = {
            "optimizer": {"name": name, "learning_rate": 1e-3},
            "engine": {"strategy": strategy},
        }
        if row.needs_whole is None or strategy in ("ddp", "zero0"):
            PretrainConfig.model_validate(values | changes)
            continue
        with pytest.raises(ValueError, match=f"{name} with engine.strategy={strategy}: .*whole"):
            PretrainConfig.model_validate(values | changes)


def test_averages_are_only_measured_if_the_run_keeps_them(tmp_path):
    with pytest.raises(ValueError, match=r"validation\.ema=true .*set optimizer\.ema"):
        toy_config(tmp_path, tmp_path / "run", validation={"ema": True})
    toy_config(tmp_path, tmp_path / "run", validation={"ema": True}, optimizer={"ema": {}})
