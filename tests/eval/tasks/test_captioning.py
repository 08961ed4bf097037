"""Captions of samples with named modalities: the objective decides on the media and the texts."""

import json

import pyarrow.parquet
import pytest

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.dataset import Dataset
from eval.evaluate import dry_run, run
from pretrain.config import PretrainConfig
from pretrain.data.transforms import build_transforms
from pretrain.model.tokenizer import build_tokenizer
from tests.eval.tasks.test_modality_retrieval import config_of
from tests.support.toy_coca import SMALL_DECODER
from tests.support.toy_towers import build_toy_model
from tests.support.toy_views import SHARD_SIZES, SIX, views_config, write_views

CAPTIONS = {"kind": "captioning", **SMALL_DECODER}
SOUNDS = CAPTIONS | {"media": "audio"}
SCANS = CAPTIONS | {"media": "scan"}
OTHER_SOUNDS = SOUNDS | {"text": {"text": "title"}}
TITLES = CAPTIONS | {"media": {"image": 2}, "text": {"text": "title"}}
# Objective of an evaluation -> media and text
VIEWS = {
    "sounds": ("audio", "text"),
    "titles": ("image", "text.title"),
    "captions:image-text": ("scan", "text"),  # the tower of scans is that of images
    "captions:audio-text": ("audio", "text.title"),
}


def use_model(monkeypatch, folder, clips, texts=None):
    """Makes eval load a model whose two streams also have objectives of captions."""
    values = views_config(folder, folder / "unused").model_dump(mode="json")
    values["streams"]["clips"]["objectives"] |= clips
    values["streams"]["texts"]["objectives"] |= texts or {}
    config = PretrainConfig.model_validate(values)
    tokenizer = build_tokenizer(config.model.text)
    by_kind = build_transforms(config.model, image=config.image, audio=config.audio)
    kinds = config.model.kinds.items()
    transforms = {modality: by_kind[kind] for modality, kind in kinds if kind in by_kind}
    model = build_toy_model(config, tokenizer).eval()
    monkeypatch.setattr(
        "eval.models.encoder.load_model", lambda *_, **__: (model, transforms, tokenizer)
    )


def section(data, **settings):
    return {"task": "captioning", "dataset": str(data), "max_tokens": 4} | settings


def expected_references(data, media, text):
    """Returns {key: texts} of the samples that have both, by a loop over all samples."""
    dataset, found = Dataset(data), {}
    for ordinal in range(len(dataset)):
        contents = dataset.read_modalities(ordinal)
        if {media, text} <= contents.present:
            found[contents.key] = contents.texts[text]
    return found


def test_the_views_of_the_objective_are_captioned_and_compared(tmp_path, monkeypatch):
    clips = {"sounds": SOUNDS, "titles": TITLES, "captions": SCANS}
    use_model(monkeypatch, tmp_path, clips, {"captions": OTHER_SOUNDS})
    data = write_views(tmp_path / "data")
    evaluations = {
        f"captions_{n}": section(data, objective=objective) for n, objective in enumerate(VIEWS)
    }
    run(config_of(tmp_path, evaluations))
    record = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]
    for name, (media, text) in zip(evaluations, VIEWS.values(), strict=True):
        table = pyarrow.parquet.read_table(tmp_path / f"out/predictions/{name}.parquet")
        rows = table.to_pylist()
        references = expected_references(data, media, text.rpartition(".")[2])
        assert {row["key"]: row["references"] for row in rows} == references
        assert record[name]["views"] == [media] and record[name]["text"] == text
        num_lacking = sum(SHARD_SIZES) - len(references)
        assert record[name]["num_lacking"] == num_lacking > 0
        note = f"{name}: {num_lacking} of 45 samples lack {media} or {text} and take no part."
        assert note in (tmp_path / "out/results.md").read_text()


def test_the_only_decoder_describes_its_own_media(tmp_path, monkeypatch, capsys):
    use_model(monkeypatch, tmp_path, {"sounds": SOUNDS})
    data = write_views(tmp_path / "data", always=("image", "audio"))
    config = config_of(tmp_path, {"sounds": section(data)})
    dry_run(config)
    assert (
        "greedy search, 45 samples, the views of the model's objective" in capsys.readouterr().out
    )
    run(config)
    record = json.loads((tmp_path / "out/results.json").read_text())["evaluations"]["sounds"]
    assert record["views"] == ["audio"]
    assert record["num_queries"] == len(expected_references(data, "audio", "text"))


def test_wrong_names_and_missing_texts_are_refused(tmp_path, monkeypatch):
    use_model(monkeypatch, tmp_path, {"sounds": SOUNDS}, {"titles": TITLES})
    data = write_views(tmp_path / "data")
    choices = r"caption media: sounds \(audio with text\), titles \(image with text\.title\)"
    for name, objective in (("null", None), ("none", "none")):
        with pytest.raises(InputError, match=rf"evaluations\.a\.objective={name}: .*{choices}"):
            run(config_of(tmp_path / name, {"a": section(data, objective=objective)}))
    few = Modalities({name: each for name, each in SIX.items() if name != "title"})
    bare = write_views(tmp_path / "bare", never=("title",), modalities=few)
    with pytest.raises(InputError, match=r"a: the decoder describes image.*text\.title: .*'title'"):
        run(config_of(tmp_path / "missing", {"a": section(bare, objective="titles")}))
