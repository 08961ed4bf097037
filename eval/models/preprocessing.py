"""Deterministic preparation of media: from the bytes of a file to a tower's input.

A clip longer than the tower's input is cut into windows of the input's length, evenly spaced from
the first sample to the last. Windows are encoded separately, and their normalised mean is the
clip's embedding. Alternatively, only the first or the central window is encoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_prep.media.decode import MediaError
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    media_extension_of,
)

LongClips = Literal["windows", "first", "centre"]


@dataclass(frozen=True)
class FrontEnd:
    """Preparation of one kind of media."""

    kind: str
    transform: Any  # object with decode(content, extension) and __call__(decoded)
    settings: dict[str, Any]  # everything that determines the transform's output
    long_clips: LongClips

    def prepare(self, sample: Sample) -> Tensor:
        """Prepares a sample's image or clip.

        Returns:
            [n, ...]: one image, or n windows of a clip, as the tower expects them.

        Raises:
            CorruptSampleError: if media of this kind are missing or cannot be decoded.
        """
        extension = media_extension_of(sample.members, self.kind)
        if extension is None:
            raise CorruptSampleError(f"{sample}: contains no {self.kind}")
        try:
            return self.prepare_media(sample.members[extension], extension)
        except MediaError as error:
            raise CorruptSampleError(f"{sample}: .{extension} cannot be decoded: {error}") from None

    def prepare_media(self, content: bytes, extension: str) -> Tensor:
        """Prepares a media file from its bytes; see `prepare`.

        Raises:
            data_prep.media.decode.MediaError: if the bytes cannot be decoded.
        """
        decoded = self.transform.decode(content, extension)
        parts = [decoded]
        if self.kind == "audio":
            parts = windows_of(decoded, self.transform.clip_samples, long_clips=self.long_clips)
        return torch.stack([self.transform(part) for part in parts])


def windows_of(
    waveform: np.ndarray, clip_samples: int, *, long_clips: LongClips
) -> list[np.ndarray]:
    """Cuts a waveform into the windows to encode; a short waveform is a single window.

    Args:
        waveform: float32 [samples]
        clip_samples: length of the tower's input.
        long_clips: "windows" (the fewest that cover the waveform, evenly spaced), "first" or
            "centre".
    """
    surplus = len(waveform) - clip_samples
    if surplus <= 0:
        return [waveform]
    if long_clips == "windows":
        num_windows = math.ceil(len(waveform) / clip_samples)
        starts = [surplus * number // (num_windows - 1) for number in range(num_windows)]
    else:
        starts = [0 if long_clips == "first" else surplus // 2]
    return [waveform[start : start + clip_samples] for start in starts]
