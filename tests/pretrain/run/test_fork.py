"""Runs that begin from another run's state."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch

from data_prep.config_file import read_config, to_yaml
from data_prep.errors import InputError
from data_prep.storage.sealed import to_sealed_json
from pretrain.checkpoint import read_model_state
from pretrain.checkpoints.record import read_record
from pretrain.checkpoints.store import write_file
from pretrain.config import Fork, PretrainConfig
from pretrain.run.attempts import read_attempts
from pretrain.run.fork import check_start, config_of_fork, first_step_of_fork, parse_parent
from tests.pretrain.test_train import steps_of, train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config


def small_config(data, folder, **sections):
    """Returns a config with images alone."""
    values = toy_config(data, folder).model_dump(exclude_unset=True)
    del values["streams"]["audio-text"], values["model"]["audio"], values["audio"]
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
    """Returns the folder of a run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    run = {"checkpoint_every_steps": 2, "keep_checkpoints": 9}
    run_in_processes(1, train, small_config(toy_data, folder, run=run))
    return folder


def put_config(checkpoint, config):
    """Replaces the config of a checkpoint, as if a run of that config had written it."""
    record = read_record(checkpoint)
    written = write_file(str(checkpoint), "config.yaml", lambda: [to_yaml(config).encode()])
    record = replace(record, files={**record.files, "config.yaml": written})
    (checkpoint / "checkpoint.json").write_bytes(record.to_json())


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
    put_config(tmp_path / "plain" / "checkpoints" / "step_00000006", plain)
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


TEXT = ["towers.text.*"]


def opening(step):
    """Returns a section of an optimizer that trains the text tower from a step on."""
    return {"frozen": TEXT, "unfreeze": [{"from_step": step, "parameters": TEXT}]}


@pytest.mark.slow
def test_forks_open_parameters_from_their_first_step_on(toy_data, parent, tmp_path):
    def fork(name, optimizer, *, of=parent, step=4, **start):
        run = {"parent": of, "folder": tmp_path / name, "fork": {"step": step} | start}
        return small_config(
            toy_data, tmp_path, optimizer=optimizer, run=run, schedule={"num_steps": 8}
        )

    later, past = fork("later", opening(6)), fork("past", opening(3))
    restarted = fork("restarted", opening(1), schedule="restart")
    stopping = restarted.run.model_copy(update={"stop_after_step": 2})
    closed = fork("closed", {"frozen": TEXT})
    forks = [later, past, restarted.model_copy(update={"run": stopping}), closed]
    longer = later.schedule.model_copy(update={"num_steps": 10})
    trained = fork("trained", {}, of=closed.run.folder, step=None)
    forks.append(trained.model_copy(update={"schedule": longer}))
    [outcomes] = run_in_processes(1, train_each, *forks)
    assert [outcome is None for outcome in outcomes] == [True, False, True, True, False]
    expected = "before step 4, at which the fork begins, expected the entries of"
    assert expected in outcomes[1]
    assert "(none), found {from_step: 3, ...}" in outcomes[1]
    assert not past.run.folder.exists()
    assert "expected optimizer moments for every parameter that this run trains" in outcomes[4]
    assert "optimizer.unfreeze" in outcomes[4]
    ends = [read_model_state(c.run.folder / "checkpoints/step_00000008") for c in (later, closed)]
    start = read_model_state(parent / "checkpoints/step_00000004")
    moved = [
        {name for name, value in end.items() if not torch.equal(value, start[name])} for end in ends
    ]
    of_text = {name for name in start if name.startswith("towers.text.")}
    assert moved[0] >= of_text
    assert not moved[1] & of_text


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
        f"{parent} (run.fork, run.parent) and continues its count; set schedule.num_steps above 6, "
        "or run.fork.schedule=restart to begin at step 0 with the parent's weights"
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


# ------------------------------------------------------------------------- from an earlier step


def states_of(*folders, step):
    return [read_model_state(each / "checkpoints" / f"step_{step:08d}") for each in folders]


