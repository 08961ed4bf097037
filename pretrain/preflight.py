"""Checks the nodes of an allocation before a run begins on them, and names those that are not well.

    srun python -m pretrain.preflight configs/pretrain/x.yaml [section.key=value ...]

Takes the arguments of pretrain.train, and is started like it; slurm/pretrain.sbatch does so and
leaves bad nodes out. Every rank must come, and have the same config, versions and clock; every node
must exchange numbers as fast as others, see the run folder and read the shards; GPUs must be free,
and checkpoints must fit on their disk. `preflight` in the config holds the floors.
"""

from __future__ import annotations

from pretrain.run import signals

if __name__ == "__main__":  # before imports that take seconds, during which a signal would kill
    signals.listen()

from data_prep.command import check_command_line, check_output_folder, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(PretrainConfig, __doc__)

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from data_prep.errors import RunError
from pretrain.distributed.launcher import adopt_environment, device_type_of, hosts_of_slurm_ranks
from pretrain.model.contrastive_model import build_model
from pretrain.model.tokenizer import build_tokenizer
from pretrain.nodes.bandwidth import Bandwidth, measure_bandwidth, measure_nodes
from pretrain.nodes.facts import MachineFacts, gather_facts, sees_file
from pretrain.nodes.verdict import NodeFacts, Problem, judge, table
from pretrain.run.attempts import machine_name
from pretrain.run.fork import config_of_fork

SEEN_FILE = ".preflight"  # in the run folder, for others to see
BYTES_PER_PARAMETER = 12  # of a checkpoint: the value and two moments
SECONDS_TO_PART = 5.0


