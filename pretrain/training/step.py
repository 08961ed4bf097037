"""The interface between the trainer and the training objective.

The trainer fetches batches, applies gradients, validates, saves and reports. An objective only
needs to implement `TrainingStep`, as `pretrain.training.objective_step` does.
"""

from __future__ import annotations

from typing import Any, Protocol

from pretrain.data.batch import StepBatch
from pretrain.model.contrastive_model import EncoderInputs
from pretrain.monitoring.timing import PhaseTimer


class NonFiniteLossError(FloatingPointError):
    """A loss is not finite; no gradient was computed."""


class StepLosses(Protocol):
    """Losses of one step over its global batch, equal on all ranks."""

    @property
    def total(self) -> float:
        """Value of the objective."""

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""

    def progress_text(self) -> str:
        """Returns the part of a progress line that follows the total loss and learning rate."""


class TrainingStep(Protocol):
    """Computes the gradient of one step's objective; every rank must make every call."""

    def backward(self, batch: StepBatch, timer: PhaseTimer) -> StepLosses:
        """Accumulates the gradient of the objective over the global batch.

        When called again with the same batch before the optimizer's step, it computes the same
        gradient.

        Args:
            batch: this rank's part of the step, on the device.
            timer: measures the phases "forward", "gather" and "backward".

        Raises:
            NonFiniteLossError: if the loss is not finite; no gradient was computed.
        """

    def micro_batches(self, batch: StepBatch) -> list[EncoderInputs]:
        """Returns the encoder inputs of this rank's part, one entry per micro-batch."""
