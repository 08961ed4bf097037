"""Diagnosis of nodes from their facts: which are bad and why, and the srun options to exclude them.

All functions are pure.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pretrain.nodes.bandwidth import Bandwidth
from pretrain.nodes.facts import MachineFacts
from pretrain.run.attempts import restarts_of_job
from pretrain.settings.preflight import Preflight

NODES_FOR_A_MEDIAN = 3  # with fewer nodes, the median does not show which one is slow
REQUEUE = "requeue"  # answer to the batch script instead of srun options
MAX_RESTARTS = 3  # a job interrupted by a signal during the checks is requeued this often


@dataclass
class NodeFacts:
    """Facts about one machine."""

    name: str
    ranks: list[MachineFacts]
    clock_seconds: float | None = None  # seconds ahead of rank 0's clock
    bandwidth: Bandwidth | None = None
    bandwidth_errors: list[str] = field(default_factory=list)

    @property
    def shard_speed(self) -> float | None:
        """Shard reading speed in megabytes per second."""
        speeds = [r.shard_megabytes_per_second for r in self.ranks]
        return next((speed for speed in speeds if speed is not None), None)

    @property
    def gpu_free_fraction(self) -> float | None:
        """Lowest fraction of free memory of any GPU."""
        fractions = [r.gpu_free_fraction for r in self.ranks if r.gpu_free_fraction is not None]
        return min(fractions, default=None)


@dataclass(frozen=True)
class Problem:
    """A reason why a run should not start."""

    node: str | None  # bad node; None if the problem is not specific to a node
    text: str

    def __str__(self) -> str:
        return self.text if self.node is None else f"{self.node}: {self.text}"


def diagnose(
    nodes: Sequence[NodeFacts], settings: Preflight, *, checkpoint_bytes: int
) -> list[Problem]:
    """Returns all problems, in the order of the nodes.

    Args:
        nodes: facts about the nodes, in the order of their first ranks.
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
    """Yields nodes whose config or versions differ from the majority."""
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
                f"{name} is {value}, on other nodes {usual}"
                + ("" if is_majority else f" ({node}; there is no majority)"),
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
                f"its clock differs by {off:+.1f} s from the median, more than "
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
                f"preflight.min_free_gpu_share={settings.min_free_gpu_share:.0%}; another "
                "process uses it",
            )
    if node.bandwidth is None and node.bandwidth_errors:
        yield Problem(node.name, f"exchange with a neighbour failed: {node.bandwidth_errors[0]}")


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
                    f"{name}: {speed:.3g} {unit}, median of the nodes {median:.3g} {unit} "
                    f"(preflight.min_share_of_median={settings.min_share_of_median:g})",
                )


def _speed(node: NodeFacts, name: str) -> float | None:
    if name == "reading shards":
        return node.shard_speed
    if node.bandwidth is None:
        return None
    return node.bandwidth.all_reduce if name == "all-reduce" else node.bandwidth.all_gather


def _full(nodes: Sequence[NodeFacts], needed: int) -> Iterator[Problem]:
    """Yields folders without room for checkpoints; their disk is shared by all nodes."""
    folders: Mapping[str, int] = nodes[0].ranks[0].free_bytes
    for folder, free in folders.items():
        if free < needed:
            yield Problem(
                None,
                f"{folder}: {free / 1e9:,.2f} GB are free, but {needed / 1e9:,.2f} GB are needed "
                "(preflight.checkpoints_to_fit checkpoints); free space, or choose another folder",
            )


def bad_nodes(problems: Collection[Problem]) -> list[str]:
    """Returns the nodes to exclude so that the run can start.

    Returns:
        Names in alphabetical order; empty if a problem is not specific to a node.
    """
    if any(problem.node is None for problem in problems):
        return []
    return sorted({problem.node for problem in problems})


def answer_to_script(
    problems: Collection[Problem], *, was_stopped: bool, environment: Mapping[str, str]
) -> str:
    """Returns the line that instructs slurm/pretrain.sbatch if the run should not start.

    Args:
        was_stopped: whether rank 0 received a stop signal.
        environment: environment variables of the job step; SRUN_OPTIONS holds the srun options that
            the step was started with.

    Returns:
        srun options that exclude the bad nodes ("--nodes=2 --exclude=node2,node5"); "requeue"; or
        "" if the job should end.
    """
    if was_stopped:
        return REQUEUE if restarts_of_job(environment) < MAX_RESTARTS else ""
    bad, num_nodes = bad_nodes(problems), int(environment.get("SLURM_STEP_NUM_NODES") or 0)
    if not 0 < len(bad) < num_nodes:
        return ""
    excluded = environment.get("SRUN_OPTIONS", "").partition("--exclude=")[2]
    names = [*filter(None, excluded.split(",")), *bad]
    return f"--nodes={num_nodes - len(bad)} --exclude={','.join(names)}"


def table(nodes: Sequence[NodeFacts]) -> list[str]:
    """Formats the measurements as a table: a header, then one line per node."""
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
