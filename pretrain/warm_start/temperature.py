"""Temperatures of a warm start: taken over if all towers that share one start from one source."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from data_prep.errors import ConfigError
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.settings.model import LARGEST_LOGIT_SCALE
from pretrain.settings.warm_start import Start

# Names of the logarithm of the scale in sources that are not Isopair's, the first that exists.
# CLAP has one for each direction; LAION's files hold the second at its first value.
_SCALES = ("logit_scale", "logit_scale_a")
_UNUSED_SCALE = "logit_scale_t"
_BIAS = "logit_bias"


@dataclass(frozen=True)
class TemperatureSource:
    """The temperatures of a source that all towers of one temperature start from.

    Attributes:
        location: path, URL or name of the source.
        tensors: logit scales and biases by name.
        ignored: patterns of names that the config leaves out.
    """

    location: str
    tensors: Mapping[str, Tensor]
    ignored: tuple[str, ...] = ()

    def find(self, *names: str) -> tuple[str, Tensor] | None:
        """Returns the first of some names that exists and is not left out, with its value [1]."""
        for name in names:
            if name in self.tensors and not any(fnmatchcase(name, p) for p in self.ignored):
                return name, self.tensors[name].float().reshape(1)
        return None


def common_source(
    towers: Collection[str],
    starts: Mapping[str, Start],
    temperatures: Mapping[str, Mapping[str, Tensor]],
) -> TemperatureSource | None:
    """Returns the source from which all towers of a temperature start; None if they differ.

    Args:
        towers: names of the towers.
        starts: tower -> config section of its warm start.
        temperatures: location of a source -> its logit scales and biases.
    """
    if not all(name in starts for name in towers):
        return None
    locations = {starts[name].source for name in towers}
    if len(locations) > 1:
        return None
    ignored = tuple(pattern for name in towers for pattern in starts[name].ignore)
    (location,) = locations
    return TemperatureSource(location, temperatures[location], ignored)


def start_temperature(
    model: ContrastiveModel, name: str, source: TemperatureSource | None, *, maximum: float
) -> str:
    """Sets a temperature, and its bias if it has one, to those of a source.

    Args:
        model: new model, changed in place.
        name: name of the temperature.
        source: source of its towers; None if they have none in common.
        maximum: largest logit scale of the run.

    Returns:
        A sentence that says what was done.

    Raises:
        ConfigError: if the scale is outside of the bounds that training keeps.
    """
    own = model.log_logit_scale[name]
    scale = f"{own.exp().item():.6g}"
    if source is None:
        return (
            f"logit scale of {name}: starts at {scale}, because its towers do not start from one "
            "source"
        )
    found = source.find(f"log_logit_scale.{name}", *_SCALES)
    if found is None:
        return (
            f"logit scale of {name}: starts at {scale}; the source has none, or `ignore` names it"
        )
    key, value = found
    _refuse_outside(value, maximum, where=f"{source.location}: {key}")
    with torch.no_grad():
        own.copy_(value)
    done = f"logit scale of {name}: {value.exp().item():.6g}, from {key} of {source.location}"
    if _UNUSED_SCALE in source.tensors:
        second = source.tensors[_UNUSED_SCALE].float().exp().item()
        done += f"; {_UNUSED_SCALE} ({second:.6g}) is not used: here, both directions share one"
    return f"{done}; {_start_bias(model, name, source)}"


def _start_bias(model: ContrastiveModel, name: str, source: TemperatureSource) -> str:
    found = source.find(f"{_BIAS}.{name}", _BIAS)
    if name not in model.logit_bias:
        return "its loss has no bias" + ("" if found is None else f", so {found[0]} is not used")
    own = model.logit_bias[name]
    if found is None:
        return f"the bias starts at {own.item():g}, because the source has none"
    with torch.no_grad():
        own.copy_(found[1])
    return f"bias {found[1].item():.6g}, from {found[0]}"


def _refuse_outside(log_scale: Tensor, maximum: float, *, where: str) -> None:
    """Refuses a scale that the clamp of the first step would change.

    Bounds are compared in float32, as the clamp does.
    """
    scale = log_scale.double().exp().item()
    if not math.isfinite(scale) or log_scale.item() < 0:
        raise ConfigError(
            f"{where}: expected the logarithm of a scale of at least 1, found {log_scale.item():g} "
            f"(a scale of {scale:g}); add its name to `ignore` to start at the config's"
        )
    if bool(log_scale.clamp(max=math.log(maximum)) == log_scale):
        return
    needed = math.ceil(scale * 1e4) / 1e4
    while not bool(log_scale.clamp(max=math.log(needed)) == log_scale):
        needed += 1e-4
    advice = f"write\nmodel:\n  logit_scale: {{maximum: {needed:.10g}}}"
    if needed > LARGEST_LOGIT_SCALE:
        advice = f"the largest is {LARGEST_LOGIT_SCALE:g}: add its name to `ignore`"
    raise ConfigError(
        f"{where}: expected a scale of at most model.logit_scale.maximum={maximum:g}, found "
        f"{scale:.8g}; training would clamp it: {advice}"
    )
