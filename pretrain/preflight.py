"""Checks the nodes of an allocation before a run starts on them, and reports unhealthy nodes.

    srun python -m pretrain.preflight configs/pretrain/x.yaml [section.key=value ...]

Takes the arguments of pretrain.train and is started in the same way. Checks, with limits from the
config section `preflight`, that

    1. all ranks join in time
    2. GPUs are free, shards are readable, all nodes share the run folder, checkpoints fit on disk
    3. config, versions and clocks agree
    4. no node communicates more slowly than the others

The report goes to standard error. If the run should not start, standard output holds one line for
slurm/pretrain.sbatch: srun's options that exclude bad nodes, or `requeue` after a signal.
"""

from __future__ import annotations

from pretrain.run import signals

if __name__ == "__main__":  # before slow imports, during which a signal would end the process
    signals.listen()

from data_prep.command import check_command_line, check_output_folder, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(PretrainConfig, __doc__)

import os
import sys
from collections.abc import Sequence
from typing import TextIO

import torch

from data_prep.errors import RunError
from pretrain.checkpoint import build_model_of
from pretrain.distributed.launcher import adopt_environment, device_type_of
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.nodes.checks import (
    MissingRanksError,
    compare_clocks,
    find_facts,
    group_by_node,
    measure_exchanges,
    wait_for_ranks,
)
from pretrain.nodes.diagnosis import Problem, answer_to_script, bad_nodes, diagnose, table
from pretrain.nodes.facts import checksum_of_config
from pretrain.nodes.rendezvous import Rendezvous
from pretrain.run.fork import config_of_fork

BYTES_PER_PARAMETER = 12  # of a checkpoint: the parameter and two moments
SHUTDOWN_SECONDS = 5.0  # rank 0 waits this long for the last messages of the other ranks


def preflight(config: PretrainConfig, *, answer: TextIO | None = None) -> None:
    """Checks the nodes; every rank must call it, and rank 0 prints the report.

    Args:
        answer: stream for the line to the batch script, which is written if the run should not
            start.

    Raises:
        RunError: if the run should not start; the message lists the problems.
    """
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    adopt_environment(os.environ, needs_group=True)
    rendezvous = Rendezvous(os.environ, timeout_seconds=config.preflight.timeout_seconds)
    try:
        problems = find_problems(rendezvous, config)
    except MissingRanksError as error:
        problems = error.problems
    finish(rendezvous, problems, answer=answer)


def find_problems(rendezvous: Rendezvous, config: PretrainConfig) -> list[Problem]:
    """Runs all checks; returns the problems on rank 0, and an empty list on other ranks.

    Raises:
        MissingRanksError: if a rank does not join or finish in time.
    """
    settings, device = config.preflight, device_of_rank(config.engine.device)
    hosts = wait_for_ranks(rendezvous)
    facts = find_facts(
        rendezvous,
        settings,
        hosts=hosts,
        device=device,
        config_checksum=checksum_of_config(config),
        datasets=sorted({s.dataset for p in config.streams.values() for s in p.all_sources}),
        folder=config.run.folder,
        checkpoints=config.run.checkpoints,
    )
    clocks = compare_clocks(rendezvous)
    bandwidths = measure_exchanges(rendezvous, settings, hosts=hosts, device=device)
    if rendezvous.rank != 0:
        return []
    nodes = group_by_node(facts, clocks=clocks, bandwidths=bandwidths)
    say("\n".join(table(nodes)))
    return diagnose(nodes, settings, checkpoint_bytes=checkpoint_bytes(config))


def finish(rendezvous: Rendezvous, problems: Sequence[Problem], *, answer: TextIO | None) -> None:
    """Ends the preflight on all ranks with the problems that rank 0 found.

    Raises:
        RunError: if there are problems, or rank 0 received a signal during the checks.
    """
    is_healthy = rendezvous.broadcast("is healthy", not problems and not signals.received)
    if rendezvous.rank != 0:
        rendezvous.send("done", value=True)
        if not is_healthy:
            raise RunError("the run should not start on these nodes; see the error of rank 0")
        return
    if not is_healthy and answer is not None:
        line = answer_to_script(
            problems, was_stopped=bool(signals.received), environment=os.environ
        )
        say(line, end="\n" if line else "", file=answer)
    rendezvous.send("done", value=True)
    rendezvous.collect("done", seconds=SHUTDOWN_SECONDS)  # the store ends with this process
    if not is_healthy:
        raise RunError(describe_problems(problems))
    say("preflight: no problems found")


def describe_problems(problems: Sequence[Problem]) -> str:
    """Returns an error message: why the run should not start, and what to do."""
    if not problems:
        return f"stopped by {', '.join(sorted(signals.received))} while checking nodes"
    lines = "\n".join(f"  {problem}" for problem in problems)
    bad = bad_nodes(problems)
    advice = f"exclude {', '.join(bad)}" if bad else "fix the problems and try again"
    return f"the run should not start on these nodes:\n{lines}\n{advice}"


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Computes the approximate size of a checkpoint."""
    model = build_model_of(config, build_text_tokenizer(config.model))
    return BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())


def device_of_rank(setting: str) -> torch.device:
    """Returns the device of this rank for a value of engine.device."""
    kind = device_type_of(setting)
    return torch.device("cpu" if kind == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")


def run(config: PretrainConfig) -> None:
    """Runs the preflight and writes only the line for the batch script to standard output."""
    # Libraries such as NCCL write to standard output from C code: redirect it to standard error.
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        preflight(config, answer=answer)


def main() -> int:
    """Runs the command and returns its exit status."""
    return run_command(PretrainConfig, run=run, dry_run=lambda _: None, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
