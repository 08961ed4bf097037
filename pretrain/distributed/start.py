"""Functions that start the accelerator and build the engine of a strategy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import InputError
from pretrain.config import Engine as EngineConfig
from pretrain.config import Run
from pretrain.distributed.deepspeed_config import read_deepspeed_file
from pretrain.distributed.engine import Engine
from pretrain.distributed.launcher import adopt_environment, device_type_of, refuse_unfit_processes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from pretrain.model.contrastive_model import ContrastiveModel
    from pretrain.optimization.optimizer import RunOptimizer


def start_accelerator(config: EngineConfig, *, run: Run) -> Accelerator:
    """Joins the processes that a launcher started and checks that Accelerate detects all of them.

    Args:
        config: config section `engine`.
        run: config section `run`, with the trackers and the folder for their files.

    Raises:
        InputError: if the device is missing, or launcher and Accelerate disagree on the processes.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    adopt_environment(os.environ, needs_group=config.strategy != "ddp")
    device = device_type_of(config.device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only helps debugging
    # On the CPU, Accelerate ignores the other processes unless the backend is named. Without a
    # launcher, it fails if the backend is named.
    is_launched = "RANK" in os.environ
    process_group = InitProcessGroupKwargs(
        backend="gloo" if device == "cpu" and is_launched else None,
        timeout=timedelta(seconds=config.start_timeout_seconds),
    )
    accelerator = Accelerator(
        log_with=run.trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(run.folder), logging_dir=str(run.folder / "tensorboard")
        ),
        **_strategy_arguments(config, device, process_group),
    )
    if config.strategy != "ddp":
        from pretrain.distributed.zero import keep_models_whole

        keep_models_whole()
    refuse_unfit_processes(
        strategy=config.strategy,
        device=(device, accelerator.device.type),
        num_processes=(int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes),
        distributed_type=accelerator.distributed_type.value,
        accumulation_steps=accelerator.gradient_accumulation_steps,
    )
    return accelerator


def _strategy_arguments(
    config: EngineConfig, device: str, process_group: InitProcessGroupKwargs
) -> dict[str, Any]:
    if config.strategy != "ddp":
        # DeepSpeed reads the device when it is imported.
        os.environ["DS_ACCELERATOR"] = device
        from pretrain.distributed.zero import deepspeed_plugin

        # No cpu=True here: Accelerate would then ignore DeepSpeed.
        return {"deepspeed_plugin": deepspeed_plugin(config), "kwargs_handlers": [process_group]}
    from accelerate.utils import DistributedDataParallelKwargs

    return {
        "cpu": device == "cpu",
        "mixed_precision": "bf16" if config.precision == "bf16" else "no",
        "kwargs_handlers": [process_group, DistributedDataParallelKwargs(broadcast_buffers=False)],
    }


def build_engine(
    accelerator: Accelerator,
    *,
    strategy: str,
    model: ContrastiveModel,
    optimizer: RunOptimizer,
    gradient_clipping: float | None,
) -> Engine:
    """Builds the engine of a strategy around a model and an optimizer over its parameters.

    Args:
        accelerator: accelerator that was started with the same strategy.
        strategy: engine.strategy.
        model: model from `build_model`.
        optimizer: optimizer over the model's parameters.
        gradient_clipping: largest global gradient norm; None disables clipping.
    """
    kind = Engine
    if strategy != "ddp":
        from pretrain.distributed.zero import ZeroEngine

        kind = ZeroEngine
    return kind(accelerator, model=model, optimizer=optimizer, gradient_clipping=gradient_clipping)


def check_engine(config: EngineConfig, *, trackers: Sequence[str]) -> None:
    """Checks the settings of the engine and its trackers without starting anything.

    Args:
        config: config section `engine`.
        trackers: run.trackers.

    Raises:
        InputError: if engine.deepspeed_config is invalid, or the package of a tracker is missing.
    """
    read_deepspeed_file(config)
    if "wandb" not in trackers:
        return
    from accelerate.utils import is_wandb_available  # takes seconds to import

    if not is_wandb_available():
        raise InputError(
            "run.trackers: wandb is not installed; pip install 'isopair[wandb]', or leave it out"
        )
