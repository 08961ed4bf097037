"""Vectors as `.npy` members: float32, little-endian, [width] or [time, width]; and their sums.

Statistics are merged sample by sample and shard by shard (Chan et al. 1983), always in the same
order, so that they do not depend on the number of workers.
"""

from __future__ import annotations

import io
import math
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.modalities.modality import VectorShape

MAX_WIDTH = 65_536
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
HEADER_ERRORS = (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError, MemoryError)


class VectorError(ValueError):
    """An array that cannot be used; `reason` is a stable identifier."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def to_vector(values: Any, *, shape: VectorShape | None = None) -> np.ndarray:
    """Converts values to a float32 array and checks it.

    Args:
        values: array, or list of numbers, or list of lists of numbers.
        shape: expected shape; None: any.

    Returns:
        Float32, [width] or [time, width].

    Raises:
        VectorError: if the values are not numbers, not finite, or have another shape.
    """
    try:
        found = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:  # lists of different lengths
        raise VectorError("vector_shape", f"expected equally long rows: {error}") from None
    if found.dtype.kind not in "fiub":
        raise VectorError("not_numbers", f"expected numbers, found {found.dtype}")
    if found.ndim not in (1, 2) or 0 in found.shape or found.shape[-1] > MAX_WIDTH:
        raise VectorError(
            "vector_shape",
            f"expected [width] or [time, width] with at most {MAX_WIDTH} columns, found "
            f"{list(found.shape)}",
        )
    if shape is not None and VectorShape.of(found) != shape:
        raise VectorError("vector_shape", f"expected {shape}, found {list(found.shape)}")
    with np.errstate(over="ignore"):
        vector = np.ascontiguousarray(found, dtype="<f4")
    if not np.isfinite(vector).all():
        place = np.argwhere(~np.isfinite(vector))[0].tolist()
        value = found[tuple(place)]
        raise VectorError(
            "not_finite", f"expected finite float32 numbers, found {value} at {place}"
        )
    return vector


def from_npy(content: bytes, *, shape: VectorShape | None = None) -> np.ndarray:
    """Parses an `.npy` file of numbers, which must not be pickled, and checks it.

    Raises:
        VectorError: if the content is not such a file, or in the cases of `to_vector`.
    """
    try:
        found = _array_in(content)
    except HEADER_ERRORS as error:
        raise VectorError("not_npy", f"expected an .npy file of numbers: {error}") from None
    return to_vector(found, shape=shape)


def _array_in(content: bytes) -> np.ndarray:
    # The size is compared with the header before any memory is allocated for it.
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"version {version}")
    shape, is_fortran, dtype = HEADER_READERS[version](file)
    expected, start = math.prod(shape) * dtype.itemsize, file.tell()
    if dtype.hasobject or len(content) - start != expected:
        raise ValueError(f"{dtype} {list(shape)} in {len(content) - start} bytes")
    flat = np.frombuffer(content, dtype, offset=start) if expected else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def to_npy(vector: np.ndarray) -> bytes:
    """Formats a vector as an `.npy` file (version 1.0); equal vectors give equal bytes."""
    file = io.BytesIO()
    contiguous = np.ascontiguousarray(vector, dtype="<f4")
    np.lib.format.write_array(file, contiguous, version=(1, 0), allow_pickle=False)
    return file.getvalue()


@dataclass
class VectorSums:
    """Count, mean and sum of squared deviations of each column, in float64."""

    num_rows: int
    mean: np.ndarray  # [width]
    squares: np.ndarray  # [width], sum of (value - mean)^2

    @classmethod
    def empty(cls, width: int) -> VectorSums:
        """Returns the sums of no rows."""
        return cls(0, np.zeros(width), np.zeros(width))

    @classmethod
    def of(cls, vector: np.ndarray) -> VectorSums:
        """Computes the sums of one vector, [width] or [time, width]."""
        rows = np.atleast_2d(vector).astype(np.float64)
        mean = rows.sum(axis=0) / len(rows)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0))

    def merge(self, other: VectorSums) -> None:
        """Adds the rows of other sums, which come after the rows of these."""
        if not other.num_rows:
            return
        total = self.num_rows + other.num_rows
        difference = other.mean - self.mean
        weight = self.num_rows * (other.num_rows / total)
        self.mean = self.mean + difference * (other.num_rows / total)
        self.squares = self.squares + other.squares + np.square(difference) * weight
        self.num_rows = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation of each column; 0 without rows."""
        return np.sqrt(self.squares / max(self.num_rows, 1))


def add_vectors(sums: dict[str, VectorSums], vectors: Mapping[str, np.ndarray]) -> None:
    """Adds the vectors of one sample to the sums of their modalities."""
    for name, vector in vectors.items():
        found = VectorSums.of(vector)
        if name in sums:
            sums[name].merge(found)
        else:
            sums[name] = found
