"""Damage to the files of a run folder: named, and survived or refused in one sentence."""

import json
import os
import shutil

import pytest

from data_prep.config_file import read_yaml
from data_prep.errors import ConfigError
from data_prep.storage.sealed import (
    DamagedFileError,
    has_valid_seal,
    read_sealed_row,
    to_sealed_json,
)
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.store import store_of_run
from pretrain.data.batch import BadSample
from pretrain.requeue import main as requeue
from pretrain.run.attempts import parse_attempt, read_attempts, read_metrics
from pretrain.run.compatibility import RunIdentity, fingerprints_of_run, parse_fingerprints
from pretrain.run.end_causes import causes_of_end
from pretrain.run.folder import RunFolder, begin_attempt
from pretrain.run.fork import origin_of_checkpoints, parse_parent
from pretrain.run.requests import Request, RunRequests
from pretrain.run.status_file import parse_status, read_status_file
from pretrain.status import main as status
from pretrain.stored_config import read_config_of_run, read_values_of_run
from tests.support.damage import edits, outcomes_of, single_bit_flips, truncations
from tests.support.toy_run import toy_config
from tests.support.toy_state import ToyEngine, writer_of

FINGERPRINTS = {"image-text/colors": "0a" * 16, "validation/image-text": "b1" * 16}
PARENT = {
    "folder": "/runs/parent",
    "checkpoint": "/runs/parent/checkpoints/step_00000006",
    "step": 6,
    "model_sha256": "0123456789abcdef" * 4,
    "marks": ["forked"],
    "differs_in": {"optimizer.learning_rate": {"parent": 1e-3, "fork": 5e-4}},
}


@pytest.fixture
def identity(tmp_path):
    return RunIdentity(toy_config(tmp_path / "data", tmp_path / "run"), FINGERPRINTS)


@pytest.fixture
def folder(identity, monkeypatch):
    """Returns the folder of a run that was stopped after its third step, as the code writes it."""
    environment = {"python": "3.11", "git_commit": None, "packages": {"torch": "2"}}
    monkeypatch.setattr("pretrain.run.folder.describe_environment", lambda: environment)
    folder = identity.config.run.folder
    attempt = begin_attempt(identity, hosts=["node1", "node2"], num_micro_batches=1)
    run = RunFolder(folder, attempt, num_steps=6, is_writer=True)
    with run.recorded():
        run.begin_from(0, has_checkpoint=False)
        for step in (1, 2, 3):
            row = {"step": step, "samples_seen": 24 * step, "loss": {"image-text": 1 / step}}
            run.write_metrics(row | {"samples_per_second": 10.5, "data_wait_share": 0.1})
            bad = BadSample("colors", 0, step, "00000000.tar", 5, "not readable")
            run.write_bad_samples(step, [("image-text", bad)])
            run.num_steps_done = step
        origin = {"parent": PARENT}
        config = identity.config
        writer = writer_of(ToyEngine(), folder / "checkpoints", origin=origin, config=config)
        writer.save(RunState(3, 3))
        writer.finish()
        run.stop_cause = "SIGTERM"
    return folder


def parent_file(folder):
    path = folder / "parent.json"
    path.write_bytes(to_sealed_json(PARENT, indent=2))
    return path


# File of a run folder -> the function that reads its content.
READERS = {
    "attempts/0001.json": lambda content: parse_attempt(content, name="0001"),
    "status.json": parse_status,
    "parent.json": parse_parent,
    "environment.json": parse_fingerprints,
}


@pytest.mark.parametrize("name", READERS)
def test_no_damage_to_a_small_file_goes_unnoticed(folder, name):
    parent_file(folder)
    content = (folder / name).read_bytes()
    read = READERS[name]
    original = read(content)
    for damage in (single_bit_flips, truncations):
        for damaged, found in outcomes_of(read, damage(content), error=DamagedFileError):
            assert found == original, damaged
    for damaged, found in outcomes_of(read, edits(content), error=DamagedFileError):
        assert found == original or "sha256" not in json.loads(damaged), damaged


@pytest.mark.parametrize("name", READERS)
def test_files_of_earlier_versions_are_read_with_the_types_checked(folder, name):
    parent_file(folder)
    values = json.loads((folder / name).read_bytes())
    del values["sha256"]
    older = json.dumps(values).encode()
    read = READERS[name]
    assert read(older) == read((folder / name).read_bytes())
    for damage in (edits, truncations):  # whatever is read, it is no other error
        list(outcomes_of(read, damage(json.dumps(values).encode()), error=DamagedFileError))


