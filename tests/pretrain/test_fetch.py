"""Fetching from a hub, and training with what was fetched."""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from data_prep.errors import InputError, RunError
from pretrain.fetch import describe_needs, fetch
from pretrain.hub import HubModel, cached_folder, model_of_tag, parse_hub_name
from pretrain.model.tokenizer import build_tokenizer
from pretrain.train import dry_run
from pretrain.warm_start.needs import find_needs, refuse_unfetched
from pretrain.warm_start.source import find_source
from tests.pretrain.run.test_fork import small_config
from tests.support.toy_hub import ToyHub
from tests.support.toy_towers import TINY_BERT, write_word_tokenizer

SIZES = TINY_BERT | {"vocab_size": 30}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = ToyHub()
    with hub.served() as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def bert(hub, tmp_path):
    """Puts a BERT and its tokenizer on the hub; returns its commit."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = write_word_tokenizer(tmp_path / "bert", ["picture", "is", "red"])
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    others = {"flax_model.msgpack": b"not read", "pytorch_model.bin": b"not read"}
    return hub.put("group/bert", files_of(folder) | others)


def config_with(data, tmp_path, **text):
    tower = {"library": "transformers", "context_length": 8} | text
    return small_config(data, tmp_path / "run", model={"text": tower})


def test_a_run_stops_at_once_until_the_command_that_it_names_has_run(
    toy_data, bert, hub, tmp_path, capsys
):
    start = {"from": "group/bert", "expect_missing": ["projection.*"]}
    config = config_with(toy_data, tmp_path, name="group/bert", start=start)
    with pytest.raises(
        InputError, match=r"model\.text\.name: expected .* python -m pretrain\.fetch CONFIG"
    ):
        dry_run(config)
    assert hub.requests == []  # it did not even ask
    fetch(config)
    output = capsys.readouterr().out
    assert f"model.text.start.from: group/bert is group/bert@{bert}, in {tmp_path}/hub" in output
    downloaded = {path.split("/")[-1] for path in hub.requests if "/resolve/" in path}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= downloaded
    assert not {"flax_model.msgpack", "pytorch_model.bin"} & downloaded
    hub.requests.clear()
    dry_run(config)
    assert "text tower starts from group/bert (sha256" in capsys.readouterr().out
    assert hub.requests == []


def test_a_pinned_revision_is_found_when_main_has_moved(bert, hub, toy_data, tmp_path, capsys):
    text = {"name": f"group/bert@{bert}", "start": {"from": f"group/bert@{bert}"}}
    config = config_with(toy_data, tmp_path, **text)
    newer = hub.put("group/bert", {"config.json": b"{}", "model.safetensors": b"other"})
    fetch(config)
    refuse_unfetched(config.model)
    expected = cached_folder(HubModel("group/bert", bert), needs=["config.json"])
    assert expected.name == bert
    source = find_source(f"group/bert@{bert}", where="")
    assert source.files == (expected / "model.safetensors",)
    assert build_tokenizer(config.model.text).vocab_size == 5
    with pytest.raises(InputError, match="group/bert@new in the hub's cache"):
        find_source("group/bert@new", where="model.text.start.from")
    hub.put("group/bert", files_of(expected), revision="new")
    fetch(config_with(toy_data, tmp_path, name="bert", tokenizer="group/bert@new"))
    assert newer not in capsys.readouterr().out


def test_shards_are_fetched_with_their_index(hub, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    shards = {name: save({key: torch.ones(2)}) for key, name in index["weight_map"].items()}
    index = json.dumps(index).encode()
    hub.put("group/large", shards | {"model.safetensors.index.json": index, "other.gguf": b"x"})
    from pretrain.fetch import fetch_need
    from pretrain.warm_start.needs import Need

    _, folder = fetch_need(Need("key", HubModel("group/large"), with_weights=True))
    assert {path.name for path in folder.iterdir()} == {*shards, "model.safetensors.index.json"}
    assert find_source("group/large", where="").read().keys() == {"a", "b"}


def test_what_the_hub_does_not_have_is_named(hub, toy_data, tmp_path, monkeypatch):
    def start(location):
        named = {"name": "bert", "options": SIZES, "tokenizer": str(tmp_path)}
        return config_with(toy_data, tmp_path, start={"from": location}, **named)

    hub.put("group/empty", {"config.json": b"{}"})
    with pytest.raises(InputError, match="expected weights in group/empty"):
        fetch(start("group/empty"))
    with pytest.raises(InputError, match="the hub has no model group/gone"):
        fetch(start("group/gone"))
    with pytest.raises(InputError, match="the hub has no model group/empty@v2"):
        fetch(start("group/empty@v2"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"cannot be fetched now: .*where there is internet"):
        fetch(start("group/empty"))


def test_tags_of_open_clip_and_timm_are_repositories():
    clip = model_of_tag("open_clip:ViT-B-32/laion2b_s34b_b79k", where="key")
    assert clip == HubModel("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    vit = model_of_tag("timm:vit_base_patch16_224.augreg_in1k", where="key")
    assert vit == HubModel("timm/vit_base_patch16_224.augreg_in1k")
    for name in ("open_clip:ViT-B-32/nothing", "open_clip:ViT", "timm:vit_base_patch16_224.no"):
        with pytest.raises(InputError, match=r"^key: expected"):
            model_of_tag(name, where="key")
    assert model_of_tag("group/name", where="key") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/clip", HubModel("openai/clip")),
        ("hf-hub:openai/clip@v1.0", HubModel("openai/clip", "v1.0")),
        ("openai/clip@refs/pr/3", HubModel("openai/clip", "refs/pr/3")),
        ("clip.pt", None),
        ("/models/clip", None),
        ("models/a/b", None),
        ("../clip/x", None),
        ("openai/clip@", None),
        ("tests/support", None),
    ],
)
def test_names_of_a_hub_are_told_from_paths(name, expected):
    assert parse_hub_name(name) == expected


def test_the_needs_of_every_setting_are_found(toy_data, tmp_path, capsys):
    image = {"library": "open_clip", "name": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}
    text = {"library": "transformers", "name": "group/text", "pretrained": True}
    config = small_config(toy_data, tmp_path / "run", model={"image": image, "text": text})
    found = {need.key: (need.model.name, need.with_weights) for need in find_needs(config.model)}
    clip = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    expected = {"model.image.pretrained": (clip, True), "model.text.name": ("group/text", False)}
    assert found == expected
    assert [need.with_weights for need in find_needs(config.model)] == [True, True, False]
    image = {"library": "timm", "name": "test_vit", "pretrained": True}
    config = small_config(toy_data, tmp_path / "run", model={"image": image})
    assert [each.model.name for each in find_needs(config.model)] == ["timm/test_vit.r160_in1k"]
    describe_needs(config)
    assert "weights and configs of timm/test_vit.r160_in1k" in capsys.readouterr().out
