"""Verdict on the nodes: which are bad and why, and how srun leaves them out.

Pure functions of what was measured.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.nodes.bandwidth import Bandwidth
from pretrain.nodes.facts import MachineFacts
from pretrain.preflight_config import Preflight
from pretrain.run.attempts import restarts_of_job

NODES_FOR_A_MEDIAN = 3  # with fewer, a median does not tell the slow node from the fast one
REQUEUE = "requeue"  # answer to the batch script in place of srun's options
MOST_RESTARTS = 3  # of a job that is requeued because a signal interrupted the checks


@dataclass
class NodeFacts:
    """Facts of one machine."""

    name: str
    ranks: list[MachineFacts]
    clock_seconds: float | None = None  # difference to rank 0's clock
    bandwidth: Bandwidth | None = None
    bandwidth_errors: list[str] = field(default_factory=list)

    @property
    def shard_speed(self) -> float | None:
        """Speed of reading shards, in megabytes per second."""
        speeds = [r.shard_megabytes_per_second for r in self.ranks]
        return next((speed for speed in speeds if speed is not None), None)

    @property
    def gpu_free_fraction(self) -> float | None:
        """Free fraction of the fullest GPU's memory."""
        fractions = [r.gpu_free_fraction for r in self.ranks if r.gpu_free_fraction is not None]
        return min(fractions, default=None)


@dataclass(frozen=True)
class Problem:
    """A reason why a run should not start."""

    node: str | None  # bad node; None if no node is to blame
    text: str

    def __str__(self) -> str:
        return self.text if self.node is None else f"{self.node}: {self.text}"


def judge(
    nodes: Sequence[NodeFacts], settings: Preflight, *, checkpoint_bytes: int
) -> list[Problem]:
    """Returns all problems, in the order of the nodes.

    Args:
        nodes: in the order of their first ranks.
        settings: limits that nodes must meet.
        checkpoint_bytes: size of one checkpoint.
    """
    return [
        *_different(nodes),
        *_clocks(nodes, settings),
        *(problem for node in nodes for problem in _of_node(node, settings)),
        *_slow(nodes, settings),
        *_full(nodes, checkpoint_bytes * settings.checkpoints_to_fit),
    ]


