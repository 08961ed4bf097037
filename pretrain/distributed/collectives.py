"""All collectives of the project. Each of them also works without a process group.

Every rank must reach each call. Ranks may hold different numbers of rows, including none. No
collective takes part in autograd. `counted_traffic` counts the bytes that a rank receives.
"""

from __future__ import annotations

import logging
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

from data_prep.errors import RunError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
SECTION_BYTES = 64  # alignment of each tensor in a message that carries several


def world_size() -> int:
    """Returns the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


# --------------------------------------------------------------------------------------- traffic


@dataclass
class Traffic:
    """Data that this rank received from others, by kind of collective."""

    calls: Counter[str] = field(default_factory=Counter)
    received_bytes: Counter[str] = field(default_factory=Counter)


_TRAFFIC: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts the collectives started in the block and the bytes received by ring algorithms.

    With one process, nothing is sent and nothing is counted.
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
    """Sums a tensor element-wise over all ranks; same shape."""
    total = values.detach().clone()
    if world_size() > 1:
        own_bytes = total.numel() * total.element_size() / world_size()
        _count("all_reduce", round(2 * (world_size() - 1) * own_bytes))
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """Gathers small Python values from all ranks, for reports.

    Returns:
        [ranks] values.
    """
    if world_size() == 1:
        return [value]
    if _TRAFFIC.get() is not None:
        _count("all_gather_object", (world_size() - 1) * len(pickle.dumps(value)))
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from(source: int, values: Tensor) -> None:
    """Broadcasts a contiguous tensor from one rank; others overwrite theirs, of the same shape."""
    if world_size() > 1:
        _count("broadcast", values.numel() * values.element_size())
        dist.broadcast(values, src=source)


def on_main_process(action: Callable[[], Result]) -> Result:
    """Runs `action` on rank 0 only; every rank returns its result or raises its error.

    Only rank 0's outcome is sent, so no rank's memory grows with the number of ranks. An error of
    any type is sent, including KeyboardInterrupt and SystemExit.

    Raises:
        RunError: if the action cannot read or write a file; on other ranks also in place of an
            error that cannot be pickled.
    """
    result, error = _outcome_of(action) if rank() == 0 else (None, None)
    if world_size() > 1:
        payload = None
        if rank() == 0:
            payload, error = _pickled(result, error)
        holder = [payload]
        dist.broadcast_object_list(holder, src=0)
        _count("broadcast_object", len(holder[0]))
        if rank() > 0:
            result, error = pickle.loads(holder[0])
    if error is not None:
        raise error
    return result


def _outcome_of(action: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    try:
        return action(), None
    except OSError as raised:
        return None, RunError(f"rank 0: {raised}")
    except BaseException as raised:  # other ranks would otherwise wait until their time-out
        return None, raised


def _pickled(result: Any, error: BaseException | None) -> tuple[bytes, BaseException | None]:
    """The outcome as other ranks get it, and the error to raise on rank 0."""
    if error is None:
        try:
            return pickle.dumps((result, None)), None
        except Exception as raised:
            error = raised
    try:
        payload = pickle.dumps((None, error))
        _, copy = pickle.loads(payload)  # fails if __init__ takes other arguments than `args`
        if type(copy) is type(error) and str(copy) == str(error):
            return payload, error
    except Exception:  # only the copy fails; the error itself is raised on rank 0
        logger.debug("rank 0: %s cannot be pickled", type(error).__name__)
    text = f"rank 0: {type(error).__name__}: {error}"
    return pickle.dumps((None, RunError(text))), error


def set_timeout(seconds: float) -> None:
    """Sets after how many seconds a collective fails, from the next one on."""
    if dist.is_initialized():
        # The only function of torch that changes a group's timeout; torchtitan uses it too.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def is_lost_peer_error(error: RuntimeError) -> bool:
    """Returns whether a collective failed because another process died or came too late."""
    # Gloo has no error type of its own.
    messages = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(text in str(error) for text in messages)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class RowSplit:
    """Assignment of the rows of the global batch to ranks, in the order of ranks."""

    counts: tuple[int, ...]  # [ranks] rows of each rank

    @property
    def total(self) -> int:
        """N, the number of rows."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Range of this rank's rows among the N rows."""
        first = self.first(rank())
        return slice(first, first + self.counts[rank()])

    def first(self, holder: int) -> int:
        """Returns the index of a rank's first row among the N rows."""
        return sum(self.counts[:holder])

    def pieces(self, piece_rows: int) -> list[range]:
        """Splits a rank's rows into pieces; all ranks have the same number of pieces.

        A piece may exceed the rows of a rank that holds fewer.
        """
        most = max(self.counts)
        return [range(start, min(start + piece_rows, most)) for start in range(0, most, piece_rows)]

    def of_piece(self, holder: int, piece: range) -> range:
        """Returns the part of a piece that a rank holds."""
        return piece[: max(0, self.counts[holder] - piece.start)]


