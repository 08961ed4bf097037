"""Runs of random configs, killed and resumed elsewhere, compared with one undisturbed process.

    python -m tests.support.random_runs FIRST_SEED NUM_RUNS     also: make soak

Every run is a function of its seed (see `random_configs`). It must train on the same samples as one
process with one micro-batch a step, with the same losses, and end with the same parameters. Prints
one line per failed run, with its seed, and a summary.
"""

import contextlib
import io
import math
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import InputError
from pretrain.checkpoint import find_checkpoint, read_model_state
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts, read_metrics, read_rows
from tests.support.gloo_processes import ProcessGroup
from tests.support.killed_runs import Kill, run_attempt, train, train_until
from tests.support.random_configs import Attempt, RandomRun, draw_run
from tests.support.toy_material import (
    TEACHER_TEXTS,
    ToyMaterial,
    register_toy_clip,
    write_material,
)
from tests.support.toy_towers import build_toy_model

MOST_REDRAWS = 10
LOSS_TOLERANCE = 1e-4  # relative
WAY_TOLERANCE = 1e-3  # of the distance that a parameter travels
ROUNDING = 1e-6  # distance of parameters that hardly travel
# Key of a metrics row -> tolerances of its numbers, relative and absolute; None if they are equal
TOLERANCES = {
    "samples_seen": None,
    "data_digest": None,
    "epochs_seen": None,
    "learning_rate": None,
    "loss": (LOSS_TOLERANCE, 1e-6),
    "validation": (LOSS_TOLERANCE, 1e-6),
    "logit_scale": (LOSS_TOLERANCE, 0),
    "logit_bias": (LOSS_TOLERANCE, 0),
    "grad_norm": (10 * LOSS_TOLERANCE, 1e-5),
}


# ------------------------------------------------------------------------- in the processes


def train_from(registry: Path, config: PretrainConfig) -> None:
    """Trains with a folder of open_clip's model configs."""
    register_toy_clip(registry)
    train(config)


def train_from_until(registry: Path, config: PretrainConfig, kill: Kill, sign: Path) -> None:
    """Trains with a folder of open_clip's model configs, until a kill."""
    register_toy_clip(registry)
    train_until(config, kill, sign)


# ------------------------------------------------------------------------- outside of them


def make_material(folder: Path) -> ToyMaterial:
    """Writes all files that random configs name, with trained teachers."""
    material = write_material(folder)
    for name in TEACHER_TEXTS:
        ProcessGroup(1, train, material.teacher_config(name)).results()
    return material


def draw_accepted_run(seed: int, material: ToyMaterial, folder: Path) -> tuple[RandomRun, int]:
    """Draws the run of a seed again until all its configs pass --dry-run.

    Returns:
        (the run, the number of runs that were refused before it)

    Raises:
        AssertionError: if MOST_REDRAWS runs are refused; the message holds the reasons.
    """
    refusals = []
    for redraw in range(MOST_REDRAWS):
        run = draw_run(seed, material, redraw=redraw)
        refusal = refusal_of(run, folder)
        if refusal is None:
            return run, redraw
        refusals.append(refusal)
    raise AssertionError(f"seed {seed}: no drawn config was accepted:\n" + "\n".join(refusals))


def refusal_of(run: RandomRun, folder: Path) -> str | None:
    """Returns why --dry-run refuses a config of a run; None if it accepts all."""
    from pretrain.train import dry_run

    configs = [run.config_alone(folder)]
    configs += [run.config_of(attempt, folder) for attempt in run.attempts]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for config in configs:
                dry_run(config)
    except InputError as error:
        return str(error)
    return None


def run_and_compare(run: RandomRun, material: ToyMaterial, folder: Path) -> float:
    """Runs all attempts and one undisturbed process, and compares them.

    Returns:
        The distance between the parameters, as a fraction of the distance that they travelled.

    Raises:
        AssertionError: if the results differ, or an attempt fails.
    """
    alone, drawn = folder / "alone", folder / "run"
    config = run.config_alone(alone)
    ProcessGroup(1, train_from, material.folder, config).results()
    for attempt in run.attempts:
        start(attempt, run.config_of(attempt, drawn), material)
    assert_same_samples_and_losses(drawn, alone)
    assert read_bad_samples(drawn) == read_bad_samples(alone)
    assert read_attempts(drawn)[-1].outcome == "finished"
    return compare_parameters(config, drawn=run.config_of(run.attempts[-1], drawn))


