import json

import pytest
from toy_pairs import shard, verify, write_pictures

from data_prep.config_file import InputError


@pytest.fixture
def dataset(tmp_path):
    return shard(write_pictures(tmp_path / "media", 8), tmp_path / "dataset")


def damage(path, place, *, keep=None):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content[:keep])


def problems_of(dataset):
    with pytest.raises(InputError) as caught:
        verify(dataset)
    return str(caught.value)


def test_an_intact_dataset_passes(dataset, capsys):
    verify(dataset, decode=True)
    assert "8 samples in 3 shards" in capsys.readouterr().out


def test_a_flipped_bit_of_a_payload_is_named_by_key(dataset):
    damage(dataset / "00000001.tar", 600)
    found = problems_of(dataset)
    assert "00000001.tar: its sha256 is not the one in manifest.jsonl" in found
    assert "00000001.tar: sample 000000000003: .jpg: its bytes have not the crc32" in found
    assert "2 problems" in found


def test_a_flipped_bit_of_a_header_is_found(dataset):
    content = (dataset / "00000001.tar").read_bytes()
    damage(dataset / "00000001.tar", content.index(b"000000000004.jpg") + 3)
    found = problems_of(dataset)
    assert "found a damaged header" in found
    assert "sample 000000000004" in found or "number 1" in found


@pytest.mark.parametrize("cut_bytes", [700, 1024], ids=["inside a member", "at a boundary"])
def test_a_truncated_tar_is_found(dataset, cut_bytes):
    tar = dataset / "00000002.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-cut_bytes])
    found = problems_of(dataset)
    assert f"00000002.tar: expected {size} bytes, found {size - cut_bytes}" in found
    assert "cut short" in found


def test_missing_files_are_found(dataset):
    (dataset / "00000000.tar").unlink()
    (dataset / "00000001.idx").unlink()
    found = problems_of(dataset)
    assert "00000000.tar: missing" in found
    assert "00000001.idx: missing" in found


def test_an_index_of_another_shard_is_found(dataset):
    (dataset / "00000000.idx").write_bytes((dataset / "00000001.idx").read_bytes())
    found = problems_of(dataset)
    assert "00000000.idx: belongs to another tar" in found
    assert "00000000.tar: sample" in found


def test_a_manifest_that_lost_a_row_is_found(dataset):
    lines = (dataset / "manifest.jsonl").read_text().splitlines(keepends=True)
    (dataset / "manifest.jsonl").write_text("".join(lines[:-1]))
    found = problems_of(dataset)
    assert "expected num_samples 6 (manifest.jsonl), found 8" in found


def test_many_problems_are_cut_to_twenty(tmp_path):
    dataset = shard(write_pictures(tmp_path / "media", 30), tmp_path / "d", samples_per_shard=1)
    for path in dataset.glob("*.tar"):
        path.unlink()
    assert problems_of(dataset).count(": missing") == 20
    assert "and 10 more" in problems_of(dataset)


def test_a_dataset_of_another_version_is_refused(dataset):
    info = json.loads((dataset / "dataset.json").read_text()) | {"format_version": 99}
    (dataset / "dataset.json").write_text(json.dumps(info))
    assert "expected format version 1, found 99" in problems_of(dataset)
