"""Runs of random configs give the result of one undisturbed process; `make soak` has more.

Every run has a new seed, which a failed test prints. To repeat it: python -m
tests.support.random_runs SEED 1, or set ISOPAIR_RANDOM_SEED to the seed of the first run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from data_prep.config_file import fixed_values
from pretrain.config import PretrainConfig
from tests.support.config_fields import fields_of, values_of
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import HOW
from tests.support.random_configs import (
    LEFT_OUT,
    LEFT_OUT_VALUES,
    REPEATABLE_MOMENTS,
    draw_run,
    merged,
)
from tests.support.random_runs import (
    assert_same_samples_and_losses,
    compare_parameters,
    draw_accepted_run,
    make_material,
    refusal_of,
    run_and_compare,
    train_from,
)
from tests.support.seeds import new_seed
from tests.support.toy_material import TEACHER_TEXTS, ToyMaterial, register_toy_clip

NUM_RUNS = 30
NUM_DRAWN = 200
NUM_VALIDATED = 80  # of them
FOLDER = Path("/runs/run")


@pytest.fixture(scope="module")
def drawn():
    return [draw_run(seed, ToyMaterial(Path("/material"))) for seed in range(NUM_DRAWN)]


@pytest.fixture(scope="module")
def configs(drawn):
    return [run.config_of(run.attempts[0], FOLDER) for run in drawn[:NUM_VALIDATED]]


@pytest.fixture(scope="module")
def values(configs):
    """Returns {field: repr of each value that it has in some config}."""
    found = {}
    for config in configs:
        for name, value in values_of(config):
            found.setdefault(name, set()).add(repr(value))
    return found


def is_left_out(name):
    return any(name == each or name.startswith(f"{each}.") for each in LEFT_OUT)


def test_every_setting_is_drawn_or_left_out_for_a_reason(values):
    names = set(fields_of(PretrainConfig))
    several = {name for name, found in values.items() if len(found) > 1}
    left_out = {name for name in names if is_left_out(name)}
    assert names - several - left_out == set(), "draw them in random_configs, or leave them out"
    assert several & left_out == set()
    for each in LEFT_OUT:
        assert any(name == each or name.startswith(f"{each}.") for name in names), each


def test_every_choice_of_a_setting_is_drawn_or_left_out_for_a_reason(values):
    for name, annotation in fields_of(PretrainConfig).items():
        if not is_left_out(name):
            choices = set(choices_of(annotation))
            missing = {each for each in choices if not any(repr(each) in v for v in values[name])}
            assert missing == set(LEFT_OUT_VALUES.get(name, ())), name


def choices_of(annotation):
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from choices_of(part)


def test_attempts_differ_in_free_settings_only(drawn):
    for run in drawn[:10]:
        fixed = fixed_values(run.config_alone(FOLDER))
        for attempt in run.attempts:
            assert fixed_values(run.config_of(attempt, FOLDER)) == fixed


def test_runs_are_of_every_kind(drawn):
    attempts = [attempt for run in drawn for attempt in run.attempts]
    kills = [attempt.kill for attempt in attempts if attempt.kill is not None]
    assert {kill.how for kill in kills} == set(HOW)
    assert {kill.moment for kill in kills} == set(REPEATABLE_MOMENTS)
    assert {attempt.world_size for attempt in attempts} == {1, 2, 3, 4}
    assert {len(run.attempts) for run in drawn} == {1, 2, 3}
    changes = [{each.world_size for each in run.attempts} for run in drawn]
    assert sum(len(sizes) > 1 for sizes in changes) > NUM_DRAWN / 4
    assert sum(bool(attempt.cached) for attempt in attempts) > len(attempts) / 6
    teachers = [
        Path(objective["teacher"]["checkpoint"]).name
        for run in drawn
        for stream in run.fixed["streams"].values()
        for objective in stream["objectives"].values()
        if "teacher" in objective
    ]
    assert set(teachers) == set(TEACHER_TEXTS)
    assert all(run.attempts[-1].kill is None for run in drawn)


def test_the_run_of_a_seed_is_always_the_same(drawn):
    assert draw_run(7, ToyMaterial(Path("/material"))) == drawn[7]
    assert draw_run(7, ToyMaterial(Path("/material")), redraw=1) != drawn[7]


# ------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    material = make_material(tmp_path_factory.mktemp("material") / "material")
    register_toy_clip(material.folder)
    return material


@pytest.mark.slow
def test_every_tower_is_accepted(material, tmp_path):
    runs = {}
    for seed in range(NUM_DRAWN):
        run = draw_run(seed, material)
        if any(each.get("require") == "all" for each in run.fixed["streams"].values()):
            continue  # refused if no sample of a source has all modalities
        for kind, tower in run.fixed["model"].items():
            if kind in ("image", "audio", "text"):
                options = tower.get("options", {})
                drops = any(value for key, value in options.items() if "drop" in key)
                runs.setdefault((kind, tower.get("name"), drops, tuple(sorted(options))), run)
    for tower, run in runs.items():
        assert refusal_of(replace(run, attempts=()), tmp_path / "run") is None, tower


@pytest.mark.slow
def test_the_comparison_finds_other_samples_losses_and_parameters(material, tmp_path):
    run, _ = draw_accepted_run(1, material, tmp_path / "run")
    changes = {
        "data_digest": {"seed": run.fixed["seed"] ^ 1},
        "loss|validation": {"optimizer": {"betas": (0.1, 0.5)}},
    }
    configs = {"alone": run.config_alone(tmp_path / "alone")}
    for name, change in changes.items():
        other = replace(run, fixed=merged(run.fixed, change))
        configs[name] = other.config_alone(tmp_path / name.partition("|")[0])
    for config in configs.values():
        run_in_processes(1, train_from, material.folder, config)
    for name in changes:
        with pytest.raises(AssertionError, match=rf"step \d+: ({name}): "):
            assert_same_samples_and_losses(configs[name].run.folder, tmp_path / "alone")
        with pytest.raises(AssertionError, match=r"\w+: .* apart after a way of "):
            compare_parameters(configs["alone"], drawn=configs[name])


# Two groups, so that two workers share the file.
NUMBERS = [
    pytest.param(number, marks=[pytest.mark.slow, pytest.mark.xdist_group(f"random {number % 2}")])
    for number in range(NUM_RUNS)
]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_random_run_ends_like_one_undisturbed_process(material, tmp_path, number):
    seed = new_seed(number)
    run, _ = draw_accepted_run(seed, material, tmp_path / "run")
    print(run)
    run_and_compare(run, material, tmp_path)
