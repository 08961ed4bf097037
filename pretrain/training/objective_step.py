"""The training step: the sum of weight * loss over the objectives of the streams in the step.

1. split this rank's part of the batch into micro-batches               gradient_cache
2. encode it with the teachers, for objectives with distillation        distillation
3. encode every view, and compute every objective over its batch        step_loss, objectives
4. run the backward of the whole batch at once, or by gradient caching  gradient_cache
"""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.data.batch import StepBatch
from pretrain.distributed.engine import Engine
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs
from pretrain.model.sample_dropout import set_patch_dropout
from pretrain.monitoring.timing import PhaseTimer
from pretrain.settings.data import StreamName
from pretrain.settings.segments import value_at
from pretrain.training.distillation import ObjectiveTeacher
from pretrain.training.gradient_cache import (
    StepTerms,
    backward_in_micro_batches,
    backward_whole_batch,
    split_into_micro_batches,
)
from pretrain.training.step_loss import StepObjectiveLosses, StreamObjectives


class ObjectiveStep:
    """A `TrainingStep` (see pretrain.training.step) of objectives.

    Args:
        engine: engine that holds the model.
        objectives: objectives of every stream.
        num_micro_batches: number of micro-batches per rank, equal on all ranks.
        teachers: teachers of the objectives with distillation, by "<stream>/<objective>".
        patch_dropouts: number of steps done -> fraction of patches to drop from then on.
    """

    def __init__(
        self,
        engine: Engine,
        objectives: Mapping[StreamName, StreamObjectives],
        *,
        num_micro_batches: int,
        teachers: Mapping[str, ObjectiveTeacher] | None = None,
        patch_dropouts: Mapping[int, float] | None = None,
    ) -> None:
        self.engine = engine
        self.objectives = objectives
        self.num_micro_batches = num_micro_batches
        self.teachers = teachers or {}
        self.patch_dropouts = {0: None} | dict(patch_dropouts or {})

    def backward(self, batch: StepBatch, timer: PhaseTimer) -> StepObjectiveLosses:
        """Accumulates the gradient of the losses over the global batch; see `TrainingStep`."""
        if len(self.patch_dropouts) > 1:
            set_patch_dropout(self.engine.model, value_at(self.patch_dropouts, batch.step))
        with timer.phase("forward"):
            micro_batches = self.micro_batches(batch)
            teacher_features = {
                key: teacher.encode(self._micro_batches_of_teacher(teacher.model, batch))
                for key, teacher in self.teachers.items()
            }
            taken = {name: self.objectives[name] for name in batch.taken}
            terms = StepTerms(batch, taken, teacher_features)
        if len(micro_batches) == 1:
            return backward_whole_batch(self.engine, micro_batches[0], terms=terms, timer=timer)
        return backward_in_micro_batches(self.engine, micro_batches, terms=terms, timer=timer)

    def micro_batches(self, batch: StepBatch) -> list[EncoderInputs]:
        """Returns the encoder inputs of this rank's part, one entry per micro-batch."""
        return split_into_micro_batches(
            batch,
            num_micro_batches=self.num_micro_batches,
            trims_captions=self.engine.model.takes_trimmed_captions,
        )

    def _micro_batches_of_teacher(
        self, teacher: ContrastiveModel, batch: StepBatch
    ) -> list[EncoderInputs]:
        """The same samples; the teacher's own property determines whether texts are cut."""
        return split_into_micro_batches(
            batch,
            num_micro_batches=self.num_micro_batches,
            trims_captions=teacher.takes_trimmed_captions,
            is_taught=True,
        )
