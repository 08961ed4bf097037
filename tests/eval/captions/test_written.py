"""Captions of trained decoders: as open_clip writes them, alike on any number of processes."""

import json
import re

import open_clip
import pyarrow.parquet
import pytest
import torch
import yaml

from data_prep.command import run_command
from data_prep.errors import InputError
from eval import evaluate
from eval.captions.captioner import OpenClipCaptioner, find_captioner
from eval.captions.cider import caption_words
from eval.captions.search import search_captions
from eval.captions.written import SearchSettings, write_captions
from eval.config import EvaluateConfig
from eval.datasets.datasets import open_dataset
from eval.models.encoder import load_encoder
from eval.models.encoding import EncodingConfig
from pretrain.captioning.caption_marks import CaptionMarks
from pretrain.config import PretrainConfig
from pretrain.data.transforms import build_transforms
from pretrain.model.tokenizer import build_tokenizer
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_coca import (
    SMALL_DECODER,
    build_tiny_coca,
    small_captioning_config,
)
from tests.support.toy_evaluation import (
    COLORS,
    load_toy_model,
    picture_sample,
    sound_sample,
    write_dataset,
    write_toy_run,
)
from tests.support.toy_towers import build_toy_model
from tests.support.toy_views import views_config

CLIP = CaptionMarks(start=49406, end=49407, pad=0)
SETTINGS = SearchSettings(num_beams=2, max_tokens=6, length_penalty=1.0, batch_size=3)


def load_captioning_model(folder, *, device="cpu", weights="plain"):
    """Replaces pretrain.checkpoint.load_model: random weights, with captions of both media."""
    return untrained_model(small_captioning_config(folder, folder))


def untrained_model(config):
    tokenizer = build_tokenizer(config.model.text)
    transforms = build_transforms(config.model, image=config.image, audio=config.audio)
    return build_toy_model(config, tokenizer).eval(), transforms, tokenizer


def pictures(folder, *, count=8):
    samples = [picture_sample(list(COLORS)[n % 3], seed=n) for n in range(count)]
    return write_dataset(folder, samples)


def test_greedy_captions_of_coca_are_open_clips(tmp_path):
    model = build_tiny_coca(tmp_path).eval()
    captioner = OpenClipCaptioner(model, open_clip.get_tokenizer("ViT-B-32"), CLIP)
    media = torch.randn(3, 3, 16, 16)
    found = search_captions(
        lambda ids, items: captioner.logits(captioner.memory(media)[items], ids)[:, -1],
        3,
        marks=CLIP,
        max_tokens=8,
        device=torch.device("cpu"),
    )
    ids = torch.full((3, 1), CLIP.start)
    for _ in range(7):  # by the library's own forward pass; its `generate` needs transformers 4
        logits = model(media, ids, output_labels=False)["logits"][:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert found == ids.tolist()


def written(folder, dataset):
    """Returns the captions and losses of a dataset, in one of several processes."""
    from unittest.mock import patch

    with patch("eval.models.encoder.load_model", load_captioning_model):
        encoder = load_encoder(EncodingConfig(checkpoint=folder, batch_size=4))
    data = open_dataset(str(dataset), split="test", subset=None, columns=None)
    keys = [f"{number:04d}" for number in range(len(data))]
    captioner = find_captioner(encoder, "image", objective=None, where="here")
    references = [[f"a {number} picture", "red"] for number in range(len(data))]
    return write_captions(
        captioner, encoder, data, references, keys=keys, view="image", settings=SETTINGS
    )


def test_captions_are_the_same_on_two_processes(tmp_path):
    run, data = write_toy_run(tmp_path / "run"), pictures(tmp_path / "pictures")
    alone = written(run, data)
    assert [each.ordinal for each in alone] == list(range(8))
    assert all(each.num_tokens == 6 for each in alone)  # of "a 1 picture" and "red", with ends
    assert run_in_processes(2, written, run, data) == [alone, alone]


def evaluate_captions(tmp_path, samples, *overrides, media="image", **settings):
    """Runs the command on a dataset of samples, and returns its status."""
    folder = write_dataset(tmp_path / "data", samples, media=media)
    config = {
        "checkpoint": str(write_toy_run(tmp_path / "run")),
        "output": str(tmp_path / "results"),
        "bootstrap_samples": 100,
        "evaluations": {
            "captions": {"task": "captioning", "dataset": str(folder), "max_tokens": 6} | settings
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return run_command(
        EvaluateConfig,
        run=evaluate.run,
        dry_run=evaluate.dry_run,
        description="",
        arguments=[str(tmp_path / "config.yaml"), *overrides],
    )


@pytest.mark.parametrize("media", ["image", "audio"])
def test_the_task_reports_captions_and_metrics(tmp_path, monkeypatch, media):
    monkeypatch.setattr("eval.models.encoder.load_model", load_captioning_model)
    make, names = {"image": (picture_sample, COLORS), "audio": (sound_sample, ("low", "high"))}[
        media
    ]
    samples = [make(list(names)[n % len(names)], seed=n) for n in range(6)]
    assert evaluate_captions(tmp_path, samples, media=media) == 0
    record = json.loads((tmp_path / "results/results.json").read_text())["evaluations"]["captions"]
    scores = {name: score["value"] for name, score in record["scores"].items()}
    assert list(scores) == ["exact_match", "cider", "token_accuracy", "token_loss"]
    table = pyarrow.parquet.read_table(tmp_path / "results/predictions/captions.parquet")
    rows = table.to_pylist()
    assert scores["token_loss"] == pytest.approx(
        sum(row["loss"] for row in rows) / sum(row["num_tokens"] for row in rows)
    )
    assert scores["exact_match"] == sum(row["exact_match"] for row in rows) / 6
    assert all(row["written"] for row in rows)
    page = (tmp_path / "results/report.html").read_text()
    assert caption_words(rows[0]["written"])[0] in page
    assert record["scores"]["exact_match"]["chance"] == pytest.approx(
        {"image": (6 * (1 / 2) * (1 / 3) + 6 * 0.5 / 6) / 6, "audio": 1 / 2}[media]
    )


def test_models_that_cannot_caption_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.models.encoder.load_model", load_toy_model)
    assert evaluate_captions(tmp_path, [picture_sample("red", seed=0)]) == 1
    assert "evaluations.captions: the model has no decoder of captions for image" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 13}, "max_tokens=13: expected at most the model's context length, 12"),
        ({"objective": "none"}, "objective=none: expected one of.*caption image: captions"),
    ],
)
def test_settings_that_no_model_has_are_refused(tmp_path, monkeypatch, capsys, settings, message):
    monkeypatch.setattr("eval.models.encoder.load_model", load_captioning_model)
    assert evaluate_captions(tmp_path, [picture_sample("red", seed=0)], **settings) == 1
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def encoder_of(folder, monkeypatch, config):
    monkeypatch.setattr("eval.models.encoder.load_model", lambda *_, **__: untrained_model(config))
    return load_encoder(EncodingConfig(checkpoint=write_toy_run(folder / "run"), batch_size=4))


