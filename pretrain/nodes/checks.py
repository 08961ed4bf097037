"""Checks that involve all ranks, which communicate through a `Rendezvous`.

Results are returned on rank 0. Every rank must call each function. If ranks are missing or late,
all ranks raise an error.
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
from pretrain.nodes.diagnosis import NodeFacts, Problem
from pretrain.nodes.facts import MachineFacts, gather_facts, wait_for_file
from pretrain.nodes.rendezvous import Rendezvous
from pretrain.run.attempts import machine_name
from pretrain.settings.preflight import Preflight

PROBE_FILE = ".preflight"  # written by rank 0 to test that all nodes share the run folder


class MissingRanksError(Exception):
    """Raised on all ranks if some ranks did not join or did not finish a check.

    Args:
        problems: one problem per missing rank on rank 0; empty on other ranks.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("ranks are missing")
        self.problems = problems


def wait_for_ranks(rendezvous: Rendezvous) -> list[str]:
    """Waits until all ranks have joined.

    Returns:
        [ranks] host names.

    Raises:
        MissingRanksError: if a rank does not join in time.
    """
    rendezvous.send("host", machine_name())
    hosts = rendezvous.collect("host") if rendezvous.rank == 0 else []
    missing = [rank for rank, host in enumerate(hosts) if host is None]
    known = rendezvous.broadcast("met", None if missing else hosts)
    if known is not None:
        return known
    expected = hosts_of_slurm_ranks(os.environ) if missing else None
    raise MissingRanksError(
        [
            Problem(
                None if expected is None else expected[rank],
                f"rank {rank} did not join within preflight.timeout_seconds="
                f"{rendezvous.timeout_seconds:g}",
            )
            for rank in missing
        ]
    )


def find_facts(
    rendezvous: Rendezvous,
    settings: Preflight,
    *,
    hosts: Sequence[str],
    device: torch.device,
    config_checksum: str,
    datasets: Sequence[str],
    folder: Path,
    checkpoints: str,
) -> list[MachineFacts]:
    """Gathers the facts about the machine of each rank.

    Args:
        settings: config section `preflight`.
        hosts: [ranks] host names.
        device: device of this rank.
        config_checksum: checksum of the whole config.
        datasets: folders or URLs of the training data.
        folder: run folder; created if missing.
        checkpoints: folder or URL of the checkpoints.

    Returns:
        [ranks] facts, on rank 0.

    Raises:
        MissingRanksError: if a rank does not finish in time.
    """
    host = hosts[rendezvous.rank]
    local_rank = hosts[: rendezvous.rank].count(host)
    token, probe_file = secrets.token_hex(8), folder / PROBE_FILE
    if rendezvous.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        probe_file.write_text(token)
    token = rendezvous.broadcast("token", token)
    facts = gather_facts(
        settings,
        rank=rendezvous.rank,
        local_rank=local_rank,
        node=names_of_nodes(hosts).index(host),
        device=device,
        config_checksum=config_checksum,
        datasets=datasets,
        folders=[folder, checkpoints],
        report=lambda activity: rendezvous.send("activity", activity),
    )
    if local_rank == 0 and not wait_for_file(probe_file, token):
        facts.problems.append(
            f"{folder} is not the same folder as on {hosts[0]}; run.folder must be on a file "
            "system that all nodes share"
        )
    rendezvous.send("facts", asdict(facts))
    found = rendezvous.collect("facts") if rendezvous.rank == 0 else []
    late = [rank for rank, values in enumerate(found) if values is None]
    if rendezvous.rank == 0:
        probe_file.unlink(missing_ok=True)
    if rendezvous.broadcast("found", not late):
        return [MachineFacts(**values) for values in found]
    raise MissingRanksError(
        [
            Problem(
                hosts[rank],
                f"rank {rank} was still {rendezvous.receive('activity', rank=rank)} after "
                f"preflight.timeout_seconds={rendezvous.timeout_seconds:g}",
            )
            for rank in late
        ]
    )


def compare_clocks(rendezvous: Rendezvous) -> list[float]:
    """Compares the clocks of all ranks, which are read when a message from rank 0 arrives.

    Returns:
        [ranks] seconds ahead of rank 0, on rank 0, including the latency of the message.
    """
    rendezvous.broadcast("clocks", value=True)
    now = time.time()
    rendezvous.send("clock", now)
    clocks = rendezvous.collect("clock") if rendezvous.rank == 0 else []
    return [clock - now if clock is not None else 0.0 for clock in clocks]


def measure_exchanges(
    rendezvous: Rendezvous, settings: Preflight, *, hosts: Sequence[str], device: torch.device
) -> list[tuple[Bandwidth | None, list[str]]]:
    """Measures the bandwidth of each node with its neighbours, then of all ranks together.

    Args:
        settings: config section `preflight`.
        hosts: [ranks] host names.
        device: device of this rank.

    Returns:
        [ranks] (bandwidth of its node, messages of failed exchanges), on rank 0.
    """
    if rendezvous.world_size == 1:
        return [(None, [])]
    # Makes a failed exchange raise an error instead of ending the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    num_bytes = round(1e6 * settings.exchanged_megabytes)
    nodes = names_of_nodes(hosts)
    ranks = [[n for n, host in enumerate(hosts) if host == node] for node in nodes]
    try:
        _join_ranks(rendezvous, device)
        own, errors = measure_nodes(ranks, num_bytes=num_bytes, device=device)
    except RuntimeError as error:  # gloo fails to connect if any rank is missing
        own, errors = None, [str(error).partition("\n")[0]]
    rendezvous.send("bandwidth", [own and [own.all_reduce, own.all_gather], errors])
    sent = rendezvous.collect("bandwidth") if rendezvous.rank == 0 else []
    found = [values or [None, ["exchange did not finish in time"]] for values in sent]
    if rendezvous.broadcast("all exchange", all(own is not None for own, _ in found)):
        together = measure_bandwidth(None, num_bytes=num_bytes, device=device)
        if rendezvous.rank == 0:
            say(
                f"{len(nodes)} nodes, {rendezvous.world_size} ranks: all-reduce "
                f"{together.all_reduce:.3g} GB/s, all-gather {together.all_gather:.3g} GB/s"
            )
        dist.destroy_process_group()
    return [(Bandwidth(*own) if own else None, errors) for own, errors in found]


def _join_ranks(rendezvous: Rendezvous, device: torch.device) -> None:
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", rendezvous.store),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timedelta(seconds=rendezvous.timeout_seconds / 2),
        device_id=device if device.type == "cuda" else None,
    )


def names_of_nodes(hosts: Sequence[str]) -> list[str]:
    """Returns the distinct host names, in the order of their first ranks."""
    return list(dict.fromkeys(hosts))


def group_by_node(
    facts: Sequence[MachineFacts],
    *,
    clocks: Sequence[float],
    bandwidths: Sequence[tuple[Bandwidth | None, list[str]]],
) -> list[NodeFacts]:
    """Combines the facts of ranks into facts of nodes, in the order of their first ranks.

    Args:
        facts: [ranks] facts of each rank's machine.
        clocks: [ranks] from `compare_clocks`.
        bandwidths: [ranks] from `measure_exchanges`.
    """
    nodes: dict[str, NodeFacts] = {}
    for rank, clock, (bandwidth, errors) in zip(facts, clocks, bandwidths, strict=True):
        node = nodes.setdefault(rank.host, NodeFacts(rank.host, [], clock, bandwidth))
        node.ranks.append(rank)
        node.bandwidth_errors += errors
    return list(nodes.values())