@pytest.mark.parametrize("name", ["metrics", "bad_samples"])
def test_no_flipped_bit_of_a_row_goes_unnoticed(folder, name):
    content = (folder / name / "0001.jsonl").read_bytes()
    line = content.split(b"\n")[0]
    original = read_sealed_row(line)
    damaged = single_bit_flips(line)
    assert all(
        row == original for _, row in outcomes_of(read_sealed_row, damaged, error=DamagedFileError)
    )


def test_damaged_rows_are_named_and_left_out(folder, caplog):
    for name in ("metrics", "bad_samples"):
        path = folder / name / "0001.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 9') + b"\xff{\n")
        (folder / name / "copy of 0001.jsonl").write_text("not a row\n")
    assert [row["step"] for row in read_metrics(folder)] == [1, 3]
    read_metrics(folder)
    run = RunFolder(folder, read_attempts(folder)[0], num_steps=6, is_writer=True)
    assert [bad.ordinal for _, bad in run.read_bad_samples()] == [1, 3]
    for name in ("metrics", "bad_samples"):
        path = folder / name / "0001.jsonl"
        assert caplog.text.count(f"{path}:2: damaged: expected the recorded crc32 of the row") == 1
        assert caplog.text.count(f"{path}:4: damaged: expected JSON: 'utf-8' codec") == 1


@pytest.mark.parametrize(
    "row",
    [
        {"samples_per_second": 1.0},
        {"step": "7"},
        {"step": 7, "samples_per_second": 1.0},
        {"step": 7, "loss": 3},
        {"step": 7, "validation": {"image-text": 5}},
        [],
    ],
)
def test_rows_without_seal_are_checked(folder, caplog, row):
    with (folder / "metrics" / "0001.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert [each["step"] for each in read_metrics(folder)] == [1, 2, 3]
    assert "0001.jsonl:4: damaged: " in caplog.text
    assert status([str(folder)]) == 0


def test_a_damaged_attempt_is_named_and_left_out(folder, identity, caplog, capsys, monkeypatch):
    begin_attempt(identity, hosts=["node1"], num_micro_batches=1)
    path = folder / "attempts" / "0001.json"
    path.write_bytes(path.read_bytes().replace(b'"from_step": 0', b'"from_step": 1'))
    assert [each.attempt for each in read_attempts(folder)] == ["0002"]
    expected = f"{path}: damaged: expected the recorded sha256 of its content"
    assert caplog.text.count(expected) == 1
    third = begin_attempt(identity, hosts=["node1"], num_micro_batches=1)
    assert third.attempt == "0003"
    assert status([str(folder)]) == 0
    assert "attempts: 2" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["requeue", str(folder / "config.yaml")])
    assert requeue() == 0
    assert "requeued: attempt 0003: running" in capsys.readouterr().out


def test_a_damaged_status_is_named(folder, caplog, capsys):
    path = folder / "status.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_status_file(folder) == {}
    assert f"{path}: damaged: expected JSON: " in caplog.text
    assert status([str(folder)]) == 0
    assert "stopped: by SIGTERM" in capsys.readouterr().out


def test_damaged_fingerprints_are_refused_until_the_file_is_deleted(folder, identity, caplog):
    path = folder / "environment.json"
    path.write_bytes(path.read_bytes().replace(b"0a0a", b"0a0b"))
    expected = rf"{path}: damaged: expected the recorded sha256 .*; if .* same, delete this file"
    with pytest.raises(ConfigError, match=expected):
        identity.refuse_other_run()
    path.unlink()
    identity.refuse_other_run()
    assert f"{path}: missing: the data of this start is only compared" in caplog.text
    begin_attempt(identity, hosts=["node1"], num_micro_batches=1)
    assert fingerprints_of_run(folder) == FINGERPRINTS


def test_a_damaged_parent_is_taken_from_a_checkpoint(folder, caplog):
    path = parent_file(folder)
    expected = {"strategy": "ddp", "fingerprints": FINGERPRINTS, "parent": PARENT}
    assert origin_of_checkpoints(folder, strategy="ddp", fingerprints=FINGERPRINTS) == expected
    assert caplog.text == ""
    path.write_bytes(path.read_bytes().replace(b'"step": 6', b'"step": 7'))
    assert origin_of_checkpoints(folder, strategy="ddp", fingerprints=FINGERPRINTS) == expected
    assert f"{path}: damaged: " in caplog.text
    assert "it is taken from the record of a checkpoint" in caplog.text
    shutil.rmtree(folder / "checkpoints")
    assert origin_of_checkpoints(folder, strategy="ddp", fingerprints=FINGERPRINTS) == {
        "strategy": "ddp",
        "fingerprints": FINGERPRINTS,
    }


# ------------------------------------------------------------------------------------- config.yaml


def test_a_config_that_is_not_readable_is_refused_with_the_way_to_restore_it(
    folder, identity, capsys, monkeypatch
):
    path = folder / "config.yaml"
    (folder / "copy.yaml").write_bytes(path.read_bytes())
    copy = folder / "checkpoints" / "step_00000003" / "config.yaml"
    for content in (b"", path.read_bytes()[:70], b"\xff", b"run: 5\n", b"a: [1\nb: }\n"):
        path.write_bytes(content)
        expected = rf"config.yaml: .*; restore it: copy {copy} to {path}"
        for read in (identity.refuse_other_run, lambda: store_of_run(str(folder))):
            with pytest.raises(ConfigError, match=expected) as raised:
                read()
            assert "\n" not in str(raised.value)
        assert status([str(folder)]) == 1
        assert f"restore it: copy {copy}" in capsys.readouterr().err
        monkeypatch.setattr("sys.argv", ["requeue", str(folder / "copy.yaml")])
        assert requeue() == 2
    shutil.copy(folder / "copy.yaml", path)
    identity.refuse_other_run()


def test_a_config_whose_content_changed_is_named_and_compared(folder, identity, caplog):
    path = folder / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"log_every_steps: 1", b"log_every_steps: 3"))
    identity.refuse_other_run()  # logging may differ
    assert f"{path}: damaged: expected the sha256 in its first line" in caplog.text
    path.write_bytes(content.replace(b"\nseed: 0", b"\nseed: 1"))
    with pytest.raises(ConfigError, match=r"seed: 1 in the run folder, 0 in this config"):
        identity.refuse_other_run()
    path.write_bytes(content.split(b"\n", 1)[1])  # as earlier versions wrote it
    caplog.clear()
    identity.refuse_other_run()
    assert caplog.text == ""
    begin_attempt(identity, hosts=["node1"], num_micro_batches=1)
    assert path.read_bytes() == content
    assert has_valid_seal(content)


