"""Temperatures that are taken over from a source."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data_prep.errors import ConfigError
from pretrain.optimization.optimizer import build_optimizer
from pretrain.settings.optimizer import Optimizer
from pretrain.settings.warm_start import Start
from pretrain.warm_start.temperature import (
    TemperatureSource,
    common_source,
    start_temperature,
)


def model(*, has_bias=False):
    parts = {"log_logit_scale": nn.ParameterDict({"t": nn.Parameter(torch.full((1,), 2.0))})}
    bias = {"t": nn.Parameter(torch.full((1,), -10.0))} if has_bias else {}
    return nn.ModuleDict(parts | {"logit_bias": nn.ParameterDict(bias)})


def as_model(modules):
    """Returns the attributes of a contrastive model that a temperature has."""
    return SimpleNamespace(
        log_logit_scale=modules["log_logit_scale"], logit_bias=modules["logit_bias"]
    )


def take(tensors, *, maximum=100.0, has_bias=False, ignored=()):
    modules = model(has_bias=has_bias)
    tensors = {name: torch.as_tensor(value) for name, value in tensors.items()}
    source = TemperatureSource("file", tensors, tuple(ignored))
    told = start_temperature(as_model(modules), "t", source, maximum=maximum)
    return modules, told


def value(modules, name="log_logit_scale"):
    return modules[name]["t"].item()


def test_scale_and_bias_are_taken_and_what_is_not_is_said():
    modules, told = take({"logit_scale": 3.0, "logit_bias": [-12.9]}, has_bias=True)
    assert (value(modules), value(modules, "logit_bias")) == (3.0, torch.tensor(-12.9).item())
    assert told == (
        "logit scale of t: 20.0855, from logit_scale of file; bias -12.9, from logit_bias"
    )
    modules, told = take({"logit_scale": 3.0, "logit_bias": [-12.9]})
    assert told.endswith("its loss has no bias, so logit_bias is not used")
    modules, told = take({"logit_scale": 3.0}, has_bias=True)
    assert told.endswith("the bias starts at -10, because the source has none")
    modules, told = take({"logit_scale": 3.0}, ignored=["logit_*"])
    assert value(modules) == 2.0
    assert told == "logit scale of t: starts at 7.38906; the source has none, or `ignore` names it"


def test_of_claps_two_scales_the_first_is_taken_and_both_are_named():
    modules, told = take({"logit_scale_a": 2.5, "logit_scale_t": 2.659})
    assert value(modules) == 2.5
    assert "12.1825, from logit_scale_a of file; logit_scale_t (14.282) is not used" in told


def test_own_checkpoints_have_temperatures_by_name():
    modules, _ = take({"log_logit_scale.other": 2.1, "log_logit_scale.t": 2.2}, ignored=["*.other"])
    assert value(modules) == pytest.approx(2.2)
    modules, told = take({"log_logit_scale.other": 2.1})
    assert (value(modules), "has none" in told) == (2.0, True)


@pytest.mark.parametrize("scale", [100.003, 117.33, 101.0, 339.99, 100.0003])
@pytest.mark.parametrize("moves", [False, True], ids=["rate 0", "rate 1e-3"])
def test_a_scale_above_the_maximum_is_an_error_whose_advice_leaves_it_bit_equal(scale, moves):
    stored = torch.tensor(math.log(scale))
    with pytest.raises(ConfigError, match=r"at most model\.logit_scale\.maximum=100") as raised:
        take({"logit_scale": stored})
    advised = float(re.search(r"logit_scale: \{maximum: ([0-9.]+)\}", str(raised.value))[1])
    assert scale <= advised <= scale + 2e-4
    modules, _ = take({"logit_scale": stored}, maximum=advised)
    optimizer = build_optimizer(Optimizer(learning_rate=1.0), modules, max_scale=advised)
    optimizer.param_groups[-1]["lr"] = 1e-3 if moves else 0.0
    modules["log_logit_scale"]["t"].grad = torch.ones(1)
    optimizer.step()
    assert torch.equal(modules["log_logit_scale"]["t"], stored.reshape(1)) != moves


@pytest.mark.parametrize("stored", [-0.1, math.log(341.0), math.nan, math.inf, 800.0])
def test_scales_that_no_setting_allows_are_refused(stored):
    with pytest.raises(ConfigError, match="to `ignore`"):
        take({"logit_scale": stored})


def test_a_temperature_is_taken_only_if_all_its_towers_start_from_one_source():
    starts = {
        "image": Start(**{"from": "a"}),
        "text": Start(**{"from": "a", "ignore": ["x"]}),
        "audio": Start(**{"from": "b"}),
    }
    tensors = {"a": {"logit_scale": torch.tensor(1.0)}, "b": {}}
    found = common_source(("image", "text"), starts, tensors)
    assert (found.location, found.ignored) == ("a", ("x",))
    assert common_source(("audio", "text"), starts, tensors) is None
    assert common_source(("image", "text"), {"image": starts["image"]}, tensors) is None