def _different(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    """Ranks whose config or versions differ from those of the majority."""
    ranks = [(node.name, rank) for node in nodes for rank in node.ranks]
    found = {"config": [rank.config_checksum for _, rank in ranks]}
    for name in sorted({name for _, rank in ranks for name in rank.versions}):
        found[name] = [rank.versions.get(name, "missing") for _, rank in ranks]
    for name, values in found.items():
        [(usual, count), *_] = Counter(values).most_common(1)
        others = {}
        for (node, _), value in zip(ranks, values, strict=True):
            if value != usual:
                others.setdefault(node, value)
        is_majority = 2 * count > len(values)
        for node, value in others.items():
            yield Problem(
                node if is_majority else None,
                f"{name} is {value}, elsewhere {usual}"
                + ("" if is_majority else f" ({node}; no majority decides which is right)"),
            )


def _clocks(nodes: Sequence[NodeFacts], settings: Preflight) -> Iterator[Problem]:
    known = [node for node in nodes if node.clock_seconds is not None]
    if not known:
        return
    median = statistics.median(node.clock_seconds for node in known)
    for node in known:
        off = node.clock_seconds - median
        if abs(off) > settings.max_clock_difference_seconds:
            yield Problem(
                node.name,
                f"its clock differs by {off:+.1f} s from the others, more than "
                f"preflight.max_clock_difference_seconds="
                f"{settings.max_clock_difference_seconds:g}",
            )


def _of_node(node: NodeFacts, settings: Preflight) -> Iterator[Problem]:
    for rank in node.ranks:
        for text in rank.problems:
            yield Problem(node.name, text)
        fraction = rank.gpu_free_fraction
        if fraction is not None and fraction < settings.min_free_gpu_share:
            yield Problem(
                node.name,
                f"rank {rank.rank}'s GPU has {fraction:.0%} of its memory free, less than "
                f"preflight.min_free_gpu_share={settings.min_free_gpu_share:.0%}; another process "
                "uses it",
            )
    if node.bandwidth is None and node.bandwidth_errors:
        yield Problem(node.name, f"no exchange with a neighbour: {node.bandwidth_errors[0]}")


def _slow(nodes: Sequence[NodeFacts], settings: Preflight) -> Iterator[Problem]:
    floors = {
        "all-reduce": ("GB/s", settings.min_all_reduce_gigabytes_per_second),
        "all-gather": ("GB/s", settings.min_all_gather_gigabytes_per_second),
        "reading shards": ("MB/s", settings.min_shard_megabytes_per_second),
    }
    for name, (unit, floor) in floors.items():
        speeds = {node.name: speed for node in nodes if (speed := _speed(node, name)) is not None}
        median = statistics.median(speeds.values()) if speeds else 0.0
        has_median = len(speeds) >= NODES_FOR_A_MEDIAN and name != "reading shards"
        for node, speed in speeds.items():
            if floor is not None and speed < floor:
                yield Problem(node, f"{name}: {speed:.3g} {unit}, less than {floor:g} {unit}")
            elif has_median and speed < settings.min_share_of_median * median:
                yield Problem(
                    node,
                    f"{name}: {speed:.3g} {unit}, the median node {median:.3g} {unit} "
                    f"(preflight.min_share_of_median={settings.min_share_of_median:g})",
                )


def _speed(node: NodeFacts, name: str) -> float | None:
    if name == "reading shards":
        return node.shard_speed
    if node.bandwidth is None:
        return None
    return node.bandwidth.all_reduce if name == "all-reduce" else node.bandwidth.all_gather


def _full(nodes: Sequence[NodeFacts], needed: int) -> Iterator[Problem]:
    """Folders without room for checkpoints; their disk is shared, so no node is to blame."""
    folders: Mapping[str, int] = nodes[0].ranks[0].free_bytes
    for folder, free in folders.items():
        if free < needed:
            yield Problem(
                None,
                f"{folder}: {free / 1e9:,.2f} GB are free, and {needed / 1e9:,.2f} GB needed "
                "(preflight.checkpoints_to_fit checkpoints); make room, or choose another folder",
            )


def bad_nodes(problems: Collection[Problem]) -> list[str]:
    """Returns the nodes without which a run can start.

    Returns:
        Names in alphabetical order; none if there is a problem that no node is to blame for.
    """
    if any(problem.node is None for problem in problems):
        return []
    return sorted({problem.node for problem in problems})


def answer_to_script(
    problems: Collection[Problem], *, was_stopped: bool, environment: Mapping[str, str]
) -> str:
    """Returns the line that tells slurm/pretrain.sbatch what to do instead of starting the run.

    Args:
        was_stopped: a signal asked rank 0 to stop.
        environment: of a job step; SRUN_OPTIONS holds the answer that the step was started with.

    Returns:
        srun's options without the bad nodes ("--nodes=2 --exclude=node2,node5"); "requeue"; or ""
        if the job is to end.
    """
    if was_stopped:
        return REQUEUE if restarts_of_job(environment) < MOST_RESTARTS else ""
    bad, num_nodes = bad_nodes(problems), int(environment.get("SLURM_STEP_NUM_NODES") or 0)
    if not 0 < len(bad) < num_nodes:
        return ""
    excluded = environment.get("SRUN_OPTIONS", "").partition("--exclude=")[2]
    names = [*filter(None, excluded.split(",")), *bad]
    return f"--nodes={num_nodes - len(bad)} --exclude={','.join(names)}"


def table(nodes: Sequence[NodeFacts]) -> list[str]:
    """Formats the measurements of every node; one line each, after a header."""
    rows = [("node", "ranks", "all-reduce", "all-gather", "shards", "clock", "GPU memory free")]
    for node in nodes:
        band = node.bandwidth
        rows.append(
            (
                node.name,
                str(len(node.ranks)),
                _shown(band and band.all_reduce, "{:.3g} GB/s"),
                _shown(band and band.all_gather, "{:.3g} GB/s"),
                _shown(node.shard_speed, "{:,.0f} MB/s"),
                _shown(node.clock_seconds, "{:+.2f} s"),
                _shown(node.gpu_free_fraction, "{:.0%}"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