def rows_per_rank(num_rows: int, device: torch.device) -> list[int]:
    """Gathers the number of rows of each rank.

    Returns:
        [ranks] numbers of rows.
    """
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = num_rows
    return sum_over_ranks(counts).tolist()


@dataclass(frozen=True)
class RowBlock:
    """The same rows of all gathered tensors, from one rank."""

    holder: int  # rank that holds the rows
    first: int  # index of the first row among the N rows
    tensors: tuple[Tensor, ...]  # each [rows, ...]


class RowGather:
    """An asynchronous gather of rows, which overlaps with computation until `wait`.

    Several tensors share one message. The blocks are views of the received buffer, without copies
    and without the padding of ranks that hold fewer rows.
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
        for tensor, section in zip(self.tensors, self.sections, strict=True):
            _rows_in(sent[section], tensor, len(own)).copy_(tensor[own.start : own.stop])
        self.received = torch.empty(world_size(), num_bytes, dtype=torch.uint8, device=device)
        _count("all_gather", (world_size() - 1) * num_bytes)
        self.work = dist.all_gather_single(self.received.view(-1), sent, async_op=True)
        self.sent = sent  # kept alive until the gather is done

    def wait(self) -> list[RowBlock]:
        """Waits for the gather.

        Returns:
            [ranks] rows of each rank.
        """
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
            _rows_in(message[section], tensor, len(rows))
            for tensor, section in zip(self.tensors, self.sections, strict=True)
        ]
        return RowBlock(holder, self.split.first(holder) + self.piece.start, tuple(tensors))


def _sections(tensors: Sequence[Tensor], num_rows: int) -> list[slice]:
    """The byte range of each tensor's rows in a message."""
    sections, start = [], 0
    for tensor in tensors:
        num_bytes = num_rows * math.prod(tensor.shape[1:]) * tensor.element_size()
        stop = start + -(-num_bytes // SECTION_BYTES) * SECTION_BYTES
        sections.append(slice(start, stop))
        start = stop
    return sections


def _rows_in(section: Tensor, like: Tensor, num_rows: int) -> Tensor:
    """The first rows of a section, uint8 [bytes], viewed with the type and shape of `like`."""
    shape = (num_rows, *like.shape[1:])
    num_bytes = math.prod(shape) * like.element_size()
    return section[:num_bytes].view(like.dtype).view(shape)


class RowStream:
    """The rows of all ranks, piece by piece; the next piece is prefetched.

    A single piece is gathered once and kept for later passes.
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
            begun: a running gather of further tensors in one piece, which each block appends.
        """
        self.tensors, self.split = tensors, split
        self.pieces = split.pieces(piece_rows) if begun is None else [begun.piece]
        self.kept = self._gather(0) if len(self.pieces) == 1 else None
        if begun is not None:
            self.kept = _JoinedGathers(self.kept, begun)

    def _gather(self, number: int) -> RowGather:
        return RowGather(self.tensors, self.split, self.pieces[number])

    def __iter__(self) -> Iterator[tuple[range, list[RowBlock]]]:
        """Yields (piece, [ranks] rows of the piece)."""
        gather = self.kept or (self._gather(0) if self.pieces else None)
        for number, piece in enumerate(self.pieces):
            following = self._gather(number + 1) if number + 1 < len(self.pieces) else None
            yield piece, gather.wait()
            gather = following


@dataclass(frozen=True)
class _JoinedGathers:
    """Two gathers of the same rows, combined."""

    first: RowGather
    second: RowGather

    def wait(self) -> list[RowBlock]:
        blocks = zip(self.first.wait(), self.second.wait(), strict=True)
        return [RowBlock(a.holder, a.first, (*a.tensors, *b.tensors)) for a, b in blocks]


class RowSum:
    """An asynchronous sum over ranks (reduce-scatter); each rank receives its own rows."""

    def __init__(self, parts: Tensor) -> None:
        """
        Args:
            parts: [ranks, rows, D] summands of this rank for the rows of each rank.
        """
        self.parts, self.work = parts, None
        if world_size() > 1:
            self.own = torch.empty_like(parts[0])
            _count("reduce_scatter", (world_size() - 1) * self.own.numel() * parts.element_size())
            self.work = dist.reduce_scatter_single(self.own.view(-1), parts.view(-1), async_op=True)

    def wait(self) -> Tensor:
        """Waits for the sum.

        Returns:
            [rows, D] this rank's rows, summed over ranks.
        """
        if self.work is None:
            return self.parts[0]
        self.work.wait()
        return self.own
