"""The interface of a training objective, and the registry of all objectives.

An objective is one module of this folder with two classes, its config section and the objective:

    ObjectiveSection     settings, under `streams.*.objectives` in the config (settings.objectives)
    Objective            the views that it reads, its loss over the global batch, its metrics

The trainer only calls these methods and mentions no objective by name, so a new one needs nothing
but a new module. Modules import torch inside their methods, because a dry run of another command or
a config error needs none of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pretrain.settings.objectives import ObjectiveSection, import_objectives
from pretrain.settings.views import own_features, own_outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.loss.options import Mode, Teacher

_OBJECTIVES: dict[str, type[Objective]] = {}  # `kind` key of the config -> objective


@dataclass(frozen=True)
class Temperature:
    """A learned inverse temperature, and the bias of the sigmoid loss."""

    scale: Tensor  # [1]
    bias: Tensor | None = None  # [1]


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective reads of one stream in one step, on this rank."""

    features: Mapping[str, Tensor]  # view -> [B, D], L2-normalised
    keys: Mapping[str, Tensor]  # view -> int64 [B], equal for equal contents
    temperature: Temperature | None
    counts: Sequence[int] | None  # [ranks] samples of each rank; None: not known
    begun: Any = None  # result of `Objective.begin`
    teacher: Teacher | None = None
    # int64 [P], samples that have the modalities of all views; the other rows of features are zero
    # and take no part. None: no sample can lack one
    rows: Tensor | None = None
    # [B, K] from the objective's module, zero for samples that take no part; None without a module
    outputs: Tensor | None = None

    def of_rows(self, values: Tensor) -> Tensor:
        """Returns the rows of [B, ...] that take part."""
        return values if self.rows is None else values[self.rows]


@dataclass(frozen=True)
class ObjectiveLoss:
    """Loss of one objective in one step, equal on all ranks."""

    for_backward: Tensor  # scalar; its gradients, averaged over ranks, are those of the global loss
    value: float  # loss over the global batch
    num_samples: int  # samples of the global batch that take part
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_averaged: int | None = None  # terms of its mean, such as tokens; None: num_samples


@dataclass(frozen=True)
class Objective(ABC):
    """One objective of one stream.

    A subclass declares its config section, `class Toy(Objective, section=ToySection)`, which
    registers it under the section's `kind`.
    """

    name: str
    section: Any  # of type `section_type`
    feature_type: torch.dtype  # of features that ranks exchange
    mode: Mode  # how the loss is divided among processes

    section_type: ClassVar[type[ObjectiveSection]]

    def __init_subclass__(
        cls, *, section: type[ObjectiveSection] | None = None, **options: Any
    ) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            (kind,) = get_args(section.model_fields["kind"].annotation)
            cls.section_type = section
            _OBJECTIVES[kind] = cls

    @property
    def views(self) -> tuple[str, ...]:
        """Views of a sample whose features it reads."""
        return self.section.views(self.name)

    def features_of(self, view: str) -> str:
        """Returns the name of the features that it reads of a view."""
        return own_features(view, self.name) if self.section.projects else view

    @property
    def read_names(self) -> tuple[str, ...]:
        """Names of the features, or of the outputs of its module, that it reads."""
        if self.section.reads_tokens:
            return (own_outputs(self.name),)
        return tuple(map(self.features_of, self.views))

    def read(self, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Returns what `ObjectiveInputs.features` and `ObjectiveInputs.outputs` hold.

        Args:
            found: features of the samples of its stream, by name.
        """
        if self.section.reads_tokens:
            return {}, found[own_outputs(self.name)]
        return {view: found[self.features_of(view)] for view in self.views}, None

    @property
    def temperature_name(self) -> str | None:
        """Name of the learned temperature that it uses; None for none."""
        return self.section.temperature_name(self.name)

    def begin(self, view: str, features: Tensor, *, counts: Sequence[int]) -> Any:
        """Starts communication as soon as a view is encoded; every rank must call it.

        Args:
            view: one of `views`.
            features: [B, D], L2-normalised.
            counts: [ranks] samples of each rank.

        Returns:
            Anything, which `ObjectiveInputs.begun` holds; None if nothing was started.
        """
        return None

    def received_bytes(self, *, counts: Sequence[int], width: int, device: torch.device) -> int:
        """Returns the bytes that the slowest rank receives from others in a step.

        Args:
            counts: [ranks] samples of each rank.
            width: D.
            device: device to train on.
        """
        return 0

    @abstractmethod
    def loss(self, inputs: ObjectiveInputs) -> ObjectiveLoss:
        """Computes the loss over the global batch; every rank must call it."""


def objective_types() -> dict[str, type[Objective]]:
    """Returns every objective by its `kind` in a config."""
    import_objectives()
    return dict(_OBJECTIVES)
