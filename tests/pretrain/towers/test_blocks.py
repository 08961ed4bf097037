"""Layers of towers against timm's layer decay, and against names by eye."""

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import build_media_backbone, build_text_backbone
from pretrain.settings.model import MediaTower, TextTower
from pretrain.towers.blocks import layers_of
from tests.pretrain.towers.test_every_tower import HTSAT, SIZES, TEXT_SIZES, WHISPER

# With and without parameters of its own after the last block, and with stages.
TIMM = (
    *("vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "beit_base_patch16_224"),
    *("convnext_tiny", "resnet18"),
)


@pytest.mark.parametrize("name", TIMM)
def test_layers_of_timm_are_those_of_its_layer_decay_with_a_head(name):
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0)
        classifier = timm.create_model(name, num_classes=3)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    expected = {
        names[id(parameter)]: group["lr_scale"]
        for group in param_groups_layer_decay(classifier, layer_decay=0.75)
        for parameter in group["params"]
    }
    layers = layers_of(backbone, lambda: pytest.fail("timm knows the layers"))
    for each, layer in layers.of_parameter.items():
        assert 0.75 ** (layers.top - layer) == pytest.approx(expected[each]), each
    assert layers.num_blocks == max(layers.of_parameter.values()) - (
        layers.top in layers.of_parameter.values()
    )


def test_layers_by_use_agree_with_timm_on_every_block(monkeypatch):
    backbone = timm.create_model("test_vit", num_classes=0, depth=4, img_size=32).eval()
    known = layers_of(backbone, lambda: None)
    monkeypatch.delattr(type(backbone), "group_matcher")
    found = layers_of(backbone, lambda: backbone(torch.zeros(1, 3, 32, 32)))
    assert found.num_blocks == known.num_blocks == 4
    different = {n for n, layer in known.of_parameter.items() if found.of_parameter[n] != layer}
    assert different == {"norm.weight", "norm.bias"}  # timm counts them to the last block


DEPTH = {"num_hidden_layers": 3}
VISION = SIZES | DEPTH | {"image_size": 16, "patch_size": 8}
TOKENIZER = Tokenizer(None, context_length=12, pad_id=0, vocab_size=100)
TEXT = TEXT_SIZES | DEPTH | {"max_position_embeddings": 20}
OPEN_CLIP = {"width": 16, "heads": 2, "layers": 3, "vocab_size": 100, "output_dim": 8}
# (kind, section, shape of an input, embeddings, a block, what follows the blocks). A block is found
# by its number; of parts with no number, the pattern of the next block follows.
TOWERS = {
    "siglip vision": ("image", VISION, (3, 16, 16), "embeddings", "layers.N.", "layernorm|head"),
    "clip vision": (
        *("image", VISION, (3, 16, 16)),
        *("embeddings|pre_layrnorm", "layers.N.", "post_layernorm"),
    ),
    "clip text": ("text", TEXT, (12,), "embeddings", "layers.N.", "final_layer_norm"),
    "bert": ("text", TEXT, (12,), "embeddings", "layer.N.", "pooler"),
    "whisper": (
        *("audio", WHISPER | {"encoder_layers": 3, "num_mel_bins": 16}, (1, 16, 3000)),
        *("conv|embed_positions", "layers.N.", r"\.layer_norm\."),
    ),
    "open_clip text": (
        *("text", OPEN_CLIP, (12,)),
        *("token_embedding|positional_embedding", "resblocks.N.", "ln_final|text_projection"),
    ),
}
NAMES = {
    "siglip vision": "siglip_vision_model",
    "clip vision": "clip_vision_model",
    "clip text": "clip_text_model",
    "bert": "bert",
    "whisper": "whisper",
    "open_clip text": "TextTransformer",
}


@pytest.mark.parametrize("tower", TOWERS)
def test_layers_of_other_libraries_are_those_that_their_names_say(tower):
    kind, options, shape, embeddings, block, top = TOWERS[tower]
    library = "open_clip" if tower.startswith("open_clip") else "transformers"
    section = {"library": library, "name": NAMES[tower], "options": options}
    if kind == "text":
        section = TextTower(**section, context_length=12, attention_dropout=False)
        backbone = build_text_backbone(section, tokenizer=TOKENIZER).eval()
        example = torch.ones(1, *shape, dtype=torch.int64)
    else:
        section = MediaTower(**section, attention_dropout=False)
        backbone = build_media_backbone(section, kind=kind).eval()
        example = torch.zeros(1, *shape)
    layers = layers_of(backbone, lambda: backbone(example))
    assert layers.num_blocks == 3
    assert set(layers.of_parameter) == {name for name, _ in backbone.named_parameters()}
    pattern = re.escape(block).replace("N", r"(\d+)")
    for name, layer in layers.of_parameter.items():
        if found := re.search(pattern, name):
            assert layer == int(found.group(1)) + 1, name
        elif re.search(embeddings, name):
            assert layer == 0, name
        else:
            assert re.search(top, name), name
            assert layer == layers.top, name


def test_what_stands_between_the_blocks_of_two_stages_belongs_to_the_second():
    section = MediaTower(
        library="transformers",
        name="clap_audio_model",
        options=HTSAT | {"depths": [2, 1], "num_mel_bins": 32},
        batch_norm="frozen",
        attention_dropout=False,
    )
    backbone = build_media_backbone(section, kind="audio").eval()
    layers = layers_of(backbone, lambda: backbone(torch.zeros(1, 1, 32, 64)))
    assert layers.num_blocks == 3
    of_part = {
        part: {layer for name, layer in layers.of_parameter.items() if part in name}
        for part in ("patch_embed", "layers.0.blocks.1.", "layers.0.downsample", "layers.1.blocks.")
    }
    assert list(of_part.values()) == [{0}, {2}, {3}, {3}]
