"""Processes, wrapping, precision, gradients, optimizer steps: one interface for every strategy.

Only this room knows Accelerate and DeepSpeed. `Engine` is one process, or many
with DistributedDataParallel; `zero.ZeroEngine` is DeepSpeed. All give the same result. The
schedule, the clamp of the scales, the loss's normalisation and the parameter groups belong to us,
not to the libraries.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from pretrain.config import PairingName, PretrainConfig
from pretrain.model.contrastive_model import (
    ContrastiveModel,
    EncoderInputs,
    OnMedia,
    PairingFeatures,
)

OPTIMIZER_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's tensor that this rank holds; `values` writes through."""

    name: str  # of the parameter
    key: str  # "parameter", "exp_avg" or "exp_avg_sq"
    values: Tensor  # flat
    offset: int  # of its first element in the flattened tensor
    total: int  # elements of the whole tensor
    is_shared: bool  # whether every rank holds this same fragment


class Engine:
    """Wraps model and optimizer; all ranks must reach every call but `log`.

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
        self.num_updates = 0  # that the optimizer has applied
        self.model = model.to(accelerator.device)
        self.optimizer = optimizer
        self._wrap()

    def _wrap(self) -> None:
        with warnings.catch_warnings():
            # Accelerate knows the option by its old name only.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            self._wrapped_model, self._wrapped_optimizer = self.accelerator.prepare(
                self.model, self.optimizer
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
        self, micro_batches: Sequence[EncoderInputs], *, on_media: OnMedia | None = None
    ) -> dict[PairingName, PairingFeatures]:
        """Features of this rank's pairs, for training and validation alike (see the model's own).

        Always through the wrapper: past it, DistributedDataParallel would leave the gradients of
        the ranks different without a word.
        """
        return self._wrapped_model(micro_batches, on_media=on_media)

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
            FloatingPointError: the norm is not finite; nothing was changed, the gradients are gone.
        """
        self._set_learning_rate(learning_rate)
        norm = self.accelerator.clip_grad_norm_(
            self._wrapped_model.parameters(), self.gradient_clipping
        ).item()
        if math.isfinite(norm):
            self._wrapped_optimizer.step()
        self._wrapped_optimizer.zero_grad()
        refuse_non_finite_norm(norm)
        self.num_updates += 1
        return norm

    @property
    def changes_sums_after_backward(self) -> bool:
        """Whether gradients of the first step after a start would be summed over ranks in another
        order than those of later ones.

        DistributedDataParallel lays out its buckets anew after the first backward pass, and with
        more than two ranks the order of a sum follows from an element's place in its bucket.
        """
        is_wrapped = self._wrapped_model is not self.model
        return is_wrapped and self.accelerator.num_processes > 2

    def gradient_norms(self) -> dict[str, float]:
        """Parameter's name -> norm of its gradient, between backward and step."""
        return {
            name: 0.0 if gradient is None else gradient.float().norm().item()
            for name, gradient in (
                (name, self._whole_gradient(parameter))
                for name, parameter in self.model.named_parameters()
            )
        }

    def _whole_gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad

    def drop_gradients(self) -> None:
        """Forgets the gradients so far, instead of a step."""
        self._wrapped_optimizer.zero_grad()

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def fragments(self) -> Iterator[Fragment]:
        """Every parameter and the moments of those that are trained, as far as this rank holds
        them."""
        for name, parameter in self.model.named_parameters():
            whole = {"parameter": parameter.data}
            if parameter.requires_grad:
                state = self._state_of(parameter)
                whole |= {moment: state[moment] for moment in OPTIMIZER_MOMENTS}
            for key, values in whole.items():
                yield Fragment(name, key, values.view(-1), 0, values.numel(), is_shared=True)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of a tensor it updates; before its first step, as it will begin."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device=parameter.device)
            state |= {moment: torch.zeros_like(parameter) for moment in OPTIMIZER_MOMENTS}
        return state

    def after_load(self, *, num_updates: int) -> None:
        """To be called when `fragments` were written to: sets the optimizer's step count."""
        self.num_updates = num_updates
        for state in self.optimizer.state.values():
            state["step"].fill_(float(num_updates))

    def init_trackers(self, config: PretrainConfig, *, first_step: int) -> None:
        """Opens the configured trackers and shows them the config.

        Args:
            config: the whole config.
            first_step: steps done: what an earlier attempt logged of later ones is to be forgotten.
        """
        values = {section: str(value) for section, value in config.model_dump().items()}
        folder = config.run.folder
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        wandb = {"dir": str(folder), "name": folder.name, "id": identity, "resume": "allow"}
        self.accelerator.init_trackers(
            "isopair",
            config=values,
            init_kwargs={"wandb": wandb, "tensorboard": {"purge_step": first_step + 1}},
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


def refuse_non_finite_norm(norm: float) -> None:
    """
    Raises:
        FloatingPointError: it is infinite or no number.
    """
    if not math.isfinite(norm):
        raise FloatingPointError("the norm of the gradient is not finite")
