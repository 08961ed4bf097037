"""All collectives of the project: what ranks tell one another. Each works without a process group.

Every rank must reach each call. Ranks may hold different numbers of rows, also none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.config_file import InputError, RunError

Result = TypeVar("Result")


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all ranks; same shape."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """[ranks] of small Python values, for reports."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def rows_per_rank(num_rows: int, device: torch.device) -> list[int]:
    """[ranks] how many rows each rank holds."""
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = num_rows
    return sum_over_ranks(counts).tolist()


def gather_rows(rows: Tensor, *, counts: list[int]) -> Tensor:
    """All ranks' rows, in rank order, with the gradient of *every* rank's use of them.

    The backward pass sums the gradient over ranks before it keeps this rank's rows: what other
    ranks compute from my features is part of my gradient.

    Args:
        rows: [B, D] this rank's rows.
        counts: rows of each rank, from `rows_per_rank`.

    Returns:
        [N, D] with N the sum of counts.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows, counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = sum_over_ranks(gradient.contiguous())
        first = sum(ctx.counts[: rank()])
        return gradient[first : first + ctx.counts[rank()]], None


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
