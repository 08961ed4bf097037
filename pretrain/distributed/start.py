"""Builds the accelerator and the engine of a strategy."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import InputError
from pretrain.config import PretrainConfig
from pretrain.distributed.deepspeed_config import read_deepspeed_file
from pretrain.distributed.engine import Engine
from pretrain.distributed.launcher import adopt_environment, device_type_of, refuse_unfit_processes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from pretrain.model.contrastive_model import ContrastiveModel


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Joins the processes that a launcher started, and checks that Accelerate sees all of them.

    Raises:
        InputError: the device is missing, or launcher and Accelerate disagree on the processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    adopt_environment(os.environ, needs_group=config.engine.strategy != "ddp")
    device = device_type_of(config.engine.device)
    if config.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help to find faults
    # On CPU Accelerate takes every process for the only one unless the backend is named, and fails
    # without a launcher if it is.
    is_launched = "RANK" in os.environ
    process_group = InitProcessGroupKwargs(
        backend="gloo" if device == "cpu" and is_launched else None,
        timeout=timedelta(seconds=config.engine.start_timeout_seconds),
    )
    accelerator = Accelerator(
        log_with=config.run.trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.run.folder), logging_dir=str(config.run.folder / "tensorboard")
        ),
        **_strategy_arguments(config, device, process_group),
    )
    refuse_unfit_processes(
        strategy=config.engine.strategy,
        device=(device, accelerator.device.type),
        num_processes=(int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes),
        distributed_type=accelerator.distributed_type.value,
        accumulation_steps=accelerator.gradient_accumulation_steps,
    )
    return accelerator


def _strategy_arguments(
    config: PretrainConfig, device: str, process_group: InitProcessGroupKwargs
) -> dict[str, Any]:
    if config.engine.strategy != "ddp":
        # DeepSpeed takes a second to import, and must know the device before.
        os.environ["DS_ACCELERATOR"] = device
        from pretrain.distributed.zero import deepspeed_plugin

        # With cpu=True Accelerate would leave DeepSpeed out.
        return {"deepspeed_plugin": deepspeed_plugin(config), "kwargs_handlers": [process_group]}
    from accelerate.utils import DistributedDataParallelKwargs

    return {
        "cpu": device == "cpu",
        "mixed_precision": "bf16" if config.engine.precision == "bf16" else "no",
        "kwargs_handlers": [process_group, DistributedDataParallelKwargs(broadcast_buffers=False)],
    }


def build_engine(
    config: PretrainConfig,
    accelerator: Accelerator,
    *,
    model: ContrastiveModel,
    optimizer: torch.optim.Optimizer,
) -> Engine:
    """The engine of engine.strategy, around a model and an optimizer over its parameters."""
    kind = Engine
    if config.engine.strategy != "ddp":
        from pretrain.distributed.zero import ZeroEngine

        kind = ZeroEngine
    return kind(
        accelerator,
        model=model,
        optimizer=optimizer,
        gradient_clipping=config.optimizer.gradient_clipping,
    )


def check_engine(config: PretrainConfig) -> None:
    """Checks, without starting anything, what the engine will be asked for.

    Raises:
        InputError: engine.deepspeed_config is wrong, or a tracker's package is not installed.
    """
    read_deepspeed_file(config)
    if "wandb" not in config.run.trackers:
        return
    from accelerate.utils import is_wandb_available  # takes seconds to import

    if not is_wandb_available():
        raise InputError(
            "run.trackers: wandb is not installed; pip install 'isopair[wandb]', or leave it out"
        )
