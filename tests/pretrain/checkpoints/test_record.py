"""Damage to checkpoint.json: each is detected, none is read as another state."""

import json
import shutil

import pytest

from data_prep.errors import InputError
from data_prep.storage.sealed import to_sealed_json
from pretrain.checkpoint import newest_checkpoint, open_checkpoint
from pretrain.checkpoints.record import RunState, parse_record, read_record
from pretrain.checkpoints.store import DamagedCheckpointError, open_store
from tests.support.damage import edits, outcomes_of, single_bit_flips, truncations
from tests.support.toy_state import ToyEngine, as_version_2, writer_of

STATE = RunState(10, 8, skipped_steps=(3, 4), tags=("forked",))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    writer = writer_of(ToyEngine(), folder)
    writer.save(STATE)
    writer.finish()
    return folder / "step_00000010"


@pytest.fixture(scope="module")
def content(checkpoint):
    return (checkpoint / "checkpoint.json").read_bytes()


def parse(content):
    return parse_record(content, location="run/checkpoints/step_00000010")


def read_as_another(content, damaged):
    """Returns each damaged content that is neither refused nor read as the original."""
    original = parse(content)
    outcomes = outcomes_of(parse, damaged, error=DamagedCheckpointError)
    return [each for each, record in outcomes if record != original]


@pytest.mark.parametrize("damage", [single_bit_flips, truncations, edits])
def test_no_damage_to_a_record_goes_unnoticed(content, damage):
    assert parse(content).state == STATE
    assert read_as_another(content, damage(content)) == []


def test_no_flipped_bit_turns_a_record_into_one_without_a_checksum(content):
    claims_version_2 = content.replace(b'"format_version": 3', b'"format_version": 2')
    twice_flipped = single_bit_flips(claims_version_2)
    readable = [each for each, _ in outcomes_of(parse, twice_flipped, error=DamagedCheckpointError)]
    assert readable == [content]  # flipped back
    older = as_version_2(content)
    for flipped in single_bit_flips(b'"format_version": 2'):
        with pytest.raises(DamagedCheckpointError):
            parse(older.replace(b'"format_version": 2', flipped))


def test_a_record_of_version_2_is_read_with_all_checks_that_it_allows(
    content, checkpoint, tmp_path
):
    older = as_version_2(content)
    state = parse(older).state
    assert state == STATE
    # It holds no checksum: names of tags and files may be read as others, but no other state.
    for damage in (single_bit_flips, edits):
        for _, record in outcomes_of(parse, damage(older), error=DamagedCheckpointError):
            found = record.state
            assert (found.step, found.num_updates) == (10, 10 - len(found.skipped_steps))
    assert list(outcomes_of(parse, truncations(older.rstrip()), error=DamagedCheckpointError)) == []
    shutil.copytree(checkpoint, tmp_path / "step_00000010")
    (tmp_path / "step_00000010" / "checkpoint.json").write_bytes(older)
    assert newest_checkpoint(open_store(tmp_path)).record.state == STATE
    values = json.loads(older)
    del values["files"]["model-00001-of-00001.safetensors"]
    (tmp_path / "step_00000010" / "checkpoint.json").write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match="element 0 of parameter/w0 is in no file"):
        open_checkpoint(str(tmp_path / "step_00000010"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"step": 11}, "step: expected 10, as in the folder's name, found 11|num_updates"),
        ({"num_updates": 9}, "num_updates: expected 8, which is step=10 without 2 skipped steps"),
        ({"skipped_steps": [4, 3]}, "skipped_steps: expected increasing steps from 1 to 10"),
        ({"skipped_steps": [4, 11]}, "skipped_steps: expected increasing steps from 1 to 10"),
        ({"step": True}, "step: expected int, found True"),
        ({"marks": "forked"}, r"marks: expected list\[str\], found 'forked'"),
        ({"written_by": {}}, "expected the key 'attempt', found none"),
        ({"shapes": {"w0": [-1]}}, "shapes.w0: expected sizes"),
        ({"files": {"../a": {}}}, "files: expected names of files in the checkpoint"),
        ({"files": {"a": {"num_bytes": 1, "sha256": "0"}}}, "files.a: expected num_bytes and sha"),
    ],
)
def test_a_record_that_contradicts_itself_is_damaged_even_if_its_checksum_is_right(
    content, changes, expected
):
    values = json.loads(content)
    del values["sha256"]
    with pytest.raises(
        DamagedCheckpointError, match=rf"step_00000010/checkpoint.json: ({expected})"
    ):
        parse(to_sealed_json(values | changes, indent=1))


def test_the_name_of_the_folder_must_agree_with_the_record(content, checkpoint, tmp_path):
    for name, expected in (
        ("step_00000011", "step: expected 11, as in the folder's name, found 10"),
        ("step_00000010_attempt_0002", "written_by.attempt: expected '0002'.* found '0001'"),
    ):
        with pytest.raises(DamagedCheckpointError, match=expected):
            parse_record(content, location=f"s3://bucket/run/{name}")
    for name in ("step_00000010_attempt_0001", "my_best_model"):
        assert parse_record(content, location=f"s3://bucket/run/{name}/").state == STATE
    shutil.copytree(checkpoint, tmp_path / "my_best_model")
    assert read_record(tmp_path / "my_best_model").state == STATE


def test_a_record_of_a_later_version_is_refused_not_passed_over(content):
    values = json.loads(content)
    del values["sha256"]
    with pytest.raises(
        InputError, match=r"expected format_version 3, found 4: .* use that version"
    ):
        parse(to_sealed_json(values | {"format_version": 4}, indent=1))
    with pytest.raises(DamagedCheckpointError, match="found 1 and no checksum"):
        parse(json.dumps(values | {"format_version": 1}).encode())
