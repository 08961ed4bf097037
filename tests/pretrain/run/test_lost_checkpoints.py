"""Starts of a run whose checkpoints are elsewhere, gone or damaged."""

import logging
import shutil

import pytest

from data_prep.errors import ConfigError, InputError
from pretrain.checkpoints.store import open_store
from pretrain.run.attempts import claim_attempt, now, write_attempt
from pretrain.run.lost_checkpoints import refuse_other_checkpoints, refuse_restart
from pretrain.run.status_file import write_status_file
from pretrain.stored_config import write_config
from tests.support.toy_run import toy_config

ATTEMPT = {"world_size": 1, "strategy": "ddp", "num_micro_batches": 1, "hosts": ["here"]}


@pytest.fixture
def config(tmp_path):
    """Returns a config whose run folder says that the run has done 7 steps and saved none."""
    config = toy_config(tmp_path, tmp_path / "run")
    attempt = claim_attempt(tmp_path / "run", **ATTEMPT)
    attempt.from_step, attempt.to_step, attempt.outcome = 0, 7, "failed: RunError()"
    write_attempt(tmp_path / "run", attempt)
    write_config(tmp_path / "run", config)
    return config


def section(config, **changes):
    return config.run.model_copy(update=changes)


def save(place, *steps):
    for step in steps:
        (place / f"step_{step:08d}").mkdir(parents=True)


def resume_once(config, step):
    attempt = claim_attempt(config.run.folder, **ATTEMPT)
    attempt.from_step = step
    write_attempt(config.run.folder, attempt)


def write_status(config, *, attempt, step):
    values = {"state": "running", "attempt": attempt, "step": 7, "num_steps": 9}
    write_status_file(config.run.folder, values | {"last_checkpoint": step, "updated": now()})


def write_metrics(config, step):
    (config.run.folder / "metrics").mkdir()
    row = f'{{"step": 5, "saves": [{{"step": {step}}}]}}\n'
    (config.run.folder / "metrics" / "0001.jsonl").write_text(row)


def test_steps_that_were_never_saved_are_computed_again(config):
    refuse_other_checkpoints(config.run)
    refuse_restart(config.run)
    refuse_other_checkpoints(section(config, folder=config.run.folder / "new"))


@pytest.mark.parametrize("former", [None, "elsewhere"])
def test_a_changed_folder_without_the_checkpoints_is_refused(config, tmp_path, former):
    former = str(tmp_path / former) if former else None
    run = section(config, checkpoint_folder=former)
    write_config(run.folder, config.model_copy(update={"run": run}))
    place = former or f"{run.folder}/checkpoints"
    save(tmp_path / "elsewhere" if former else run.folder / "checkpoints", 2, 4)
    refuse_other_checkpoints(run)
    new = tmp_path / "new"
    changed = section(config, checkpoint_folder=str(new))
    for found in ("none", "step 2"):
        with pytest.raises(ConfigError) as raised:
            refuse_other_checkpoints(changed)
        assert str(raised.value) == (
            f"run.checkpoint_folder={new}: expected the checkpoints of this run up to step 4, "
            f"found {found}; they are in {place}: set run.checkpoint_folder={place}, or move its "
            f"step_* folders to {new}"
        )
        save(new, 2 if found == "none" else 4)
    refuse_other_checkpoints(changed)  # copied: both hold them


def test_moved_with_its_checkpoints_a_run_continues(config, tmp_path):
    save(config.run.folder / "checkpoints", 4)
    resume_once(config, 4)
    shutil.move(config.run.folder, tmp_path / "moved")
    refuse_other_checkpoints(section(config, folder=tmp_path / "moved"))
    shutil.move(tmp_path / "moved" / "checkpoints", tmp_path / "saved")
    moved = {"folder": tmp_path / "moved", "checkpoint_folder": str(tmp_path / "saved")}
    refuse_other_checkpoints(section(config, **moved))


@pytest.mark.parametrize(
    "record",
    [
        lambda config: resume_once(config, 5),
        lambda config: write_status(config, attempt="0001", step=5),
        lambda config: write_metrics(config, 5),
    ],
)
def test_a_run_whose_checkpoints_are_gone_never_begins_again_in_silence(config, record):
    record(config)
    for check in (refuse_other_checkpoints, refuse_restart):
        with pytest.raises(InputError, match=r"has saved one at step 5 .* delete .*run$"):
            check(config.run)


def test_what_a_superseded_attempt_saved_is_not_missed(config):
    write_status(config, attempt="0001", step=5)
    resume_once(config, 0)
    refuse_other_checkpoints(config.run)


def test_a_fork_that_has_saved_nothing_begins_from_its_parent(config, tmp_path, caplog):
    fork = section(config, parent=tmp_path / "parent")
    resume_once(config, 4)
    (fork.folder / "parent.json").write_text(
        '{"folder": "p", "checkpoint": "c", "step": 4, "model_sha256": "", "marks": [], '
        '"differs_in": {}}'
    )
    refuse_other_checkpoints(fork)
    resume_once(config, 6)
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="one at step 6"):
        refuse_other_checkpoints(fork)


def test_a_former_folder_that_cannot_be_read_does_not_stop_the_run(
    config, tmp_path, caplog, monkeypatch
):
    save(config.run.folder / "checkpoints", 4)
    shutil.copytree(config.run.folder / "checkpoints", tmp_path / "here")
    former = str(config.run.folder / "checkpoints")
    store_type = type(open_store(former))
    read = store_type.checkpoints

    def forbidden(store):
        if str(store.folder) == former:
            raise PermissionError(13, "Permission denied")
        return read(store)

    monkeypatch.setattr(store_type, "checkpoints", forbidden)
    refuse_other_checkpoints(section(config, checkpoint_folder=str(tmp_path / "here")))
    assert "cannot be read" in caplog.text
