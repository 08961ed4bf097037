import pickle
import shutil

import numpy as np
import pytest
import torch
from toy_run import COLORS, toy_config, write_toy_dataset

from data_prep.config_file import InputError, RunError
from data_prep.media_decode import decode_image
from data_prep.shard_format import BLOCK_BYTES, Dataset, ShardIndex
from pretrain.config import ImageTransform
from pretrain.media_transforms import ImageToPixels
from pretrain.pair_loader import StepDataset, load_steps
from pretrain.sample_order import format_digest
from pretrain.shard_reader import MIN_REACH, PairReader
from pretrain.source_datasets import open_samples
from pretrain.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def config(toy_data, tmp_path_factory):
    return toy_config(toy_data, tmp_path_factory.mktemp("run"))


def step_dataset(config, rank=0, world_size=1):
    tokenizer = build_tokenizer(config.model.text)
    return StepDataset(config, tokenizer=tokenizer, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3, 7, 8])
def test_pixels_tokens_and_waveforms_of_a_step_do_not_depend_on_the_ranks(config, world_size):
    alone = step_dataset(config)
    ranks = [step_dataset(config, rank, world_size) for rank in range(world_size)]
    for step in (0, 5):
        whole = alone[step].pairings
        parts = [rank[step].pairings for rank in ranks]
        for name, batch in whole.items():
            assert torch.equal(torch.cat([part[name].media for part in parts]), batch.media)
            assert torch.equal(torch.cat([part[name].tokens for part in parts]), batch.tokens)
            summed = sum(part[name].digest for part in parts)
            assert format_digest(summed) == format_digest(batch.digest)


def test_loader_processes_change_nothing(config):
    direct = step_dataset(config)
    loaded = list(load_steps(step_dataset(config), first_step=2, last_step=5, num_workers=2))
    assert [batch.step for batch in loaded] == [2, 3, 4]
    for batch in loaded:
        for name, expected in direct[batch.step].pairings.items():
            assert torch.equal(batch.pairings[name].media, expected.media)
            assert torch.equal(batch.pairings[name].tokens, expected.tokens)


def test_readers_survive_pickling_after_use(config):
    dataset = step_dataset(config)
    before = dataset[1]
    after = pickle.loads(pickle.dumps(dataset))[1]
    assert torch.equal(after.pairings["image-text"].media, before.pairings["image-text"].media)


def test_every_picture_comes_with_one_of_its_own_captions(config):
    dataset = step_dataset(config)
    tokenizer = dataset.pairings["image-text"].tokenizer
    reader = dataset.pairings["image-text"].readers[0]
    sample = reader.read_exactly(3)
    assert sample.captions == [f"picture 3 is {COLORS[3]}"]
    drawn = dataset.pairings["image-text"].load(0, lanes=dataset.lanes)
    own = {tuple(tokenizer([c])[0].tolist()) for n in range(83) for c in reader.read(n)[0].captions}
    more = dataset.pairings["image-text"].readers[1]
    own |= {tuple(tokenizer([c])[0].tolist()) for n in range(25) for c in more.read(n)[0].captions}
    assert {tuple(row) for row in drawn.tokens.tolist()} <= own


def damaged_copy(source, folder, *, places):
    """A dataset of pictures with a flipped bit in some of its first shard."""
    shutil.copytree(source, folder)
    index = ShardIndex.read(folder / "00000000.idx")
    tar = folder / "00000000.tar"
    content = bytearray(tar.read_bytes())
    for place in places:
        block = int(index.table[place, index.fields.index("png"), 0])
        content[block * BLOCK_BYTES + 30] ^= 1
    tar.write_bytes(content)
    return folder


def reader_of(folder, window=16):
    transform = ImageToPixels(ImageTransform(size=16))
    samples = open_samples(str(folder), subset=None)
    return PairReader("colors", samples=samples, kind="image", transform=transform, window=window)


def test_a_substitute_comes_from_the_window_and_depends_on_the_place_alone(toy_data, tmp_path):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", places=[20]))
    pair, [bad] = reader.read(20)
    assert bad.ordinal == 20
    assert bad.substitute == pair.ordinal
    assert 0 <= pair.ordinal < MIN_REACH
    assert "sample 000020: .png has not the crc32 of its index" in bad.reason
    assert reader_of(tmp_path / "data").read(20)[1] == [bad]
    assert reader.read(21)[1] == []


def test_without_a_good_neighbour_the_sample_is_named(toy_data, tmp_path):
    source = toy_data / "more_colors"
    reader = reader_of(damaged_copy(source, tmp_path / "data", places=range(25)), window=1)
    with pytest.raises(InputError, match=r"neither this sample nor 16 neighbours.*sample 000007"):
        reader.read(7)


def test_a_window_of_one_still_finds_a_substitute(toy_data, tmp_path):
    reader = reader_of(damaged_copy(toy_data / "colors", tmp_path / "data", places=[3]), window=1)
    assert reader.read(3)[1][0].ordinal == 3


def test_bytes_that_pass_the_checksum_but_do_not_decode_are_substituted_too(tmp_path, monkeypatch):
    import toy_run

    good = toy_run.toy_members
    monkeypatch.setattr(
        toy_run,
        "toy_members",
        lambda media, number: good(media, number) | ({"png": b"GIF89a"} if number == 4 else {}),
    )
    reader = reader_of(write_toy_dataset(tmp_path / "data", "image", shard_sizes=(9,)))
    _, [bad] = reader.read(4)
    assert "sample 000004: .png: expected png bytes, found gif" in bad.reason


def test_a_shard_that_disappears_stops_the_run_and_is_never_substituted(config, toy_data, tmp_path):
    shutil.copytree(toy_data, tmp_path / "data")
    moved = toy_config(tmp_path / "data", tmp_path / "run")
    dataset = step_dataset(moved)
    (tmp_path / "data" / "tones" / "00000000.tar").unlink()
    with pytest.raises(RunError, match=r"cannot read a shard: .*tones/00000000\.tar"):
        list(load_steps(dataset, first_step=0, last_step=6, num_workers=0))


def test_dataset_reads_what_was_written(toy_data):
    dataset = Dataset(toy_data / "colors")
    assert len(dataset) == 83
    assert dataset.locate(40) == (1, 0)
    assert dataset.locate(82) == (2, 29)
    pixels = decode_image(dataset.read_sample(82).members["png"], "png")
    assert pixels.shape == (12, 10, 3)
    assert pixels.dtype == np.uint8
