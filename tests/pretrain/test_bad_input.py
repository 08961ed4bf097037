"""Training meets every kind of damage: counted once, named, batches full, and never a hang."""

import shutil
from collections import Counter

import pytest

from data_prep.errors import InputError
from data_prep.media.formats import image_format
from data_prep.shards.folder import finish_dataset
from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.writer import ShardWriter
from pretrain.config import PretrainConfig
from pretrain.data.loaders import start_loader
from pretrain.model.tokenizer import build_tokenizer
from pretrain.settings.data import Loading
from pretrain.training.assembly import open_step_loader
from tests.support.bad_media import BAD_MEDIA, picture, sound
from tests.support.toy_run import toy_config, write_toy_dataset

GOOD = {"image": picture, "audio": sound}
# Media that data_prep's filters refuse although they can be decoded.
DECODABLE = {
    "apng",
    "narrow_picture",
    "short_clip",
    "silent_clip",
    "tiny_picture",
    "wav_of_8_channels",
    "webp_animated",
}
THREADS = Loading(num_workers=2)


def config_of(folder, kind, run, **loading):
    """Returns the config of a run over one source, with 8 pairs a step."""
    values = toy_config(folder.parent, run).model_dump()
    other = "audio" if kind == "image" else "image"
    values["model"][other] = None
    source = {"name": "source", "dataset": folder}
    name = f"{kind}-text"
    stream = {"global_batch_size": 8, "objectives": {name: {}}, "sources": [source]}
    values["streams"] = {name: stream}
    values["loading"] = {"retries": 0} | loading
    return PretrainConfig.model_validate(values)


def load_an_epoch(config):
    """Returns (the batches of one epoch, all their substitutions)."""
    loader = open_step_loader(config, build_tokenizer(config.model.text), rank=0, world_size=1)
    num_steps = loader.schedule.num_samples // 8
    [name] = loader.readers
    bad_samples, num_read = [], Counter()
    with start_loader(THREADS) as load:
        for batch in load(loader, first_step=0, last_step=num_steps):
            pairs = batch.streams[name]
            assert [len(view) for view in pairs.views.values()] == [8, 8]
            bad_samples += pairs.bad_samples
            num_read.update(pairs.num_read)
    assert num_read == {("source", 0): 8 * num_steps}
    return bad_samples


