"""Files of flat float32 fragments of tensors, in the safetensors format, written and read in parts.

A name is "<key>/<tensor>@<place of the fragment's first element in the flattened tensor>", so that
a file tells by itself what it holds. The safetensors library can read these files; it cannot write
one while its sum is taken, nor read a part of one behind a URL, which is why this module exists.
The format: the header's length in 8 bytes, little endian; the header in JSON; then the values.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from torch import Tensor

ALIGNMENT = 64  # of the first value, in bytes
CHUNK_BYTES = 16 << 20
VALUE_BYTES = 4


@dataclass(frozen=True)
class Piece:
    """A fragment of a flattened tensor, without its values."""

    tensor: str  # "<key>/<name>"
    offset: int  # of its first element in the tensor
    length: int  # elements

    @property
    def stop(self) -> int:
        """Place behind its last element."""
        return self.offset + self.length


@dataclass(frozen=True)
class StoredPiece:
    """A piece and where its values are."""

    piece: Piece
    file: str
    start_byte: int


def file_chunks(pieces: Sequence[Piece], values: Tensor) -> Iterator[memoryview]:
    """The content of a file.

    Args:
        pieces: what it holds, in order.
        values: [elements of all pieces] float32, on the CPU.
    """
    yield memoryview(_header(pieces))
    content = memoryview(values.numpy()).cast("B")
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


def _header(pieces: Iterable[Piece]) -> bytes:
    entries, start = {}, 0
    for piece in pieces:
        stop = start + piece.length * VALUE_BYTES
        entries[f"{piece.tensor}@{piece.offset}"] = {
            "dtype": "F32",
            "shape": [piece.length],
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_pieces(file: BinaryIO, name: str) -> list[StoredPiece]:
    """What a file holds.

    Args:
        file: opened, at its start.
        name: of the file, for the result.

    Raises:
        ValueError: it is no such file.
    """
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    stored = []
    for key, entry in entries.items():
        tensor, _, offset = key.rpartition("@")
        if entry["dtype"] != "F32":
            raise ValueError(f"{name}: {key}: expected values of type F32, found {entry['dtype']}")
        start, stop = entry["data_offsets"]
        piece = Piece(tensor, int(offset), (stop - start) // VALUE_BYTES)
        stored.append(StoredPiece(piece, name, 8 + length + start))
    return stored


class PieceIndex:
    """Where the elements of tensors are, over all files of a checkpoint."""

    def __init__(self, stored: Iterable[StoredPiece]) -> None:
        self._of_tensor: dict[str, list[StoredPiece]] = {}
        for each in stored:
            self._of_tensor.setdefault(each.piece.tensor, []).append(each)
        for pieces in self._of_tensor.values():
            pieces.sort(key=lambda each: each.piece.offset)

    def has(self, tensor: str) -> bool:
        """Whether anything is stored of a tensor, "<key>/<name>"."""
        return tensor in self._of_tensor

    def parts_of(self, wanted: Piece) -> Iterator[tuple[StoredPiece, Piece]]:
        """(a stored piece, which of the wanted elements it gives), in order, without gap.

        Raises:
            ValueError: elements are nowhere.
        """
        pieces = self._of_tensor.get(wanted.tensor, [])
        number = bisect_right(pieces, wanted.offset, key=lambda each: each.piece.offset) - 1
        place = wanted.offset
        while place < wanted.stop:
            held = pieces[number].piece if 0 <= number < len(pieces) else None
            if held is None or not held.offset <= place < held.stop:
                raise ValueError(
                    f"element {place} of {wanted.tensor} is in no file of the checkpoint"
                )
            stop = min(held.stop, wanted.stop)
            yield pieces[number], Piece(wanted.tensor, place, stop - place)
            place, number = stop, number + 1


def read_values(file: BinaryIO, stored: StoredPiece, part: Piece, target: Tensor) -> None:
    """Reads a part of a stored piece.

    Args:
        file: the opened file.
        stored: a piece in it.
        part: elements of that piece.
        target: [elements] float32, on the CPU, contiguous: written to.

    Raises:
        EOFError: the file is too short.
    """
    file.seek(stored.start_byte + (part.offset - stored.piece.offset) * VALUE_BYTES)
    left = memoryview(target.numpy()).cast("B")
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{stored.file}: cut short")
        left = left[count:]