def start(attempt: Attempt, config: PretrainConfig, material: ToyMaterial) -> bool:
    """Runs one attempt to its end; returns whether it was killed."""
    if attempt.kill is None:
        ProcessGroup(attempt.world_size, train_from, material.folder, config).results()
        return False
    target = partial(train_from_until, material.folder)
    return run_attempt(config, attempt.world_size, attempt.kill, target=target)


# ----------------------------------------------------------------------------- comparison


def assert_same_samples_and_losses(folder: Path, alone: Path) -> None:
    """Compares the metrics of all steps and validations that both runs report.

    Args:
        folder: run folder.
        alone: run folder of one undisturbed process, which reports every step.
    """
    rows, expected = rows_of(folder), rows_of(alone)
    steps = [step for step, is_validation in expected if not is_validation]
    assert steps == list(range(1, steps[-1] + 1))
    reported = {step for step, is_validation in rows if not is_validation}
    assert reported >= {*steps[1::2], steps[-1]}, f"steps {sorted(reported)} of {steps[-1]}"
    for key in sorted(rows):
        for name in (each for each in TOLERANCES if each in expected[key]):
            found, truth = rows[key][name], expected[key][name]
            assert is_close(name, found, truth), f"step {key[0]}: {name}: {found}, alone {truth}"


def is_close(name: str, found: Any, truth: Any) -> bool:
    """Returns whether two values of a metrics row are equal to within TOLERANCES."""
    if TOLERANCES[name] is None:
        return found == truth
    relative, absolute = TOLERANCES[name]
    return found == pytest.approx(truth, rel=relative, abs=absolute)


def rows_of(folder: Path) -> dict[tuple[int, bool], dict]:
    """Reads the metrics as {(step, whether it is a validation): row}."""
    rows = {}
    for row in read_metrics(folder):
        losses = {name: each["loss"] for name, each in row.get("validation", {}).items()}
        rows[row["step"], "validation" in row] = row | {"validation": losses}
    return rows


def read_bad_samples(folder: Path) -> set[tuple]:
    """Reads which samples were substituted, at which steps, and by which."""
    keys = ("step", "stream", "source", "ordinal", "substitute")
    paths = (folder / "bad_samples").glob("*.jsonl")
    return {tuple(row.get(key) for key in keys) for path in paths for row in read_rows(path)}


def compare_parameters(alone: PretrainConfig, *, drawn: PretrainConfig) -> float:
    """Computes the distance of final parameters as a fraction of the way from the first ones.

    Raises:
        AssertionError: if the fraction exceeds WAY_TOLERANCE.
    """
    first = build_toy_model(alone).state_dict()
    ends = [read_model_state(find_checkpoint(config.run.folder)) for config in (alone, drawn)]
    away = {name: (ends[1][name] - end).norm().item() for name, end in ends[0].items()}
    way = {name: (end - first[name]).norm().item() for name, end in ends[0].items()}
    for name, length in way.items():
        limit = WAY_TOLERANCE * length + ROUNDING
        assert away[name] <= limit, f"{name}: {away[name]:.3g} apart after a way of {length:.3g}"
    return math.hypot(*away.values()) / math.hypot(*way.values())


def main(first_seed: str, num_runs: str) -> int:
    """Runs the command."""
    began = time.monotonic()
    ways, failed, num_redraws = [], [], 0
    with tempfile.TemporaryDirectory(prefix="isopair-random-") as place:
        material = make_material(Path(place) / "material")
        register_toy_clip(material.folder)
        for seed in range(int(first_seed), int(first_seed) + int(num_runs)):
            folder = Path(place) / str(seed)
            folder.mkdir()
            run = None
            try:
                run, num_refused = draw_accepted_run(seed, material, folder / "run")
                num_redraws += num_refused
                ways.append(run_and_compare(run, material, folder))
            except AssertionError as error:
                failed.append(seed)
                print(f"FAILED {run or seed}\n{error}", flush=True)
            shutil.rmtree(folder)
    print(
        f"{num_runs} runs in {time.monotonic() - began:.0f} s, {num_redraws} refused configs: "
        f"{len(failed)} failed {failed or ''}\n"
        f"furthest from one undisturbed process: {max(ways, default=0):.2e} of the way"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
