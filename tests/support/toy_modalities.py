"""Samples with every subset of four modalities, as members, for tests of what reads them."""

import io
import json
from itertools import combinations

import numpy as np
import soundfile
from PIL import Image

from data_prep.config import MakeShards
from data_prep.make_shards import make_shards
from data_prep.modalities.modality import Modalities, Modality
from data_prep.modalities.vectors import to_npy
from data_prep.shards.folder import finish_dataset
from data_prep.shards.sample import Sample
from data_prep.shards.sample_contents import contents_of
from data_prep.shards.writer import ShardWriter

WIDTH = 3
FOUR = Modalities(
    {
        "scan": Modality("image"),
        "audio": Modality("audio"),
        "title": Modality("text"),
        "values": Modality("vector", width=WIDTH),
    }
)
# Columns of all but `audio`, for make_shards.
NAMED = {
    "scan": {"kind": "image", "column": "scan"},
    "title": {"kind": "text", "column": "title"},
    "values": {"kind": "vector", "column": "values"},
}
SUBSETS = [subset for size in range(1, 5) for subset in combinations(FOUR, size)]


def image(number, *, file_format="PNG"):
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number % 5, 16, 3))
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, file_format)
    return sink.getvalue()


def sound(number):
    wave = np.random.default_rng(number).normal(scale=0.1, size=4000 + number)
    sink = io.BytesIO()
    soundfile.write(sink, wave, 16_000, format="FLAC")
    return sink.getvalue()


def vector(number):
    return np.random.default_rng(number).normal(5.0, 2.0, size=WIDTH).astype(np.float32)


def members_of(number, subset):
    """Returns the members of a sample that has a subset of FOUR."""
    found = {
        "scan": ("scan.png", image(number)),
        "audio": ("flac", sound(number)),
        "title": ("json", json.dumps({"title": f"title {number}"}).encode()),
        "values": ("values.npy", to_npy(vector(number))),
    }
    return dict(found[name] for name in subset)


def make_from_folder(folder, members_of=members_of):
    """Makes a dataset by make_shards, from files of a sample per subset; returns its folder."""
    (folder / "in").mkdir()
    for number, subset in enumerate(SUBSETS):
        for extension, content in members_of(number, subset).items():
            (folder / f"in/{number:03d}.{extension}").write_bytes(content)
    config = {"input": str(folder / "in"), "output": folder / "out", "samples_per_shard": 4}
    columns = {"audio": "audio", "named": NAMED}
    make_shards(MakeShards(**config, columns=columns, min_modalities=1))
    return folder / "out"


def write_subsets(folder, *, subsets=SUBSETS, samples_per_shard=4):
    """Writes a dataset in which sample n has the n-th of `subsets`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for start in range(0, len(subsets), samples_per_shard):
        names.append(f"{len(names):08d}")
        writer = ShardWriter(folder, names[-1], modalities=FOUR)
        for number in range(start, min(start + samples_per_shard, len(subsets))):
            members = members_of(number, subsets[number])
            contents = contents_of(Sample(names[-1], f"{number:012d}", members), FOUR)
            writer.add(f"{number:012d}", members=members, contents=contents)
        writer.finish()
    finish_dataset(folder, names, modalities=FOUR, preparation={})
    return folder
