"""Samples with any subset of six modalities, and a config whose objectives read all of them."""

import json
from pathlib import Path

import numpy as np

from data_prep.modalities.modality import Modalities, Modality
from data_prep.modalities.vectors import to_npy
from data_prep.shards.folder import finish_dataset
from data_prep.shards.sample import Sample
from data_prep.shards.sample_contents import contents_of
from data_prep.shards.writer import ShardWriter
from pretrain.config import PretrainConfig
from tests.support.toy_modalities import image, sound
from tests.support.toy_run import toy_config

SIX = Modalities(
    {
        "image": Modality("image"),
        "scan": Modality("image"),
        "audio": Modality("audio"),
        "text": Modality("text"),
        "title": Modality("text"),
        "values": Modality("vector", width=3),
        "series": Modality("vector", width=2, is_sequence=True),
    }
)
SHARD_SIZES = (20, 7, 18)
CLIPS = {
    "image-text": {"weight": 2.0},
    "audio-text": {"loss": "sigmoid"},
    "image-audio": {"duplicates": "masked", "label_smoothing": 0.1},
    "image-scan": {"duplicates": "positives"},
    "values-text": {"weight": 0.5, "temperature": "image-text"},
    "series-scan": {"negatives": "all_pairs"},
    "augmented": {
        "left": "image",
        "right": {"image": 2},
        "direction": "forward",
        "projection": "own",
    },
    "texts": {"left": {"text": "title"}, "right": "text"},
}


def vectors_of(number):
    """Returns (values, series) of a sample; the first columns are large, the last one constant."""
    rng = np.random.default_rng(number)
    values = np.array([*(1000 + 50 * rng.normal(size=2)), 7.0], dtype=np.float32)
    series = rng.normal(size=(1 + number % 6, 2)).astype(np.float32)
    return values, series


def views_members(number: int, present) -> dict[str, bytes]:
    """Returns the members of a sample that has some of SIX."""
    values, series = vectors_of(number)
    texts = {
        "text": [f"picture {number}", f"again {number % 5}"],
        "title": f"title {number % 7} of {number}",
    }
    found = {
        "image": ("png", image(number)),
        "scan": ("scan.png", image(number + 1000)),
        "audio": ("flac", sound(number)),
        "values": ("values.npy", to_npy(values)),
        "series": ("series.npy", to_npy(series)),
    }
    members = dict(found[name] for name in found if name in present)
    named = {name: text for name, text in texts.items() if name in present}
    return members | ({"json": json.dumps(named).encode()} if named else {})


def write_views(
    folder: Path,
    *,
    fraction: float = 0.6,
    seed: int = 0,
    always=(),
    never=(),
    members_of=views_members,
    modalities=SIX,
) -> Path:
    """Writes samples that have each modality with a probability.

    Args:
        always: modalities of every sample.
        never: modalities of none.
        members_of: returns the members of a sample from its number and its modalities.
        modalities: modalities of the dataset.
    """
    folder.mkdir(parents=True)
    rng, number, names = np.random.default_rng(seed), 0, []
    for shard, size in enumerate(SHARD_SIZES):
        names.append(f"{shard:08d}")
        writer = ShardWriter(folder, names[-1], modalities=modalities)
        for _ in range(size):
            drawn = {name for name in modalities if rng.random() < fraction}
            present = (drawn - set(never)) | set(always) or {"text"}
            members = members_of(number, present)
            key = f"{number:06d}"
            contents = contents_of(Sample(names[-1], key, members), modalities)
            writer.add(key, members=members, contents=contents)
            number += 1
        writer.finish()
    finish_dataset(folder, names, modalities=modalities, preparation={})
    return folder


def views_config(data: Path, run: Path, /, **sections) -> PretrainConfig:
    """Returns a config of two streams over `data`/clips and `data`/texts."""
    model = toy_config(data, run).model.model_dump(mode="json")
    model["modalities"] = {
        "scan": "image",
        "title": {"kind": "text", "tower": model["text"]},
        "values": {"kind": "vector", "width": 3, "tower": {"width": 8}},
        "series": {"kind": "vector", "width": 2, "max_rows": 4, "tower": {"width": 8}},
    }
    streams = {
        "clips": {
            "global_batch_size": 16,
            "sources": [{"name": "clips", "dataset": data / "clips"}],
            "objectives": CLIPS,
        },
        "texts": {
            "global_batch_size": 8,
            "sources": [{"name": "texts", "dataset": data / "texts"}],
            "objectives": {"title-text": {}, "image-text": {}},
        },
    }
    values = toy_config(data, run).model_dump(mode="json")
    return PretrainConfig.model_validate(values | {"model": model, "streams": streams} | sections)