def test_a_fork_from_an_earlier_step_equals_a_run_that_has_only_this_checkpoint(
    toy_data, parent, tmp_path
):
    before = contents(parent)
    changes = {"optimizer": {"learning_rate": 5e-4}}  # the six steps are enough
    fork = small_config(toy_data, parent, **changes, run={"fork": {"step": 4}})
    plain = small_config(toy_data, tmp_path / "plain", **changes)
    (tmp_path / "plain" / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        parent / "checkpoints" / "step_00000004",
        tmp_path / "plain" / "checkpoints" / "step_00000004",
    )
    put_config(tmp_path / "plain" / "checkpoints" / "step_00000004", plain)
    stopping = fork.model_copy(update={"run": fork.run.model_copy(update={"stop_after_step": 5})})
    assert run_in_processes(1, train_each, stopping, fork, plain) == [[None] * 3]
    assert contents(parent) == before
    folder = config_of_fork(fork).run.folder
    assert [(each.from_step, each.to_step) for each in read_attempts(folder)] == [(4, 5), (5, 6)]
    assert json.loads((folder / "parent.json").read_text())["step"] == 4
    forked, expected = states_of(folder, plain.run.folder, step=6)
    assert all(torch.equal(forked[name], expected[name]) for name in expected)
    own = read_config(PretrainConfig, folder / "config.yaml")
    assert (own.run.start, own.run.parent) == (Fork(step=4), parent)


def test_a_step_without_a_valid_checkpoint_is_refused_with_those_that_exist(
    toy_data, parent, tmp_path
):
    damaged = shutil.copytree(parent, tmp_path / "run")
    flipped = damaged / "checkpoints" / "step_00000004" / "checkpoint.json"
    flipped.write_bytes(flipped.read_bytes().replace(b'"step": 4', b'"step": 5'))
    of_model = next((damaged / "checkpoints" / "step_00000006").glob("model-*"))
    of_model.write_bytes(bytes(of_model.stat().st_size))
    cases = {
        3: "step, found none; use one of the steps 2, 4, 6",
        0: "step, found none; use one of the steps 2, 4, 6",
        4: "step, found a damaged one; use one of the steps 2, 6",
        6: "step, found a damaged one; use one of the steps 2, 4",  # found when it is read
    }
    configs = [
        small_config(
            toy_data, damaged, schedule={"num_steps": 9}, run={"fork": {"step": step}}, seed=5
        )
        for step in cases
    ]
    same = small_config(toy_data, parent, run={"fork": {"step": 2}})
    [[*outcomes, of_same]] = run_in_processes(1, train_each, *configs, same)
    assert "holds this same run" in of_same
    for (step, expected), outcome in zip(cases.items(), outcomes, strict=True):
        assert f"run.fork.step={step}: expected a valid checkpoint of {damaged}" in str(outcome)
        assert expected in str(outcome)
    for config in configs[:3]:
        assert not config_of_fork(config).run.folder.exists()
        with pytest.raises(InputError, match=r"run\.fork\.step=\d: expected a valid checkpoint"):
            check_start(config_of_fork(config))  # as the dry run does
    ended = small_config(toy_data, parent, seed=5, run={"fork": {"step": 6}})
    with pytest.raises(InputError, match=r"leaves nothing.*run\.fork\.schedule=restart"):
        check_start(config_of_fork(ended))


def test_each_way_to_start_has_a_folder_of_its_own_and_the_default_is_that_of_true(tmp_path):
    starts = [True, {"step": 3}, {"step": 4}, {"schedule": "restart"}]
    starts += [{"step": 3, "schedule": "restart"}]
    configs = [small_config(tmp_path, tmp_path / "run", run={"fork": start}) for start in starts]
    folders = [config_of_fork(each).run.folder.name for each in configs]
    assert len(set(folders)) == len(starts)
    for start in ({}, {"step": None}, {"schedule": "continue"}):
        config = config_of_fork(small_config(tmp_path, tmp_path / "run", run={"fork": start}))
        assert (config.run.folder.name, config.run.fork) == (folders[0], False)
    for config in map(config_of_fork, configs):
        assert config_of_fork(config) == config  # a fork's own config is that of a run
        assert PretrainConfig.model_validate(config.model_dump()) == config


