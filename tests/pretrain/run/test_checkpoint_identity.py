"""Checkpoints of another run in the folder of a run's checkpoints."""

import json

import pytest

from data_prep.config_file import to_yaml
from data_prep.errors import ConfigError
from pretrain.checkpoints.record import RunState
from pretrain.config import PretrainConfig
from pretrain.run.checkpoint_identity import refuse_checkpoints_of_other_run
from pretrain.run.compatibility import RunIdentity
from pretrain.run.folder import begin_attempt
from tests.support.toy_run import toy_config
from tests.support.toy_state import ToyEngine, writer_of

FINGERPRINTS = {"image-text/colors": "aaaa", "model.text.tokenizer": "bbbb"}


@pytest.fixture
def config(tmp_path):
    return toy_config(tmp_path, tmp_path / "run", run={"checkpoint_folder": str(tmp_path / "all")})


def save(config, *steps, fingerprints=FINGERPRINTS):
    origin = {"strategy": "ddp"} | ({"fingerprints": fingerprints} if fingerprints else {})
    folder = config.run.checkpoints
    for step in steps:
        writer = writer_of(ToyEngine(), folder, config=config, origin=origin, keep_checkpoints=9)
        writer.save(RunState(step, step))
        writer.finish()


def refuse(config, fingerprints=FINGERPRINTS):
    refuse_checkpoints_of_other_run(RunIdentity(config, fingerprints))


def test_checkpoints_of_an_equal_run_are_used(config, tmp_path):
    refuse(config)  # none
    save(config, 3)
    refuse(config)
    free = {"folder": tmp_path / "new", "log_every_steps": 9}
    moved = config.run.model_copy(update=free)
    refuse(config.model_copy(update={"run": moved, "micro_batch_size": 5}))
    refuse(config, FINGERPRINTS | {"model.image.pretrained": "of a version that stored none"})


@pytest.mark.parametrize(
    ("changes", "fingerprints", "expected"),
    [
        ({"seed": 5}, {}, "seed: 0 in the checkpoint, 5 in this config"),
        ({}, {"image-text/colors": "c"}, "fingerprint.image-text/colors: 'aaaa' in the checkpoint"),
        ({}, {"model.text.tokenizer": "c"}, "fingerprint.model.text.tokenizer: 'bbbb' in the"),
    ],
)
def test_checkpoints_of_another_run_are_refused_before_anything_is_written(
    config, tmp_path, changes, fingerprints, expected
):
    save(config, 3)
    other = RunIdentity(config.model_copy(update=changes), FINGERPRINTS | fingerprints)
    with pytest.raises(ConfigError) as raised:
        begin_attempt(other, hosts=["here"], num_micro_batches=1)
    first, line, *_, last = str(raised.value).splitlines()
    location = tmp_path / "all" / "step_00000003"
    assert first == f"{location} is the checkpoint of a run that differs from this config:"
    assert line.strip().startswith(expected)
    assert last.startswith(f"set run.checkpoint_folder to another folder than {tmp_path / 'all'};")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_fingerprints_is_compared_by_its_config(config):
    save(config, 3, fingerprints=None)
    refuse(config, {"image-text/colors": "other"})
    with pytest.raises(ConfigError, match="seed: 0 in the checkpoint, 5 in this config"):
        refuse(config.model_copy(update={"seed": 5}))


def test_the_newest_readable_checkpoint_is_compared(config, tmp_path):
    save(config.model_copy(update={"seed": 5}), 3)
    save(config, 4)
    refuse(config)
    path = tmp_path / "all" / "step_00000004"
    for name in ("config.yaml", "checkpoint.json"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-2])
        with pytest.raises(ConfigError, match=r"step_00000003 is .*\n  seed: 5 in the checkpoint"):
            refuse(config)
        (path / name).write_bytes(content)
    (path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="step_00000003 is the checkpoint of a run that differs"):
        refuse(config)


def test_segments_that_begin_after_the_checkpoint_may_differ(config, tmp_path):
    colors = {"name": "colors", "dataset": str(tmp_path / "colors")}

    def with_segment(step):
        values = json.loads(config.model_dump_json())
        values["streams"]["image-text"]["segments"] = [{"from_step": step, "sources": [colors]}]
        return PretrainConfig.model_validate(values)

    save(with_segment(5), 5)
    for step, is_used in ((5, False), (6, False), (4, True)):
        if is_used:
            with pytest.raises(ConfigError, match=r"streams\.image-text\.segments"):
                refuse(with_segment(step))
        else:
            refuse(with_segment(step))


def test_entries_of_unfreeze_that_no_step_has_used_may_differ(config):
    def with_entries(*steps):
        entries = [{"from_step": step, "parameters": ["towers.text.*"]} for step in steps]
        values = json.loads(config.model_dump_json())
        values["optimizer"] |= {"frozen": ["towers.text.*"], "unfreeze": entries}
        return PretrainConfig.model_validate(values)

    save(with_entries(3, 5), 5)
    for steps in ((3,), (3, 5), (3, 6, 8)):
        refuse(with_entries(*steps))
    for steps in ((), (2,), (3, 4), (5,)):
        with pytest.raises(ConfigError, match=r"optimizer\.unfreeze.*in the checkpoint"):
            refuse(with_entries(*steps))


def test_a_config_of_another_version_is_named_with_its_checkpoint(config, tmp_path, monkeypatch):
    newer = to_yaml(config) + "new_key: 1\n"
    monkeypatch.setattr("tests.support.toy_state.to_yaml", lambda config: newer)
    save(config, 3)
    expected = f"{tmp_path / 'all' / 'step_00000003' / 'config.yaml'}: unknown key 'new_key'"
    with pytest.raises(ConfigError, match=expected):
        refuse(config)