def test_captions_are_no_longer_than_those_of_the_tokenizer(tmp_path, monkeypatch):
    encoder = encoder_of(tmp_path, monkeypatch, small_captioning_config(tmp_path, tmp_path))
    encoder.tokenizer.context_length = 9
    captioner = find_captioner(encoder, "image", objective=None, where="here")
    assert captioner.decoder.decoder.context_length == 12
    ids = captioner.tokenize(["a picture of a very large and very red dog"])
    assert captioner.context_length == ids.shape[1] == 9
    memory = torch.zeros(1, 4, captioner.decoder.decoder.width)
    assert captioner.logits(memory, ids).shape == (1, 9, captioner.vocab_size)


def test_decoders_of_objectives_with_one_name_are_told_apart(tmp_path, monkeypatch):
    values = views_config(tmp_path, tmp_path / "run").model_dump(mode="json")
    text = values["model"]["text"]
    values["model"]["modalities"]["title"]["tower"] = text
    captions = {"kind": "captioning", **SMALL_DECODER}
    values["streams"]["clips"]["objectives"]["captions"] = captions
    values["streams"]["texts"]["objectives"]["captions"] = captions | {"text": "title"}
    values["streams"]["texts"]["objectives"]["sounds"] = captions | {"media": "audio"}
    values["streams"]["texts"]["objectives"]["titles"] = captions | {"text": "title"}
    encoder = encoder_of(tmp_path, monkeypatch, PretrainConfig.model_validate(values))
    modules = encoder.model.objective_modules
    for objective in (None, "captions", "none", "sounds"):
        names = "captions:image-text, captions:image-title, titles"
        with pytest.raises(InputError, match=rf"here\.objective=.* caption image: {names}"):
            find_captioner(encoder, "image", objective=objective, where="here")
    for objective, modality, module in (
        ("captions:image-text", "image", "captions:image-text"),
        ("captions:image-title", "image", "captions:image-title"),
        ("titles", "image", "titles:image-title"),
        (None, "audio", "sounds:audio-text"),
    ):
        found = find_captioner(encoder, modality, objective=objective, where="here")
        assert found.decoder is modules[module]
        assert found.text == module.rpartition("-")[2]


def test_captions_need_no_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.models.encoder.load_model", load_captioning_model)
    samples = [picture_sample("red", seed=seed) for seed in range(3)]
    assert evaluate_captions(tmp_path, samples, "matryoshka_dims=[2]") == 0
    assert not list((tmp_path / "results").rglob("origin.json"))


def test_cider_and_loss_are_no_metrics_of_averages(tmp_path):
    with pytest.raises(ValueError, match="use exact_match or token_accuracy"):
        EvaluateConfig.model_validate(
            {
                "checkpoint": "run",
                "output": "results",
                "evaluations": {
                    "a": {"task": "captioning", "dataset": "data", "main_metric": "cider"}
                },
            }
        )