def extension_for(name, kind, content):
    if kind == "image":
        found = image_format(content)
        return found if found in ("jpg", "png", "webp") else "jpg"
    return next((each for each in ("flac", "ogg", "opus", "mp3") if each in name), "wav")


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_every_kind_of_bad_media_is_substituted_once_and_named(tmp_path, kind):
    names = [name for name, (_, bad_kind, _) in BAD_MEDIA.items() if bad_kind == kind]
    names += ["good"] * (-2 * len(names) % 8 // 2)  # so that the epoch leaves nothing over
    folder = tmp_path / "data"
    folder.mkdir()
    writer = ShardWriter(folder, "00000000")
    for number, name in enumerate(names):
        content = GOOD[kind]() if name == "good" else BAD_MEDIA[name][0]()
        for key, media in ((f"{number:03d}_{name}", content), (f"{number:03d}_fine", GOOD[kind]())):
            extension = extension_for(name if media is content else "", kind, media)
            writer.add(key, members={extension: media, "txt": key.encode()})
    writer.finish()
    finish_dataset(folder, ["00000000"], media=kind, preparation={})

    bad_samples = load_an_epoch(config_of(folder, kind, tmp_path / "run"))
    found = {names[bad.ordinal // 2]: bad for bad in bad_samples}
    assert set(found) == set(names) - DECODABLE - {"good"}
    assert len(bad_samples) == len(found)
    for name, bad in found.items():
        assert bad.ordinal % 2 == 0
        assert f"sample {bad.ordinal // 2:03d}_{name}: ." in bad.reason
        assert names[bad.substitute // 2] in DECODABLE | {"good"} or bad.substitute % 2 == 1


def missing_caption(folder):
    writer = ShardWriter(folder, "00000000")
    for number in range(40):
        caption = b"" if number == 7 else b"\xff\xfe" if number == 9 else b"a caption"
        writer.add(f"{number:06d}", members={"jpg": picture(), "txt": caption})
    writer.finish()


def test_captions_that_are_none_are_substituted_like_bad_media(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    missing_caption(folder)
    finish_dataset(folder, ["00000000"], media="image", preparation={})
    bad_samples = load_an_epoch(config_of(folder, "image", tmp_path / "run"))
    assert {bad.ordinal: bad.reason.partition(": sample ")[2] for bad in bad_samples} == {
        7: "000007: expected a caption in .json or .txt, found none",
        9: "000009: .txt is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte",
    }


# ---------------------------------------------------------------------------------- damaged tars


@pytest.fixture
def whole(tmp_path):
    """Three shards of 24 pictures."""
    return write_toy_dataset(tmp_path / "data", "image", shard_sizes=(24, 24, 24))


def tar_of(folder):
    return folder / "00000001.tar"


def block_of(folder, place, field="png"):
    index = ShardIndex.read(folder / "00000001.idx")
    return int(index.table[place, index.fields.index(field), 0])


def patch_tar(folder, start, new):
    content = bytearray(tar_of(folder).read_bytes())
    content[start : start + len(new)] = new
    tar_of(folder).write_bytes(content)


def zeroed_header(folder):
    patch_tar(folder, (block_of(folder, 5) - 1) * BLOCK_BYTES, bytes(BLOCK_BYTES))


def flipped_header_bit(folder):
    patch_tar(folder, (block_of(folder, 5) - 1) * BLOCK_BYTES + 3, b"\x07")


@pytest.mark.parametrize("damage", [zeroed_header, flipped_header_bit])
def test_damaged_headers_lose_no_sample(whole, tmp_path, damage):
    damage(whole)
    assert load_an_epoch(config_of(whole, "image", tmp_path / "run")) == []


def test_a_flipped_bit_of_the_payload_costs_that_sample_alone(whole, tmp_path):
    patch_tar(whole, block_of(whole, 5) * BLOCK_BYTES + 40, b"\x99\x98")
    [bad] = load_an_epoch(config_of(whole, "image", tmp_path / "run"))
    assert (bad.ordinal, bad.shard) == (29, "00000001")
    assert "sample 000029: .png: CRC32 mismatch with the index" in bad.reason


def cut_in_a_payload(folder):
    content = tar_of(folder).read_bytes()
    tar_of(folder).write_bytes(content[: block_of(folder, 5) * BLOCK_BYTES + 100])


def cut_between_members(folder):
    content = tar_of(folder).read_bytes()
    tar_of(folder).write_bytes(content[: (block_of(folder, 5) - 1) * BLOCK_BYTES])


def emptied(folder):
    tar_of(folder).write_bytes(b"")


def error_page(folder):
    tar_of(folder).write_bytes(b"<!DOCTYPE html><html>404 Not Found</html>")


def removed(folder):
    tar_of(folder).unlink()


def of_other_keys(folder):
    """Writes a shard of the same length with other samples."""
    other = write_toy_dataset(folder.parent / "other", "image", shard_sizes=(48, 24))
    content = (other / "00000001.tar").read_bytes()
    tar_of(folder).write_bytes(
        content[: tar_of(folder).stat().st_size].ljust(tar_of(folder).stat().st_size, b"\0")
    )


WHOLE_SHARDS = [cut_in_a_payload, cut_between_members, emptied, error_page, removed, of_other_keys]


@pytest.mark.parametrize("damage", WHOLE_SHARDS, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_stops_the_run_with_its_name(whole, tmp_path, damage):
    damage(whole)
    with pytest.raises(InputError, match=r"00000001\.tar"):
        load_an_epoch(config_of(whole, "image", tmp_path / "run"))


@pytest.mark.parametrize("damage", WHOLE_SHARDS[:-1], ids=lambda damage: damage.__name__)
def test_by_setting_a_damaged_shard_is_substituted_and_said_to_be_bad(whole, tmp_path, damage):
    damage(whole)
    config = config_of(whole, "image", tmp_path / "run", on_bad_shard="substitute")
    bad_samples = load_an_epoch(config)
    assert sorted(bad.ordinal for bad in bad_samples) == list(range(24, 48))
    assert all(bad.is_shard_bad and "00000001.tar" in bad.reason for bad in bad_samples)


def test_a_shard_that_goes_bad_during_the_run_is_bad_from_then_on(whole, tmp_path):
    config = config_of(whole, "image", tmp_path / "run", on_bad_shard="substitute")
    loader = open_step_loader(config, build_tokenizer(config.model.text), rank=0, world_size=1)
    shutil.move(tar_of(whole), whole / "elsewhere")
    bad_samples = [
        bad for step in range(9) for bad in loader.load(step).streams["image-text"].bad_samples
    ]
    assert sorted(bad.ordinal for bad in bad_samples) == list(range(24, 48))


# ------------------------------------------------------------------------------- damaged caches


def test_damage_to_the_cache_of_a_node_costs_no_sample_of_a_whole_dataset(whole, tmp_path):
    cache = {"folder": tmp_path / "cache"}
    values = config_of(whole, "image", tmp_path / "run", cache=cache).model_dump()
    values["streams"]["image-text"]["sources"][0]["dataset"] = whole.as_uri()
    config = PretrainConfig.model_validate(values)
    assert load_an_epoch(config) == []
    [index] = tmp_path.glob("cache/*/datasets/*/00000002.idx")
    patch_tar(index.parent, block_of(whole, 5) * BLOCK_BYTES + 40, b"\x99\x98")
    content = index.read_bytes()
    index.write_bytes(content[:-600] + bytes(600))  # a page of zeros
    assert load_an_epoch(config) == []
    for path in (tar_of(index.parent), index):
        assert path.read_bytes() == (whole / path.name).read_bytes()
