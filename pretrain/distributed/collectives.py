"""All collectives of the project: what ranks tell one another. Each works without a process group.

Every rank must reach each call. Ranks may hold different numbers of rows, also none. None takes
part in autograd. What a block of code makes ranks receive is counted by `counted_traffic`.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.errors import (
    InputError,
    RunError,
)

Result = TypeVar("Result")
SECTION_BYTES = 64  # alignment of each tensor in a message that carries several


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


# --------------------------------------------------------------------------------------- traffic


@dataclass
class Traffic:
    """What this rank received from others, by kind of collective."""

    calls: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)


_TRAFFIC: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the collectives started in the block, with what ring algorithms make a rank receive.

    With one process nothing is sent and nothing counted.
    """
    traffic = Traffic()
    token = _TRAFFIC.set(traffic)
    try:
        yield traffic
    finally:
        _TRAFFIC.reset(token)


def _count(collective: str, num_bytes: int) -> None:
    traffic = _TRAFFIC.get()
    if traffic is not None:
        traffic.calls[collective] += 1
        traffic.received_bytes[collective] += num_bytes


# ------------------------------------------------------------------------------ sums and objects


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all ranks; same shape."""
    total = values.detach().clone()
    if world_size() > 1:
        share = total.numel() * total.element_size() / world_size()
        _count("all_reduce", round(2 * (world_size() - 1) * share))
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """[ranks] of small Python values, for reports."""
    if world_size() == 1:
        return [value]
    if _TRAFFIC.get() is not None:
        _count("all_gather_object", (world_size() - 1) * len(pickle.dumps(value)))
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from(source: int, values: Tensor) -> None:
    """Overwrites a contiguous tensor, of the same shape everywhere, by one rank's."""
    if world_size() > 1:
        _count("broadcast", values.numel() * values.element_size())
        dist.broadcast(values, src=source)


