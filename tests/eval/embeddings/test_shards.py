"""Embeddings of every view of a dataset, each in a folder of its own."""

import json

import numpy as np
import pyarrow.parquet
import pytest

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.embeddings import check_embeddings
from eval.config import EmbedConfig
from eval.embed import dry_run, run
from tests.eval.tasks.test_modality_retrieval import items_of
from tests.support.toy_evaluation import write_toy_run
from tests.support.toy_views import SHARD_SIZES, SIX, write_views
from tests.support.toy_views_model import load_views_model


@pytest.fixture
def embed(tmp_path, monkeypatch):
    """Runs the command on samples with any subset of modalities; returns (dataset, output)."""
    monkeypatch.setattr("eval.models.encoder.load_model", load_views_model)
    data = write_views(tmp_path / "data", always=("title",), fraction=0.5)
    checkpoint = write_toy_run(tmp_path / "run")

    def embed(command=run, **settings):
        values = {"checkpoint": checkpoint, "dataset": data}
        values |= {"output": tmp_path / "out", "batch_size": 4}
        command(EmbedConfig.model_validate(values | settings))
        return data, tmp_path / "out"

    return embed


def rows_of(folder):
    paths = sorted(folder.glob("*.parquet"))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_every_view_has_a_folder_with_the_samples_that_have_it(embed):
    data, out = embed()
    dataset = Dataset(data)
    keys = [dataset.read_sample(ordinal).key for ordinal in range(len(dataset))]
    assert sorted(path.name for path in out.iterdir()) == sorted(SIX)
    for view, modality in SIX.items():
        items = items_of(dataset, view)
        rows, record = rows_of(out / view), json.loads((out / view / "embeddings.json").read_text())
        found = [keys[sample] for sample, *_ in items]
        assert [row["key"] for row in rows] == list(dict.fromkeys(found))
        if modality.kind == "text":
            embeddings = [each for row in rows for each in row["caption_embeddings"]]
            num_texts = [len(row["caption_embeddings"]) for row in rows]
            assert num_texts == [found.count(row["key"]) for row in rows]
        else:
            embeddings = [row["media_embedding"] for row in rows]
        expected = np.stack([each.numpy() for *_, each in items])
        np.testing.assert_allclose(np.array(embeddings), expected, atol=1e-6)
        assert (record["view"], record["num_embedded"]) == (view, len(rows))
        assert record["num_lacking"] == sum(SHARD_SIZES) - len(rows)
        column = "caption_embeddings" if modality.kind == "text" else "media_embedding"
        check_embeddings(out / view, dataset.info.fingerprint, columns=[column])
        with pytest.raises(InputError, match=f"of the view '{view}' without"):
            both = ["media_embedding", "caption_embeddings"]
            check_embeddings(out / view, dataset.info.fingerprint, columns=both)


def test_named_views_alone_are_embedded_and_finished_shards_kept(embed, capsys):
    views = ["scan", {"image": "scan"}, {"text": "title"}]
    embed(dry_run, views=views)
    assert "would embed 45 samples by image.scan in 3 shards; 0 are" in capsys.readouterr().out
    _, out = embed(views=views)
    assert sorted(path.name for path in out.iterdir()) == ["image.scan", "scan", "text.title"]
    scan, as_image = (rows_of(out / name) for name in ("scan", "image.scan"))
    assert [row["key"] for row in scan] == [row["key"] for row in as_image]
    assert scan[0]["media_embedding"] != as_image[0]["media_embedding"]  # of two towers
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    embed(views=views)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == made


def test_views_that_the_dataset_or_the_model_lacks_are_refused(embed):
    with pytest.raises(InputError, match=r"expected a modality of image, .*; found 'photo'"):
        embed(views=["photo"])
    with pytest.raises(InputError, match="contains scan, but the model has towers for"):
        embed(views=[{"photo": "scan"}])
