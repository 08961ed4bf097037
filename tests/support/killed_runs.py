"""Training runs killed at random moments and started again, until they end by themselves.

    python -m tests.support.killed_runs FIRST_SEED NUM_CASES     also: make soak

A case is a function of its seed. The seed decides the number of processes, engine.strategy, and the
kills: their process, signal and moment. The result is compared with an undisturbed run of the same
processes: parameters and moments bit for bit, and the sample ids of every step. Prints one line per
failed case, with its seed, and a summary.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pretrain.checkpoint import open_checkpoint
from pretrain.checkpoints.state import PARAMETER, read_whole
from pretrain.config import PretrainConfig
from pretrain.fail_points import EVENT
from pretrain.run.attempts import read_attempts, read_metrics
from tests.support.gloo_processes import ProcessGroup
from tests.support.toy_run import toy_config, write_toy_data
from tests.support.toy_towers import build_toy_model

NUM_STEPS = 6
TIMEOUT_SECONDS = 300  # of collectives
SECONDS_TO_END = 900  # of an attempt, or of processes whose peer was killed
SECONDS_OF_LAUNCHER = 3  # before it ends those that are left
SECONDS_OF_LOADER = 60  # before it notices that its process was killed
# Where an attempt may run: processes and strategy, each as likely as it is often here.
PLACES = [(1, "ddp")] * 2 + [
    (world_size, strategy)
    for world_size in (2, 4)
    for strategy in ("ddp", "zero1", "zero2", "zero3")
]
HOW = ("KILL one", "KILL all", "SIGTERM", "SIGUSR1")
MOMENTS = (
    "start",  # before the processes meet
    "loaded",  # before the first step
    "first step",
    "step",  # some later one
    "update",  # the gradient was taken
    "validation",
    "writing",  # a file of a checkpoint is written in part
    "commit",  # all are written, and do not count yet
    "committed",  # they count; old ones are not deleted yet
    "any",  # some time
)
OF_MAIN_PROCESS = ("commit", "committed")
# Fail point of pretrain.fail_points -> names here
NAMES_OF_MOMENT = {name: (name,) for name in MOMENTS if name not in ("first step", "any")}
NAMES_OF_MOMENT["step"] = ("first step", "step")


@dataclass(frozen=True)
class Kill:
    """What happens to one attempt."""

    how: str  # of HOW
    moment: str  # of MOMENTS
    count: int  # which of the moments of that name, from 1 on
    rank: int
    seconds: float  # of "any": since the start

    def __str__(self):
        return f"{self.how} of rank {self.rank} at {self.moment} {self.count}"


@dataclass(frozen=True)
class Case:
    """A run and what happens to it: (processes, strategy, kill) of each attempt but the last."""

    seed: int
    attempts: tuple[tuple[int, str, Kill], ...]
    last: tuple[int, str]

    @property
    def is_steady(self):
        """Whether all attempts are of as many processes with the same strategy."""
        return {each[:2] for each in self.attempts} == {self.last}

    def __str__(self):
        attempts = [f"{n} x {strategy}: {kill}" for n, strategy, kill in self.attempts]
        return f"seed {self.seed}: " + "; ".join(attempts) + "; last {} x {}".format(*self.last)


def case_of(seed, *, places=PLACES, ways=HOW, steady_fraction=0.7):
    """Returns the case of a seed."""
    rng = random.Random(seed)
    last, is_steady = rng.choice(places), rng.random() < steady_fraction
    attempts = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        world_size, strategy = last if is_steady else rng.choice(places)
        moment = rng.choice(MOMENTS)
        kill = Kill(
            how=rng.choice(ways),
            moment=moment,
            count=rng.randint(1, 3) if moment in ("step", "update", "writing", "commit") else 1,
            rank=0 if moment in OF_MAIN_PROCESS else rng.randrange(world_size),
            seconds=rng.uniform(0.1, 2.5),
        )
        attempts.append((world_size, strategy, kill))
    return Case(seed, tuple(attempts), last)


def config_of(data, folder, strategy):
    """Returns a config with images alone, six steps, three checkpoints and two validations."""
    values = toy_config(data, folder).model_dump(exclude_unset=True)
    del values["streams"]["audio-text"], values["model"]["audio"], values["audio"]
    values["model"]["text"]["options"] |= {"width": 8}
    values["run"] |= {"checkpoint_every_steps": 2, "trackers": []}
    values["schedule"] |= {"num_steps": NUM_STEPS}
    values["engine"] |= {"strategy": strategy}
    values["engine"] |= dict.fromkeys(("timeout_seconds", "start_timeout_seconds"), TIMEOUT_SECONDS)
    held_out = {"dataset": data / "more_colors", "batch_size": 10}
    values["validation"] = {"every_steps": 3, "streams": {"image-text": held_out}}
    return PretrainConfig.model_validate(values)


# ------------------------------------------------------------------------- in the processes


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


def train_until(config, kill, sign):
    """Trains, and at the moment of its kill asks for it: by touching the file `sign`."""
    met = Counter()

    def meet_all(moment):
        for name in NAMES_OF_MOMENT[moment]:
            meet(name)

    def meet(moment):
        met[moment] += 1
        if moment != kill.moment or met[moment] != kill.count:
            return
        if int(os.environ.get("RANK", "0")) != kill.rank:
            return
        sign.touch()
        if kill.how.startswith("KILL"):
            signal.pause()  # until it is killed
        os.kill(os.getpid(), getattr(signal, kill.how))

    sys.addaudithook(lambda event, values: meet_all(*values) if event == EVENT else None)
    train(config)


# ------------------------------------------------------------------------- outside of them


class UnexpectedEndError(AssertionError):
    """An attempt ended otherwise than it should have."""


def run_attempt(config, world_size, kill, *, target=train_until):
    """Runs one attempt; returns whether the moment of its kill came.

    Args:
        target: function of (config, kill, sign) that every process runs.
    """
    sign = config.run.folder.parent / "sign"
    sign.unlink(missing_ok=True)
    group = ProcessGroup(world_size, target, config, kill, sign)
    end = time.monotonic() + kill.seconds if kill.moment == "any" else None
    while not sign.exists() and any(process.is_alive() for process in group.processes):
        time.sleep(0.005)
        if end is not None and time.monotonic() >= end:
            sign.touch()
            number = getattr(signal, kill.how, signal.SIGKILL)
            if number != signal.SIGKILL:
                os.kill(group.pids[kill.rank], number)
    is_met, has_killed = sign.exists(), kill.how.startswith("KILL")
    if is_met and has_killed:
        for pid in group.pids if kill.how == "KILL all" else [group.pids[kill.rank]]:
            os.kill(pid, signal.SIGKILL)
    is_starting = is_met and kill.moment in ("start", "any")
    _wait(group.processes, ends_the_rest=is_starting)
    # A process that has ended leaves its pipe to its loader, which ends a little later.
    is_over = not any(process.is_alive() for process in group.processes)
    outcomes = group.outcomes(timeout_seconds=SECONDS_OF_LOADER if is_over else 0.1)
    failures = [str(told) for is_done, told in outcomes if not is_done]
    # At a signal before its handlers are there a process just ends.
    may_fail = is_met and (has_killed or kill.moment == "any")
    if failures and not may_fail:
        raise UnexpectedEndError(f"{kill}: " + "\n".join(failures))
    if not is_starting and any("gave no result" in told for told in failures):
        raise UnexpectedEndError(f"{kill}: a process did not end when its peer was killed")
    return is_met


def _wait(processes, *, ends_the_rest):
    """Until all have ended; or, where they may still wait for one another to start, as a launcher
    does: for a while after one was killed."""
    end = time.monotonic() + SECONDS_TO_END
    while any(each.is_alive() for each in processes) and time.monotonic() < end:
        if ends_the_rest and any((each.exitcode or 0) < 0 for each in processes):
            ends_the_rest, end = False, time.monotonic() + SECONDS_OF_LAUNCHER
        time.sleep(0.01)


def run_case(case, undisturbed, folder):
    """Runs a case to its end in a new folder; returns which kills were met."""
    met = [
        kill
        for world_size, strategy, kill in case.attempts
        if run_attempt(undisturbed.config_of(folder, strategy), world_size, kill)
    ]
    world_size, strategy = case.last
    ProcessGroup(world_size, train, undisturbed.config_of(folder, strategy)).results()
    return met


class Undisturbed:
    """Runs that nobody disturbs, each made when it is first asked for.

    Args:
        folder: for data and runs.
        write_data: function that writes the data of a new folder.
        config_of: function of (data, run folder, strategy).
    """

    def __init__(self, folder, *, write_data=write_toy_data, config_of=config_of):
        self.folder = folder
        self.data = folder / "data"
        write_data(self.data)
        self.config_of = partial(config_of, self.data)
        self._runs = {}

    def run_of(self, world_size, strategy):
        """Returns the folder of the run."""
        key = (world_size, strategy)
        if key not in self._runs:
            folder = self.folder / f"whole_{world_size}_{strategy}"
            ProcessGroup(world_size, train, self.config_of(folder, strategy)).results()
            self._runs[key] = folder
        return self._runs[key]


def first_state(config):
    """Returns {"<key>/<name>": values} of all parameters before the first step."""
    model = build_toy_model(config)
    return {f"{PARAMETER}/{name}": p.detach().flatten() for name, p in model.named_parameters()}


def final_state(folder, num_steps=NUM_STEPS):
    """Returns {"<key>/<name>": values} of all parameters and moments after the last step."""
    whole = open_checkpoint(str(folder / "checkpoints" / f"step_{num_steps:08d}"))
    sizes = {name: torch.Size(shape).numel() for name, shape in whole.record.shapes.items()}
    wanted = {
        f"{key}/{name}": size
        for name, size in sizes.items()
        for key in (PARAMETER, "exp_avg", "exp_avg_sq")
    }
    return read_whole(whole.location, whole.index, sizes=wanted)


def check_case(case, undisturbed, folder):
    """
    Returns:
        How far the parameters ended from those of one undisturbed process, as a share of the
        distance that they travelled.

    Raises:
        AssertionError: the run did not end as if it had never been disturbed.
    """
    rows, expected = (read_metrics(each) for each in (folder, undisturbed.run_of(*case.last)))
    told = [[(r["step"], r.get("data_digest")) for r in part] for part in (rows, expected)]
    assert told[0] == told[1], f"{case}: steps, validations or sample ids differ: {told}"
    assert read_attempts(folder)[-1].outcome == "finished", str(case)
    state = final_state(folder)
    if case.is_steady:
        same = final_state(undisturbed.run_of(*case.last))
        different = [name for name in same if not torch.equal(state[name], same[name])]
        assert not different, f"{case}: not bit-identical: {different}"
    alone = final_state(undisturbed.run_of(1, "ddp"))
    share = travelled_share(
        state, alone, first=first_state(undisturbed.config_of(undisturbed.folder, "ddp"))
    )
    assert share < 0.01, f"{case}: {share:.4f} of the distance travelled away"
    return share


def travelled_share(state, expected, *, first):
    """Computes the distance to a run's end as a fraction of the distance that the run travelled.

    Biases of keys are left out: their true gradient is zero.
    """
    names = [name for name in first if not name.endswith("in_proj_bias")]
    away = sum((state[name] - expected[name]).square().sum() for name in names).sqrt()
    travelled = sum((expected[name] - first[name]).square().sum() for name in names).sqrt()
    return (away / travelled).item()


def main(first_seed, num_cases):
    """Runs the command."""
    start = time.monotonic()
    met, shares, failures = Counter(), [], []
    with tempfile.TemporaryDirectory(prefix="isopair-soak-") as place:
        undisturbed = Undisturbed(Path(place))
        for seed in range(int(first_seed), int(first_seed) + int(num_cases)):
            case = case_of(seed)
            with tempfile.TemporaryDirectory(dir=place) as folder:
                try:
                    kills = run_case(case, undisturbed, Path(folder) / "run")
                    met.update(f"{kill.how} at {kill.moment}" for kill in kills)
                    shares.append(check_case(case, undisturbed, Path(folder) / "run"))
                except AssertionError as error:
                    failures.append(seed)
                    print(f"FAILED {case}\n{error}", flush=True)
    print(
        f"{num_cases} runs with {sum(met.values())} kills in {time.monotonic() - start:.0f} s: "
        f"{len(failures)} failed {failures or ''}\n"
        f"furthest from one undisturbed process: {max(shares, default=0):.2e} of the distance "
        "travelled"
    )
    for name, count in sorted(met.items()):
        print(f"  {count:3d}  {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