def test_no_flipped_bit_of_a_config_ends_in_another_error(folder, caplog):
    """Reads a part of the config, because YAML is slow; a test of seals covers the whole."""
    path = folder / "config.yaml"
    path.write_text("run: {folder: a, keep: 1e-3}\nengine: {}\n'b': [1, true]\n")
    original = read_values_of_run(folder)
    for damaged in single_bit_flips(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            read_values_of_run(folder)
        except ConfigError:
            continue
    path.write_text("run: {folder: a, keep: 1e-3}\nengine: {}\n'b': [1, true]\n")
    assert read_values_of_run(folder) == original


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("engine", "timeout_seconds", ".inf"),
        ("engine", "start_timeout_seconds", "soon"),
        ("schedule", "num_steps", "[1]"),
    ],
)
def test_status_refuses_numbers_that_are_none(tmp_path, capsys, section, key, value):
    (tmp_path / "config.yaml").write_text(f"{section}:\n  {key}: {value}\n")
    assert status([str(tmp_path)]) == 1
    assert f"{section}.{key}: expected a positive number, found" in capsys.readouterr().err


# ------------------------------------------------------------------------------ requests, failures


def test_a_request_that_cannot_be_deleted_is_acted_on_once_and_named(tmp_path, caplog):
    now = [0.0]
    (tmp_path / "SAVE").mkdir()
    (tmp_path / "STOP").mkdir()
    with RunRequests(tmp_path, clock=lambda: now[0]) as requests:
        now[0] += 10
        request = requests.all_reduce(device="cpu")
        assert (request.saves, request.stop_cause) == (True, "file STOP")
        requests.acknowledge(request)
        for name in ("SAVE", "STOP"):
            assert f"{tmp_path / name}: expected a file that can be deleted, found: " in caplog.text
        now[0] += 10
        assert requests.all_reduce(device="cpu") == Request()


def test_damaged_reports_of_failures_are_still_shown(folder):
    attempt = read_attempts(folder)[0]
    attempt.outcome = "failed: RunError()"
    reports = folder / "failures" / "0001"
    reports.mkdir(parents=True)
    (reports / "rank_00001.txt").write_bytes(b"2026 rank 1 on node\xff2: ValueError: x\n\ntrace")
    assert causes_of_end(folder, [attempt], 0) == ["rank 1 on node\ufffd2: ValueError: x"]
    (reports / "rank_00001.txt").unlink()
    (reports / "rank_00002.txt").mkdir()
    [cause] = causes_of_end(folder, [attempt], 0)
    assert cause == f"{reports / 'rank_00002.txt'}: cannot be read: {os.strerror(21)}"


def test_the_config_that_a_run_wrote_is_read_back(folder, identity):
    assert read_config_of_run(folder) == identity.config
    assert read_values_of_run(folder) == read_yaml(folder / "config.yaml")
