"""Embeddings are cached per model, preprocessing, precision and version of the libraries."""

import json
from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import torch

from eval.config import EmbedConfig
from eval.embeddings.files import Origin, origin_of
from eval.embeddings.store import EmbeddingStore
from eval.models.encoder import load_encoder
from eval.models.loaded_model import encoding_packages
from tests.support.toy_models import OPEN_CLIP_SIZES, write_open_clip_folder

TEXTS = ["a red square", "two dogs on the grass"]
DATASET = SimpleNamespace(info=SimpleNamespace(media="image", fingerprint="f" * 64))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a toy CLIP, and two architectures of open_clip that both fit them."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "configs").mkdir()
    for name, settings in (("tiny77", {}), ("tiny77-quickgelu", {"quick_gelu": True})):
        path = folder / "configs" / f"{name}.json"
        path.write_text(json.dumps(OPEN_CLIP_SIZES | settings))
    open_clip.add_model_config(folder / "configs")
    return write_open_clip_folder(folder / "tiny") / "open_clip_model.safetensors"


def encoder_of(weights, architecture="tiny77"):
    values = {"checkpoint": weights, "open_clip_architecture": architecture, "batch_size": 4}
    values |= {"dataset": "unused", "output": "unused"}
    return load_encoder(EmbedConfig.model_validate(values))


@pytest.fixture(scope="module")
def encoder(weights):
    return encoder_of(weights)


def cached(folder, encoder):
    store = EmbeddingStore(folder, encoder)
    store.encode_texts(TEXTS, name="texts")
    return store.texts(TEXTS)


def test_architectures_with_equal_weights_do_not_share_embeddings(weights, encoder, tmp_path):
    encoders = [encoder, encoder_of(weights, "tiny77-quickgelu")]
    assert encoders[0].origin.sha256 == encoders[1].origin.sha256
    for encoder in (*encoders, encoders[0]):
        assert torch.equal(cached(tmp_path, encoder), encoder.encode_texts(TEXTS))
    assert not torch.equal(*(encoder.encode_texts(TEXTS) for encoder in encoders))
    assert len(list(tmp_path.iterdir())) == 2
    first, second = (origin_of(DATASET, encoder) for encoder in encoders)
    assert first.as_metadata() != second.as_metadata()


def folders_of(tmp_path, encoder, *, packages=None):
    """Returns the folders of the cached texts and of the cached media of an encoder."""
    store = EmbeddingStore(tmp_path, encoder)
    store.packages = packages or store.packages
    dataset = SimpleNamespace(folder=tmp_path / "set", fingerprint="f", info=DATASET.info)
    dataset = type("Sized", (SimpleNamespace,), {"__len__": lambda _: 5})(**vars(dataset))
    return store._text_parts(TEXTS).folder, store._media_parts(dataset).folder


def test_everything_that_decides_an_embedding_is_part_of_the_key(weights, encoder, tmp_path):
    own = folders_of(tmp_path, encoder)
    assert folders_of(tmp_path, encoder_of(weights)) == own
    origin = encoder.origin
    others = {
        "weights": replace(encoder, origin=replace(origin, sha256="0")),
        "precision": replace(encoder, dtype=torch.bfloat16),
        "batch size": replace(encoder, batch_size=5),
        "device": replace(encoder, device=torch.device("cuda")),
    }
    for key in origin.settings:
        settings = dict(origin.settings) | {key: "other"}
        others[key] = replace(encoder, origin=replace(origin, settings=settings))
    assert {"architecture", "model_cfg", "tokenizer"} <= set(others)
    for name, other in others.items():
        object.__setattr__(other, "embed_dim", 16)  # not computed on another device
        texts, media = folders_of(tmp_path, other)
        assert texts != own[0] and media != own[1], name
    for package in encoding_packages():
        versions = encoding_packages() | {package: "0.0.other"}
        texts, media = folders_of(tmp_path, encoder, packages=versions)
        assert texts != own[0] and media != own[1], package


def test_preprocessing_is_part_of_the_key_of_media(encoder, tmp_path):
    own = folders_of(tmp_path, encoder)
    front_end = replace(encoder.front_ends["image"], settings={"size": 224})
    texts, media = folders_of(tmp_path, replace(encoder, front_ends={"image": front_end}))
    assert (texts, media != own[1]) == (own[0], True)


def test_files_of_eval_embed_record_the_same_origin(encoder):
    origin = origin_of(DATASET, encoder)
    metadata = origin.as_metadata()
    for name in Origin.__dataclass_fields__:
        other = replace(origin, **{name: {"x": "other"}})
        assert other.as_metadata() != metadata, name
    assert json.loads(metadata["isopair.packages"]) == encoding_packages()
    assert json.loads(metadata["isopair.model_settings"])["architecture"] == "tiny77"
