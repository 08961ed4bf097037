"""Probe of a model's towers before training: each is run as training will run it.

1. the largest token id of the tokenizer                    text towers
2. a sample alone and among others, in float64              mixed samples, routing, buffers
3. captions padded and trimmed, in float64                  text towers that take trimmed captions
4. the run's precision and activation checkpointing         errors, gradients of recomputed blocks

A tower that fails is rejected with the name of the layer or option. Trained towers are probed in
training mode with dropout per sample, frozen towers and teachers in evaluation mode. The probe
works on copies, one tower at a time, and changes neither the model nor any random generator.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.model.activation_checkpointing import checkpoint_backbone
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.tokenizer import Tokenizer
from pretrain.probe.backbone_copy import NotCopiedError, ProbedBackbone
from pretrain.probe.comparison import Call, Tolerance, compare, encode
from pretrain.probe.examples import backbone_examples
from pretrain.probe.float64 import clear_function_caches
from pretrain.probe.mixing import (
    BFLOAT16,
    FLOAT32,
    MIDDLE,
    calls_of,
    encodes_trimmed_equally,
    refuse_differences,
    refuse_mixing,
    trimmed,
)
from pretrain.settings.model import tower_key
from pretrain.settings.transforms import AudioTransform, ImageTransform

logger = logging.getLogger(__name__)

# Recomputed blocks repeat the same operations, but some kernels of GPUs sum in varying order.
RECOMPUTED = Tolerance(largest=2e-2, floor=0.1)
# Larger towers are compared in the run's precision alone. A copy in float64 with gradients has 16
# bytes per parameter, as many as training with AdamW.
MAX_FLOAT64_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a run that change how it encodes.

    Attributes:
        device: device of the probe.
        is_bf16: whether towers compute under bf16 autocast.
        is_checkpointed: whether blocks of trained towers recompute their activations.
    """

    device: torch.device
    is_bf16: bool = False
    is_checkpointed: bool = False

    def describe(self, probed: ProbedBackbone) -> str:
        """Returns the mode and settings for messages."""
        precision = f"with engine.precision={'bf16' if self.is_bf16 else 'fp32'}"
        blocks = " and engine.activation_checkpointing=true"
        recomputes = self.is_checkpointed and probed.is_trained
        return f"{probed.mode} {precision}{blocks if recomputes else ''}"


def probe_model(
    model: ContrastiveModel,
    *,
    tokenizer: Tokenizer | None,
    image: ImageTransform,
    audio: AudioTransform,
    settings: ProbeSettings,
    where: str = "model",
    names: Collection[str] | None = None,
) -> bool:
    """Checks that a run can use every tower, and that no tower mixes samples.

    A model in evaluation mode, such as a teacher, is probed in that mode and without gradients.

    Args:
        model: model without activation checkpointing.
        tokenizer: tokenizer of the texts; None without a text tower.
        image: config section `image`.
        audio: config section `audio`.
        settings: settings of the run.
        where: name of the model for messages.
        names: towers to probe; None: all.

    Returns:
        Whether the model takes trimmed captions.

    Raises:
        InputError: if a tower cannot be used by the run, or mixes samples.
    """
    towers = {name: model.towers[name] for name in names or model.towers}
    examples = backbone_examples(towers, model.kinds, image=image, audio=audio, tokenizer=tokenizer)
    is_on_gpu = settings.device.type == "cuda"
    takes_trimmed = model.takes_trimmed_captions
    with torch.random.fork_rng(devices=[settings.device] if is_on_gpu else []):
        for name, tower in towers.items():
            is_trained = tower.training and not tower.is_frozen
            key = where + tower_key(name).removeprefix("model")
            probed = ProbedBackbone(tower.backbone, tower.drop_keys, key, is_trained)
            if model.kinds[name] == "text":
                refuse_unknown_tokens(probed, examples[name][MIDDLE : MIDDLE + 1])
            if name == "text":
                takes_trimmed = probe_tower(
                    probed, examples[name], settings=settings, takes_trimmed=takes_trimmed
                )
            else:
                probe_tower(probed, examples[name], settings=settings)
    gc.collect()  # checkpointed blocks of a copy refer to themselves
    if is_on_gpu:
        torch.cuda.empty_cache()
    return takes_trimmed


