"""Parameter groups: learning rate, weight decay, bounds and first step of trained parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pretrain.optimization.parameter_traits import Traits


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    max_scale: float,
    traits: Mapping[str, Traits] | None = None,
) -> list[dict[str, Any]]:
    """Returns groups with decay (matrices, kernels), without (norms, biases), and logit scales.

    Each kind is divided further by learning rate and first step.

    Args:
        model: model to train.
        weight_decay: optimizer.weight_decay.
        max_scale: largest logit scale.
        traits: traits of every parameter by name; None: those of a config without settings.
    """
    groups: dict[tuple[int, float, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = Traits() if traits is None else traits[name]
        kind = _kind(name, parameter, own)
        group = groups.setdefault(
            (kind, own.rate_scale, own.from_step),
            {
                "params": [],
                "weight_decay": weight_decay if kind == DECAYED else 0.0,
                "clamp": (0.0, math.log(max_scale)) if kind == SCALES else None,
                "rate_scale": own.rate_scale,
                "from_step": own.from_step,
                "labels": [],
            },
        )
        group["params"].append(parameter)
        if own.label not in group["labels"]:
            group["labels"].append(own.label)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


DECAYED, UNDECAYED, SCALES = range(3)


def _kind(name: str, parameter: nn.Parameter, traits: Traits) -> int:
    if name.startswith("log_logit_scale."):
        return SCALES
    return DECAYED if parameter.ndim >= 2 and traits.has_decay else UNDECAYED


def describe_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    traits: Mapping[str, Traits],
) -> Iterator[str]:
    """Describes the parameters of each part by decay and first step, one line each.

    Args:
        model: model to train.
        weight_decay: optimizer.weight_decay.
        learning_rate: optimizer.learning_rate.
        traits: traits of every parameter by name.
    """
    rows: dict[tuple[Any, ...], int] = {}
    for name, parameter in model.named_parameters():
        own = traits[name]
        is_decayed = _kind(name, parameter, own) == DECAYED
        rate, decay, first = (
            ("-", "-", "never")
            if own.from_step is None
            else (
                f"{learning_rate * own.rate_scale:.3g}",
                f"{weight_decay if is_decayed else 0:g}",
                str(own.from_step),
            )
        )
        key = (own.part, rate, decay, first)
        rows[key] = rows.get(key, 0) + parameter.numel()
    table = [
        ("parameters of", "number", "learning rate", "weight decay", "trained from step"),
        *((part, f"{number:,}", *rest) for (part, *rest), number in rows.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for part, *numbers in table:
        cells = [part.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join(cells)
