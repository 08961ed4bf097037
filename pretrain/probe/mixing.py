"""Comparison of a sample alone and among others, which finds layers that mix samples."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.model.caption_trimming import TOKENS_MULTIPLE
from pretrain.probe.backbone_copy import ProbedBackbone
from pretrain.probe.comparison import Call, Differences, Tolerance, compare
from pretrain.probe.float64 import FindLowerPrecision
from pretrain.probe.mixing_layer import first_layer_that_mixes

logger = logging.getLogger(__name__)

FLOAT64 = Tolerance(largest=1e-9, floor=1e-4)
FLOAT32 = Tolerance(largest=1e-3, floor=1e-2)
BFLOAT16 = Tolerance(largest=0.1, floor=0.1)
# The sample between two others is compared, because it may depend on either side.
MIDDLE = 1


def calls_of(copied: ProbedBackbone, examples: Tensor) -> tuple[Call, Call]:
    """Returns the calls that encode the middle sample among the others, and alone.

    Args:
        copied: copy of a backbone, whose device and type the inputs get.
        examples: inputs of the backbone, [3, ...].
    """
    dtype = next(copied.backbone.parameters()).dtype
    examples = examples.to(copied.device, dtype if examples.is_floating_point() else None)
    together = Call(examples, first=0, row=MIDDLE)
    return together, Call(examples[MIDDLE : MIDDLE + 1], first=MIDDLE, row=0)


def encodes_trimmed_equally(copied: ProbedBackbone, together: Call, alone: Call) -> bool:
    """Compares a padded caption among others with the same caption trimmed and alone.

    Args:
        copied: copy of the backbone of a text tower, in float64.
        together: captions [3, L] with a short one in the middle.
        alone: the short caption [1, L].

    Returns:
        Whether features and gradients are equal and no other effect is found.
    """
    how = f"{copied.mode} with trimmed captions"
    try:
        found = compare(copied, trimmed(alone), together, floor=FLOAT64.floor, how=how)
    except InputError as error:
        logger.info("captions are not trimmed: %s", error)
        return False
    return not found.exceed(FLOAT64) and found.routed is None and found.buffer is None


def trimmed(call: Call) -> Call:
    """Returns the call with captions cut to the shortest length to which training trims."""
    return replace(call, examples=call.examples[:, :TOKENS_MULTIPLE])


def refuse_mixing(copied: ProbedBackbone, together: Call, alone: Call) -> bool:
    """Checks that a sample has the same features and gradients alone and among others.

    Args:
        copied: copy of a backbone, in float64.
        together: the sample between two others.
        alone: the sample.

    Returns:
        Whether the backbone can be compared in float64.

    Raises:
        InputError: if the backbone mixes samples.
    """
    how = f"{copied.mode} in float64"
    try:
        found = compare(copied, alone, together, floor=FLOAT64.floor, how=how)
    except InputError as error:
        logger.info("%s: not compared in float64: %s", copied.where, error)
        return False
    tolerance = FLOAT64
    if found.exceed(FLOAT64) and _lowers_precision(copied, together):
        tolerance = FLOAT32
    refuse_differences(copied, found, tolerance, together=together, alone=alone)
    return True


@torch.no_grad()
def _lowers_precision(copied: ProbedBackbone, call: Call) -> bool:
    """Whether the backbone converts values to a lower precision, which explains differences."""
    with FindLowerPrecision() as finder:
        copied.encode(call.examples, how=copied.mode)
    return finder.is_found


def refuse_differences(
    copied: ProbedBackbone, found: Differences, tolerance: Tolerance, *, together: Call, alone: Call
) -> None:
    """Raises the error that explains differences.

    Args:
        copied: copy of a backbone.
        found: differences between the two calls.
        tolerance: differences caused by rounding.
        together: the sample between two others.
        alone: the sample.

    Raises:
        InputError: if there is a difference.
    """
    where, how = copied.where, copied.mode
    advice = "choose a model without it"
    if copied.is_trained:
        advice += ", or freeze the tower (frozen: true) if it happens only in training mode"
    if found.features > tolerance.largest:
        layer = _layer_that_mixes(copied, tolerance, together=together, alone=alone)
        what, difference = layer, found.features
    elif found.gradient > tolerance.largest:
        what, difference = f"the gradient of parameter {found.parameter}", found.gradient
    elif found.routed is not None:
        raise InputError(
            f"{where}: parameter {found.routed} is used by some samples only, as in a mixture of "
            f"experts; engines expect a gradient of every parameter in every step; {advice}"
        )
    elif found.buffer is not None:
        raise InputError(
            f"{where}: buffer {found.buffer} changes with every call {how}, so the result would "
            f"depend on the number of processes and on micro_batch_size; {advice}"
        )
    else:
        return
    raise InputError(
        f"{where}: {what} mixes samples {how}: a sample alone and among {len(together.examples)} "
        f"differs by {difference:.1e}, so the result would depend on the number of processes and "
        f"on micro_batch_size; {advice}"
    )


def _layer_that_mixes(
    copied: ProbedBackbone, tolerance: Tolerance, *, together: Call, alone: Call
) -> str:
    layer = first_layer_that_mixes(
        copied.backbone,
        lambda: copied.encode(alone.examples, first=alone.first, how=copied.mode),
        lambda: copied.encode(together.examples, first=together.first, how=copied.mode),
        row=together.row,
        tolerance=tolerance.largest,
    )
    return copied.layer_name(layer or copied.backbone)