def test_an_existing_fork_is_not_resumed_as_one_from_another_step(parent, tmp_path):
    def config(**start):
        run = {"parent": parent, "fork": start}
        return small_config(tmp_path, tmp_path / "fork", seed=5, run=run)

    check_start(config(step=4))
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "config.yaml").write_text(to_yaml(config(step=4)))
    check_start(config(step=4))
    for other in ({}, {"step": 2}, {"step": 4, "schedule": "restart"}):
        with pytest.raises(
            InputError, match=r"created with run\.fork\.step=4 and .*continue, found"
        ):
            check_start(config(**other))


def test_the_first_step_of_a_fork_is_zero_if_its_schedule_was_restarted():
    parent = {"folder": "p", "checkpoint": "c", "step": 4, "model_sha256": "", "marks": []}
    parent["differs_in"] = {}
    content = json.dumps(parent).encode()  # of an earlier version
    assert first_step_of_fork(parse_parent(content)) == 4
    for schedule, expected in (("continue", 4), ("restart", 0)):
        content = to_sealed_json(parent | {"schedule": schedule}, indent=2)
        assert first_step_of_fork(parse_parent(content)) == expected


# ---------------------------------------------------------------------- with the schedule restarted


def train_restarted(forks, checkpoint, plain):
    """Trains forks, and then a new run, if any, with the weights of a checkpoint."""
    from pretrain import train as train_module

    outcomes = train_each(*forks)
    assert outcomes == [None] * len(forks), outcomes
    if plain is None:
        return
    build = train_module.build_training_model

    def build_with_weights(*arguments, **settings):
        model = build(*arguments, **settings)
        model.load_state_dict(read_model_state(checkpoint))
        return model

    train_module.build_training_model = build_with_weights
    try:
        train(plain)
    finally:
        train_module.build_training_model = build


@pytest.mark.parametrize(
    ("strategy", "num_processes"),
    [("ddp", 1), pytest.param("zero3", 2, marks=pytest.mark.slow)],
)
def test_a_restarted_schedule_equals_a_new_run_with_the_parents_weights(
    toy_data, parent, tmp_path, strategy, num_processes
):
    engine = {"strategy": strategy}
    folder = tmp_path / "fork"
    run = {"parent": parent, "fork": {"step": 4, "schedule": "restart"}}
    fork = small_config(toy_data, folder, run=run, engine=engine)  # no other difference
    stopping = fork.run.model_copy(update={"stop_after_step": 3})
    plain = small_config(toy_data, tmp_path / "plain", engine=engine)
    stopped = fork.model_copy(update={"run": stopping})
    checkpoint = parent / "checkpoints" / "step_00000004"
    jobs = [([stopped, fork], plain)]
    if strategy != "ddp":  # DeepSpeed runs once in a process
        jobs = [([stopped], None), ([fork], None), ([], plain)]
    for forks, new in jobs:
        run_in_processes(num_processes, train_restarted, forks, checkpoint, new)
    assert [(a.from_step, a.to_step) for a in read_attempts(folder)] == [(0, 3), (3, 6)]
    # The first state is saved: from then on the fork does not need its parent.
    assert (folder / "checkpoints" / "step_00000000").exists()
    shown = ("step", "learning_rate", "loss", "sample_digest")
    rows, expected_rows = (
        [[row.get(key) for key in shown] for row in steps_of(each)]
        for each in (folder, plain.run.folder)
    )
    assert rows == expected_rows
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6]
    forked, expected = states_of(folder, plain.run.folder, step=6)
    assert all(torch.equal(forked[name], expected[name]) for name in expected)
    told = json.loads((folder / "parent.json").read_text())
    assert (told["step"], told["schedule"], told["differs_in"]) == (4, "restart", {})
    state = read_record(folder / "checkpoints" / "step_00000006").state
    assert (state.step, state.num_updates, state.skipped_steps) == (6, 6, ())
