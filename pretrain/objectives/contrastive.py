"""Contrastive losses between two views of the samples of the global batch (see pretrain.loss)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_prep.config_file import Location, Section, free
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    ObjectiveSection,
)
from pretrain.settings.views import ViewName

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.loss.contrastive_loss import ContrastiveLoss
    from pretrain.loss.options import LossOptions, Teacher

LossKind = Literal["softmax", "sigmoid"]


class Distillation(Section):
    """Distillation: a trained model provides part of the softmax targets."""

    # Run folder or checkpoint (path or URL), folder of open_clip or Hugging Face, model of a hub,
    # or open_clip:<model>/<tag>; the fingerprint of its files is part of the identity
    checkpoint: Location = free()
    weight: float = Field(0.5, gt=0, le=1)  # weight of its softmaxes in the targets


class ContrastiveSection(ObjectiveSection):
    """Contrasts two views of every sample with those of all others in the global batch."""

    kind: Literal["contrastive"] = "contrastive"
    # Views that are contrasted, such as image, {image: 2} (a second augmentation) or {text: title};
    # null: the halves of the name, such as image and text of image-text
    left: ViewName | None = None
    right: ViewName | None = None
    # Name of the learned temperature and bias, which objectives may share; null: the objective's
    temperature: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    # own: an mlp on the features of each tower, instead of the tower's projection (Mu et al. 2022,
    # "SLIP"); only training uses it
    projection: Literal["shared", "own"] = "shared"
    # softmax: CLIP's (Radford et al. 2021); sigmoid: SigLIP's (Zhai et al. 2023), which starts well
    # with model.logit_scale.initial: 10
    loss: LossKind = "softmax"
    # fraction of the softmax targets that is spread over the batch
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # softmax only. both: left to right and back; forward: from left to right alone
    direction: Literal["both", "forward"] = "both"
    # softmax only. per_anchor: a softmax for each row and column; all_pairs: one over all pairs
    negatives: Literal["per_anchor", "all_pairs"] = "per_anchor"
    # Role of two samples in a batch whose left or right views are equal. negatives: as in CLIP;
    # positives: as if they were one sample; masked: excluded from each other's loss.
    duplicates: Literal["negatives", "positives", "masked"] = "negatives"
    teacher: Distillation | None = None
    # The loss is also computed on the first d numbers of the embeddings, normalised again, for each
    # d of this list, at the same temperature: they then serve as shorter embeddings (Kusupati et
    # al. 2022, "Matryoshka Representation Learning", equation 1). All numbers always take part
    matryoshka_dims: list[PositiveInt] = []
    # factor of the loss of each of matryoshka_dims; that of all numbers has 1. null: 1 for each
    matryoshka_weights: list[PositiveFloat] | None = None

    @model_validator(mode="after")
    def _weighs_each_dim(self) -> ContrastiveSection:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims != sorted(set(dims)):
            raise ValueError(f"expected rising matryoshka_dims, found {dims}")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(
                f"expected one of matryoshka_weights for each of matryoshka_dims={dims}, found "
                f"{weights}"
            )
        return self

    @model_validator(mode="after")
    def _has_softmaxes(self) -> ContrastiveSection:
        for name in ("label_smoothing", "direction", "negatives", "teacher"):
            default = type(self).model_fields[name].default
            if self.loss != "softmax" and getattr(self, name) != default:
                value = "" if name == "teacher" else f"={getattr(self, name)}"
                raise ValueError(
                    f"{name}{value} with loss={self.loss}: it is for loss=softmax alone; remove it"
                )
        if self.negatives == "all_pairs":
            if self.direction != "both":
                raise ValueError(
                    f"direction={self.direction} with negatives=all_pairs: one softmax over all "
                    "pairs has no direction; remove direction"
                )
            if self.teacher is not None:
                raise ValueError(
                    "teacher with negatives=all_pairs: a teacher provides targets for the softmax "
                    "of each anchor; remove teacher, or set negatives to per_anchor"
                )
        return self

    def views(self, name: str) -> tuple[str, str]:
        """Returns (left, right); see the base class."""
        left, _, right = name.partition("-")
        return self.left or left, self.right or right

    def temperature_name(self, name: str) -> str:
        """Returns the name of its temperature; see the base class."""
        return self.temperature or name

    @property
    def has_bias(self) -> bool:
        """Whether the loss is SigLIP's."""
        return self.loss == "sigmoid"

    @property
    def projects(self) -> bool:
        """Whether it has a projection of its own; see the base class."""
        return self.projection == "own"

    @property
    def nested_dims(self) -> list[int]:
        """The list matryoshka_dims; see the base class."""
        return self.matryoshka_dims

    @property
    def weights_of_dims(self) -> dict[int, float]:
        """Factor of the loss of each of matryoshka_dims."""
        weights = self.matryoshka_weights or [1.0] * len(self.matryoshka_dims)
        return dict(zip(self.matryoshka_dims, weights, strict=True))

    @property
    def contrasts_repeats(self) -> bool:
        """Whether equal samples are negatives of one another."""
        return self.duplicates == "negatives"

    def for_validation(self) -> ContrastiveSection:
        """Returns the plain loss, by which runs with different settings can be compared.

        The losses of matryoshka_dims are metrics, which the loss does not include.
        """
        plain = {"label_smoothing": 0.0, "duplicates": "negatives", "teacher": None}
        only_measured = {"matryoshka_weights": [0.0] * len(self.matryoshka_dims)}
        return self.model_copy(update=plain | only_measured)


