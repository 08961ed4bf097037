"""The only file that knows Accelerate: processes, wrapping, precision, gradients, optimizer steps.

One process or many (DistributedDataParallel) give the same result. The schedule, the clamp of the
scales, the loss's normalisation and the parameter groups belong to us, not to Accelerate.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor

from data_prep.config_file import InputError
from pretrain.config import PairingName, PretrainConfig
from pretrain.model import ContrastiveModel, PairingFeatures, PairInputs

PLAIN_STRATEGIES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
OPTIMIZER_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's tensor that this rank holds; `values` writes through."""

    name: str  # of the parameter
    key: str  # "parameter", "exp_avg" or "exp_avg_sq"
    values: Tensor  # flat
    offset: int  # of its first element in the flattened tensor
    total: int  # elements of the whole tensor


def start_accelerator(config: PretrainConfig) -> Accelerator:
    """Joins the processes that a launcher started, and checks that Accelerate sees all of them.

    Raises:
        InputError: the device is missing, or launcher and Accelerate disagree on the processes.
    """
    _adopt_slurm_environment(os.environ)
    device = config.engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("engine.device=cuda: torch sees no GPU here; use cpu or auto")
    # On CPU Accelerate takes every process for the only one unless the backend is named, and fails
    # without a launcher if it is.
    is_launched = "RANK" in os.environ
    process_group = InitProcessGroupKwargs(
        backend="gloo" if device == "cpu" and is_launched else None,
        timeout=timedelta(seconds=config.engine.timeout_seconds),
    )
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if config.engine.precision == "bf16" else "no",
        log_with=config.run.trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.run.folder), logging_dir=str(config.run.folder / "tensorboard")
        ),
        kwargs_handlers=[process_group, DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise InputError(
            f"the launcher started WORLD_SIZE={expected} processes, Accelerate sees "
            f"{accelerator.num_processes}; start with torchrun or accelerate launch --multi_gpu"
        )
    _refuse_launcher_settings(accelerator)
    return accelerator


def _refuse_launcher_settings(accelerator: Accelerator) -> None:
    """What a launcher's config or environment asks of Accelerate would change the gradient."""
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"Accelerate was told gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS); "
            "unset it: micro_batch_size does this without changing the gradient"
        )
    if accelerator.distributed_type not in PLAIN_STRATEGIES:
        raise InputError(
            f"Accelerate was told distributed_type={accelerator.distributed_type.value}; expected "
            f"one of {', '.join(strategy.value for strategy in PLAIN_STRATEGIES)}: use "
            "configs/accelerate/two_processes.yaml, or torchrun"
        )


def _adopt_slurm_environment(environment: Any) -> None:
    """Under plain srun, fills in what torchrun would have set."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"started by srun, but scontrol cannot name the hosts ({error}); set MASTER_ADDR, "
            "MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK in the batch script, or use torchrun"
        ) from None
    tasks_per_node = re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])
    environment.setdefault("MASTER_ADDR", hosts[0])
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = tasks_per_node.group() if tasks_per_node else "1"


class Engine:
    """Wraps model and optimizer; all ranks must reach every call but `log` and `full_state_dict`.

    Args:
        accelerator: from `start_accelerator`.
        model: as `build_model` returns it.
        optimizer: over its parameters.
        gradient_clipping: largest global gradient norm; None for no bound.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        model: ContrastiveModel,
        optimizer: torch.optim.Optimizer,
        gradient_clipping: float | None,
    ) -> None:
        self.accelerator = accelerator
        self.gradient_clipping = gradient_clipping or math.inf
        self.model = model.to(accelerator.device)
        self.optimizer = optimizer
        with warnings.catch_warnings():
            # Accelerate knows the option by its old name only.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            self._wrapped_model, self._wrapped_optimizer = accelerator.prepare(
                self.model, optimizer
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    def train_mode(self, is_training: bool) -> None:
        """Switches towers that are not frozen between training and evaluation."""
        self._wrapped_model.train(is_training)

    def forward(
        self, batches: Mapping[PairingName, PairInputs]
    ) -> dict[PairingName, PairingFeatures]:
        """Features of this rank's pairs, for training and validation alike.

        Always through the wrapper: past it, DistributedDataParallel would leave the gradients of
        the ranks different without a word.
        """
        return self._wrapped_model(batches)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds the forward and backward of one micro-batch: gradients only add up on this rank
        until the last one's backward, which averages their sum over ranks."""
        is_wrapped = self._wrapped_model is not self.model
        return self._wrapped_model.no_sync() if is_wrapped and not is_last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds a loss's gradients, averaged over ranks unless inside an earlier micro-batch."""
        with warnings.catch_warnings():
            # Of kernels whose gradients come in another memory order: a copy, not an error.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            self.accelerator.backward(loss)

    def step(self, *, learning_rate: float) -> float:
        """One optimizer step with the gradients so far; returns their global norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; nothing was changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self.accelerator.clip_grad_norm_(
            self._wrapped_model.parameters(), self.gradient_clipping
        ).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm}")
        self._wrapped_optimizer.step()
        self._wrapped_optimizer.zero_grad()
        return norm

    def fragments(self) -> Iterator[Fragment]:
        """Every trained parameter and its optimizer moments, as far as this rank holds them."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state[parameter]
            if not state:  # as AdamW makes it at its first step
                state["step"] = torch.tensor(0.0, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter) for moment in OPTIMIZER_MOMENTS}
            for key, values in [
                ("parameter", parameter.data),
                *((moment, state[moment]) for moment in OPTIMIZER_MOMENTS),
            ]:
                yield Fragment(name, key, values.view(-1), 0, values.numel())

    def after_load(self, *, num_steps_done: int) -> None:
        """To be called when `fragments` were written to: sets the optimizer's step count."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(num_steps_done))

    def full_state_dict(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    def init_trackers(self, config: PretrainConfig) -> None:
        """Opens the configured trackers and shows them the config."""
        values = {section: str(value) for section, value in config.model_dump().items()}
        folder = config.run.folder
        self.accelerator.init_trackers(
            "isopair",
            config=values,
            init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}},
        )

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Sends values to the trackers."""
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Closes the trackers and leaves the process group; only `model` can be used afterwards.

        The wrapper must not be the last to hold the group: the group's threads would be joined
        under the interpreter's lock, which one of them may be waiting for, and the process would
        never end.
        """
        group = dist.group.WORLD if dist.is_initialized() else None
        self.accelerator.end_training()  # which also destroys the process group
        del self._wrapped_model, self._wrapped_optimizer
        self.accelerator.free_memory()
        del group


def check_trackers(config: PretrainConfig) -> None:
    """
    Raises:
        InputError: a tracker's package is not installed.
    """
    from accelerate.utils import is_wandb_available

    if "wandb" in config.run.trackers and not is_wandb_available():
        raise InputError(
            "run.trackers: wandb is not installed; pip install 'isopair[wandb]', or leave it out"
        )
