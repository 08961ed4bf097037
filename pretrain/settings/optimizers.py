"""Optimizers by name, one row each: class, defaults, options and needs. Needs no torch.

ZeRO 1 to 3 flatten tensors and cut them into uneven parts, one per process. An optimizer is
admitted there only if the parts step to the same bits as whole tensors. A test computes this for
every row and compares it with the table.

Weight decay is decoupled in every row (Loshchilov and Hutter 2019): in addition to its update, a
step subtracts learning rate x weight_decay x parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

EMA = "ema"  # key of the average of the weights among the tensors of a parameter

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Option(NamedTuple):
    """A setting of a single optimizer, and of its class."""

    type: Any  # as in a config section
    default: Any


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer of a library.

    Attributes:
        path: module and name of the class.
        betas: default of optimizer.betas; None if the class has none.
        eps: default of optimizer.eps; None if the class has none.
        options: settings under optimizer.options.
        fixed: further arguments of the class.
        needs_whole: reason why it needs whole tensors; None if parts step to the same bits.
        group_count: type of the number of updates, if a parameter group holds it.
        scalars: numbers of a parameter's state, in addition to the number of updates.
    """

    path: str
    betas: tuple[float, ...] | None
    eps: float | None
    options: Mapping[str, Option] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    needs_whole: str | None = None
    group_count: Literal["number", "tensor"] | None = None
    scalars: tuple[str, ...] = ()

    @property
    def settings(self) -> list[str]:
        """Names of the settings that depend on the optimizer."""
        own = {"betas": self.betas, "eps": self.eps}
        names = [name for name, default in own.items() if default is not None]
        return names + [f"options.{name}" for name in self.options]


CAUTIOUS = "it scales an update by the fraction of a tensor's elements that agree with the gradient"

OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow("torch.optim.AdamW", (0.9, 0.98), 1e-6, fixed={"fused": True}),
    "lion": OptimizerRow("timm.optim.Lion", (0.9, 0.99), None),
    "adan": OptimizerRow(
        "timm.optim.Adan",
        (0.98, 0.92, 0.99),
        1e-8,
        options={"no_prox": Option(bool, False)},  # decay before the update; False: after it
        group_count="number",
    ),
    "adopt": OptimizerRow(
        "timm.optim.Adopt",
        (0.9, 0.9999),
        1e-6,
        options={"clip_exp": Option(Positive | None, 0.333)},  # updates clipped at step ** clip_exp
        fixed={"decoupled": True},
    ),
    "nadamw": OptimizerRow("timm.optim.NAdamW", (0.9, 0.999), 1e-8),
    "laprop": OptimizerRow(
        "timm.optim.LaProp", (0.9, 0.999), 1e-15, scalars=("exp_avg_lr_1", "exp_avg_lr_2")
    ),
    "cadamw": OptimizerRow(
        "timm.optim.AdamWLegacy",
        (0.9, 0.999),
        1e-8,
        fixed={"caution": True},
        needs_whole=CAUTIOUS,
    ),
    "clion": OptimizerRow(
        "timm.optim.Lion", (0.9, 0.99), None, fixed={"caution": True}, needs_whole=CAUTIOUS
    ),
    "adamp": OptimizerRow(
        "timm.optim.AdamP",
        (0.9, 0.999),
        1e-8,
        options={
            "delta": Option(Positive, 0.1),
            "wd_ratio": Option(Positive, 0.1),
            "nesterov": Option(bool, False),
        },
        needs_whole="it projects updates onto the plane that is orthogonal to a weight",
    ),
    "mars": OptimizerRow(
        "timm.optim.Mars",
        (0.9, 0.99),
        1e-8,
        options={"gamma": Option(Positive, 0.025), "optimize_1d": Option(bool, False)},
        needs_whole="it divides corrected gradients by the norm over a tensor",
    ),
    "novograd": OptimizerRow(
        "timm.optim.NvNovoGrad",
        (0.95, 0.98),
        1e-8,
        options={"grad_averaging": Option(bool, False)},
        fixed={"decoupled_decay": True},
        needs_whole="its second moment is the norm over a tensor",
    ),
    "adafactor": OptimizerRow(  # the variant of big_vision
        "timm.optim.AdafactorBigVision",
        None,
        None,
        options={
            "momentum": Option(Fraction | None, 0.9),
            "beta2_cap": Option(Fraction, 0.999),
            "decay_rate": Option(Positive, 0.8),
            "clipping_threshold": Option(Positive | None, None),
            "min_dim_size_to_factor": Option(Annotated[int, Field(ge=2)], 16),
        },
        fixed={"momentum_dtype": "float32"},
        needs_whole="its second moment is stored by rows and columns of a matrix",
    ),
    "lamb": OptimizerRow(
        "timm.optim.Lamb",
        (0.9, 0.999),
        1e-6,
        options={"trust_clip": Option(bool, False), "always_adapt": Option(bool, False)},
        # The engine clips by the global norm, in a way that does not depend on the strategy.
        fixed={"decoupled_decay": True, "max_grad_norm": None},
        needs_whole="it scales updates by the norm of a parameter",
        group_count="tensor",
    ),
    "muon": OptimizerRow(
        "timm.optim.Muon",
        (0.9, 0.95),  # of AdamW, which updates all but matrices and kernels
        1e-7,
        options={
            "momentum": Option(Fraction, 0.95),
            "nesterov": Option(bool, False),
            "ns_steps": Option(Annotated[int, Field(ge=1)], 5),
            "fallback_lr_scale": Option(Positive, 1.0),  # rate of AdamW / learning_rate
        },
        needs_whole="it orthogonalizes the update of a matrix",
    ),
}
