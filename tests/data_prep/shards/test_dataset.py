import os
import tarfile

import numpy as np
import pytest

from data_prep.shards.dataset import Dataset
from data_prep.shards.index import ShardIndex
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    media_extension_of,
    split_member_name,
)
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
