"""The files outside the config that determine a model."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import open_clip
import pytest
import torch
from huggingface_hub import file_download
from transformers import AutoConfig, AutoModel

from data_prep.config_file import Section
from pretrain.config import PretrainConfig
from pretrain.model.source_files import fingerprint_of_files, tokenizer_files, tower_files
from pretrain.settings.model import Model, TextTower
from pretrain.settings.objectives import ObjectiveSection
from tests.support.config_fields import objective_sections
from tests.support.toy_towers import TINY_BERT, write_tiny_open_clip, write_word_tokenizer

DATA = "its dataset has a fingerprint"
OUTPUT = "only written, or holds what the run wrote"
NAME = "part of the identity as text; names no file"
TOWERS = (*(f"model.{kind}" for kind in ("image", "audio", "text")), "model.modalities.*.tower")
# Key of a text or path of the config -> why the run cannot read another content there.
HARMLESS = {
    "run.folder": OUTPUT,
    "run.checkpoint_folder": "its checkpoints are compared with the run",
    "run.parent": "parent.json records the state that a fork begins from",
    "loading.cache.folder": "every file in it has a checksum",
    "engine.deepspeed_config": "tunes memory and communication only",
    **{
        f"{tower}.start.{name}": NAME
        for tower in TOWERS
        for name in ("tower", "expect_missing.*", "ignore.*")
    },
    "model.modalities.*.tower": NAME,
    "streams.*.sources.*.name": NAME,
    "streams.*.segments.*.sources.*.name": NAME,
    **{
        f"streams.*.objectives.*.{name}": NAME
        for name in (
            *("left", "right", "temperature", "media", "text", "name"),
            *("start.tower", "start.expect_missing.*", "start.ignore.*"),
        )
    },
    **{
        f"optimizer.{name}": "patterns of names of parameters"
        for name in ("no_decay.*", "frozen.*", "unfreeze.*.parameters.*")
    },
}
FINGERPRINTED = {
    "streams.*.sources.*.dataset": DATA,
    "streams.*.sources.*.subset": DATA,
    "streams.*.segments.*.sources.*.dataset": DATA,
    "streams.*.segments.*.sources.*.subset": DATA,
    "streams.*.objectives.*.teacher.checkpoint": "teacher/<stream>/<objective>",
    "streams.*.objectives.*.start.from": "objectives.<module>.start",
    "validation.streams.*.dataset": "validation/<stream>",
    "validation.streams.*.subset": "validation/<stream>",
    "model.text.tokenizer": "model.text.tokenizer",
    "model.modalities.*.tower.tokenizer": "the tokenizer of model.text is used",
    **{
        f"{tower}.{name}": "pretrain.model.source_files"
        for tower in TOWERS
        for name in ("name", "pretrained", "options.*")
    },
    **{f"{tower}.start.from": "model.<tower>.start" for tower in TOWERS},
}


def texts_of(section, key=""):
    """Yields the keys of all fields that may hold a text or a path, other than fixed choices."""
    for name, field in section.model_fields.items():
        yield from _texts_in(field.annotation, f"{key}.{name}" if key else name)


def _texts_in(annotation, key):
    if annotation is ObjectiveSection:  # the section of any objective
        for section in objective_sections():
            yield from texts_of(section, key)
    elif annotation in (str, Path, Any):
        yield key
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield from texts_of(annotation, key)
    elif get_origin(annotation) is dict:
        yield from _texts_in(get_args(annotation)[1], f"{key}.*")
    elif get_origin(annotation) is not Literal:
        below = f"{key}.*" if get_origin(annotation) in (list, tuple) else key
        for part in get_args(annotation):
            yield from _texts_in(part, below)


def test_every_setting_that_may_name_a_file_has_a_fingerprint_or_a_reason():
    assert set(texts_of(PretrainConfig)) == HARMLESS.keys() | FINGERPRINTED.keys()


def fingerprints(files):
    return {key: fingerprint_of_files(paths) for key, paths in files.items() if paths}


def model(**towers):
    text = {"library": "open_clip"}
    return Model.model_validate({"embed_dim": 16, "text": text} | towers)


def assert_every_byte_counts(read, paths):
    """Checks that another content of each file changes the fingerprints, and moving does not."""
    before = read()
    assert before
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert read() != before, path
        path.write_bytes(content)
    assert read() == before


def test_a_tokenizer_is_all_its_files_wherever_they_are(tmp_path):
    folder = write_word_tokenizer(tmp_path / "words", ["a", "b"])
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "spiece.model"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("not read")

    def read(folder=folder, **settings):
        settings = {"library": "transformers", "name": "bert", "tokenizer": str(folder)} | settings
        return fingerprints(tokenizer_files(TextTower(**settings)))

    decisive = [path for path in folder.iterdir() if path.name != "README.md"]
    assert len(decisive) >= 6
    assert_every_byte_counts(read, decisive)
    assert read().keys() == {"model.text.tokenizer"}
    assert read() == read(tokenizer=None, name=str(folder))
    assert read() == read(shutil.copytree(folder, tmp_path / "copy"))
    (folder / "README.md").write_text("changed")
    assert read() == read(tmp_path / "copy")
    assert tokenizer_files(TextTower(library="open_clip")) == {}


def test_transformers_weights_are_found_whole_or_in_shards(tmp_path):
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **TINY_BERT | {"vocab_size": 300}))
    bert.save_pretrained(tmp_path / "whole")
    bert.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "shards"):
        folder = tmp_path / name
        by_path = {"library": "transformers", "name": "bert", "pretrained": str(folder)}
        by_name = by_path | {"name": str(folder), "pretrained": True}
        (folder / "training_args.bin").write_text("not read")
        (folder / "pytorch_model.bin").write_text("not read")
        expected = {path for path in folder.iterdir() if path.suffix != ".bin"}
        for tower in (by_path, by_name):
            [(key, paths)] = tower_files(model(text=tower)).items()
            assert (key, set(paths)) == ("model.text.pretrained", expected)
        assert_every_byte_counts(
            lambda tower=by_path: fingerprints(tower_files(model(text=tower))), expected
        )
    assert tower_files(model(text=by_path | {"pretrained": False})) == {}
    (folder / "model.safetensors.index.json").write_text("{")
    assert tower_files(model(text=by_path)).keys() == {"model.text.pretrained"}


def test_files_of_timm_open_clip_and_options(tmp_path):
    write_tiny_open_clip(tmp_path)
    for name in ("weights.pt", "image.pt", "config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    timm_file = {"library": "timm", "name": "vit", "pretrained": f"{tmp_path}/weights.pt"}
    timm_folder = {"library": "timm", "name": f"local-dir:{tmp_path}", "pretrained": True}
    clip = {"library": "open_clip", "name": "tiny", "pretrained": f"{tmp_path}/clip.pt"}
    options = {"act": "gelu", "n": 3, "a": [{"file": f"{tmp_path}/image.pt"}, "no/such/file"]}
    found = tower_files(model(image=timm_file, audio=timm_folder, text=clip | {"options": options}))
    names = {key: [path.name for path in paths] for key, paths in found.items()}
    assert names == {
        "model.image.pretrained": ["weights.pt"],
        "model.audio.pretrained": ["model.safetensors"],
        "model.audio.name": ["config.json"],
        "model.text.pretrained": ["clip.pt"],
        "model.text.options.a.0.file": ["image.pt"],
    }


def test_weights_that_are_gone_keep_their_key(tmp_path):
    for library, name in (("timm", "vit"), ("open_clip", "ViT-B-32"), ("transformers", "bert")):
        tower = {"library": library, "name": name, "pretrained": str(tmp_path / "gone")}
        assert tower_files(model(image=tower)) == {"model.image.pretrained": []}
    text = TextTower(library="transformers", name="bert", tokenizer=str(tmp_path / "gone"))
    assert tokenizer_files(text) == {"model.text.tokenizer": []}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts files into the cache of a hub, as a download does."""
    monkeypatch.setattr(file_download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository, **files):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        commit = torch.randint(2**60, ()).item()
        (folder / "snapshots" / f"{commit}").mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(f"{commit}")
        for name, content in files.items():
            (folder / "snapshots" / f"{commit}" / name).write_text(content)

    return put


