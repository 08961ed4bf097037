import random

import numpy as np
import pytest
import torch
from timm.layers import DropPath, set_fused_attn
from torch import nn

from data_prep.errors import InputError
from pretrain.model.contrastive_model import StreamInputs
from pretrain.model.drop_layers import replace_drop_layers, sample_drops
from pretrain.model.sample_dropout import DropKeys, SampleDropPath, SamplePatchDropout
from pretrain.model.towers import probe_backbone
from tests.support.toy_droppers import VIT
from tests.support.toy_run import toy_config
from tests.support.toy_towers import (
    TINY_BERT,
    build_toy_model,
    write_clip_tokenizer,
    write_tiny_open_clip,
)


@pytest.fixture
def build_image_model(tmp_path):
    """A model in training whose image tower is given."""

    def build(**tower):
        model = toy_config(tmp_path, tmp_path / "run").model.model_dump(mode="json")
        config = toy_config(tmp_path, tmp_path / "run", model=model | {"image": tower})
        return build_toy_model(config).train()

    return build


def image_features(model, rows):
    pixels = torch.randint(
        0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    tokens = torch.ones(6, 12, dtype=torch.int64)
    drop_keys = DropKeys(torch.tensor(2), torch.arange(6)[rows])
    inputs = StreamInputs({"image": (pixels[rows],), "text": (tokens[rows],)}, drop_keys)
    return model([{"image-text": inputs}]).views["image-text"]["image"]


TINY_DINOV2 = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "drop_path_rate": 0.5,
    "hidden_dropout_prob": 0.2,
}
TINY_CONVNEXT = {
    "num_stages": 2,
    "hidden_sizes": [8, 16],
    "depths": [2, 2],
    "patch_size": 2,
    "drop_path_rate": 0.5,
    "layer_scale_init_value": 1.0,
}


@pytest.mark.parametrize(
    ("tower", "kind_of_layer"),
    [
        (VIT, SamplePatchDropout),
        ({"library": "transformers", "name": "dinov2", "options": TINY_DINOV2}, SampleDropPath),
        ({"library": "transformers", "name": "convnext", "options": TINY_CONVNEXT}, SampleDropPath),
        (
            {
                "library": "timm",
                "name": "vit_pe_core_tiny_patch16_384",
                "options": {"img_size": 16, "patch_size": 4, "depth": 2, "patch_drop_rate": 0.5},
            },
            SamplePatchDropout,
        ),
    ],
    ids=["timm vit", "transformers dinov2", "transformers convnext", "timm eva"],
)
def test_a_tower_drops_alike_for_a_pair_whoever_is_beside_it(
    build_image_model, tower, kind_of_layer
):
    model = build_image_model(**tower)
    assert any(isinstance(layer, kind_of_layer) for layer in sample_drops(model))
    with torch.no_grad():
        whole = image_features(model, slice(0, 6))
        parts = [image_features(model, rows) for rows in (slice(0, 1), slice(1, 6))]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(whole, image_features(model.eval(), slice(0, 6)), atol=1e-2)


def test_open_clips_patch_dropout_is_drawn_per_sample(build_image_model, tmp_path):
    write_tiny_open_clip(tmp_path)
    tower = {"library": "open_clip", "name": "tiny", "options": {"force_patch_dropout": 0.5}}
    model = build_image_model(**tower)
    layer = model.towers["image"].backbone.patch_dropout
    assert (layer.prob, layer.num_prefix_tokens) == (0.5, 1)
    with torch.no_grad():
        whole = image_features(model, slice(0, 6))
        alone = image_features(model, slice(4, 6))
    torch.testing.assert_close(alone, whole[4:], atol=1e-5, rtol=1e-4)


