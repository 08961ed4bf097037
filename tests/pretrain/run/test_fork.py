"""Runs that begin from another run's state."""

import hashlib
import json
import shutil

import pytest
import torch

from data_prep.config_file import read_config, to_yaml
from pretrain.checkpoint import read_model_state
from pretrain.checkpoints.record import read_record
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts
from pretrain.run.fork import config_of_fork
from tests.pretrain.test_train import steps_of, train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config


def small_config(data, folder, **sections):
    """Returns a config with images alone."""
    values = toy_config(data, folder).model_dump(exclude_unset=True)
    del values["pairings"]["audio-text"], values["model"]["audio"], values["audio"]
    for section, changes in sections.items():
        values[section] = values[section] | changes if isinstance(changes, dict) else changes
    return PretrainConfig.model_validate(values)


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def parent(toy_data, tmp_path_factory):
    """Returns the folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    run_in_processes(1, train, small_config(toy_data, folder))
    return folder


def train_each(*configs):
    """Returns the error of each run, or None, all in one process."""
    outcomes = []
    for config in configs:
        try:
            train(config)
        except Exception as error:
            outcomes.append(str(error))
        else:
            outcomes.append(None)
    return outcomes


CHANGES = {"optimizer": {"learning_rate": 5e-4}, "schedule": {"num_steps": 12}}


def test_a_fork_goes_on_from_the_parents_state_and_the_same_command_goes_on_with_it(
    toy_data, parent, tmp_path
):
    before = contents(parent)
    run = {"fork": True, "folder": parent, "keep_checkpoints": 9}
    config = small_config(toy_data, parent, **CHANGES, run=run)
    stopping = config.run.model_copy(update={"stop_after_step": 9})
    # The obvious way: a copy of the parent's checkpoint in a new folder of the same config.
    plain = small_config(toy_data, tmp_path / "plain", **CHANGES)
    shutil.copytree(parent / "checkpoints", tmp_path / "plain" / "checkpoints")
    outcomes = run_in_processes(
        1, train_each, config.model_copy(update={"run": stopping}), config, plain
    )
    assert outcomes == [[None] * 3]
    assert contents(parent) == before
    [folder] = parent.parent.glob("run_fork_*")
    assert folder == config_of_fork(config).run.folder
    attempts = read_attempts(folder)
    assert [(each.from_step, each.to_step) for each in attempts] == [(6, 9), (9, 12)]
    assert all(each.tags == ["forked"] for each in attempts)
    assert [row["step"] for row in steps_of(folder)] == list(range(7, 13))
    told = json.loads((folder / "parent.json").read_text())
    del told["sha256"]
    assert (told["folder"], told["step"]) == (str(parent), 6)
    assert told["differs_in"] == {
        "optimizer.learning_rate": {"parent": 1e-3, "fork": 5e-4},
        "schedule.num_steps": {"parent": 6, "fork": 12},
    }
    steps = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in steps] == [f"step_{step:08d}" for step in (6, 9, 12)]
    assert all(read_record(path).written_by["parent"] == told for path in steps)
    forked, expected = (
        read_model_state(each / "checkpoints" / "step_00000012")
        for each in (folder, plain.run.folder)
    )
    assert all(torch.equal(forked[name], expected[name]) for name in expected)
    # It is a run like any other: its own config goes on with it, and it can be forked.
    own = read_config(PretrainConfig, folder / "config.yaml")
    assert (own.run.fork, own.run.parent) == (False, parent)
    again = {"fork": True, "folder": folder}
    grandchild = small_config(toy_data, folder, schedule={"num_steps": 13}, run=again)
    assert run_in_processes(1, train_each, own, grandchild) == [[None, None]]
    [attempt] = read_attempts(config_of_fork(grandchild).run.folder)
    assert (attempt.from_step, attempt.to_step) == (12, 13)


def test_what_cannot_be_forked_is_refused(toy_data, parent, tmp_path):
    run = {"fork": True, "folder": parent}
    cases = {
        "holds this same run": small_config(toy_data, parent, run=run),
        "found no config.yaml there": small_config(
            toy_data, tmp_path, run=run | {"folder": tmp_path / "nothing"}
        ),
        "image.projection.weight: (16, 64) in the checkpoint, (24, 64) in the model": small_config(
            toy_data, parent, run=run, model={"embed_dim": 24}, schedule={"num_steps": 7}
        ),
    }
    [outcomes] = run_in_processes(1, train_each, *cases.values())
    for expected, outcome in zip(cases, outcomes, strict=True):
        assert expected in str(outcome), outcome


@pytest.mark.parametrize("num_steps", [2, 5, 6])
def test_a_fork_that_would_train_nothing_is_refused_before_its_folder_appears(
    toy_data, parent, tmp_path, num_steps
):
    before = contents(parent)
    schedule = {"num_steps": num_steps, "warmup_steps": 0}
    by_fork = small_config(toy_data, parent, schedule=schedule, run={"fork": True})
    by_parent = small_config(
        toy_data, tmp_path / "named", schedule=schedule, run={"parent": parent}
    )
    expected = (
        f"schedule.num_steps={num_steps} leaves nothing to train: the fork begins at step 6 of "
        f"{parent} (run.fork, run.parent) and continues its count; set schedule.num_steps above 6"
    )
    outcomes = run_in_processes(1, train_each, by_fork, by_parent)
    assert outcomes == [[expected, expected]]
    assert contents(parent) == before
    assert not (config_of_fork(by_fork).run.folder / "config.yaml").exists()
    # The remedy: nothing is in the way.
    longer = small_config(
        toy_data, tmp_path / "named", schedule=schedule | {"num_steps": 7}, run={"parent": parent}
    )
    assert run_in_processes(1, train_each, longer) == [[None]]
    [attempt] = read_attempts(tmp_path / "named")
    assert (attempt.from_step, attempt.to_step) == (6, 7)


def test_a_fork_whose_parent_has_trained_on_meanwhile_is_refused(toy_data, parent, tmp_path):
    """The fork was created, and ended before its first checkpoint."""
    config = small_config(
        toy_data, tmp_path / "fork", schedule={"num_steps": 6}, run={"parent": tmp_path / "run"}
    )
    shutil.copytree(parent, tmp_path / "run")
    changed = config.model_copy(update={"seed": 5})
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "config.yaml").write_text(to_yaml(changed))
    shutil.copy(parent / "environment.json", tmp_path / "fork")
    [[outcome]] = run_in_processes(1, train_each, changed)
    assert "leaves nothing to train: the fork begins at step 6" in outcome
