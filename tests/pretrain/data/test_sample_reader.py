import shutil

import pytest
import torch

from data_prep.errors import InputError
from data_prep.media.formats import MediaError
from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.sample import BadShardError
from data_prep.storage import retry
from pretrain.data.datasets import open_samples
from pretrain.data.sample_reader import SampleReader
from pretrain.data.transforms import ImageToPixels
from pretrain.data.view_formats import MediaFormat, TextFormat
from pretrain.model.tokenizer import build_tokenizer
from pretrain.sampling.keyed_random import key_of, permute
from pretrain.settings.model import TextTower
from pretrain.settings.transforms import ImageTransform
from pretrain.settings.views import View
from tests.support import toy_run
from tests.support.toy_run import write_toy_dataset


def damaged_copy(source, folder, *, indices):
    """Copies a dataset of pictures, with a flipped bit in some samples of its first shard."""
    shutil.copytree(source, folder)
    index = ShardIndex.read(folder / "00000000.idx")
    tar = folder / "00000000.tar"
    content = bytearray(tar.read_bytes())
    for index_of_sample in indices:
        block = int(index.table[index_of_sample, index.fields.index("png"), 0])
        content[block * BLOCK_BYTES + 30] ^= 1
    tar.write_bytes(content)
    return folder


def reader_of(folder, *, takes_bad_shards=False, **settings):
    samples = open_samples(str(folder), subset=None, takes_bad_shards=takes_bad_shards)
    transform = ImageToPixels(ImageTransform(size=16))
    return SampleReader(
        "colors",
        samples=samples,
        formats={
            "image": MediaFormat(View.parse("image"), "image", transform),
            "text": TextFormat(
                View.parse("text"),
                build_tokenizer(TextTower(library="open_clip")),
                has_lengths=True,
            ),
        },
        takes_bad_shards=takes_bad_shards,
        **settings,
    )


def row_of(reader, pair):
    """Returns the row of a batch that a pair fills."""
    transform, drawn = reader.formats["image"].transform, pair.views["image"]
    row = torch.empty(transform.row_shape, dtype=transform.row_dtype)
    transform.write_row(drawn.part, drawn.rng, row)
    return row


def caption_of(pair):
    return pair.views["text"].part


def test_a_substitute_comes_from_the_shard_and_depends_on_the_place_alone(toy_data, tmp_path):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", indices=[20]))
    pair = reader.decode_training(20, epoch=5)
    bad = pair.bad_sample
    assert (bad.source, bad.epoch, bad.ordinal, bad.shard) == ("colors", 5, 20, "00000000")
    assert bad.substitute == pair.ordinal
    first = [
        int(20 + step) % 40 for step in permute([0, 1], sizes=40, keys=key_of("substitute", 20))
    ]
    assert pair.ordinal == next(each for each in first if each != 20)
    assert "sample 000020: .png: CRC32 mismatch with the index" in bad.reason
    again = reader_of(tmp_path / "data").decode_training(20, epoch=0).bad_sample
    assert again.substitute == bad.substitute
    assert reader.decode_training(21, epoch=0).bad_sample is None


def test_a_substitute_is_shown_as_its_own_epoch_would_show_it(toy_data, tmp_path):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", indices=[20]))
    pair = reader.decode_training(20, epoch=5)
    itself = reader.decode_training(pair.ordinal, epoch=5)
    assert torch.equal(row_of(reader, pair), row_of(reader, itself))
    assert caption_of(pair) == caption_of(itself)


def test_without_a_good_neighbour_the_sample_is_named(toy_data, tmp_path):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", indices=range(40)))
    with pytest.raises(
        InputError, match=r"neither this sample nor 1[56] neighbours.*sample 000007"
    ):
        reader.decode_training(7, epoch=0)


def test_where_a_small_shard_is_bad_throughout_the_next_one_helps(tmp_path):
    folder = write_toy_dataset(tmp_path / "whole", "image", shard_sizes=(3, 4))
    reader = reader_of(damaged_copy(folder, tmp_path / "data", indices=range(3)))
    assert reader.decode_training(1, epoch=0).ordinal in range(3, 7)