def test_a_layer_called_twice_draws_twice(build_image_model):
    model = build_image_model(library="transformers", name="dinov2", options=TINY_DINOV2)
    layer = next(each for each in sample_drops(model) if isinstance(each, SampleDropPath))
    drawn = []
    layer.register_forward_hook(lambda _, inputs, output: drawn.append(output.flatten(1).any(1)))
    for step in range(8):
        drop_keys = DropKeys(torch.tensor(step), torch.arange(6))
        pixels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
        tokens = torch.ones(6, 12, dtype=torch.int64)
        inputs = StreamInputs({"image": (pixels,), "text": (tokens,)}, drop_keys)
        model([{"image-text": inputs}])
    assert len(drawn) == 16
    assert not torch.equal(torch.cat(drawn[::2]), torch.cat(drawn[1::2]))


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (
            VIT | {"options": VIT["options"] | {"attn_drop_rate": 0.3}},
            r"model\.image: layer blocks\.0\.attn \(Attention; rates: attn_drop\.p=0\.3, "
            r"proj_drop\.p=0\.2\) draws random .*set its rate to 0 in options: dropout layers",
        ),
        (
            {
                "library": "timm",
                "name": "test_resnet",
                "options": {"norm_layer": "groupnorm1", "drop_rate": 0.3},
            },
            r"layer \(the backbone\) \(ResNet; rates: drop_rate=0\.3\) draws random numbers",
        ),
        (
            {
                "library": "transformers",
                "name": "dinov2",
                "options": TINY_DINOV2 | {"attention_probs_dropout_prob": 0.25},
            },
            r"\(Dinov2\w*; rates: attention_dropout=0\.25\) draws random numbers",
        ),
        (
            VIT | {"options": VIT["options"] | {"drop_path_rate": 1.0}},
            r"model\.image\.blocks\.1\.drop_path1: expected a probability from 0 to "
            "below 1",
        ),
    ],
)
def test_dropping_that_cannot_be_drawn_per_sample_is_refused(build_image_model, tower, message):
    with pytest.raises(InputError, match=message):
        build_image_model(**tower)


def test_attention_dropout_of_a_text_tower_is_refused(tmp_path):
    options = TINY_BERT | {"attention_probs_dropout_prob": 0.2}
    text = {"library": "transformers", "name": "bert", "options": options, "context_length": 12}
    text["tokenizer"] = str(write_clip_tokenizer(tmp_path / "tokenizer"))
    model = toy_config(tmp_path, tmp_path / "run").model.model_dump(mode="json")
    config = toy_config(tmp_path, tmp_path / "run", model=model | {"text": text})
    with pytest.raises(InputError, match=r"\(BertSelfAttention; rates: dropout\.p=0\.2\)"):
        build_toy_model(config)


class Layered(nn.Module):
    """A backbone with one layer that drops, fed in some way."""

    def __init__(self, layer, before=lambda rows: rows, after=lambda rows: rows):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layer = layer
        self.before = before
        self.after = after

    def forward(self, rows):
        return self.after(self.layer(self.before(self.first(rows)))).mean(dim=1)


def probed(backbone):
    drop_keys = replace_drop_layers(backbone, kind="image")
    examples = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    return probe_backbone(backbone, examples, where="model.image", drop_keys=drop_keys)


class ThinDropPath(nn.Module):
    """Drops single places under the name of another layer."""

    def __init__(self):
        super().__init__()
        self.drop_prob = 0.1

    def forward(self, rows):
        return nn.functional.dropout(rows, self.drop_prob, self.training)


