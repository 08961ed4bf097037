"""eval.embed on a real checkpoint, compared with the embeddings computed by an evaluation."""

import io
import json
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from data_prep.command import run_command
from data_prep.config import IndexShards, MakeSubset
from data_prep.config_file import read_config
from data_prep.errors import InputError
from data_prep.index_shards import index_shards
from data_prep.make_subset import choose_samples
from data_prep.shards.columns import shard_schema
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.sample import captions_of
from data_prep.shards.subset import KeptSamples
from eval.config import EmbedConfig
from eval.embed import dry_run, run
from eval.embeddings.files import is_finished, origin_of
from eval.embeddings.store import EmbeddingStore
from eval.models.encoder import load_encoder
from pretrain.checkpoint import find_checkpoint
from pretrain.train import pretrain
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config, toy_members


@pytest.fixture(scope="module")
def checkpoint(toy_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    pretrain(toy_config(toy_data, folder, schedule={"num_steps": 3, "warmup_steps": 0}))
    return find_checkpoint(folder)


@pytest.fixture
def embed(checkpoint, tmp_path, capsys):
    """Runs the command on a dataset: (exit status, what was printed)."""

    def embed(dataset, *arguments, **settings):
        values = {"checkpoint": checkpoint, "dataset": dataset, "output": tmp_path / "out"}
        values = {key: str(value) for key, value in values.items()} | settings
        path = tmp_path / "embed.yaml"
        path.write_text(yaml.safe_dump(values))
        commands = {"run": run, "dry_run": dry_run, "description": ""}
        status = run_command(EmbedConfig, arguments=[str(path), *arguments], **commands)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return embed


def read_rows(folder):
    paths = sorted(folder.glob("*.parquet"))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


def encoder_of(checkpoint):
    values = {"checkpoint": checkpoint, "dataset": "unused", "output": "unused"}
    return load_encoder(EmbedConfig.model_validate(values | {"batch_size": 100}))


def own_embeddings(checkpoint, dataset):
    """Computes embeddings as an evaluation does: media [Q, D], captions [M, D] and their items."""
    samples = KeptSamples(dataset, subset=None)
    rows = [samples.read_sample(n) for n in range(len(samples))]
    keys, captions = [row.key for row in rows], [captions_of(row) for row in rows]
    texts = [text for of_sample in captions for text in of_sample]
    media_of_text = np.repeat(np.arange(len(samples)), [len(each) for each in captions])
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddingStore(Path(folder), encoder_of(checkpoint))
        store.encode_media(samples, keys)
        store.encode_texts(texts, name="captions")
        media, text_embeddings = store.media(samples, keys), store.texts(texts)
    return media.numpy(), text_embeddings.numpy(), media_of_text


@pytest.mark.parametrize(
    ("name", "settings"), [("colors", {"batch_size": 7}), ("tones", {"workers": 2})]
)
def test_embeddings_are_those_that_evaluation_makes(
    embed, toy_data, checkpoint, tmp_path, name, settings
):
    status, printed = embed(toy_data / name, **settings)
    assert status == 0, printed
    media, texts, media_of_text = own_embeddings(checkpoint, toy_data / name)
    rows = read_rows(tmp_path / "out")
    found = np.array([row["media_embedding"] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(found, media, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    found = np.concatenate([row["caption_embeddings"] for row in rows])
    np.testing.assert_allclose(found, texts, atol=1e-6)
    counts = [len(row["caption_embeddings"]) for row in rows]
    assert np.array_equal(np.repeat(np.arange(len(rows)), counts), media_of_text)
    assert [row["key"] for row in rows] == [f"{n:06d}" for n in range(len(media))]
    assert [row["uid"] for row in rows] == [row["key"] for row in rows]


def test_files_say_what_they_hold_and_what_they_are_made_from(
    embed, toy_data, checkpoint, tmp_path
):
    assert embed(toy_data / "colors")[0] == 0
    dataset = Dataset(toy_data / "colors")
    origin = origin_of(dataset, encoder_of(checkpoint))
    out = tmp_path / "out"
    names = ["00000000.parquet", "00000001.parquet", "00000002.parquet", "embeddings.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    vector = pyarrow.list_(pyarrow.float32(), 16)
    for name, size in zip(names[:3], (40, 13, 30), strict=True):
        table = pyarrow.parquet.read_table(out / name)
        assert table.num_rows == size
        assert table.schema.field("media_embedding").type == vector
        assert table.schema.field("caption_embeddings").type.value_type == vector
        metadata = table.schema.metadata
        assert metadata[b"isopair.dataset_fingerprint"].decode() == dataset.info.fingerprint
        assert metadata[b"isopair.checkpoint"].decode() == origin.checkpoint
    record = json.loads((out / "embeddings.json").read_text())
    assert record["dataset_fingerprint"] == dataset.info.fingerprint
    assert (record["num_embedded"], record["bad_samples"], record["embed_dim"]) == (83, [], 16)
    assert record["transform"]["size"] == 16


def test_finished_shards_are_kept_and_those_of_another_origin_refused(
    embed, toy_data, checkpoint, tmp_path
):
    out = tmp_path / "out"
    assert embed(toy_data / "colors")[0] == 0
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "00000001.parquet").unlink()
    (out / "embeddings.json").unlink()
    (out / ".00000001.parquet.host.1.tmp").write_bytes(b"of an attempt that was killed")
    kept_file = (out / "00000000.parquet").stat().st_ino
    assert "; 2 are already finished" in embed(toy_data / "colors", "--dry-run")[1]
    assert embed(toy_data / "colors")[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents
    assert (out / "00000000.parquet").stat().st_ino == kept_file

    status, printed = embed(toy_data / "more_colors")
    assert status == 1
    assert "00000000.parquet: the embeddings have a different origin:" in printed
    assert "isopair.dataset_fingerprint: " in printed
    origin = origin_of(Dataset(toy_data / "colors"), encoder_of(checkpoint))
    for other in (replace(origin, checkpoint="other"), replace(origin, transform={"size": 224})):
        with pytest.raises(
            InputError, match=r"isopair\.(checkpoint|transform): .* in the file, .* now"
        ):
            is_finished(out / "00000000.parquet", other)


def damage(folder, numbers):
    """Flips a bit of the media of some samples of the first shard."""
    index = ShardIndex.read(folder / "00000000.idx")
    content = bytearray((folder / "00000000.tar").read_bytes())
    for number in numbers:
        block = int(index.table[number, index.fields.index("png"), 0])
        content[block * BLOCK_BYTES + 30] ^= 1
    (folder / "00000000.tar").write_bytes(content)


def write_uids(folder):
    """Writes the Parquet file of each shard, with uids that differ from the keys."""
    schema = shard_schema("image", kept={})
    start = 0
    for row in Dataset(folder).manifest:
        ordinals = range(start, start + row.num_samples)
        columns = dict.fromkeys(schema.names, [None] * row.num_samples)
        columns["key"] = [f"{n:06d}" for n in ordinals]
        columns["uid"] = [f"picture-{n}" for n in ordinals]
        table = pyarrow.Table.from_pydict(columns, schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{row.name}.parquet")
        start += row.num_samples


def test_bad_samples_are_left_out_and_named_and_the_rest_scores_a_subset(
    embed, toy_data, checkpoint, tmp_path
):
    folder = shutil.copytree(toy_data / "colors", tmp_path / "colors")
    write_uids(folder)
    damage(folder, [2, 39])
    status, printed = embed(folder)
    assert status == 1
    assert "2 of 83 samples are corrupt, above max_bad_fraction=0.001" in printed
    assert "sample 000039: .png: CRC32 mismatch with the index" in printed
    assert not (tmp_path / "out/embeddings.json").exists()

    status, printed = embed(folder, max_bad_fraction=0.03)
    assert status == 0
    assert "81 of 83 samples in 3 shards; 2 are corrupt and were skipped" in printed
    record = json.loads((tmp_path / "out/embeddings.json").read_text())
    bad = [(each["shard"], each["ordinal"]) for each in record["bad_samples"]]
    assert bad == [("00000000", 2), ("00000000", 39)]
    assert "sample 000039: .png: CRC32 mismatch" in record["bad_samples"][1]["reason"]
    rows = read_rows(tmp_path / "out")
    left = [n for n in range(83) if n not in (2, 39)]
    assert [row["uid"] for row in rows] == [f"picture-{n}" for n in left]
    media, texts, media_of_text = own_embeddings(checkpoint, toy_data / "colors")
    found = np.array([row["media_embedding"] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(found, media[left], atol=1e-6)

    cosines = (texts * media[media_of_text]).sum(axis=1)
    best = np.array([cosines[media_of_text == n].max() for n in range(83)])
    best[[2, 39]] = np.nan
    top = {"column": "clip_score", "fraction": 0.25}
    values = {"dataset": folder, "output": tmp_path / "x.subset", "top": top}
    chosen = choose_samples(
        MakeSubset.model_validate(values | {"embeddings": tmp_path / "out"})
    ).bitmap
    assert np.array_equal(np.flatnonzero(chosen), np.sort(np.argsort(-best)[:20]))


def test_what_cannot_be_embedded_is_named(embed, toy_data, tmp_path):
    assert "absent: expected a run folder" in embed(toy_data / "colors", "checkpoint=absent")[1]
    folder = shutil.copytree(toy_data / "colors", tmp_path / "colors")
    write_uids(folder)
    shutil.copy(folder / "00000000.parquet", folder / "00000001.parquet")
    assert "00000001.parquet: expected 13 rows" in embed(folder)[1]


def test_shards_in_folders_of_their_own_are_embedded_and_scored(
    embed, toy_data, checkpoint, tmp_path
):
    """Tests two tars of the same name, with audio that the dataset of images skips."""
    tars = tmp_path / "tars"
    for number, folder in enumerate(("a.b", "c")):
        (tars / folder).mkdir(parents=True)
        with tarfile.open(tars / folder / "train.0.tar", "w") as tar:
            for n in range(8 * number, 8 * number + 8):
                members = toy_members("image", n) | {"flac": b"no picture"}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{n:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    dataset = tmp_path / "indexed"
    index_shards(IndexShards(input=f"{tars}/*/*.tar", output=dataset, media="image"))
    status, printed = embed(dataset)
    assert status == 0, printed
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.parquet")} == {"a.b", "c"}
    media, texts, media_of_text = own_embeddings(checkpoint, dataset)
    cosines = (texts * media[media_of_text]).sum(axis=1)
    best = [cosines[media_of_text == n].max() for n in range(16)]
    top = {"column": "clip_score", "fraction": 0.25}
    values = {"dataset": dataset, "output": tmp_path / "x.subset", "top": top}
    chosen = choose_samples(MakeSubset(**values, embeddings=tmp_path / "out")).bitmap
    assert np.array_equal(np.flatnonzero(chosen), np.sort(np.argsort(best)[-4:]))


def run_embed(path):
    run(read_config(EmbedConfig, path))


@pytest.mark.slow
def test_processes_share_the_shards_and_write_what_one_writes(
    embed, toy_data, checkpoint, tmp_path
):
    assert embed(toy_data / "colors")[0] == 0
    alone = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    run_in_processes(2, run_embed, tmp_path / "embed.yaml")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == alone