def on_main_process(action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 alone; every rank returns its result, or raises what it raised.

    Raises:
        InputError: as the action does.
        RunError: the action could not read or write a file.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = action()
        except InputError as raised:
            error = raised
        except OSError as raised:
            error = RunError(f"rank 0: {raised}")
    result, error = gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result


def set_timeout(seconds: float) -> None:
    """Has collectives fail that do not end within so many seconds, from the next one on."""
    if dist.is_initialized():
        # Of torch's functions the only one that changes a group's time-out; torchtitan uses it too.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_of_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process died, or did not come to it in time."""
    # Gloo's errors have no type of their own.
    signs = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class RowSplit:
    """Which rows of the global batch each rank holds: rank 0 the first, and so on."""

    counts: tuple[int, ...]  # rows of each rank

    @property
    def total(self) -> int:
        """N."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where this rank's rows are among all."""
        first = self.first(rank())
        return slice(first, first + self.counts[rank()])

    def first(self, holder: int) -> int:
        """Where that rank's rows begin among all."""
        return sum(self.counts[:holder])

    def pieces(self, piece_rows: int) -> list[range]:
        """Pieces of a rank's rows, equally many for all: ranks with fewer rows send less."""
        most = max(self.counts)
        return [range(start, min(start + piece_rows, most)) for start in range(0, most, piece_rows)]

    def of_piece(self, holder: int, piece: range) -> range:
        """The part of a piece that a rank has."""
        return piece[: max(0, self.counts[holder] - piece.start)]


def rows_per_rank(num_rows: int, device: torch.device) -> list[int]:
    """[ranks] how many rows each rank holds."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = num_rows
    return sum_over_ranks(counts).tolist()


@dataclass(frozen=True)
class RowBlock:
    """Rows of one rank: of each gathered tensor, the same ones."""

    holder: int  # the rank
    first: int  # where they begin among the N rows
    tensors: tuple[Tensor, ...]  # each [rows, ...]


class RowGather:
    """A gather that travels while the caller computes, until `wait`.

    Several tensors share one message. The blocks are views of what arrived: nothing is copied, and
    the padding of ranks with fewer rows is never seen.
    """

    def __init__(self, tensors: Sequence[Tensor], split: RowSplit, piece: range) -> None:
        self.split, self.piece = split, piece
        self.tensors = [tensor.detach() for tensor in tensors]
        self.work = None
        if world_size() > 1:
            self.sections = _sections(self.tensors, len(piece))
            self._start()

    def _start(self) -> None:
        num_bytes = self.sections[-1].stop
        device = self.tensors[0].device
        sent = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        own = self.split.of_piece(rank(), self.piece)
        for tensor, place in zip(self.tensors, self.sections, strict=True):
            _rows_in(sent[place], tensor, len(own)).copy_(tensor[own.start : own.stop])
        self.received = torch.empty(world_size(), num_bytes, dtype=torch.uint8, device=device)
        _count("all_gather", (world_size() - 1) * num_bytes)
        self.work = dist.all_gather_single(self.received.view(-1), sent, async_op=True)
        self.sent = sent  # kept until it has left

    def wait(self) -> list[RowBlock]:
        """[ranks] what every rank sent."""
        if world_size() == 1:
            rows = slice(self.piece.start, self.piece.stop)
            return [RowBlock(0, rows.start, tuple(tensor[rows] for tensor in self.tensors))]
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
        return [self._block(holder) for holder in range(world_size())]

    def _block(self, holder: int) -> RowBlock:
        rows = self.split.of_piece(holder, self.piece)
        message = self.received[holder]
        tensors = [
            _rows_in(message[place], tensor, len(rows))
            for tensor, place in zip(self.tensors, self.sections, strict=True)
        ]
        return RowBlock(holder, self.split.first(holder) + self.piece.start, tuple(tensors))


def _sections(tensors: Sequence[Tensor], num_rows: int) -> list[slice]:
    """Where in a message each tensor's rows are, in bytes."""
    sections, start = [], 0
    for tensor in tensors:
        num_bytes = num_rows * math.prod(tensor.shape[1:]) * tensor.element_size()
        stop = start + -(-num_bytes // SECTION_BYTES) * SECTION_BYTES
        sections.append(slice(start, stop))
        start = stop
    return sections


def _rows_in(section: Tensor, like: Tensor, num_rows: int) -> Tensor:
    """The first rows of a section, uint8 [bytes], read as rows of `like`."""
    shape = (num_rows, *like.shape[1:])
    num_bytes = math.prod(shape) * like.element_size()
    return section[:num_bytes].view(like.dtype).view(shape)


class RowStream:
    """All ranks' rows of some tensors, piece by piece; the next piece travels meanwhile.

    In one piece, they are gathered once and kept for every later pass.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        split: RowSplit,
        *,
        piece_rows: int,
        begun: RowGather | None = None,
    ) -> None:
        """
        Args:
            begun: a gather of further tensors, all in one piece; they follow the others in blocks.
        """
        self.tensors, self.split = tensors, split
        self.pieces = split.pieces(piece_rows) if begun is None else [begun.piece]
        self.kept = self._gather(0) if len(self.pieces) == 1 else None
        if begun is not None:
            self.kept = _JoinedGathers(self.kept, begun)

    def _gather(self, number: int) -> RowGather:
        return RowGather(self.tensors, self.split, self.pieces[number])

    def __iter__(self) -> Iterator[tuple[range, list[RowBlock]]]:
        """(piece, [ranks] its rows of each rank)"""
        gather = self.kept or (self._gather(0) if self.pieces else None)
        for number, piece in enumerate(self.pieces):
            following = self._gather(number + 1) if number + 1 < len(self.pieces) else None
            yield piece, gather.wait()
            gather = following


@dataclass(frozen=True)
class _JoinedGathers:
    """Two gathers of the same rows, as one."""

    first: RowGather
    second: RowGather

    def wait(self) -> list[RowBlock]:
        blocks = zip(self.first.wait(), self.second.wait(), strict=True)
        return [RowBlock(a.holder, a.first, (*a.tensors, *b.tensors)) for a, b in blocks]


class RowSum:
    """A sum over ranks that travels while the caller computes; each rank gets its own rows."""

    def __init__(self, parts: Tensor) -> None:
        """
        Args:
            parts: [ranks, rows, D] what this rank adds to the rows of each.
        """
        self.parts, self.work = parts, None
        if world_size() > 1:
            self.own = torch.empty_like(parts[0])
            _count("reduce_scatter", (world_size() - 1) * self.own.numel() * parts.element_size())
            self.work = dist.reduce_scatter_single(self.own.view(-1), parts.view(-1), async_op=True)

    def wait(self) -> Tensor:
        """[rows, D] of this rank, summed over ranks."""
        if self.work is None:
            return self.parts[0]
        self.work.wait()
        return self.own
