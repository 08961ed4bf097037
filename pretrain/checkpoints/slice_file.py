"""Files of flat float32 tensor slices in the safetensors format, written and read in parts.

Each entry is named "<key>/<parameter>@<offset>", so that a file describes itself. The safetensors
library can read these files. It can neither hash a file while writing it nor read a part of a file
behind a URL, so this module does both.

The format is the length of the header in 8 bytes (little endian), the header in JSON, and the
values.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from pretrain.distributed.tensor_slice import TensorSlice

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64  # of the first value, in bytes
CHUNK_BYTES = 16 << 20
VALUE_BYTES = 4


@dataclass(frozen=True)
class StoredSlice:
    """A slice and the position of its values in a file of a checkpoint."""

    slice: TensorSlice
    file: str
    start_byte: int


def file_chunks(slices: Sequence[TensorSlice], values: Tensor) -> Iterator[memoryview]:
    """Yields the content of a file, chunk by chunk.

    Args:
        slices: the slices in the file, in order.
        values: [elements of all slices] float32, on the CPU.
    """
    yield memoryview(header_of(slices))
    content = memoryview(values.numpy()).cast("B")
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def header_of(slices: Iterable[TensorSlice]) -> bytes:
    """Returns the bytes before the values of a file."""
    entries, start = {}, 0
    for each in slices:
        stop = start + each.length * VALUE_BYTES
        entries[f"{each.tensor}@{each.offset}"] = {
            "dtype": "F32",
            "shape": [each.length],
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_slices(file: BinaryIO, name: str) -> list[StoredSlice]:
    """Reads the header of a file and returns the slices that it lists.

    Args:
        file: open file, positioned at its start.
        name: name of the file, stored in the result.

    Raises:
        ValueError: if the file is not a file of float32 slices.
    """
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    stored = []
    for key, entry in entries.items():
        tensor, _, offset = key.rpartition("@")
        if entry["dtype"] != "F32":
            raise ValueError(f"{name}: {key}: expected values of type F32, found {entry['dtype']}")
        start, stop = entry["data_offsets"]
        held = TensorSlice(tensor, int(offset), (stop - start) // VALUE_BYTES)
        stored.append(StoredSlice(held, name, 8 + length + start))
    return stored


class SliceIndex:
    """Locates the elements of tensors in the files of a checkpoint."""

    def __init__(self, stored: Iterable[StoredSlice]) -> None:
        self._of_tensor: dict[str, list[StoredSlice]] = {}
        for each in stored:
            self._of_tensor.setdefault(each.slice.tensor, []).append(each)
        for slices in self._of_tensor.values():
            slices.sort(key=lambda each: each.slice.offset)

    def has(self, tensor: str) -> bool:
        """Returns whether any slice of the tensor "<key>/<parameter>" is stored."""
        return tensor in self._of_tensor

    def parts_of(self, wanted: TensorSlice) -> Iterator[tuple[StoredSlice, TensorSlice]]:
        """Yields (stored slice, the part of `wanted` that it provides), in order and without gaps.

        Raises:
            ValueError: if some elements are in no file.
        """
        slices = self._of_tensor.get(wanted.tensor, [])
        number = bisect_right(slices, wanted.offset, key=lambda each: each.slice.offset) - 1
        start = wanted.offset
        while start < wanted.stop:
            held = slices[number].slice if 0 <= number < len(slices) else None
            if held is None or not held.offset <= start < held.stop:
                raise ValueError(
                    f"element {start} of {wanted.tensor} is in no file of the checkpoint"
                )
            stop = min(held.stop, wanted.stop)
            yield slices[number], TensorSlice(wanted.tensor, start, stop - start)
            start, number = stop, number + 1


def read_values(file: BinaryIO, stored: StoredSlice, part: TensorSlice, target: Tensor) -> None:
    """Reads a part of a stored slice.

    Args:
        file: open file.
        stored: a slice in the file.
        part: the elements to read; all are in the stored slice.
        target: [part.length] float32, on the CPU, contiguous; overwritten.

    Raises:
        EOFError: if the file is too short.
    """
    file.seek(stored.start_byte + (part.offset - stored.slice.offset) * VALUE_BYTES)
    left = memoryview(target.numpy()).cast("B")
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{stored.file}: truncated")
        left = left[count:]
