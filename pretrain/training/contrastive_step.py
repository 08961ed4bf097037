"""The training step of contrastive pretraining: the sum of weight * loss over its pairings.

1. split this rank's part of the batch into micro-batches               gradient_cache
2. encode them with the teachers, for pairings with distillation        distillation
3. define the loss of every pairing over its global batch               step_loss
4. run the backward of the whole batch at once, or by gradient caching  gradient_cache
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.config import PairingName
from pretrain.data.batch import StepBatch
from pretrain.distributed.engine import Engine
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.distillation import PairingTeacher
from pretrain.training.gradient_cache import (
    backward_in_micro_batches,
    backward_whole_batch,
    split_into_micro_batches,
)
from pretrain.training.step_loss import ContrastiveLosses, PairingLoss, terms_of_step


class ContrastiveStep:
    """A `TrainingStep` (see pretrain.training.step) of contrastive losses.

    Args:
        engine: engine that holds the model.
        losses: loss of every pairing.
        num_micro_batches: number of micro-batches per rank, equal on all ranks.
        teachers: teachers of the pairings with distillation.
    """

    def __init__(
        self,
        engine: Engine,
        losses: Mapping[PairingName, PairingLoss],
        *,
        num_micro_batches: int,
        teachers: Mapping[PairingName, PairingTeacher] | None = None,
    ) -> None:
        self.engine = engine
        self.losses = losses
        self.num_micro_batches = num_micro_batches
        self.teachers = teachers or {}

    def backward(self, batch: StepBatch, timer: PhaseTimer) -> ContrastiveLosses:
        """Accumulates the gradient of the losses over the global batch; see `TrainingStep`."""
        with timer.phase("forward"):
            micro_batches = self.micro_batches(batch)
            teacher_features = {
                name: teacher.encode(self._micro_batches_for(teacher.model, batch))
                for name, teacher in self.teachers.items()
            }
            terms = terms_of_step(self.losses, batch, teacher_features=teacher_features)
        if len(micro_batches) == 1:
            return backward_whole_batch(self.engine, micro_batches[0], terms=terms, timer=timer)
        return backward_in_micro_batches(self.engine, micro_batches, terms=terms, timer=timer)

    def micro_batches(self, batch: StepBatch) -> list[EncoderInputs]:
        """Returns the encoder inputs of this rank's part, one entry per micro-batch."""
        return self._micro_batches_for(self.engine.model, batch)

    def _micro_batches_for(self, model: ContrastiveModel, batch: StepBatch) -> list[EncoderInputs]:
        """The same pairs for any model; its own property determines whether captions are cut."""
        return split_into_micro_batches(
            batch,
            num_micro_batches=self.num_micro_batches,
            trims_captions=model.takes_trimmed_captions,
        )
