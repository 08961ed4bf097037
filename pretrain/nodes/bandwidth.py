"""Bandwidth between ranks: within a node, between neighbouring nodes, and across all ranks.

A slow node slows down every collective it takes part in, so a collective of all ranks does not show
which node is slow. Nodes are therefore measured in pairs, each with both of its neighbours. The
faster of its two pairs counts, since a slow pair may be the neighbour's fault.

Results are bus bandwidths, which do not depend on the number of ranks n (nccl-tests,
PERFORMANCE.md):

    all-reduce   2 (n - 1) / n * bytes / time
    all-gather   (n - 1) / n * bytes of the result / time
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
    """Bandwidths of one group of ranks, in gigabytes per second."""

    all_reduce: float
    all_gather: float


def node_pairs(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs each node with both of its neighbours in a ring, in rounds of disjoint pairs.

    Returns:
        [rounds][pairs] of (node, next node).
    """
    if num_nodes < 2:
        return []
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    if num_nodes == 2:
        return [ring[:1]]
    last = ring[num_nodes - 1 :] if num_nodes % 2 else []  # an odd ring needs a third round
    even = num_nodes - num_nodes % 2
    return [rounds for rounds in (ring[0:even:2], ring[1:even:2], last) if rounds]


def measure_bandwidth(
    group: dist.ProcessGroup | None, *, num_bytes: int, device: torch.device
) -> Bandwidth:
    """Measures the best bandwidth of several exchanges; all ranks of the group must call it.

    Args:
        group: None for all ranks.
        num_bytes: size of the reduced tensor, and of the result of the all-gather.
        device: device of the tensors.

    Raises:
        RuntimeError: if a rank does not take part in time.
    """
    num_ranks = dist.get_world_size(group)
    part_size = max(1, num_bytes // 4 // num_ranks)
    whole = torch.zeros(part_size * num_ranks, device=device)
    part = torch.zeros(part_size, device=device)
    sent = whole.numel() * 4 * (num_ranks - 1) / num_ranks
    reduce_seconds, gather_seconds = [], []
    for _ in range(NUM_TIMED + 1):
        reduce_seconds.append(_seconds(lambda: dist.all_reduce(whole, group=group), device))
        gather_seconds.append(
            _seconds(lambda: dist.all_gather_single(whole, part, group=group), device)
        )
    # The first exchange establishes the connections.
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
    """Measures this node's bandwidth in the faster of its two pairs; every rank must call it.

    A single node is measured among its own ranks.

    Args:
        ranks_of_nodes: [nodes] ranks of each node.
        num_bytes: see `measure_bandwidth`.
        device: device of the tensors.

    Returns:
        (bandwidth, messages of failed exchanges). The bandwidth is None if no exchange succeeded
        or there is only one rank.
    """
    num_nodes = len(ranks_of_nodes)
    groups = [pair for pairs in node_pairs(num_nodes) for pair in pairs] or [(0,)]
    found, errors = [], []
    for nodes in groups:
        ranks = [rank for node in nodes for rank in ranks_of_nodes[node]]
        if len(ranks) == 1:
            continue
        try:
            # All ranks create all groups. With use_local_synchronization, ranks that were members
            # of other groups before would hang (torch 2.13, gloo).
            group = dist.new_group(sorted(ranks))
            if dist.get_rank() in ranks:
                found.append(measure_bandwidth(group, num_bytes=num_bytes, device=device))
        except RuntimeError as error:
            errors.append(f"{type(error).__name__}: {error}".partition("\n")[0])
    if not found:
        return None, errors
    best = Bandwidth(max(b.all_reduce for b in found), max(b.all_gather for b in found))
    return best, errors
