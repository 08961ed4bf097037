"""DeepSpeed's settings: those that users tune in a file, and those that the engine decides.

The files in configs/deepspeed/ tune memory and communication only, so none of their keys changes a
gradient. Keys that could change one are set here, from the run's config.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from data_prep.config_file import Section, read_config
from data_prep.errors import ConfigError
from pretrain.config import Engine as EngineConfig

# DeepSpeed key -> the key of the run's config, or the part of the project, that determines it.
SET_ELSEWHERE = {
    "train_batch_size": "streams.*.global_batch_size",
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
    "prescale_gradients": "the loss, which expects gradients averaged over ranks",
    "gradient_predivide_factor": "the loss, which expects gradients averaged over ranks",
    "stage": "engine.strategy",
}
# Keys that DeepSpeed ignores below stage 3, in addition to all that start with "stage3_".
ONLY_IN_STAGE_3 = ("sub_group_size", "offload_param")


class DeepSpeedSection(Section):
    """A section of a DeepSpeed file; keys that are set elsewhere raise an error that says where."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_set_elsewhere(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in SET_ELSEWHERE:
                raise ValueError(
                    f"{key}={values[key]!r}: the engine sets this key from "
                    f"{SET_ELSEWHERE[key]}; remove it here"
                )
        return values


class Offload(DeepSpeedSection):
    """Offloading of state that the GPU need not hold."""

    device: Literal["none", "cpu"] = "none"  # nvme would need a compiled operator
    pin_memory: bool = True


class ZeroTuning(DeepSpeedSection):
    """ZeRO settings under DeepSpeed's names; None keeps DeepSpeed's default."""

    reduce_bucket_size: PositiveInt | None = None  # elements
    allgather_bucket_size: PositiveInt | None = None  # elements
    overlap_comm: bool | None = None  # reduce during the backward pass
    reduce_scatter: bool | None = None
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None
    sub_group_size: PositiveInt | None = None  # elements per optimizer update
    stage3_prefetch_bucket_size: int | None = Field(None, ge=0)  # elements
    stage3_param_persistence_threshold: int | None = Field(
        None, ge=0
    )  # elements; smaller parameters are not partitioned
    stage3_max_live_parameters: int | None = Field(None, ge=0)
    stage3_max_reuse_distance: int | None = Field(None, ge=0)


class DeepSpeedFile(DeepSpeedSection):
    """The content of a file in configs/deepspeed/."""

    zero_optimization: ZeroTuning = ZeroTuning()


def zero_stage(strategy: str) -> int:
    """Returns the stage of a ZeRO strategy, such as 2 for "zero2"."""
    return int(strategy.removeprefix("zero"))


def read_deepspeed_file(config: EngineConfig) -> dict[str, Any]:
    """Reads the file engine.deepspeed_config and returns its settings under DeepSpeed's keys.

    Raises:
        ConfigError: if the file is invalid or holds settings that the strategy ignores.
    """
    path, strategy = config.deepspeed_config, config.strategy
    if path is None:
        return {}
    if strategy in ("ddp", "zero0"):
        raise ConfigError(
            f"engine.deepspeed_config={path}: nothing in it has an effect with "
            f"engine.strategy={strategy}; use zero1, zero2 or zero3, or remove the key"
        )
    tuning = read_config(DeepSpeedFile, path).zero_optimization.model_dump(exclude_none=True)
    for key in tuning:
        if strategy != "zero3" and (key.startswith("stage3_") or key in ONLY_IN_STAGE_3):
            raise ConfigError(
                f"{path}: zero_optimization.{key} only has an effect with engine.strategy=zero3, "
                f"found {strategy}; remove it"
            )
    return tuning


def deepspeed_settings(config: EngineConfig) -> dict[str, Any]:
    """Builds DeepSpeed's config, except for clipping, which the engine adds.

    Raises:
        ConfigError: if the file engine.deepspeed_config is invalid.
    """
    settings: dict[str, Any] = {
        # The trainer splits batches itself. DeepSpeed divides the loss by the accumulation steps.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": zero_stage(config.strategy),
            # True would replace torch's linear layer with one that rounds differently in autocast.
            "memory_efficient_linear": False,
            **read_deepspeed_file(config),
        },
        # Otherwise offloading replaces our optimizer with a compiled one that cannot clamp.
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.precision == "bf16":
        # Not the key `bf16`, which converts all parameters, including the logit scales. With a
        # non-empty list, DeepSpeed would send gradients and parameters of linear layers as bf16.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings
