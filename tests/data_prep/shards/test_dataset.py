import os
import tarfile

import numpy as np
import pytest

from data_prep.shards import dataset as dataset_module
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import ShardIndex
from data_prep.shards.sample import (
    BadShardError,
    CorruptSampleError,
    Sample,
    captions_of,
    media_extension_of,
    split_member_name,
)
from tests.support.damage import single_bit_flips
from tests.support.toy_shards import jpeg, write_toy_dataset


@pytest.fixture
def dataset(tmp_path):
    return write_toy_dataset(tmp_path / "dataset")


def test_samples_round_trip_byte_for_byte(dataset):
    read = Dataset(dataset)
    assert len(read) == 8
    for number in range(8):
        sample = read.read_sample(number)
        assert sample.key == f"{number:012d}"
        assert sample.members["jpg"] == jpeg(number)
        expected = [f"caption {number}"] + [f"other {number}"] * (number % 3 == 0)
        assert captions_of(sample) == expected


def test_python_tarfile_reads_the_same_members(dataset):
    read = Dataset(dataset)
    for number in range(8):
        sample = read.read_sample(number)
        with tarfile.open(read.tar_path(read.locate(number)[0]), "r:") as tar:
            for extension, content in sample.members.items():
                assert tar.extractfile(f"{sample.key}.{extension}").read() == content


def test_wrong_bytes_are_named_by_shard_and_key(dataset):
    tar = dataset / "00000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(CorruptSampleError, match=r"00000001\.tar: sample 000000000003: \.jpg"):
        Dataset(dataset).read_sample(3)


def test_a_damaged_index_is_named_and_gives_no_sample(dataset):
    path = dataset / "00000001.idx"
    content = path.read_bytes()
    # With a page of zeros, all members would be empty, and their checksums would match.
    damaged = [content[:-36] + bytes(36), content[:-1], content + b"\0", b""]
    damaged += [(dataset / "00000002.idx").read_bytes()]
    damaged += list(single_bit_flips(content))[::31]
    for each in damaged:
        path.write_bytes(each)
        read = Dataset(dataset)
        with pytest.raises(BadShardError, match=r"00000001\.idx: damaged index.*repair=true"):
            read.read_sample(3)
        assert list(read.bad_shards) == [1]
    path.unlink()
    with pytest.raises(BadShardError, match=r"00000001\.idx: no index"):
        Dataset(dataset).read_sample(3)


def test_an_index_that_is_truncated_after_it_was_read_does_no_harm(dataset):
    read = Dataset(dataset)
    expected = read.read_sample(3)
    os.truncate(dataset / "00000001.idx", 0)  # a mapped file would end the process
    assert read.read_sample(3) == expected


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_folder_in_the_place_of_a_shards_file_is_named(dataset, suffix):
    read = Dataset(dataset)
    path = dataset / f"00000001{suffix}"
    path.unlink()
    path.mkdir()
    with pytest.raises(BadShardError, match=rf"00000001\{suffix}: cannot open the"):
        read.read_sample(3)


def test_few_indexes_are_held_if_they_are_large(dataset, monkeypatch):
    monkeypatch.setattr(dataset_module, "BYTES_OF_OPEN_INDEXES", 1000)
    read = Dataset(dataset)
    for ordinal in (0, 3, 6, 0, 3, 6):
        assert read.read_sample(ordinal).members["jpg"] == jpeg(ordinal)
    assert read._index.cache_info().maxsize == 1000 // max(r.index_bytes for r in read.manifest)


def test_an_index_survives_writing_and_reading(tmp_path):
    index = ShardIndex(
        fields=("jpg", "txt"),
        table=np.arange(12, dtype=np.uint32).reshape(2, 2, 3),
        tar_bytes=2048,
        tar_sha256="ab",
        rejected={"empty_caption": 3},
        long_keys={1: "a/very/long/key"},
    )
    (tmp_path / "x.idx").write_bytes(index.to_bytes())
    read = ShardIndex.read(tmp_path / "x.idx")
    assert read.to_bytes() == index.to_bytes()
    assert (read.rejected, read.long_keys) == (index.rejected, index.long_keys)


def test_keys_end_at_the_first_dot_of_the_file_name():
    assert split_member_name("a.b/c.d.JPG") == ("a.b/c", "d.jpg")
    assert split_member_name("plain") == ("plain", "")


def test_captions_come_from_json_before_txt():
    def captions(**members):
        return captions_of(Sample("x.tar", "k", members))

    assert captions(json=b'{"captions": ["a", "b"]}', txt=b"c") == ["a", "b"]
    assert captions(json=b'{"caption": null}', txt=b" c\n") == ["c"]
    for bad in ({}, {"txt": b"\xff"}, {"json": b"{"}, {"json": b"[]"}):
        with pytest.raises(CorruptSampleError, match=r"x\.tar: sample k"):
            captions(**bad)


def test_media_is_that_of_the_kind_and_the_first_by_the_alphabet():
    members = ("wav", "txt", "png", "jpg", "flac")
    assert media_extension_of(members, "image") == "jpg"
    assert media_extension_of(members, "audio") == "flac"
    assert media_extension_of(("txt", "wav"), "image") is None


def test_captions_alone_are_read_without_the_pictures_beside_them(tmp_path, monkeypatch):
    dataset = Dataset(write_toy_dataset(tmp_path / "data"))
    whole = dataset.read_sample(3).members
    read_bytes, pread = [], os.pread

    def counting(descriptor, size, offset):
        read_bytes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    assert dataset.read_sample(3, fields=("txt",)).members == {"txt": whole["txt"]}
    assert sum(read_bytes) == len(whole["txt"]) + 512  # and the header that holds the key
    assert dataset.read_sample(3).members == whole
    assert dataset.read_sample(3, fields=()).members == {}
    assert dataset.read_sample(3, fields=("txt",)).key == dataset.read_sample(3).key