class SkippedLayer(nn.Module):
    """Leaves itself out at random, by a generator that is not torch's."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.layerdrop = 0.2

    def forward(self, rows):
        return rows if self.training and self.draw() < self.layerdrop else 2 * rows


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            Layered(
                nn.Dropout(0.1), lambda rows: rows.transpose(0, 1), lambda r: r.transpose(0, 1)
            ),
            r"layer layer drops from \[4, 2, 6\] for 2 samples; expected the rows of a sample next",
        ),
        (
            Layered(
                nn.Dropout(0.1),
                lambda r: r.transpose(0, 1).reshape(8, 6),
                lambda r: r.view(2, 4, 6),
            ),
            r"drops from \[8, 6\] for 2 samples",
        ),
        (
            Layered(nn.Dropout(0.1), lambda rows: torch.ones(2, 4, 6), lambda rows: rows),
            "expected the rows of a sample next to each other",
        ),
        (
            Layered(nn.AlphaDropout(0.1)),
            r"layer \(AlphaDropout; rates: p=0\.1\) draws random",
        ),
        (Layered(ThinDropPath()), "expected a ThinDropPath that drops entire rows"),
        (
            Layered(SkippedLayer(random.random)),
            r"\(SkippedLayer; rates: layerdrop=0\.2\)",
        ),
        (Layered(SkippedLayer(np.random.random)), r"\(SkippedLayer; rates: layerdrop=0\.2\)"),
        (Layered(SkippedLayer(lambda: torch.rand(()))), r"\(SkippedLayer; rates: layerdrop=0\.2\)"),
    ],
    ids=["second axis", "mixed rows", "no sample", "alpha", "path", "random", "numpy", "torch"],
)
def test_a_layer_that_would_depend_on_the_batch_is_refused(backbone, message):
    with pytest.raises(InputError, match=message):
        probed(backbone)


def test_adjacent_rows_are_accepted_also_after_zeros():
    """Tests layers initialised to zeros, whose later inputs must be checked all the same."""
    zero = nn.Linear(6, 6)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    flat = Layered(
        nn.Sequential(zero, nn.Dropout(0.1), DropPath(0.1)),
        lambda rows: rows.reshape(8, 6)[: rows.numel() // 6] if len(rows) == 2 else rows[0],
        lambda rows: rows.view(-1, 4, 6),
    )
    assert probed(flat) == 6
    assert not zero.weight.any()
    assert [type(layer).__name__ for layer in flat.layer] == [
        "Linear",
        "SampleDropout",
        "SampleDropPath",
    ]


def test_a_layer_in_two_places_stays_one():
    shared = nn.Dropout(0.5)
    backbone = Layered(nn.Sequential(shared, nn.Linear(6, 6), shared))
    assert probed(backbone) == 6
    assert backbone.layer[0] is backbone.layer[2]
    assert len(sample_drops(backbone)) == 1


def test_attention_dropout_as_a_layer_is_drawn_per_sample(build_image_model):
    """Tests attention without a fused kernel, whose weights pass through a dropout layer."""
    options = VIT["options"] | {"attn_drop_rate": 0.3}
    set_fused_attn(False)
    try:
        model = build_image_model(**VIT | {"options": options})
    finally:
        set_fused_attn(True)
    names = [layer.name for layer in sample_drops(model)]
    assert "image.blocks.0.attn.attn_drop" in names
    with torch.no_grad():
        whole, alone = image_features(model, slice(0, 6)), image_features(model, slice(5, 6))
    torch.testing.assert_close(alone, whole[5:], atol=1e-5, rtol=1e-4)


def test_a_frozen_tower_may_drop_as_it_likes(build_image_model):
    options = VIT["options"] | {"attn_drop_rate": 0.3}
    model = build_image_model(**VIT | {"options": options, "frozen": True})
    assert not sample_drops(model)
    assert not model.towers["image"].backbone.training


TINY_MAE = {key: value for key, value in TINY_DINOV2.items() if "drop" not in key}


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
def test_a_tower_that_draws_in_evaluation_mode_is_refused(build_image_model, is_frozen):
    mode = "in evaluation mode, too" if is_frozen else "that depend on which samples share"
    message = rf"layer backbone\.embeddings \(ViTMAEEmbeddings\) draws random numbers {mode}"
    tower = {"library": "transformers", "name": "vit_mae", "options": TINY_MAE}
    with pytest.raises(InputError, match=message):
        build_image_model(**tower, frozen=is_frozen)


def test_building_draws_nothing_that_would_change_the_weights(build_image_model):
    """Compares towers built after a dropping and after a plain image tower."""
    plain = {key: rate for key, rate in VIT["options"].items() if "drop" not in key}
    states = [
        build_image_model(**VIT | {"options": options}).state_dict()
        for options in (plain, VIT["options"])
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
