"""Datasets with Parquet files, written without make_shards, for tests of data sheets."""

import hashlib
import io
import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from PIL import Image

from data_prep.report.value_counts import QUANTILES
from data_prep.shards.columns import shard_schema
from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.writer import ShardWriter

TEXTS = (
    "a red circle",
    "A  red\tcircle, <b>large</b> & round",
    "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433",
    "\u7ea2\u8272\u7684\u5706\u5708",
    "it's 2 o'clock",
    "1234",
)


def picture_row(number):
    rng = np.random.default_rng(number // 2 if number % 7 == 1 else number)  # some are copies
    height, width = (int(side) for side in rng.integers(20, 90, 2))
    sink = io.BytesIO()
    image_format = ("JPEG", "PNG")[number % 2]
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
        sink, image_format
    )
    captions = [TEXTS[(number + each) % len(TEXTS)] + " !" * (number % 4) for each in range(2)]
    values = {
        "captions": captions[: 1 + number % 2],
        "height": height,
        "width": width,
        "is_reencoded": number % 3 == 0,
        "language": (None, "en", "ru")[number % 3],
        "marks": ["image_too_small"] if number % 5 == 0 else [],
        "class_name": ("cat", "dog")[number % 2],
        "Licence": ("CC0", None, "<i>own</i>")[number % 3],
        'price in $ "x"': number / 7 if number % 4 else float("nan"),
        "filename": f"{number}.bin",
    }
    return sink.getvalue(), ("jpg", "png")[number % 2], values


PICTURE_COLUMNS = {"Licence": "string", 'price in $ "x"': "double", "filename": "string"}


def sound_row(number):
    rate, sink = 16000, io.BytesIO()
    tone = 0.5 * np.sin(np.arange(rate // 4 + 100 * number) * 0.05)
    soundfile.write(sink, tone, rate, format="WAV")
    values = {
        "captions": [f"tone {number}"],
        "seconds": len(tone) / rate,
        "sample_rate_hz": rate,
        "channels": 1,
        "is_reencoded": False,
    }
    return sink.getvalue(), "wav", values


def write_dataset(folder, samples, *, media="image", kept=None, per_shard=8, **info):
    """Writes a dataset as make_shards does.

    Args:
        folder: new dataset folder.
        samples: list of (media bytes, extension, values of columns).
        media: "image" or "audio".
        kept: types of the kept columns.
        per_shard: samples per shard.
        info: fields of dataset.json.
    """
    folder.mkdir(parents=True)
    schema = shard_schema(media, kept=kept or {})
    manifest = []
    for start in range(0, len(samples), per_shard):
        name = f"{len(manifest):08d}"
        writer, rows = ShardWriter(folder, name), []
        for place, (content, extension, values) in enumerate(samples[start : start + per_shard]):
            key = f"{start + place:012d}"
            metadata = {"captions": values["captions"], "class_name": values.get("class_name")}
            members = {extension: content, "json": json.dumps(metadata).encode()}
            writer.add(key, members=members)
            sha256 = hashlib.sha256(content).hexdigest()
            own = {"key": key, "uid": key, "extension": extension, "bytes": len(content)}
            rows.append(own | {"sha256": sha256, "source_row": start + place} | values)
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
        writer.finish()
        manifest.append(manifest_row(folder, name))
    whole = DatasetInfo(
        media=media,
        fields=[],
        num_samples=len(samples),
        num_shards=len(manifest),
        tar_bytes=sum(row.tar_bytes for row in manifest),
        fingerprint=fingerprint_of(manifest),
        **info,
    )
    write_dataset_files(folder, whole, manifest=manifest)
    return whole


def assert_counts(counts, values):
    """Checks counts of numbers against numpy."""
    assert counts.num_filled == len(values)
    assert counts.num_distinct == len(set(values))
    frequent = Counter(values)
    assert counts.most_frequent == sorted(frequent.items(), key=lambda e: (-e[1], e[0]))[:40]
    assert counts.num_repeated == sum(num > 1 for num in frequent.values())
    assert counts.smallest_count == min(frequent.values())
    spread = counts.spread
    assert (spread.minimum, spread.maximum) == (min(values), max(values))
    expected = np.quantile(np.array(values, dtype=float), QUANTILES, method="inverted_cdf")
    assert spread.quantiles == tuple(expected)
    if counts.num_distinct > 12:
        edges = spread.histogram.edges
        found = np.histogram(values, bins=[*edges[:-1], np.nextafter(edges[-1], -np.inf)])[0]
        assert spread.histogram.counts == found.tolist()
    else:
        assert spread.histogram is None
