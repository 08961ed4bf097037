"""Transfer of state between an engine and the files of a checkpoint.

Each rank writes the slices that only it holds and an equal part of the replicated ones. When
loading, a rank reads the slices that its engine holds, from the files that contain them. So the
number of processes and the strategy may differ between saving and loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from data_prep.storage.remote_file import join, open_binary
from pretrain.checkpoints.slice_file import SliceIndex, file_chunks, read_values
from pretrain.checkpoints.store import retry_remote
from pretrain.distributed.collectives import broadcast_from, rank, world_size
from pretrain.distributed.tensor_slice import PARAMETER, HeldSlice, TensorSlice
from pretrain.settings.optimizers import EMA

if TYPE_CHECKING:
    from pretrain.distributed.engine import Engine
    from pretrain.model.contrastive_model import ContrastiveModel

BUFFERS_FILE = "buffers.safetensors"
SCALARS_FILE = "optimizer-scalars.json"
FILE_KINDS = {PARAMETER: "model", EMA: "ema"}  # of slices by key; the others: optimizer


def slices_to_write(
    held: Iterable[HeldSlice], *, rank: int, world_size: int
) -> Iterator[HeldSlice]:
    """Yields the slices that a rank writes, such that exactly one rank writes each element.

    Replicated slices are concatenated and split into parts of equal length, one per rank.
    """
    held = list(held)
    total = sum(each.slice.length for each in held if each.is_replicated)
    first, stop = (total * number // world_size for number in (rank, rank + 1))
    position = 0
    for each in held:
        if not each.is_replicated:
            yield each
            continue
        length = each.slice.length
        start, end = (min(max(bound - position, 0), length) for bound in (first, stop))
        position += length
        if start < end:
            part = TensorSlice(each.slice.tensor, each.slice.offset + start, end - start)
            yield replace(each, slice=part, values=each.values[start:end])


@dataclass(frozen=True)
class CopiedFile:
    """The content of one checkpoint file, copied out of the engine."""

    name: str
    slices: list[TensorSlice]
    values: Tensor  # [elements of all slices] float32, on the CPU

    def chunks(self) -> Iterator[memoryview]:
        """Yields the bytes to write."""
        return file_chunks(self.slices, self.values)


class StateCopy:
    """Copies a rank's part of an engine's state into CPU memory that is reused for every save.

    A thread touches the memory in advance, because allocating it takes longer than a copy.

    Args:
        engine: engine to copy from. If the layout of its slices changes, because parameters are
            opened, the next copy needs new memory.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._files: dict[str, CopiedFile] = {}
        self._reserve(self._by_file())
        # No daemon thread: one that is in torch when Python ends would abort the process.
        self._touching = Thread(target=self._touch, name="checkpoint memory")
        self._touching.start()

    def _by_file(self) -> dict[str, list[HeldSlice]]:
        """The slices that this rank writes, by file name."""
        files: dict[str, list[HeldSlice]] = {}
        held = self._engine.slices()
        for each in slices_to_write(held, rank=rank(), world_size=world_size()):
            kind = FILE_KINDS.get(each.slice.key, "optimizer")
            name = f"{kind}-{rank() + 1:05d}-of-{world_size():05d}.safetensors"
            files.setdefault(name, []).append(each)
        return files

    def _reserve(self, by_file: Mapping[str, Sequence[HeldSlice]]) -> None:
        """Allocates memory for slices, unless it is there."""
        slices = {name: [each.slice for each in held] for name, held in by_file.items()}
        if slices != {name: file.slices for name, file in self._files.items()}:
            self._files.clear()  # first, so that both never need memory
            for name, part in slices.items():
                self._files[name] = CopiedFile(name, part, self._empty_values(part))

    def _empty_values(self, slices: Sequence[TensorSlice]) -> Tensor:
        num_values = sum(each.length for each in slices)
        return torch.empty(num_values, pin_memory=self._engine.device.type == "cuda")

    def _touch(self) -> None:
        for file in self._files.values():
            file.values.zero_()

    def take(self) -> list[CopiedFile]:
        """Copies the current state; the result of the previous call must no longer be in use."""
        self._touching.join()
        by_file = self._by_file()
        self._reserve(by_file)
        for name, held in by_file.items():
            start = 0
            for each in held:
                stop = start + each.slice.length
                self._files[name].values[start:stop].copy_(each.values, non_blocking=True)
                start = stop
        if self._engine.device.type == "cuda":
            torch.cuda.current_stream(self._engine.device).synchronize()
        return list(self._files.values())


