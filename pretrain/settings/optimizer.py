"""Config sections of the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_prep.config_file import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


# Pattern of names of parameters, such as towers.image.backbone.blocks.0.*; * is anything
Pattern = Annotated[str, Field(min_length=1)]


class Unfreeze(Section):
    """Frozen parameters that are trained from a step on."""

    from_step: PositiveInt  # number of steps done before
    # Names of parameters that `frozen` or a tower's frozen_blocks freezes
    parameters: list[Pattern] = Field(min_length=1)


class Optimizer(Section):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019)."""

    learning_rate: PositiveFloat  # peak
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: float = Field(0.2, ge=0)  # none for norms, biases and logit scales
    gradient_clipping: PositiveFloat | None = 1.0  # largest global gradient norm
    # Patterns of names of parameters (* is anything), such as towers.image.backbone.blocks.0.*:
    no_decay: list[Pattern] = []  # without weight decay, in addition to norms, biases and scales
    frozen: list[Pattern] = []  # not trained
    unfreeze: list[Unfreeze] = []  # more may be added while a run is stopped; none may change

    @model_validator(mode="after")
    def _opens_in_order(self) -> Optimizer:
        steps = [each.from_step for each in self.unfreeze]
        if steps != sorted(set(steps)):
            raise ValueError(f"expected entries of unfreeze with rising from_step, found {steps}")
        return self


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
