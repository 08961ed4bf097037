"""How fast ranks exchange numbers: within a node, between neighbouring nodes, and all together.

A slow node slows every collective that it takes part in, and cannot be told from the others by one
that all take part in. So nodes are measured in pairs, each with both of its neighbours: a node is
as fast as the faster of its pairs, for the other may be slow because of the neighbour.

Figures are bus bandwidths, which do not depend on the number of ranks (nccl-tests, PERFORMANCE.md):
of an all-reduce among n ranks 2 (n - 1) / n * bytes / time, and of an all-gather whose result has
so many bytes (n - 1) / n * bytes / time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

NUM_TIMED = 3


@dataclass(frozen=True)
class Bandwidth:
    """Of one group of ranks, in gigabytes a second."""

    all_reduce: float
    all_gather: float


def node_pairs(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of neighbours, in which each node meets both of its neighbours; the
    last one's next neighbour is the first."""
    if num_nodes < 2:
        return []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    if num_nodes == 2:
        return [ring[:1]]
    last = ring[num_nodes - 1 :] if num_nodes % 2 else []  # of an odd ring: alone in its round
    even = num_nodes - num_nodes % 2
    return [rounds for rounds in (ring[0:even:2], ring[1:even:2], last) if rounds]


def measure_bandwidth(
    group: dist.ProcessGroup | None, *, num_bytes: int, device: torch.device
) -> Bandwidth:
    """The best of several exchanges; every rank of the group must call it.

    Args:
        group: None for all ranks.
        num_bytes: of the tensor that is reduced, and of the one that is gathered.
        device: of the tensors.

    Raises:
        RuntimeError: a rank did not take part in time.
    """
    num_ranks = dist.get_world_size(group)
    share = max(1, num_bytes // 4 // num_ranks)
    whole = torch.zeros(share * num_ranks, device=device)
    part = torch.zeros(share, device=device)
    sent = whole.numel() * 4 * (num_ranks - 1) / num_ranks
    reduce_seconds, gather_seconds = [], []
    for _ in range(NUM_TIMED + 1):
        reduce_seconds.append(_seconds(lambda: dist.all_reduce(whole, group=group), device))
        gather_seconds.append(
            _seconds(lambda: dist.all_gather_single(whole, part, group=group), device)
        )
    # The first one joins the ranks.
    best_reduce, best_gather = min(reduce_seconds[1:]), min(gather_seconds[1:])
    return Bandwidth(2 * sent / best_reduce / 1e9, sent / best_gather / 1e9)


def _seconds(exchange: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    exchange()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_nodes(
    ranks_of_nodes: Sequence[Sequence[int]], *, num_bytes: int, device: torch.device
) -> tuple[Bandwidth | None, list[str]]:
    """This node's bandwidth: the better of its two pairs, or among its own ranks if it is the only
    node; every rank must call it.

    Args:
        ranks_of_nodes: [nodes] ranks of each.
        num_bytes: see `measure_bandwidth`.
        device: of the tensors.

    Returns:
        None where no exchange succeeded, or there is only one rank; and what the failed ones said.
    """
    num_nodes = len(ranks_of_nodes)
    groups = [pair for pairs in node_pairs(num_nodes) for pair in pairs] or [(0,)]
    found, errors = [], []
    for nodes in groups:
        ranks = [rank for node in nodes for rank in ranks_of_nodes[node]]
        if len(ranks) == 1:
            continue
        try:
            # All ranks make all groups: members alone hang, if they were in others before (torch
            # 2.13, gloo, use_local_synchronization).
            group = dist.new_group(sorted(ranks))
            if dist.get_rank() in ranks:
                found.append(measure_bandwidth(group, num_bytes=num_bytes, device=device))
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    if not found:
        return None, errors
    best = Bandwidth(max(b.all_reduce for b in found), max(b.all_gather for b in found))
    return best, errors
