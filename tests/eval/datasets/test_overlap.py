"""Items of an evaluation set in a training set: identical, altered, or equal in name only."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
from PIL import Image

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.make_shards import make_shards
from data_prep.shards.subset import Subset
from eval.check_overlap import dry_run, run
from eval.config import OverlapConfig
from tests.support.toy_evaluation import sound_sample, write_dataset


def scene(seed):
    """Draws an image with structure: enlarged blocks of colours."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((160, 120), Image.Resampling.BICUBIC)


def encoded(image, *, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def write_training(folder, files, *, media):
    """Writes Isopair shards from files: name -> (content, caption)."""
    (folder / "raw").mkdir(parents=True)
    lines = ["file\tcaption"]
    for name, (content, caption) in files.items():
        (folder / "raw" / name).write_bytes(content)
        lines.append(f"{name}\t{caption}")
    (folder / "raw" / "pairs.tsv").write_text("\n".join(lines) + "\n")
    values = {"input": str(folder / "raw/pairs.tsv"), "output": folder / "shards", "media": media}
    columns = {"media": "file", "caption": "caption"}
    make_shards(MakeShards.model_validate(values | {"columns": columns}))
    return folder / "shards"


def overlap_of(tmp_path, dataset, train, **settings):
    values = {"dataset": str(dataset), "train": [train], "output": tmp_path / "out"}
    config = OverlapConfig.model_validate(values | settings)
    dry_run(config)
    run(config)
    rows = pyarrow.parquet.read_table(tmp_path / "out/overlap.parquet").to_pylist()
    return rows, json.loads((tmp_path / "out/overlap.json").read_text())


def test_pictures_are_found_by_name_bytes_likeness_and_caption(tmp_path):
    same, smaller, mirrored, other = (scene(seed) for seed in range(4))
    files = {
        "a.png": (encoded(same), "unrelated words"),
        "b.jpg": (encoded(smaller.resize((120, 90)), form="JPEG", quality=80), "some words"),
        "c.png": (encoded(mirrored.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), "more words"),
        "d.png": (encoded(scene(50)), "A  dog on\u00a0grass"),
        "0004.png": (encoded(scene(51)), "only the name is the same"),
        **{f"x{n}.png": (encoded(scene(100 + n)), f"filler {n}") for n in range(20)},
    }
    train = write_training(tmp_path / "train", files, media="image")
    pictures = [same, smaller, mirrored, other, scene(60), scene(61)]
    captions = ["one", "two", "three", "a dog on grass", "five", "six"]
    samples = [
        {"png": encoded(picture), "txt": text.encode()}
        for picture, text in zip(pictures, captions, strict=True)
    ]
    test = write_dataset(tmp_path / "test", samples)
    rows, record = overlap_of(tmp_path, test, train)
    found = {(row["key"], row["method"]) for row in rows}
    assert found == {
        ("0000", "content"),
        ("0000", "near"),
        ("0001", "near"),
        ("0002", "near"),
        ("0003", "caption"),
        ("0004", "key"),
    }
    assert all(row["similarity"] >= 0.94 for row in rows)
    assert record["num_items"] == {
        "key": 1, "content": 1, "near": 3, "caption": 1, "any": 5, "all": 6
    }  # fmt: skip
    clean = Subset.read(tmp_path / "out/clean.subset")
    assert clean.num_kept == 1
    rows, record = overlap_of(tmp_path, test, train, keys=False, captions=False, near_media=None)
    assert [(row["key"], row["method"]) for row in rows] == [("0000", "content")]


def test_sounds_are_found_though_they_were_encoded_anew(tmp_path):
    generator = np.random.default_rng(0)
    files, tests = {}, []
    for number in range(6):
        pitches = generator.uniform(200, 3000, 40)
        time = np.arange(800) / 8000
        waveform = np.concatenate([0.4 * np.sin(2 * np.pi * hz * time) for hz in pitches])
        flac, ogg = io.BytesIO(), io.BytesIO()
        soundfile.write(flac, waveform, 8000, format="FLAC")
        soundfile.write(ogg, waveform, 8000, format="OGG")
        if number < 4:
            files[f"{number}.ogg"] = (ogg.getvalue(), f"sound {number}")
        tests.append({"flac": flac.getvalue(), "txt": f"other {number}".encode()})
    train = write_training(tmp_path / "train", files, media="audio")
    test = write_dataset(tmp_path / "test", tests, media="audio")
    rows, record = overlap_of(tmp_path, test, train)
    assert [(row["key"], row["method"]) for row in rows] == [(f"000{n}", "near") for n in range(4)]
    assert record["num_items"]["any"] == 4


def test_what_cannot_be_compared_is_named(tmp_path):
    train = write_training(tmp_path / "train", {"a.png": (encoded(scene(0)), "a")}, media="image")
    sounds = write_dataset(tmp_path / "sounds", [sound_sample("low", seed=0)], media="audio")
    with pytest.raises(InputError, match=r"shards: expected audio, .* found image"):
        overlap_of(tmp_path, sounds, train)
    pictures = write_dataset(tmp_path / "pictures", [{"png": encoded(scene(0)), "txt": b"a"}])
    shutil.move(train / "00000000.parquet", tmp_path)
    with pytest.raises(InputError, match=r"00000000\.parquet: expected the columns of the shard"):
        overlap_of(tmp_path, pictures, train)