def test_names_of_a_hub_are_looked_up_in_its_cache(hub):
    towers = {
        "image": {"library": "timm", "name": "test_convnext", "pretrained": True},
        "text": {"library": "transformers", "name": "group/bert", "pretrained": True},
    }

    def read():
        config = model(**towers)
        return fingerprints(tower_files(config) | tokenizer_files(config.text))

    assert read() == {}
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": json.dumps(index),
        "1.safetensors": "one",
        "2.safetensors": "two",
        "tokenizer.json": "{}",
    }
    hub("group/bert", **files)
    hub("timm/test_convnext.r160_in1k", **{"model.safetensors": "weights"})
    before = read()
    expected = {"model.image.pretrained", "model.text.pretrained", "model.text.tokenizer"}
    assert before.keys() == expected
    hub("group/bert", **files | {"README.md": "another commit with the same weights"})
    assert read() == before
    hub("group/bert", **files | {"2.safetensors": "other"})
    changed = read()
    assert {key for key in before if changed[key] != before[key]} == {"model.text.pretrained"}
    tag = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    hub(tag["hf_hub"].rstrip("/"), **{"open_clip_model.safetensors": "weights"})
    clip = {"library": "open_clip", "name": "ViT-B-32", "pretrained": "openai"}
    assert fingerprints(tower_files(model(text=clip))).keys() == {"model.text.pretrained"}