class Meeting:
    """Where ranks tell one another what they found, by a key-value store that rank 0 serves; unlike
    a collective it shows who did not come.

    Args:
        environment: as torchrun sets it.
        timeout_seconds: of every wait for the others.
    """

    def __init__(self, environment: Mapping[str, str], *, timeout_seconds: float) -> None:
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.timeout_seconds = timeout_seconds
        has_server = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            server = dist.TCPStore(
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                self.world_size,
                is_master=self.rank == 0 and not has_server,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} on {machine_name()} does not reach rank 0 at "
                f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}: {error}"
            ) from None
        self.store = dist.PrefixStore("preflight", server)

    def tell(self, key: str, value: Any) -> None:
        """To rank 0."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def collect(self, key: str, *, seconds: float | None = None) -> list[Any]:
        """[ranks] what each told, on rank 0; None of those that did not in time."""
        end = time.monotonic() + (self.timeout_seconds if seconds is None else seconds)
        return [
            self.told(key, rank=rank, seconds=end - time.monotonic())
            for rank in range(self.world_size)
        ]

    def told(self, key: str, *, rank: int, seconds: float = 0.0) -> Any:
        """What a rank has told rank 0 within so many seconds; None for nothing."""
        told = self._wait(f"{key}/{rank}", seconds=seconds)
        return None if told is None else json.loads(told)

    def announce(self, key: str, value: Any) -> Any:
        """From rank 0 to all; returns what it says.

        Raises:
            RunError: rank 0 says nothing.
        """
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        # Rank 0 may wait for others as long as it may.
        heard = self._wait(key, seconds=2 * self.timeout_seconds)
        if heard is None:
            raise RunError(f"rank {self.rank}: rank 0 did not say what comes of {key!r}")
        return json.loads(heard)

    def _wait(self, key: str, *, seconds: float) -> bytes | None:
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except dist.DistStoreError:
            return None
        return self.store.get(key)


def preflight(config: PretrainConfig) -> None:
    """Checks; rank 0 prints what it found.

    Raises:
        RunError: a run should not begin here, and why.
    """
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    adopt_environment(os.environ, needs_group=True)
    meeting = Meeting(os.environ, timeout_seconds=config.preflight.timeout_seconds)
    hosts = meet(meeting, config)
    facts = find_facts(meeting, config, hosts)
    clocks = compare_clocks(meeting)
    bandwidths = measure(meeting, config, hosts)
    if meeting.rank == 0:
        nodes = nodes_of(facts, clocks=clocks, bandwidths=bandwidths)
        say("\n".join(table(nodes)))
        finish(meeting, config, judge(nodes, config.preflight, checkpoint_bytes=size_of(config)))
    else:
        finish(meeting, config, [])


def finish(meeting: Meeting, config: PretrainConfig, problems: list[Problem]) -> None:
    """Ends the preflight on every rank, with what rank 0 has found.

    Raises:
        RunError: it found a problem.
    """
    is_well = meeting.announce("verdict", not problems)
    if meeting.rank != 0:
        meeting.tell("parted", value=True)
        if not is_well:
            raise RunError("a run should not begin here; rank 0 says why")
        return
    bad_nodes = sorted({each.node for each in problems if each.node is not None})
    if any(each.node is None for each in problems):
        bad_nodes = []  # without them it would not be well either
    if config.preflight.verdict is not None:
        config.preflight.verdict.write_text(verdict_of(problems, bad_nodes) + "\n")
    meeting.tell("parted", value=True)
    meeting.collect("parted", seconds=SECONDS_TO_PART)  # for the store ends with this process
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        advice = f"leave out {', '.join(bad_nodes)}" if bad_nodes else "mend it, and try again"
        raise RunError(f"a run should not begin here:\n{lines}\n{advice}")
    say("preflight: all is well")


def verdict_of(problems: list[Problem], bad_nodes: list[str]) -> str:
    """A word for the script that started it: well, stop (a signal came), leave_out, or refuse."""
    if signals.heard:
        return "stop"
    if bad_nodes:
        return f"leave_out {','.join(bad_nodes)}"
    return "refuse" if problems else "well"


def refuse(meeting: Meeting, config: PretrainConfig, problems: list[Problem]) -> NoReturn:
    """Ends the preflight on every rank before it is over.

    Raises:
        RunError: always; on rank 0 with the problems, of which there must be some there.
    """
    finish(meeting, config, problems)
    raise AssertionError("there was no problem")


def meet(meeting: Meeting, config: PretrainConfig) -> list[str]:
    """[ranks] name of each one's machine.

    Raises:
        RunError: some did not come; the log names them.
    """
    meeting.tell("host", machine_name())
    hosts = meeting.collect("host") if meeting.rank == 0 else []
    missing = [rank for rank, host in enumerate(hosts) if host is None]
    came = meeting.announce("met", None if missing else hosts)
    if came is not None:
        return came
    expected = hosts_of_slurm_ranks(os.environ) if missing else None
    problems = [
        Problem(
            None if expected is None else expected[rank],
            f"rank {rank} did not come within preflight.timeout_seconds="
            f"{meeting.timeout_seconds:g}",
        )
        for rank in missing
    ]
    refuse(meeting, config, problems)


def find_facts(meeting: Meeting, config: PretrainConfig, hosts: list[str]) -> list[MachineFacts]:
    """[ranks] what each finds out by itself, on rank 0.

    Raises:
        RunError: some did not end; it says what they were at.
    """
    host = hosts[meeting.rank]
    local_rank = hosts[: meeting.rank].count(host)
    token, seen_file = secrets.token_hex(8), config.run.folder / SEEN_FILE
    if meeting.rank == 0:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        seen_file.write_text(token)
    token = meeting.announce("token", token)
    facts = gather_facts(
        config,
        rank=meeting.rank,
        local_rank=local_rank,
        node=names_of_nodes(hosts).index(host),
        device=device_of(config),
        says=lambda doing: meeting.tell("doing", doing),
    )
    if local_rank == 0 and not sees_file(seen_file, token):
        facts.problems.append(
            f"{config.run.folder} is not the folder that {hosts[0]} sees; run.folder must be on a "
            "file system that all nodes share"
        )
    meeting.tell("facts", asdict(facts))
    told = meeting.collect("facts") if meeting.rank == 0 else []
    late = [rank for rank, values in enumerate(told) if values is None]
    if meeting.rank == 0:
        seen_file.unlink(missing_ok=True)
    if meeting.announce("found", not late):
        return [MachineFacts(**values) for values in told]
    problems = [
        Problem(
            hosts[rank],
            f"rank {rank} was still {meeting.told('doing', rank=rank)} after "
            f"preflight.timeout_seconds={meeting.timeout_seconds:g}",
        )
        for rank in late
    ]
    refuse(meeting, config, problems)


def compare_clocks(meeting: Meeting) -> list[float]:
    """[ranks] seconds that each one's clock is ahead of rank 0's, on rank 0: all look at theirs
    when they hear one word, so up to the time that it takes to come."""
    meeting.announce("clocks", value=True)
    now = time.time()
    meeting.tell("clock", now)
    clocks = meeting.collect("clock") if meeting.rank == 0 else []
    return [clock - now if clock is not None else 0.0 for clock in clocks]


def measure(
    meeting: Meeting, config: PretrainConfig, hosts: list[str]
) -> list[tuple[Bandwidth | None, list[str]]]:
    """[ranks] each one's bandwidth with its neighbours and what failed, on rank 0."""
    if meeting.world_size == 1:
        return [(None, [])]
    device = device_of(config)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # an error instead of the end of the process
    num_bytes = round(1e6 * config.preflight.exchanged_megabytes)
    nodes = names_of_nodes(hosts)
    ranks = [[n for n, host in enumerate(hosts) if host == node] for node in nodes]
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timedelta(seconds=meeting.timeout_seconds / 2),
            device_id=device if device.type == "cuda" else None,
        )
        own, errors = measure_nodes(ranks, num_bytes=num_bytes, device=device)
    except RuntimeError as error:  # gloo joins all at once: one that is not reached, and none is
        own, errors = None, [str(error).partition("\n")[0]]
    meeting.tell("bandwidth", [own and [own.all_reduce, own.all_gather], errors])
    told = meeting.collect("bandwidth") if meeting.rank == 0 else []
    found = [values or [None, ["it did not end in time"]] for values in told]
    if meeting.announce("all exchange", all(own is not None for own, _ in found)):
        together = measure_bandwidth(None, num_bytes=num_bytes, device=device)
        if meeting.rank == 0:
            say(
                f"{len(nodes)} nodes, {meeting.world_size} ranks together: all-reduce "
                f"{together.all_reduce:.3g} GB/s, all-gather {together.all_gather:.3g} GB/s"
            )
        dist.destroy_process_group()
    return [(Bandwidth(*own) if own else None, errors) for own, errors in found]


def names_of_nodes(hosts: list[str]) -> list[str]:
    """Each machine once, in the order of its first rank."""
    return list(dict.fromkeys(hosts))


def nodes_of(
    facts: list[MachineFacts],
    *,
    clocks: list[float],
    bandwidths: list[tuple[Bandwidth | None, list[str]]],
) -> list[NodeFacts]:
    """What is known of each machine, from what is known of its ranks; as those are numbered."""
    nodes: dict[str, NodeFacts] = {}
    for rank, clock, (bandwidth, errors) in zip(facts, clocks, bandwidths, strict=True):
        node = nodes.setdefault(rank.host, NodeFacts(rank.host, [], clock, bandwidth))
        node.ranks.append(rank)
        node.bandwidth_errors += errors
    return list(nodes.values())


def size_of(config: PretrainConfig) -> int:
    """Bytes of a checkpoint."""
    model = build_model(config, tokenizer=build_tokenizer(config.model.text))
    return BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())


def device_of(config: PretrainConfig) -> torch.device:
    """Of this rank."""
    kind = device_type_of(config.engine.device)
    return torch.device("cpu" if kind == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


def main() -> int:
    """The command."""
    return run_command(PretrainConfig, run=preflight, dry_run=lambda _: None, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
