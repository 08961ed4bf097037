"""The interface between the trainer and what a step minimises.

The trainer takes batches, applies gradients, validates, saves and reports. All that it asks of an
objective is a `TrainingStep`; `pretrain.training.contrastive_step` is one.
"""

from __future__ import annotations

from typing import Any, Protocol

from pretrain.data.batch import StepBatch
from pretrain.model.contrastive_model import EncoderInputs
from pretrain.monitoring.timing import PhaseTimer


class NonFiniteLossError(FloatingPointError):
    """A loss is not finite; no gradient was taken."""


class StepLosses(Protocol):
    """Losses of one step over its global batch, equal on all ranks."""

    @property
    def total(self) -> float:
        """The minimised value."""

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""

    def shown(self) -> str:
        """Returns the part of a progress line that follows the total loss and learning rate."""


class TrainingStep(Protocol):
    """The gradient of one step's objective; every rank must make every call."""

    def backward(self, batch: StepBatch, timer: PhaseTimer) -> StepLosses:
        """Adds the gradient of the objective over the global batch to the model's parameters.

        Called again with the same batch before the optimizer's step, it gives the same gradient.

        Args:
            batch: this rank's part of the step, on the device.
            timer: measures the phases "forward", "gather" and "backward".

        Raises:
            NonFiniteLossError: if the loss is not finite; no gradient was taken.
        """

    def micro_batches(self, batch: StepBatch) -> list[EncoderInputs]:
        """Returns the encoder inputs of this rank's part, one entry per micro-batch."""
