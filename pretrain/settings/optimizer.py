"""Config sections of the optimizer and the learning-rate schedule."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from data_prep.config_file import Section
from pretrain.settings.optimizers import OPTIMIZERS, Fraction, OptimizerRow
from pretrain.settings.segments import check_rising_steps


class Ema(Section):
    """Exponential moving average of the trained weights, updated by every optimizer step.

    It begins with the weights before the first step. A fork that adds it begins with the weights
    that the fork starts from.
    """

    decay: float = Field(0.9999, gt=0, lt=1)  # update n: ema = decay * ema + (1 - decay) * weights
    # the decay of update n is at most 1 - n ** (-2/3), as in timm's ModelEmaV3: 0.99 at n = 1000
    warmup: bool = True


# Pattern of names of parameters, such as towers.image.backbone.blocks.0.*; * is anything
Pattern = Annotated[str, Field(min_length=1)]


class Unfreeze(Section):
    """Frozen parameters that are trained from a step on."""

    from_step: PositiveInt  # number of steps done before
    # Names of parameters that `frozen` or a tower's frozen_blocks freezes
    parameters: list[Pattern] = Field(min_length=1)


class Optimizer(Section):
    """Optimizer with decoupled weight decay (Loshchilov and Hutter 2019)."""

    # The rows of pretrain.settings.optimizers. Under engine.strategy zero1 to zero3: adamw, lion,
    # adan, adopt, nadamw and laprop; the others need whole tensors
    name: Literal[*OPTIMIZERS] = "adamw"
    learning_rate: PositiveFloat  # peak
    # Decays of the moments; the default, and that of eps, depends on `name`. null: it has none
    betas: tuple[Fraction, ...] | None = (0.9, 0.98)
    eps: PositiveFloat | None = 1e-6
    weight_decay: float = Field(0.2, ge=0)  # none for norms, biases and logit scales
    gradient_clipping: PositiveFloat | None = 1.0  # largest global gradient norm
    # Patterns of names of parameters (* is anything), such as towers.image.backbone.blocks.0.*:
    no_decay: list[Pattern] = []  # without weight decay, in addition to norms, biases and scales
    frozen: list[Pattern] = []  # not trained
    unfreeze: list[Unfreeze] = []  # more may be added while a run is stopped; none may change

    # Further settings of the optimizer, such as no_prox of adan; the rest have its defaults
    options: dict[str, bool | int | float | None] = {}
    ema: Ema | None = None  # average of the weights, for evaluation; null: none

    @model_validator(mode="after")
    def _opens_in_order(self) -> Optimizer:
        check_rising_steps([each.from_step for each in self.unfreeze], name="entries of unfreeze")
        return self

    @property
    def row(self) -> OptimizerRow:
        """The optimizer's row in the table."""
        return OPTIMIZERS[self.name]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_name(cls, values: Any) -> Any:
        row = OPTIMIZERS.get(str(values.get("name"))) if isinstance(values, dict) else None
        if row is None:  # adamw, or a name that is refused
            return values
        return {"betas": row.betas, "eps": row.eps} | values

    @model_validator(mode="after")
    def _knows_settings(self) -> Optimizer:
        for key, default in (("betas", self.row.betas), ("eps", self.row.eps)):
            value = getattr(self, key)
            if value is not None and default is None:
                raise ValueError(f"{key}={value}: {self.name} has none; {self._known}")
            if value is None and default is not None:
                raise ValueError(f"{key}=null: {self.name} needs it; its default is {default}")
        if self.betas is not None and len(self.betas) != len(self.row.betas):
            raise ValueError(
                f"betas={list(self.betas)}: {self.name} has {len(self.row.betas)}, with the "
                f"defaults {list(self.row.betas)}"
            )
        for key, value in self.options.items():
            self._check_option(key, value)
        return self

    @property
    def _known(self) -> str:
        return f"settings of {self.name}: {', '.join(self.row.settings) or 'none'}"

    def _check_option(self, key: str, value: Any) -> None:
        option = self.row.options.get(key)
        if option is None:
            near = difflib.get_close_matches(key, self.row.options, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"options.{key}: {self.name} has no such option; {hint}{self._known}")
        try:
            TypeAdapter(option.type).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[-1]["msg"]
            raise ValueError(
                f"options.{key}={value}: {reason}; default: {option.default}"
            ) from None

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of the optimizer's class, except parameters, rate and decay."""
        own = {"betas": self.betas, "eps": self.eps}
        chosen = {name: value for name, value in own.items() if value is not None}
        defaults = {name: option.default for name, option in self.row.options.items()}
        return chosen | defaults | self.options | dict(self.row.fixed)


class Schedule(Section):
    """Learning rate over steps: linear warm-up, then one of three shapes."""

    num_steps: PositiveInt
    warmup_steps: int = Field(0, ge=0)
    shape: Literal["cosine", "constant", "constant_with_cooldown"] = "cosine"
    cooldown_steps: int = Field(0, ge=0)  # last steps, with the rate decaying linearly to zero

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.shape == "constant_with_cooldown") != (self.cooldown_steps > 0):
            raise ValueError(
                f"shape={self.shape} with cooldown_steps={self.cooldown_steps}; "
                "constant_with_cooldown needs cooldown_steps above 0, other shapes need 0"
            )
        if self.warmup_steps + self.cooldown_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} "
                f"do not fit into num_steps={self.num_steps}"
            )
        return self
