"""Loss options and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from pretrain.settings.model import LARGEST_LOGIT_SCALE

Mode = Literal["strip1", "strip2"]  # see two_passes
Kind = Literal["softmax", "sigmoid"]
Duplicates = Literal["negatives", "positives", "masked"]
Direction = Literal["both", "forward"]
Negatives = Literal["per_anchor", "all_pairs"]


@dataclass(frozen=True)
class Teacher:
    """Features of another model for the same pairs, whose softmaxes are mixed into the targets."""

    media: Tensor  # [B, teacher's D], L2-normalised
    text: Tensor  # [B, teacher's D], L2-normalised
    scale: float  # the teacher's inverse temperature
    weight: float = 0.5  # weight of the teacher's softmaxes in the targets, in (0, 1]


@dataclass(frozen=True)
class LossOptions:
    """Settings of a contrastive loss; see reference.py for the formulas.

    Raises:
        ValueError: if a value is unknown or out of range, or two settings are incompatible.
    """

    kind: Kind = "softmax"
    label_smoothing: float = 0.0  # in [0, 1), softmax only
    duplicates: Duplicates = "negatives"
    mode: Mode | Literal["auto"] = "auto"  # see two_passes; affects speed only
    piece_rows: int | None = None  # rows of each rank gathered at once; None: chosen by size
    direction: Direction = "both"  # softmax only; forward: from each media to the captions
    negatives: Negatives = "per_anchor"  # softmax only; all_pairs: one softmax over all pairs

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", Kind),
            ("duplicates", Duplicates),
            ("direction", Direction),
            ("negatives", Negatives),
        ):
            _check_choice(name, getattr(self, name), get_args(choices))
        _check_choice("mode", self.mode, ("auto", *get_args(Mode)))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected 0 <= x < 1, found {self.label_smoothing:g}"
            )
        softmax_only = {"label_smoothing": 0.0, "direction": "both", "negatives": "per_anchor"}
        for name, default in softmax_only.items():
            if self.kind == "sigmoid" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} is defined for the softmax loss only, "
                    f'found kind="sigmoid"; set {name} to {default}'
                )
        if self.negatives == "all_pairs" and self.direction != "both":
            raise ValueError(
                f'direction="{self.direction}" with negatives="all_pairs": a single softmax over '
                'all pairs has no direction; set direction to "both"'
            )


def check_arguments(
    media: Tensor,
    text: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    keys: Sequence[Tensor],
    teacher: Teacher | None,
) -> None:
    """Checks that the arguments of `contrastive_loss` are consistent.

    Raises:
        ValueError: if shapes or settings are inconsistent.
    """
    if media.ndim != 2 or media.shape != text.shape:
        raise ValueError(
            f"expected media and text of the same shape [B, D], found {tuple(media.shape)} and "
            f"{tuple(text.shape)}"
        )
    if options.kind == "softmax" and bias is not None:
        raise ValueError(
            'a bias does not change the softmax loss; omit the bias or set kind="sigmoid"'
        )
    if options.duplicates != "negatives" and not 1 <= len(keys) <= 2:
        raise ValueError(
            f'duplicates="{options.duplicates}": expected one or two keys per pair, '
            f"found {len(keys)}"
        )
    if teacher is not None:
        _check_teacher(media, options, teacher)


def check_scale(scale: float, options: LossOptions) -> None:
    """Checks the scale of the softmax loss.

    Raises:
        ValueError: if the loss would overflow for some unit vectors.
    """
    if options.kind == "softmax" and abs(scale) > LARGEST_LOGIT_SCALE:
        raise ValueError(
            f"expected a scale of at most {LARGEST_LOGIT_SCALE:g} for the softmax loss, found "
            f"{scale:g}; set a lower logit_scale.maximum"
        )


def _check_teacher(media: Tensor, options: LossOptions, teacher: Teacher) -> None:
    if options.kind != "softmax":
        raise ValueError(f'a teacher requires the softmax loss, found kind="{options.kind}"')
    if options.negatives != "per_anchor":
        raise ValueError(
            "a teacher provides targets per anchor, found "
            f'negatives="{options.negatives}"; set negatives to "per_anchor"'
        )
    if not 0 < teacher.weight <= 1:
        raise ValueError(f"teacher.weight: expected 0 < x <= 1, found {teacher.weight:g}")
    if abs(teacher.scale) > LARGEST_LOGIT_SCALE:
        raise ValueError(
            f"teacher.scale: expected at most {LARGEST_LOGIT_SCALE:g}, found {teacher.scale:g}"
        )
    shapes = tuple(teacher.media.shape), tuple(teacher.text.shape)
    if shapes[0] != shapes[1] or shapes[0][:1] != (len(media),):
        raise ValueError(
            f"expected teacher features of the same shape [{len(media)}, D], found {shapes[0]} and "
            f"{shapes[1]}"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
