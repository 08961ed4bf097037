"""Small image and audio datasets with measured Parquet files, for tests of find_duplicates."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

from data_prep.shards.columns import shard_schema
from data_prep.shards.dataset import Dataset
from data_prep.shards.folder import finish_dataset
from data_prep.shards.parquet import measure_media, row_of
from data_prep.shards.sample import Sample
from data_prep.shards.writer import ShardWriter

SAMPLES_PER_SHARD = 4


def wav(waveform, rate_hz, **options):
    """Encodes a waveform as WAV, or in the format that the options name."""
    sink = io.BytesIO()
    soundfile.write(sink, waveform, rate_hz, **{"format": "WAV", "subtype": "PCM_16", **options})
    return sink.getvalue()


def write_dataset(folder: Path, samples, *, media, is_measured=True) -> Path:
    """Writes a finished dataset.

    Args:
        folder: new dataset folder.
        samples: list of (extension, bytes, captions).
        media: "image" or "audio".
        is_measured: whether the Parquet files contain hashes.
    """
    folder.mkdir(parents=True)
    names = []
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        names.append(f"{len(names):08d}")
        writer = ShardWriter(folder, names[-1])
        rows = []
        chunk = samples[start : start + SAMPLES_PER_SHARD]
        for number, (extension, content, captions) in enumerate(chunk, start=start):
            text = json.dumps({"captions": captions, "uid": f"{folder.name}-{number}"})
            members = {extension: content, "json": text.encode()}
            sample = Sample(shard="", key=f"{number:06d}", members=members)
            writer.add(sample.key, members=members)
            measures = measure_media(sample, media) if is_measured else {}
            rows.append(row_of(sample, media_kind=media, measures=measures, kept={}))
        schema = shard_schema(media, kept={})
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{names[-1]}.parquet")
        writer.finish(rejected={})
    finish_dataset(folder, names, media=media, preparation={})
    return folder


def write_embeddings(folder: Path, dataset: Path, vectors, *, checkpoint="c0", left_out=()) -> Path:
    """Writes media embeddings in the format of eval.embed, leaving out some ordinals."""
    folder.mkdir(parents=True)
    info = Dataset(dataset)
    vectors = np.asarray(vectors, np.float32)
    for row, start in zip(info.manifest, info.shard_starts, strict=False):
        ordinals = [n for n in range(start, start + row.num_samples) if n not in left_out]
        flat = pyarrow.array(vectors[ordinals].ravel())
        columns = {
            "key": pyarrow.array([f"{n:06d}" for n in ordinals], pyarrow.string()),
            "media_embedding": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{row.name}.parquet")
    record = {
        "dataset_fingerprint": info.info.fingerprint,
        "checkpoint": checkpoint,
        "transform": {},
        "embed_dim": vectors.shape[1],
    }
    (folder / "embeddings.json").write_text(json.dumps(record))
    return folder
