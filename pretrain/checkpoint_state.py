"""Between an engine's tensors and the fragments in a checkpoint's files.

Every rank writes its share: the fragments that it alone holds, and an equal part of those that all
hold. A rank loads whatever its engine holds now, from whichever files have it: so the number of
processes and the strategy that saved need not be those that load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors.torch import save
from torch import Tensor

from data_prep.remote_file import join, open_binary
from pretrain.checkpoint_store import tried
from pretrain.engine import Engine, Fragment
from pretrain.fragment_file import Piece, PieceIndex, empty_values, file_chunks, read_values
from pretrain.gather import broadcast_from, rank, world_size
from pretrain.model import ContrastiveModel

PARAMETER = "parameter"  # key of the fragments that are the model
BUFFERS_FILE = "buffers.safetensors"


def piece_of(fragment: Fragment) -> Piece:
    """A fragment without its values."""
    return Piece(f"{fragment.key}/{fragment.name}", fragment.offset, len(fragment.values))


def share_of_rank(
    fragments: Iterable[Fragment], *, rank: int, world_size: int
) -> Iterator[Fragment]:
    """The fragments that a rank writes: every element is written by exactly one rank.

    What all ranks hold is laid end to end and cut into equally long parts.
    """
    fragments = list(fragments)
    total = sum(len(each.values) for each in fragments if each.is_shared)
    first, stop = (total * number // world_size for number in (rank, rank + 1))
    place = 0
    for each in fragments:
        if not each.is_shared:
            yield each
            continue
        start, end = (min(max(bound - place, 0), len(each.values)) for bound in (first, stop))
        place += len(each.values)
        if start < end:
            yield replace(each, values=each.values[start:end], offset=each.offset + start)


@dataclass(frozen=True)
class CopiedFile:
    """The content of one file of a checkpoint, copied out of the engine."""

    name: str
    pieces: list[Piece]
    values: Tensor  # [elements of the pieces] float32, on the CPU

    def chunks(self) -> Iterator[memoryview]:
        """What is to be written."""
        return file_chunks(self.pieces, self.values)


class StateCopy:
    """Copies a rank's share of an engine's state to the CPU, into memory kept from save to save.

    Args:
        engine: whose fragments stay the same from now on, but for their values.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._values: dict[str, Tensor] = {}

    def take(self) -> list[CopiedFile]:
        """Copies the state as it is now; what was taken before must not be in use any more."""
        share = list(share_of_rank(self._engine.fragments(), rank=rank(), world_size=world_size()))
        files = []
        for kind, is_model in (("model", True), ("optimizer", False)):
            part = [each for each in share if (each.key == PARAMETER) == is_model]
            if part:
                name = f"{kind}-{rank() + 1:05d}-of-{world_size():05d}.safetensors"
                files.append(self._copy(name, part))
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()
        return files

    def _copy(self, name: str, part: Sequence[Fragment]) -> CopiedFile:
        pieces = [piece_of(each) for each in part]
        if name not in self._values:
            is_pinned = self._engine.device.type == "cuda"
            self._values[name] = empty_values(pieces, is_pinned=is_pinned)
        values, place = self._values[name], 0
        for each in part:
            values[place : place + len(each.values)].copy_(each.values, non_blocking=True)
            place += len(each.values)
        return CopiedFile(name, pieces, values)


def shapes_of(model: ContrastiveModel) -> dict[str, tuple[int, ...]]:
    """Of parameters by name, also where DeepSpeed has taken them apart."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
    }


def buffer_file(model: ContrastiveModel) -> dict[str, bytes]:
    """The file of the model's saved buffers, which every rank holds; none if it has none."""
    parameters = dict(model.named_parameters())
    buffers = {
        name: values.detach().cpu()
        for name, values in model.state_dict().items()
        if name not in parameters
    }
    return {BUFFERS_FILE: save(buffers)} if buffers else {}


def load_fragments(engine: Engine, location: str, index: PieceIndex) -> None:
    """Writes a checkpoint's values into an engine; every rank must call it.

    What all ranks hold is read once: each reads a part of the tensors, and sends them to the rest.

    Args:
        engine: whose fragments are written to.
        location: of the checkpoint.
        index: of its files.

    Raises:
        ValueError: the files lack elements.
        OSError: a file cannot be read.
    """
    fragments = list(engine.fragments())
    shared = [each for each in fragments if each.is_shared and world_size() > 1]
    reader_of = _divide([len(each.values) for each in shared])
    read_here = [each for each, reader in zip(shared, reader_of, strict=True) if reader == rank()]
    own = [each for each in fragments if not (each.is_shared and world_size() > 1)]
    _read_into(own, location, index)
    _read_into(read_here, location, index)
    for each, reader in zip(shared, reader_of, strict=True):
        broadcast_from(reader, each.values)


def _divide(sizes: Sequence[int]) -> list[int]:
    """[tensors] which rank reads each, so that all read about as many elements."""
    total, place, readers = max(1, sum(sizes)), 0, []
    for size in sizes:
        readers.append(min((place + size // 2) * world_size() // total, world_size() - 1))
        place += size
    return readers


def _read_into(fragments: Iterable[Fragment], location: str, index: PieceIndex) -> None:
    """Fragment by fragment, with each file opened once."""
    with ExitStack() as files:
        opened = {}
        for fragment in fragments:
            values = torch.empty(len(fragment.values), dtype=torch.float32)
            for stored, part in index.parts_of(piece_of(fragment)):
                if stored.file not in opened:
                    path = join(location, stored.file)
                    opened[stored.file] = files.enter_context(open_binary(path))
                start = part.offset - fragment.offset
                target = values[start : start + part.length]
                read = partial(read_values, opened[stored.file], stored, part, target)
                tried(join(location, stored.file), read)
            fragment.values.copy_(values)


def read_whole(location: str, index: PieceIndex, *, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors put together from their pieces.

    Args:
        location: of the checkpoint.
        index: of its files.
        sizes: "<key>/<name>" -> elements, of the tensors wanted.

    Returns:
        "<key>/<name>" -> flat tensor.

    Raises:
        ValueError: the files lack elements.
        OSError: a file cannot be read.
    """
    fragments = []
    for tensor, size in sizes.items():
        key, _, name = tensor.partition("/")
        fragments.append(Fragment(name, key, torch.empty(size), 0, size, is_shared=False))
    _read_into(fragments, location, index)
    return {f"{each.key}/{each.name}": each.values for each in fragments}
