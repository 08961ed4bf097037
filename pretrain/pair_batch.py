"""A rank's share of one step, on its way from the loader to the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pretrain.config import PairingName
from pretrain.shard_reader import BadSample


@dataclass(frozen=True)
class PairingBatch:
    """A rank's pairs of one pairing in one step; B is 0 where the step does not take the pairing.

    What two rows have in common is in `media_keys` and `caption_keys`: equal keys, equal content.
    """

    media: Tensor  # uint8 [B, 3, H, Wd], channels last, or float32 [B, samples]
    stripes: Tensor  # int32 [B, stripes, 2] start and width of SpecAugment's stripes
    tokens: Tensor  # int64 [B, L]
    caption_lengths: Tensor  # int64 [B] tokens up to the last that is not padding; on the CPU
    media_keys: Tensor  # int64 [B] of the sample whose media this is
    caption_keys: Tensor  # int64 [B] of the tokens
    digest: np.ndarray  # int64 [2], see sample_order.digest_halves
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> slots of that epoch that were filled, with substitutes
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of one step."""

    step: int
    pairings: dict[PairingName, PairingBatch]
