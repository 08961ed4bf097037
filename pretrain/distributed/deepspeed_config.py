"""DeepSpeed's settings: what a person may tune, read from a file, and what the engine decides.

The files in configs/deepspeed/ hold memory and communication only: none of their keys changes a
gradient. Everything that could is written here, from the run's own config.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from data_prep.config_file import (
    Section,
    read_config,
)
from data_prep.errors import ConfigError
from pretrain.config import PretrainConfig

# Keys of DeepSpeed that a run's config, or a law, decides.
DECIDED_ELSEWHERE = {
    "train_batch_size": "pairings.*.global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision: gradients are reduced in fp32",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "prescale_gradients": "the loss: gradients are averaged over ranks as they are",
    "gradient_predivide_factor": "the loss: gradients are averaged over ranks as they are",
    "stage": "engine.strategy",
}
# Those that DeepSpeed ignores below stage 3, besides all that start with "stage3_".
ONLY_IN_STAGE_3 = ("sub_group_size", "offload_param")


class DeepSpeedSection(Section):
    """A part of a DeepSpeed file; keys that are decided elsewhere are refused with that place."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_decided_elsewhere(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in DECIDED_ELSEWHERE:
                raise ValueError(
                    f"{key}={values[key]!r}: the engine writes this key, from "
                    f"{DECIDED_ELSEWHERE[key]}; remove it here"
                )
        return values


class Offload(DeepSpeedSection):
    """Where something is kept that the GPU need not hold."""

    device: Literal["none", "cpu"] = "none"  # nvme needs an operator that would be compiled
    pin_memory: bool = True


class ZeroTuning(DeepSpeedSection):
    """DeepSpeed's names; what is left out keeps DeepSpeed's default."""

    reduce_bucket_size: PositiveInt | None = None  # elements
    allgather_bucket_size: PositiveInt | None = None  # elements
    overlap_comm: bool | None = None  # reduce while the backward pass goes on
    reduce_scatter: bool | None = None
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    sub_group_size: PositiveInt | None = None  # elements updated at once
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0)  # elements
    stage3_param_persistence_threshold: int | None = Field(None, ge=0)  # smaller ones stay whole
    stage3_max_live_parameters: int | None = Field(None, ge=0)
    stage3_max_reuse_distance: int | None = Field(None, ge=0)


class DeepSpeedFile(DeepSpeedSection):
    """A file of configs/deepspeed/."""

    zero_optimization: ZeroTuning = ZeroTuning()


def zero_stage(config: PretrainConfig) -> int:
    """The ZeRO stage of an engine.strategy that has one."""
    return int(config.engine.strategy.removeprefix("zero"))


def read_deepspeed_file(config: PretrainConfig) -> dict[str, Any]:
    """What engine.deepspeed_config tunes, as DeepSpeed's own keys.

    Raises:
        ConfigError: the file is wrong, or holds what the strategy would ignore.
    """
    path, strategy = config.engine.deepspeed_config, config.engine.strategy
    if path is None:
        return {}
    if strategy in ("ddp", "zero0"):
        raise ConfigError(
            f"engine.deepspeed_config={path}: nothing in it has an effect with "
            f"engine.strategy={strategy}; use zero1, zero2 or zero3, or leave it out"
        )
    tuning = read_config(DeepSpeedFile, path).zero_optimization.model_dump(exclude_none=True)
    for key in tuning:
        if strategy != "zero3" and (key.startswith("stage3_") or key in ONLY_IN_STAGE_3):
            raise ConfigError(
                f"{path}: zero_optimization.{key} has an effect with engine.strategy=zero3 alone, "
                f"found {strategy}; remove it"
            )
    return tuning


def deepspeed_settings(config: PretrainConfig) -> dict[str, Any]:
    """DeepSpeed's whole config; the engine adds the clipping.

    Raises:
        ConfigError: engine.deepspeed_config cannot be used.
    """
    settings: dict[str, Any] = {
        # Batches are ours: of these two DeepSpeed uses only the second, to divide the loss by it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": zero_stage(config),
            # It would replace torch's linear layer by one with other rounding under autocast.
            "memory_efficient_linear": False,
            **read_deepspeed_file(config),
        },
        # Else offloading replaces our optimizer by one that must be compiled and cannot clamp.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.engine.precision == "bf16":
        # Not `bf16`, which makes the parameters bf16, the logit scales among them. Unless the list
        # is empty, gradients and gathered parameters of linear layers would travel as bf16.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings
