"""Tiny twins of published recipes: 20 steps with every strategy, and resumed on one process.

CLIP      Radford et al. 2021: two transformers, softmax over the batch
SigLIP    Zhai et al. 2023: a vision transformer with attention pooling, sigmoid of each pair
CLAP      Wu et al. 2023: HTSAT and a masked text transformer, projections of two layers
LiT       Zhai et al. 2022: a frozen image tower, a text tower from scratch
FLIP      Li et al. 2023: masked images, and whole ones at the end, here also larger
CoCa      Yu et al. 2022: CLIP with a decoder that attends to the image and writes the caption
"""

import shutil

import pytest
import torch

from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.run.attempts import read_attempts, read_metrics
from pretrain.train import pretrain
from tests.pretrain.towers.test_every_tower import HTSAT
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import train
from tests.support.toy_coca import SMALL_DECODER
from tests.support.toy_run import toy_config
from tests.support.toy_towers import write_clip_tokenizer

NUM_STEPS, SAVED = 20, 11  # SAVED: step of the checkpoint that a run resumes from
TEXT = {"library": "open_clip", "context_length": 12}
TEXT |= {"options": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 49408}}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 16}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 49408,
    "max_position_embeddings": 16,
}


def vit(**options):
    return {"library": "timm", "name": "test_vit", "options": VIT | options}


def clip(values):
    values["model"] |= {"image": vit(), "text": TEXT}


def siglip(values):
    without_mask = TEXT["options"] | {"no_causal_mask": True, "pool_type": "last"}
    image = vit(global_pool="map", class_token=False)
    values["model"] |= {"image": image, "text": TEXT | {"options": without_mask}}
    values["model"]["logit_scale"]["initial"] = 10
    values["streams"]["image-text"]["objectives"] = {"image-text": {"loss": "sigmoid"}}


def clap(values):
    audio = {"library": "transformers", "name": "clap_audio_model", "options": HTSAT}
    audio |= {"batch_norm": "frozen", "batch_norm_samples": 16, "projection": "mlp"}
    audio |= {"attention_dropout": False}
    values["model"] |= {"audio": audio, "image": None}
    values["model"]["text"] = {
        "library": "transformers",
        "name": "roberta",
        "options": BERT,
        "tokenizer": None,
        "projection": "mlp",
        "attention_dropout": False,
        "context_length": 12,
    }


def lit(values):
    values["model"] |= {"image": vit() | {"frozen": True}, "text": TEXT}


def flip(values):
    values["model"] |= {"image": vit(patch_drop_rate=0.5, dynamic_img_size=True), "text": TEXT}
    values["image"]["segments"] = [
        {"from_step": 14, "patch_dropout": 0.0},
        {"from_step": 16, "size": 24},
    ]


def coca(values):
    clip(values)
    captions = {"kind": "captioning", "weight": 2.0} | SMALL_DECODER
    values["streams"]["image-text"]["objectives"]["captions"] = captions


RECIPES = {"CLIP": clip, "SigLIP": siglip, "CLAP": clap, "LiT": lit, "FLIP": flip, "CoCa": coca}


def config_of(toy_data, folder, recipe, *, strategy="ddp", tokenizer):
    values = toy_config(toy_data, folder).model_dump(mode="json")
    values["model"] |= {"audio": None, "image": None}
    name = "audio-text" if recipe == "CLAP" else "image-text"
    RECIPES[recipe](values)
    if recipe == "CLAP":
        values["model"]["text"]["tokenizer"] = str(tokenizer)
    values["streams"] = {name: values["streams"][name] | {"global_batch_size": 8}}
    values["schedule"] = {"num_steps": NUM_STEPS, "warmup_steps": 2}
    values["optimizer"] = {"learning_rate": 1e-3, "eps": 1e-4}
    values["engine"]["strategy"] = strategy
    values["run"] |= {"checkpoint_every_steps": SAVED, "trackers": []}
    return PretrainConfig.model_validate(values)


def rows_of(folder):
    return [row for row in read_metrics(folder) if "validation" not in row]


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    """Returns {recipe: folder} of undisturbed runs of one process, and CLAP's tokenizer."""
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = write_clip_tokenizer(folder / "tokenizer")
    folders = {recipe: folder / recipe for recipe in RECIPES}
    for recipe, each in folders.items():
        pretrain(config_of(toy_data, each, recipe, tokenizer=tokenizer))
    return folders, tokenizer


def assert_same_run(folder, expected, recipe):
    rows, truths = rows_of(folder), rows_of(expected)
    assert len(rows) == NUM_STEPS
    for row, truth in zip(rows, truths, strict=True):
        assert row["data_digest"] == truth["data_digest"], recipe
        assert row["loss"] == pytest.approx(truth["loss"], rel=1e-3), (recipe, row["step"])
    found = load_model(folder)[0].state_dict()
    for name, value in load_model(expected)[0].state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_every_recipe_is_the_same_run_with_every_strategy(toy_data, tmp_path, alone, strategy):
    folders, tokenizer = alone
    for recipe, expected in folders.items():
        folder = tmp_path / recipe
        config = config_of(toy_data, folder, recipe, strategy=strategy, tokenizer=tokenizer)
        run_in_processes(2, train, config)
        assert_same_run(folder, expected, recipe)
        shutil.rmtree(folder / "checkpoints" / f"step_{NUM_STEPS:08d}")
        pretrain(config_of(toy_data, folder, recipe, tokenizer=tokenizer))
        attempts = [(each.world_size, each.from_step) for each in read_attempts(folder)]
        assert attempts == [(2, 0), (1, SAVED)]
        assert_same_run(folder, expected, recipe)


@pytest.mark.slow
def test_every_recipe_learns(alone):
    for recipe, folder in alone[0].items():
        losses = [row["total_loss"] for row in rows_of(folder)]
        assert sum(losses[-4:]) < sum(losses[:4]), recipe