def test_bytes_that_pass_the_checksum_but_do_not_decode_are_substituted_too(tmp_path, monkeypatch):
    good = toy_run.toy_members
    monkeypatch.setattr(
        toy_run,
        "toy_members",
        lambda media, number: good(media, number) | ({"png": b"GIF89a"} if number == 4 else {}),
    )
    reader = reader_of(write_toy_dataset(tmp_path / "data", "image", shard_sizes=(9,)))
    bad = reader.decode_training(4, epoch=0).bad_sample
    assert "sample 000004: .png: expected png bytes, found gif" in bad.reason


def test_a_pair_opened_before_it_is_decoded_is_the_same_or_has_the_same_substitute(
    toy_data, tmp_path, monkeypatch
):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", indices=[20]))
    assert reader.open_training(20, epoch=0) is None
    decode = reader.formats["image"].transform.decode_training
    monkeypatch.setattr(
        reader.formats["image"].transform,
        "decode_training",
        lambda *arguments: raise_media_error() if arguments[0] == of_21 else decode(*arguments),
    )
    of_21 = reader.dataset.read_sample(21).members["png"]
    for ordinal in (20, 21, 22):
        opened = reader.open_training(ordinal, epoch=0)
        pair = reader.decode_training(ordinal, epoch=0, opened=opened)
        expected = reader.decode_training(ordinal, epoch=0)
        assert (pair.ordinal, caption_of(pair)) == (expected.ordinal, caption_of(expected))
        assert (pair.views["image"].part == expected.views["image"].part).all()
        assert pair.bad_sample == expected.bad_sample
        assert (pair.bad_sample is None) == (ordinal == 22)


def raise_media_error():
    raise MediaError("damaged")


# ------------------------------------------------------------------------------- whole shards


def missing(folder):
    (folder / "00000000.tar").unlink()


def cut(folder):
    tar = folder / "00000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])


def without_index(folder):
    (folder / "00000000.idx").unlink()


def with_index_of_another(folder):
    shutil.copy(folder / "00000001.idx", folder / "00000000.idx")


def with_empty_index(folder):
    (folder / "00000000.idx").write_bytes(b"")


WAYS = [missing, cut, without_index, with_index_of_another, with_empty_index]


@pytest.mark.parametrize("damage", WAYS, ids=lambda damage: damage.__name__)
def test_a_bad_shard_stops_with_its_name_or_by_setting_is_substituted(toy_data, tmp_path, damage):
    folder = tmp_path / "data"
    shutil.copytree(toy_data / "colors", folder)
    damage(folder)
    with pytest.raises(BadShardError, match=r"00000000\.(tar|idx)"):
        reader_of(folder).decode_training(7, epoch=0)
    reader = reader_of(folder, takes_bad_shards=True)
    substitutes = set()
    for ordinal in range(40):
        pair = reader.decode_training(ordinal, epoch=1)
        assert pair.bad_sample.is_shard_bad
        assert pair.ordinal in range(40, 53)
        substitutes.add(pair.ordinal)
    assert len(substitutes) > 6
    assert reader.decode_training(45, epoch=0).bad_sample is None


# ------------------------------------------------------------------------------------- for now


class Flaky:
    """Fails a number of times before it works."""

    def __init__(self, works, failures):
        self.works, self.failures, self.calls = works, failures, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(5, "Input/output error", "some.tar")
        return self.works(*arguments, **keywords)


def test_a_read_that_fails_for_the_moment_is_tried_again_and_changes_nothing(toy_data, monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    reader = reader_of(toy_data / "colors", retries=3)
    expected = reader.decode_training(7, epoch=0)
    flaky = Flaky(reader.dataset.read_sample, failures=3)
    monkeypatch.setattr(reader.dataset, "read_sample", flaky)
    pair = reader.decode_training(7, epoch=0)
    assert pair.bad_sample is None
    assert torch.equal(row_of(reader, pair), row_of(reader, expected))
    assert flaky.calls == 4


def test_a_read_that_keeps_failing_stops_and_is_never_substituted(toy_data, monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    reader = reader_of(toy_data / "colors", retries=2, takes_bad_shards=True)
    flaky = Flaky(reader.dataset.read_sample, failures=99)
    monkeypatch.setattr(reader.dataset, "read_sample", flaky)
    with pytest.raises(OSError, match=r"some\.tar"):
        reader.decode_training(7, epoch=0)
    assert flaky.calls == 3