def shapes_of(model: ContrastiveModel) -> dict[str, tuple[int, ...]]:
    """Returns {parameter name: full shape}, including parameters that DeepSpeed has partitioned."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
    }


def buffer_file(model: ContrastiveModel) -> dict[str, bytes]:
    """Returns {file name: content} of the persistent buffers; empty if the model has none.

    Every rank holds the same buffers.
    """
    parameters = dict(model.named_parameters())
    buffers = {
        name: values.detach().cpu()
        for name, values in model.state_dict().items()
        if name not in parameters
    }
    return {BUFFERS_FILE: save(buffers)} if buffers else {}


def scalar_file(engine: Engine) -> dict[str, bytes]:
    """Returns {file name: content} of the optimizer's numbers; empty if it has none.

    Every rank holds the same numbers.
    """
    scalars = engine.scalars()
    return {SCALARS_FILE: json.dumps(scalars, indent=1).encode()} if scalars else {}


def load_slices(
    engine: Engine,
    location: str,
    index: SliceIndex,
    *,
    is_loaded: Callable[[TensorSlice], bool] = lambda held: True,
) -> None:
    """Loads a checkpoint's values into an engine; every rank must call it.

    Each replicated slice is read by one rank only, which broadcasts it to the others.

    Args:
        engine: engine whose slices are overwritten.
        location: path or URL of the checkpoint.
        index: index of the checkpoint's files.
        is_loaded: returns whether to load a slice; the others stay as they are.

    Raises:
        ValueError: if the files lack elements.
        OSError: if a file cannot be read.
    """
    held = [each for each in engine.slices() if is_loaded(each.slice)]
    shared = [each for each in held if each.is_replicated and world_size() > 1]
    readers = _divide([each.slice.length for each in shared])
    read_here = [each for each, reader in zip(shared, readers, strict=True) if reader == rank()]
    own = [each for each in held if not (each.is_replicated and world_size() > 1)]
    _read_into(own, location, index)
    _read_into(read_here, location, index)
    for each, reader in zip(shared, readers, strict=True):
        broadcast_from(reader, each.values)


def _divide(sizes: Sequence[int]) -> list[int]:
    """[tensors] rank that reads each tensor; every rank reads about the same number of elements."""
    total, start, readers = max(1, sum(sizes)), 0, []
    for size in sizes:
        readers.append(min((start + size // 2) * world_size() // total, world_size() - 1))
        start += size
    return readers


def _read_into(held: Iterable[HeldSlice], location: str, index: SliceIndex) -> None:
    """Reads the values of all slices, opening each file once."""
    with ExitStack() as files:
        opened = {}
        for each in held:
            is_here = each.values.device.type == "cpu"
            values = each.values if is_here else torch.empty(each.slice.length)
            for stored, part in index.parts_of(each.slice):
                if stored.file not in opened:
                    path = join(location, stored.file)
                    opened[stored.file] = files.enter_context(open_binary(path))
                start = part.offset - each.slice.offset
                target = values[start : start + part.length]
                read = partial(read_values, opened[stored.file], stored, part, target)
                retry_remote(join(location, stored.file), read)
            if not is_here:
                each.values.copy_(values)


def read_whole(location: str, index: SliceIndex, *, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Reads complete tensors, assembled from their slices.

    Args:
        location: path or URL of the checkpoint.
        index: index of the checkpoint's files.
        sizes: "<key>/<parameter>" -> number of elements, for each tensor to read.

    Returns:
        "<key>/<parameter>" -> flat tensor.

    Raises:
        ValueError: if the files lack elements.
        OSError: if a file cannot be read.
    """
    held = [
        HeldSlice(TensorSlice(tensor, 0, size), torch.empty(size), is_replicated=False)
        for tensor, size in sizes.items()
    ]
    _read_into(held, location, index)
    return {each.slice.tensor: each.values for each in held}
