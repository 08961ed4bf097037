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
from threading import Thread

import torch
from safetensors.torch import save
from torch import Tensor

from data_prep.storage.remote_file import join, open_binary
from pretrain.checkpoints.slice_file import Piece, PieceIndex, file_chunks, read_values
from pretrain.checkpoints.store import tried
from pretrain.distributed.collectives import broadcast_from, rank, world_size
from pretrain.distributed.engine import Engine, Fragment
from pretrain.model.contrastive_model import ContrastiveModel

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

    That memory is taken in the background: to be given so much of it takes longer than a copy.

    Args:
        engine: whose fragments stay the same from now on, but for their values.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        pieces = {name: [piece_of(e) for e in part] for name, part in self._share().items()}
        self._files = {
            name: CopiedFile(name, part, self._empty_values(part)) for name, part in pieces.items()
        }
        self._touching = Thread(target=self._touch, name="checkpoint memory", daemon=True)
        self._touching.start()

    def _share(self) -> dict[str, list[Fragment]]:
        """What this rank writes, by file."""
        files: dict[str, list[Fragment]] = {}
        fragments = self._engine.fragments()
        for each in share_of_rank(fragments, rank=rank(), world_size=world_size()):
            kind = "model" if each.key == PARAMETER else "optimizer"
            name = f"{kind}-{rank() + 1:05d}-of-{world_size():05d}.safetensors"
            files.setdefault(name, []).append(each)
        return files

    def _empty_values(self, pieces: Sequence[Piece]) -> Tensor:
        num_values = sum(piece.length for piece in pieces)
        return torch.empty(num_values, pin_memory=self._engine.device.type == "cuda")

    def _touch(self) -> None:
        for file in self._files.values():
            file.values.zero_()

    def take(self) -> list[CopiedFile]:
        """Copies the state as it is now; what was taken before must not be in use any more."""
        self._touching.join()
        for name, fragments in self._share().items():
            place = 0
            for each in fragments:
                target = self._files[name].values[place : place + len(each.values)]
                target.copy_(each.values, non_blocking=True)
                place += len(each.values)
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()
        return list(self._files.values())


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
            is_here = fragment.values.device.type == "cpu"
            values = fragment.values if is_here else torch.empty(len(fragment.values))
            for stored, part in index.parts_of(piece_of(fragment)):
                if stored.file not in opened:
                    path = join(location, stored.file)
                    opened[stored.file] = files.enter_context(open_binary(path))
                start = part.offset - fragment.offset
                target = values[start : start + part.length]
                read = partial(read_values, opened[stored.file], stored, part, target)
                tried(join(location, stored.file), read)
            if not is_here:
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
