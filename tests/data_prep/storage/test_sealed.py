"""Seals: every flipped bit is detected, and files without a seal are read."""

import pytest
import yaml

from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    has_valid_seal,
    read_sealed_json,
    read_sealed_row,
    to_sealed_json,
    to_sealed_row,
    to_sealed_yaml,
)
from tests.support.damage import edits, outcomes_of, single_bit_flips, truncations

VALUES = {"step": 10, "name": "caf\u00e9 \U0001f600", "nested": {"sha256": [1.5, None, True]}}
ROW = {"step": 3, "loss": {"image-text": 0.1}, "digest": "0123abcd", "text": "caf\u00e9"}


def test_a_sealed_object_is_read_as_it_was_written():
    content = to_sealed_json(VALUES, indent=2)
    assert read_sealed_json(content, unsealed_keys=()) == (VALUES, True)
    assert list(read_sealed_json(b'{"step": 1}', unsealed_keys=["step"])) == [{"step": 1}, False]
    with pytest.raises(DamagedFileError, match="expected its checksum under the key 'sha256'"):
        read_sealed_json(b'{"step": 1, "sha257": ""}', unsealed_keys=["step"])


@pytest.mark.parametrize("damage", [single_bit_flips, truncations, edits])
def test_no_damage_to_a_sealed_object_goes_unnoticed(damage):
    def read(content):
        return read_sealed_json(content, unsealed_keys=VALUES)[0]

    damaged = damage(to_sealed_json(VALUES, indent=2))
    for content, values in outcomes_of(read, damaged, error=DamagedFileError):
        # An object without its seal has the keys of an older one; a flipped bit removes no seal.
        is_without_seal = damage is edits and b"sha256" not in content.split(b"nested")[-1][20:]
        assert values == VALUES or is_without_seal, content


def test_no_flipped_bit_of_a_sealed_row_goes_unnoticed():
    line = to_sealed_row(ROW).encode().removesuffix(b"\n")
    assert read_sealed_row(line) == ROW
    for damage in (single_bit_flips, truncations):
        for content, row in outcomes_of(read_sealed_row, damage(line), error=DamagedFileError):
            assert row == ROW, content
    with pytest.raises(DamagedFileError, match='expected a row that ends in its "crc32"'):
        read_sealed_row(b'{"crc32": "00000000", "step": 1}')


@pytest.mark.parametrize(
    "row", [b'{"step": 1, "x": NaN}', b'{"step": 1, "a": {"host": "node0123"}}']
)
def test_a_row_without_seal_is_read(row):
    assert read_sealed_row(row)["step"] == 1


def test_no_flipped_bit_of_sealed_yaml_goes_unnoticed():
    text = "seed: 0\nrun:\n  folder: runs/a\n  keep: 'on'\nrates: [0.5, 1e-3]\n"
    content = to_sealed_yaml(text)
    assert yaml.safe_load(content) == yaml.safe_load(text)
    assert (has_valid_seal(content), has_valid_seal(text.encode())) == (True, None)
    for damaged in single_bit_flips(content):
        if has_valid_seal(damaged) is not False:
            assert damaged.endswith(b"\n" + text.encode())
            assert damaged.startswith(b"# ")
    first_line = content.index(b"\n")
    assert all(has_valid_seal(each) is False for each in list(truncations(content))[first_line:])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -1, 10**30], [True, 1.0, "1", None]),
        (float, [0, 0.5], [True, "1"]),
        (str, ["a"], [b"a", None]),
        (bool, [True], [0, 1]),
        (int | None, [1, None], [False, 1.5]),
        (list[str], [[], ["a"]], [["a", 1], "a", ("a",)]),
        (dict[str, int], [{}, {"a": 1}], [{"a": True}, []]),
    ],
)
def test_types_are_checked_strictly(kind, good, bad):
    for value in good:
        check_types({"key": value}, {"key": kind})
    for value in bad:
        with pytest.raises(DamagedFileError, match="key: expected "):
            check_types({"key": value}, {"key": kind})
    check_types({}, {"key": kind}, optional=["key"])
    with pytest.raises(DamagedFileError, match="expected the key 'key', found none"):
        check_types({}, {"key": kind})
