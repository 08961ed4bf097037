"""Checks that all ranks run together, each through a `Meeting`; results arrive on rank 0.

Every rank must call each function. If ranks are missing or late, all ranks raise.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.command import say
from pretrain.distributed.launcher import hosts_of_slurm_ranks
from pretrain.nodes.bandwidth import Bandwidth, measure_bandwidth, measure_nodes
from pretrain.nodes.facts import MachineFacts, gather_facts, sees_file
from pretrain.nodes.meeting import Meeting
from pretrain.nodes.verdict import NodeFacts, Problem
from pretrain.preflight_config import Preflight
from pretrain.run.attempts import machine_name

SEEN_FILE = ".preflight"  # written to the run folder for other nodes to see


class MissingRanksError(Exception):
    """Some ranks did not join or finish a check; raised on all ranks.

    Args:
        problems: one per missing rank on rank 0, none on other ranks.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("ranks are missing")
        self.problems = problems


def meet(meeting: Meeting) -> list[str]:
    """Waits for all ranks.

    Returns:
        [ranks] names of their machines.

    Raises:
        MissingRanksError: if ranks did not join in time.
    """
    meeting.send("host", machine_name())
    hosts = meeting.collect("host") if meeting.rank == 0 else []
    missing = [rank for rank, host in enumerate(hosts) if host is None]
    known = meeting.broadcast("met", None if missing else hosts)
    if known is not None:
        return known
    expected = hosts_of_slurm_ranks(os.environ) if missing else None
    raise MissingRanksError(
        [
            Problem(
                None if expected is None else expected[rank],
                f"rank {rank} did not join within preflight.timeout_seconds="
                f"{meeting.timeout_seconds:g}",
            )
            for rank in missing
        ]
    )


def find_facts(
    meeting: Meeting,
    settings: Preflight,
    *,
    hosts: Sequence[str],
    device: torch.device,
    config_checksum: str,
    datasets: Sequence[str],
    folder: Path,
    checkpoints: str,
) -> list[MachineFacts]:
    """Gathers the facts that each rank finds out about its machine.

    Args:
        settings: config section `preflight`.
        hosts: [ranks] names of their machines.
        device: device of this rank.
        config_checksum: checksum of the whole config.
        datasets: folders or URLs of the training data.
        folder: run folder, created if missing.
        checkpoints: folder or URL of the checkpoints.

    Returns:
        [ranks] facts, on rank 0.

    Raises:
        MissingRanksError: if ranks did not finish in time.
    """
    host = hosts[meeting.rank]
    local_rank = hosts[: meeting.rank].count(host)
    token, seen_file = secrets.token_hex(8), folder / SEEN_FILE
    if meeting.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        seen_file.write_text(token)
    token = meeting.broadcast("token", token)
    facts = gather_facts(
        settings,
        rank=meeting.rank,
        local_rank=local_rank,
        node=names_of_nodes(hosts).index(host),
        device=device,
        config_checksum=config_checksum,
        datasets=datasets,
        folders=[folder, checkpoints],
        report=lambda activity: meeting.send("activity", activity),
    )
    if local_rank == 0 and not sees_file(seen_file, token):
        facts.problems.append(
            f"{folder} is not the folder that {hosts[0]} sees; run.folder must be on a file "
            "system that all nodes share"
        )
    meeting.send("facts", asdict(facts))
    found = meeting.collect("facts") if meeting.rank == 0 else []
    late = [rank for rank, values in enumerate(found) if values is None]
    if meeting.rank == 0:
        seen_file.unlink(missing_ok=True)
    if meeting.broadcast("found", not late):
        return [MachineFacts(**values) for values in found]
    raise MissingRanksError(
        [
            Problem(
                hosts[rank],
                f"rank {rank} was still {meeting.receive('activity', rank=rank)} after "
                f"preflight.timeout_seconds={meeting.timeout_seconds:g}",
            )
            for rank in late
        ]
    )


def compare_clocks(meeting: Meeting) -> list[float]:
    """Compares the clocks of all ranks, each read when a message from rank 0 arrives.

    Returns:
        [ranks] seconds ahead of rank 0, on rank 0; includes the travel time of the message.
    """
    meeting.broadcast("clocks", value=True)
    now = time.time()
    meeting.send("clock", now)
    clocks = meeting.collect("clock") if meeting.rank == 0 else []
    return [clock - now if clock is not None else 0.0 for clock in clocks]


def measure_exchanges(
    meeting: Meeting, settings: Preflight, *, hosts: Sequence[str], device: torch.device
) -> list[tuple[Bandwidth | None, list[str]]]:
    """Measures the bandwidth of each node with its neighbours, then of all ranks together.

    Args:
        settings: config section `preflight`.
        hosts: [ranks] names of their machines.
        device: device of this rank.

    Returns:
        [ranks] (bandwidth of its node, messages of failed exchanges), on rank 0.
    """
    if meeting.world_size == 1:
        return [(None, [])]
    # A failed exchange raises an error instead of ending the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    num_bytes = round(1e6 * settings.exchanged_megabytes)
    nodes = names_of_nodes(hosts)
    ranks = [[n for n, host in enumerate(hosts) if host == node] for node in nodes]
    try:
        _join_ranks(meeting, device)
        own, errors = measure_nodes(ranks, num_bytes=num_bytes, device=device)
    except RuntimeError as error:  # gloo connects all ranks at once, and fails if one is missing
        own, errors = None, [str(error).partition("\n")[0]]
    meeting.send("bandwidth", [own and [own.all_reduce, own.all_gather], errors])
    sent = meeting.collect("bandwidth") if meeting.rank == 0 else []
    found = [values or [None, ["it did not finish in time"]] for values in sent]
    if meeting.broadcast("all exchange", all(own is not None for own, _ in found)):
        together = measure_bandwidth(None, num_bytes=num_bytes, device=device)
        if meeting.rank == 0:
            say(
                f"{len(nodes)} nodes, {meeting.world_size} ranks together: all-reduce "
                f"{together.all_reduce:.3g} GB/s, all-gather {together.all_gather:.3g} GB/s"
            )
        dist.destroy_process_group()
    return [(Bandwidth(*own) if own else None, errors) for own, errors in found]


def _join_ranks(meeting: Meeting, device: torch.device) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=meeting.timeout_seconds / 2),
        device_id=device if device.type == "cuda" else None,
    )


def names_of_nodes(hosts: Sequence[str]) -> list[str]:
    """Returns each machine once, in the order of its first rank."""
    return list(dict.fromkeys(hosts))


def group_by_node(
    facts: Sequence[MachineFacts],
    *,
    clocks: Sequence[float],
    bandwidths: Sequence[tuple[Bandwidth | None, list[str]]],
) -> list[NodeFacts]:
    """Combines the facts of ranks into facts of nodes, in the order of their first ranks.

    Args:
        facts: [ranks].
        clocks: [ranks] from `compare_clocks`.
        bandwidths: [ranks] from `measure_exchanges`.
    """
    nodes: dict[str, NodeFacts] = {}
    for rank, clock, (bandwidth, errors) in zip(facts, clocks, bandwidths, strict=True):
        node = nodes.setdefault(rank.host, NodeFacts(rank.host, [], clock, bandwidth))
        node.ranks.append(rank)
        node.bandwidth_errors += errors
    return list(nodes.values())