class ContrastiveObjective(Objective, section=ContrastiveSection):
    """The contrastive loss of two views over the global batch, exact for any number of ranks."""

    @property
    def options(self) -> LossOptions:
        """Settings of the loss."""
        from pretrain.loss.options import LossOptions

        return LossOptions(
            self.section.loss,
            self.section.label_smoothing,
            self.section.duplicates,
            self.mode,
            direction=self.section.direction,
            negatives=self.section.negatives,
        )

    def begin(self, view: str, features: Tensor, *, counts: Sequence[int]) -> Any:
        """Starts the gather of the left view, while the right one is encoded."""
        from pretrain.loss.contrastive_loss import begin_gather

        if view != self.views[0] or self.section.teacher is not None:
            return None
        return begin_gather(features.to(self.feature_type), options=self.options, counts=counts)

    def received_bytes(self, *, counts: Sequence[int], width: int, device: torch.device) -> int:
        """Returns the bytes of features, sums and gradients; see the base class."""
        from pretrain.loss.two_passes import received_bytes

        return sum(
            received_bytes(
                counts,
                options=self.options,
                width=each,
                feature_bytes=self.feature_type.itemsize,
                device=device,
            )
            for each in (width, *self.section.nested_dims)
        )

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveLoss:
        """Computes the loss and in-batch recall at 1 in both directions, for each nested width."""
        sides = [inputs.of_rows(inputs.features[view]) for view in self.views]
        whole = self._contrast(sides, inputs, media_gather=inputs.begun)
        total, value, metrics = whole.for_backward, whole.value, self._recalls(whole)
        for dim, weight in self.section.weights_of_dims.items():
            found = self._contrast([first_numbers(side, dim) for side in sides], inputs)
            total = total + weight * found.for_backward
            value += weight * found.value
            own = {"loss": found.value} | self._recalls(found)
            metrics |= {f"dim{dim}_{name}": metric for name, metric in own.items()}
        return ObjectiveLoss(total, value, whole.num_pairs, metrics)

    def _contrast(
        self, sides: Sequence[Tensor], inputs: ObjectiveInputs, *, media_gather: Any = None
    ) -> ContrastiveLoss:
        from pretrain.loss.contrastive_loss import contrastive_loss

        return contrastive_loss(
            *sides,
            inputs.temperature.scale,
            inputs.temperature.bias,
            options=self.options,
            keys=tuple(
                inputs.of_rows(inputs.keys[view]) for view in self.views if view in inputs.keys
            ),
            teacher=_rows_of_teacher(inputs),
            counts=inputs.counts if inputs.rows is None else None,
            media_gather=media_gather,
            feature_type=self.feature_type,
        )

    def _recalls(self, found: ContrastiveLoss) -> dict[str, float]:
        left, right = self.views
        return {
            f"{left}_to_{right}_recall@1": found.media_to_text_recall_at_1,
            f"{right}_to_{left}_recall@1": found.text_to_media_recall_at_1,
        }


def first_numbers(embeddings: Tensor, dim: int) -> Tensor:
    """Returns the first numbers of embeddings, normalised again: [B, D] -> [B, dim].

    The rows are L2-normalised.
    """
    from torch.nn import functional

    return functional.normalize(embeddings[:, :dim], dim=-1)


def _rows_of_teacher(inputs: ObjectiveInputs) -> Teacher | None:
    """Teacher features of the samples that take part."""
    teacher = inputs.teacher
    if teacher is None or inputs.rows is None:
        return teacher
    left, right = inputs.of_rows(teacher.media), inputs.of_rows(teacher.text)
    return replace(teacher, media=left, text=right)