@torch.no_grad()
def refuse_unknown_tokens(probed: ProbedBackbone, tokens: Tensor) -> None:
    """Encodes a caption with the largest token id where the model is.

    A model in training is on the CPU; on a GPU, an unknown id would end the process.

    Args:
        probed: backbone of a text tower.
        tokens: int64 [1, L].

    Raises:
        InputError: if the tower cannot encode it.
    """
    was_training = probed.backbone.training
    try:
        probed.backbone.eval()
        replace(probed, is_trained=False).encode(
            tokens,
            how=f"with token ids up to {int(tokens.max())}; the tower must know every token of "
            "model.text.tokenizer",
        )
    finally:
        probed.backbone.train(was_training)


def probe_tower(
    probed: ProbedBackbone,
    examples: Tensor,
    *,
    settings: ProbeSettings,
    takes_trimmed: bool = False,
) -> bool:
    """Runs the checks of one tower.

    Args:
        probed: backbone of the tower.
        examples: inputs of the backbone, [3, ...].
        settings: settings of the run.
        takes_trimmed: whether the tower is a text tower that may take trimmed captions.

    Returns:
        Whether the tower takes trimmed captions.

    Raises:
        InputError: if the tower cannot be used by the run, or mixes samples.
    """
    is_compared = False
    try:
        if probed.num_parameters <= MAX_FLOAT64_PARAMETERS:
            is_compared, takes_trimmed = _compare_in_float64(
                probed, examples, settings.device, takes_trimmed
            )
        refuse_failing_run(
            probed,
            examples,
            settings=settings,
            is_compared=is_compared,
            takes_trimmed=takes_trimmed,
        )
    except (NotCopiedError, torch.OutOfMemoryError) as error:
        reason = str(error).partition("\n")[0]
        logger.warning("%s: not checked for layers that mix samples: %s", probed.where, reason)
    return takes_trimmed


def _compare_in_float64(
    probed: ProbedBackbone, examples: Tensor, device: torch.device, takes_trimmed: bool
) -> tuple[bool, bool]:
    """(whether the backbone can be compared in float64, whether it takes trimmed captions)"""
    copied = probed.copy(device=device, dtype=torch.float64, fills_zeros=True)
    together, alone = calls_of(copied, examples)
    try:
        takes_trimmed = takes_trimmed and encodes_trimmed_equally(copied, together, alone)
        return takes_trimmed or refuse_mixing(copied, together, alone), takes_trimmed
    finally:
        clear_function_caches(probed.backbone)


# --------------------------------------------------------------------------------- as in training


def refuse_failing_run(
    probed: ProbedBackbone,
    examples: Tensor,
    *,
    settings: ProbeSettings,
    is_compared: bool,
    takes_trimmed: bool,
) -> None:
    """Encodes samples with the precision and activation checkpointing of the run.

    Args:
        probed: backbone of a tower.
        examples: inputs of the backbone, [3, ...].
        settings: settings of the run.
        is_compared: whether a sample alone and among others was compared in float64.
        takes_trimmed: whether captions are trimmed.

    Raises:
        InputError: if the run cannot encode the samples, recomputed blocks change the gradient, or
            the backbone mixes samples.
    """
    recomputes = settings.is_checkpointed and probed.is_trained
    if is_compared and not settings.is_bf16 and not recomputes:
        return  # the comparison in float64 ran the same operations
    copied = probed.copy(device=settings.device, dtype=torch.float32)
    together, alone = calls_of(copied, examples)
    plain = replace(settings, is_checkpointed=False).describe(probed)
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.is_bf16):
        if not is_compared:
            tolerance = BFLOAT16 if settings.is_bf16 else FLOAT32
            found = compare(copied, alone, together, floor=tolerance.floor, how=plain)
            refuse_differences(copied, found, tolerance, together=together, alone=alone)
        if recomputes:
            _refuse_recomputing(copied, together, how=settings.describe(probed))
        else:
            encode(copied, together, how=plain)
        if takes_trimmed:
            encode(copied, trimmed(alone), how=f"{settings.describe(probed)}, trimmed")


def _refuse_recomputing(copied: ProbedBackbone, call: Call, *, how: str) -> None:
    def recompute() -> None:
        checkpoint_backbone(copied.backbone, copied.drop_keys, where=copied.where)

    found = compare(copied, call, call, floor=RECOMPUTED.floor, how=how, between=recompute)
    if found.exceed(RECOMPUTED):
        raise InputError(
            f"{copied.where}: if blocks recompute their activations, features differ by "
            f"{found.features:.1e} and the gradient of parameter {found.parameter} by "
            f"{found.gradient:.1e}; set engine.activation_checkpointing to false"
        )
