"""From the bytes of media to what a tower is given, without chance.

A clip longer than the tower's is taken whole: windows of the tower's length, evenly spaced from its
first sample to its last, are encoded each by itself, and their normalised mean is the clip's
embedding. Or only its first part, or its centre, is taken.
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
    """How media of one kind are prepared."""

    kind: str
    transform: Any  # decode(content, extension) and transform(decoded)
    settings: dict[str, Any]  # everything that what it gives is a function of
    long_clips: LongClips

    def prepare(self, sample: Sample) -> Tensor:
        """[n, ...]: the windows of a sample's clip, or its one image, as the tower expects them.

        Raises:
            CorruptSampleError: it has no media of this kind, or they cannot be decoded.
        """
        extension = media_extension_of(sample.members, self.kind)
        if extension is None:
            raise CorruptSampleError(f"{sample}: holds no {self.kind}")
        try:
            return self.prepare_media(sample.members[extension], extension)
        except MediaError as error:
            raise CorruptSampleError(f"{sample}: .{extension} cannot be decoded: {error}") from None

    def prepare_media(self, content: bytes, extension: str) -> Tensor:
        """As `prepare`, of the bytes of a file.

        Raises:
            data_prep.media.decode.MediaError: they cannot be decoded.
        """
        decoded = self.transform.decode(content, extension)
        parts = [decoded]
        if self.kind == "audio":
            parts = windows_of(decoded, self.transform.clip_samples, long_clips=self.long_clips)
        return torch.stack([self.transform(part) for part in parts])


def windows_of(
    waveform: np.ndarray, clip_samples: int, *, long_clips: LongClips
) -> list[np.ndarray]:
    """The parts of a waveform that are encoded; itself where it is no longer than one of them.

    Args:
        waveform: float32 [samples]
        clip_samples: of the tower's input.
        long_clips: "windows": as few as cover the waveform, evenly spaced.
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
