"""Deterministic preparation of images, clips and vectors: from bytes to a tower's input.

A clip longer than the tower's input is cut into windows of the input's length, evenly spaced from
the first sample to the last. Windows are encoded separately, and their normalised mean is the
clip's embedding. Alternatively, only the first or the central window is encoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.media.decode import MediaError
from data_prep.modalities.modality import Kind, VectorShape
from data_prep.modalities.vectors import VectorError, from_npy
from data_prep.shards.sample import CorruptSampleError
from data_prep.shards.sample_contents import SampleContents

LongClips = Literal["windows", "first", "centre"]


class FrontEnd(Protocol):
    """Preparation of one modality of a model."""

    kind: Kind
    settings: dict[str, Any]  # everything that determines the output, except long_clips
    long_clips: LongClips | None  # matters for clips only

    def prepare(self, contents: SampleContents, member: str) -> Tensor:
        """Prepares a modality of a sample.

        Args:
            contents: content of the sample.
            member: modality of the dataset.

        Returns:
            [n, ...]: one image or vector, or n windows of a clip.

        Raises:
            CorruptSampleError: if the sample lacks the modality, or it cannot be decoded.
        """

    def prepare_file(self, content: bytes, extension: str) -> Tensor:
        """Prepares a file from its bytes; see `prepare`.

        Raises:
            data_prep.media.decode.MediaError, VectorError: if the bytes cannot be decoded.
        """

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Returns the inputs of the tower for a batch of prepared rows, [B, ...]."""

    def example(self) -> Tensor:
        """Returns a prepared row, [1, ...]."""


@dataclass(frozen=True)
class MediaFrontEnd:
    """Preparation of images or clips."""

    kind: Kind
    transform: Any  # object with decode(content, extension) and __call__(decoded)
    settings: dict[str, Any]
    long_clips: LongClips

    def prepare(self, contents: SampleContents, member: str) -> Tensor:
        """Prepares an image or a clip; see `FrontEnd`."""
        if member not in contents.media:
            raise CorruptSampleError(f"{contents}: contains no {member}")
        extension = contents.extensions[member]
        try:
            return self.prepare_file(contents.media[member], extension)
        except MediaError as error:
            name = extension if member == self.kind else f"{member}.{extension}"
            raise CorruptSampleError(f"{contents}: .{name} cannot be decoded: {error}") from None

    def prepare_file(self, content: bytes, extension: str) -> Tensor:
        """Prepares a media file from its bytes; see `FrontEnd`."""
        return self._transformed(self.transform.decode(content, extension))

    def _transformed(self, decoded: np.ndarray) -> Tensor:
        parts = [decoded]
        if self.kind == "audio":
            parts = windows_of(decoded, self.transform.clip_samples, long_clips=self.long_clips)
        return torch.stack([self.transform(part) for part in parts])

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Returns the batch; see `FrontEnd`."""
        return (batch,)

    def example(self) -> Tensor:
        """Returns a black image or a silent clip; see `FrontEnd`."""
        if self.kind == "audio":
            return self._transformed(np.zeros(self.transform.clip_samples, np.float32))
        return self._transformed(np.zeros((64, 64, 3), np.uint8))


@dataclass(frozen=True)
class VectorFrontEnd:
    """Preparation of vectors.

    A prepared sequence is [rows, width + 1]. Its last column is 1 for rows of the vector, and 0 for
    rows of padding.
    """

    shape: tuple[int, ...]  # (width,), or (most rows, width) of sequences, which are cut
    kind: Kind = "vector"
    long_clips: None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Shape of the tower's input; see `FrontEnd`."""
        return {"shape": list(self.shape)}

    @property
    def vector_shape(self) -> VectorShape:
        """Shape of the vectors of a dataset."""
        return VectorShape(self.shape[-1], is_sequence=len(self.shape) == 2)

    def prepare(self, contents: SampleContents, member: str) -> Tensor:
        """Prepares a vector; see `FrontEnd`."""
        if member not in contents.vectors:
            raise CorruptSampleError(f"{contents}: contains no {member}")
        return self._padded(contents.vectors[member])

    def prepare_file(self, content: bytes, extension: str) -> Tensor:
        """Prepares an `.npy` file from its bytes; see `FrontEnd`."""
        if extension != "npy":
            raise VectorError("not_npy", f"expected an .npy file, found .{extension}")
        return self._padded(from_npy(content, shape=self.vector_shape))

    def _padded(self, vector: np.ndarray) -> Tensor:
        values = torch.from_numpy(vector.copy())
        if len(self.shape) == 1:
            return values[None]
        rows = values[: self.shape[0]]
        padded = torch.zeros(self.shape[0], self.shape[1] + 1)
        padded[: len(rows)] = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        return padded[None]

    def inputs(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Returns [B, width], or [B, rows, width] and the numbers of rows; see `FrontEnd`."""
        if len(self.shape) == 1:
            return (batch,)
        return batch[..., :-1], batch[..., -1].sum(dim=1).long()

    def example(self) -> Tensor:
        """Returns a vector of zeros; see `FrontEnd`."""
        return self._padded(np.zeros(self.shape, np.float32))


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
