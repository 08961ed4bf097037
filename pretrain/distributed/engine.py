"""The engine: one interface to processes, precision, gradients and optimizer steps.

Only this package uses Accelerate and DeepSpeed. `Engine` runs one process, or many with
DistributedDataParallel (DDP); `zero.ZeroEngine` runs DeepSpeed. All compute the same result. The
learning rate schedule, the clamp of the logit scales, the loss's normalisation and the parameter
groups do not come from the libraries.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed.tensor_slice import PARAMETER, HeldSlice, TensorSlice
from pretrain.optimization.unfreezing import Unfreezing, learning_rates
from pretrain.settings.optimizers import EMA

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pretrain.model.contrastive_model import (
        ContrastiveModel,
        EncoderInputs,
        OnView,
        StepFeatures,
    )
    from pretrain.optimization.optimizer import RunOptimizer


class Engine:
    """Wraps a model and its optimizer; every rank must reach every call except `log`.

    Args:
        accelerator: accelerator from `start_accelerator`.
        model: model from `build_model`.
        optimizer: optimizer over the model's parameters.
        gradient_clipping: largest global gradient norm; None disables clipping.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        model: ContrastiveModel,
        optimizer: RunOptimizer,
        gradient_clipping: float | None,
    ) -> None:
        self.accelerator = accelerator
        self.gradient_clipping = gradient_clipping or math.inf
        self.num_updates = 0  # optimizer updates applied so far
        self.model = model.to(accelerator.device)
        self.optimizer = optimizer
        self.unfreezing = Unfreezing(self.model, optimizer)
        self._names_of_groups = _names_of_groups(model, optimizer)
        self._wrap()

    def _wrap(self) -> None:
        with warnings.catch_warnings():
            # Accelerate passes the deprecated name of this option.
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
        """Switches the trained towers between training and evaluation mode."""
        self._wrapped_model.train(is_training)

    def begin_step(self, step: int) -> None:
        """Opens the parameter groups that are trained from this step on; see Unfreezing.

        Args:
            step: number of the step, from 0.
        """
        if self.unfreezing.open_groups(step, updates_before=lambda _: self.num_updates):
            self.train_mode(True)

    def open_groups(self, num_steps_done: int, *, updates_before: Callable[[int], int]) -> None:
        """Opens the parameter groups that steps have trained; must precede loading to `slices`.

        Args:
            num_steps_done: steps done at the checkpoint to load.
            updates_before: function that returns the number of updates before a step.
        """
        self.unfreezing.open_groups(num_steps_done - 1, updates_before=updates_before)

    def forward(
        self, micro_batches: Sequence[EncoderInputs], *, on_view: OnView | None = None
    ) -> StepFeatures:
        """Encodes this rank's pairs, in training and in validation; see ContrastiveModel.forward.

        Calls the model through the wrapper. Calling it directly would bypass DDP's hooks, and
        gradients would silently differ between ranks.
        """
        return self._wrapped_model(micro_batches, on_view=on_view)

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Returns a context for the forward and backward of one micro-batch.

        Gradients accumulate on this rank; the backward of the last micro-batch averages their sum
        over ranks.
        """
        is_wrapped = self._wrapped_model is not self.model
        return self._wrapped_model.no_sync() if is_wrapped and not is_last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulates a loss's gradients, averaged over ranks unless more micro-batches follow."""
        with warnings.catch_warnings():
            # Some kernels return gradients in another memory order, which only costs a copy.
            warnings.filterwarnings("ignore", message="Grad strides do not match")
            self.accelerator.backward(loss)

    def step(self, *, learning_rate: float) -> float:
        """Takes an optimizer step and returns the global gradient norm before clipping.

        Raises:
            FloatingPointError: if the norm is not finite. The gradients are dropped, and
                parameters and optimizer state are unchanged.
        """
        self._prepare_optimizer(learning_rate)
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
        """Whether the first backward pass changes the order in which gradients are summed.

        DDP rebuilds its buckets after the first backward pass. With more than two ranks, the order
        of a sum depends on an element's position in its bucket.
        """
        is_wrapped = self._wrapped_model is not self.model
        return is_wrapped and self.accelerator.num_processes > 2

    def gradient_norms(self) -> dict[str, float]:
        """Computes {parameter name: gradient norm}; call it between backward and step."""
        return {
            name: 0.0 if gradient is None else gradient.float().norm().item()
            for name, gradient in (
                (name, self._full_gradient(parameter))
                for name, parameter in self.model.named_parameters()
            )
        }

    def _full_gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad

    def drop_gradients(self) -> None:
        """Drops the accumulated gradients without taking a step."""
        self._wrapped_optimizer.zero_grad()

    def _prepare_optimizer(self, learning_rate: float) -> None:
        self.optimizer.num_updates = self.num_updates
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_scale", 1.0)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step by part of the model; empty if all are equal."""
        return learning_rates(self.optimizer.param_groups)

    def slices(self) -> Iterator[HeldSlice]:
        """Yields the slices that this rank holds of all parameters and of the optimizer's tensors.

        The slices of a parameter follow it. Frozen parameters, and those that are not trained yet,
        have none.
        """
        for name, parameter in self.model.named_parameters():
            values_by_key = {PARAMETER: parameter.data}
            if self._is_trained(name, parameter):
                values_by_key |= self.optimizer.tensors_of(parameter)
            for key, values in values_by_key.items():
                held = TensorSlice(f"{key}/{name}", 0, values.numel())
                yield HeldSlice(held, values.view(-1), is_replicated=True)

    def _is_trained(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is trained now, and has moments."""
        return parameter.requires_grad and self.unfreezing.is_open(name)

    def scalars(self) -> dict[str, dict[str, float]]:
        """Returns {parameter: {name: number}} of the optimizer's state, equal on all ranks.

        It leaves out numbers that follow from the number of updates.
        """
        groups = zip(self._names_of_groups, self.optimizer.scalars, strict=True)
        return {name: values for names, values in groups if values for name in names}

    def after_load(
        self, *, num_updates: int, scalars: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        """Sets the numbers of the optimizer's state; must be called after writing to `slices`.

        Args:
            num_updates: optimizer updates applied so far.
            scalars: result of `scalars`.
        """
        self.num_updates = num_updates
        for name, tensor in self._tensors_of_state():
            updates = num_updates - self.unfreezing.missed_updates(name)
            self.optimizer.set_updates(tensor, updates)
        self.optimizer.set_scalars(
            [(scalars or {}).get(names[0], {}) for names in self._names_of_groups]
        )
        self._refresh_model()

    def _tensors_of_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name of a parameter that is trained now, tensor that the optimizer updates for it)"""
        for name, parameter in self.model.named_parameters():
            if self._is_trained(name, parameter):
                yield name, parameter

    def _refresh_model(self) -> None:
        """Copies the tensors that the optimizer updates into the model, if they are others."""

    # ----------------------------------------------------------------------------------- EMA

    @torch.no_grad()
    def begin_averages(self) -> None:
        """Sets the averages of the weights to the weights."""
        for parameter, average in self._averages():
            average.copy_(parameter)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Returns a context in which the model has the averages as weights.

        An error inside ends the run, so it is left as it is: only some ranks may have raised it.
        """
        self._swap_averages()
        yield
        self._swap_averages()

    @torch.no_grad()
    def _swap_averages(self) -> None:
        for parameter, average in self._averages():
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
        self._refresh_model()

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(slice of a trained parameter, the same slice of its average)"""
        for held in self.slices():
            if held.slice.key == PARAMETER:
                parameter = held.values
            elif held.slice.key == EMA:
                yield parameter, held.values

    def init_trackers(
        self, config: Mapping[str, Any], *, run_folder: Path, num_steps_done: int
    ) -> None:
        """Opens the configured trackers and logs the config to them.

        Args:
            config: the run's config, section by section.
            run_folder: run folder; its name and path identify the run.
            num_steps_done: steps completed; entries that an earlier attempt logged for later steps
                are discarded.
        """
        values = {section: str(value) for section, value in config.items()}
        identity = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
        wandb = {"dir": str(run_folder), "name": run_folder.name, "id": identity, "resume": "allow"}
        self.accelerator.init_trackers(
            "isopair",
            config=values,
            init_kwargs={"wandb": wandb, "tensorboard": {"purge_step": num_steps_done + 1}},
        )

    def log(self, values: dict[str, float], *, step: int) -> None:
        """Logs values to the trackers."""
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Closes the trackers and destroys the process group; only `model` stays usable."""
        # If the wrapper held the last reference to the group, this thread would join the group's
        # threads while holding the GIL. One of them may wait for the GIL: a deadlock.
        group = dist.group.WORLD if dist.is_initialized() else None
        self.accelerator.end_training()  # also destroys the process group
        del self._wrapped_model, self._wrapped_optimizer
        self.accelerator.free_memory()
        del group


def _names_of_groups(model: ContrastiveModel, optimizer: RunOptimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]


def refuse_non_finite_norm(norm: float) -> None:
    """Raises an error if a gradient norm is infinite or NaN.

    Raises:
        FloatingPointError: if the norm is not finite.
    """
    if not math.isfinite(norm):
        raise FloatingPointError("the norm of the gradient is not finite")
