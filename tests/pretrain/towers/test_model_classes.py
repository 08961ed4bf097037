"""Halves of dual encoders against the whole models of transformers, with random weights."""

import pytest
import torch
from transformers import AutoConfig, ClapModel, CLIPModel, MetaClip2Model, Siglip2Model, SiglipModel

from data_prep.errors import InputError
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import build_media_backbone, build_text_backbone
from pretrain.settings.model import MediaTower, TextTower
from tests.pretrain.towers.test_every_tower import HTSAT, NAFLEX, SIZES, TEXT_SIZES

PAD = 1
TEXT = TEXT_SIZES | {"max_position_embeddings": 24, "pad_token_id": PAD, "vocab_size": 100}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
TOKENIZER = Tokenizer(None, context_length=16, pad_id=PAD, vocab_size=100)
# Model type -> (class, config of the half for media, kind of media).
WHOLE = {
    "clip": (CLIPModel, VISION, "image"),
    "siglip": (SiglipModel, VISION, "image"),
    "siglip2": (Siglip2Model, NAFLEX, "image"),
    "metaclip_2": (MetaClip2Model, VISION, "image"),
    "clap": (ClapModel, HTSAT | {"num_mel_bins": 32}, "audio"),
}


@pytest.fixture(scope="module", params=WHOLE)
def saved(request, tmp_path_factory):
    """Saves a tiny random model of every dual encoder: (model, folder, kind of media)."""
    model_class, media, kind = WHOLE[request.param]
    torch.manual_seed(0)
    half = "vision_config" if kind == "image" else "audio_config"
    text = TEXT | {"projection_size": 16} if "siglip" in request.param else TEXT
    model = model_class(AutoConfig.for_model(request.param, text_config=text, **{half: media}))
    folder = tmp_path_factory.mktemp(request.param)
    model.eval().save_pretrained(folder)
    return model, folder, kind


def loaded(folder, *, kind, **tower):
    tower = {"library": "transformers", "name": str(folder), "pretrained": True} | tower
    if kind == "text":
        tower = {"pooling": "own"} | tower
        return build_text_backbone(TextTower(**tower), tokenizer=TOKENIZER).eval()
    return build_media_backbone(MediaTower(**tower), kind=kind).eval()


def texts():
    tokens = torch.randint(3, 100, (3, 16), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((16, 5, 9)):
        tokens[row, length - 1] = 2  # the end token
        tokens[row, length:] = PAD
    return tokens


@torch.no_grad()
def test_the_media_half_equals_that_of_the_whole_model(saved):
    model, folder, kind = saved
    generator = torch.Generator().manual_seed(2)
    if kind == "audio":
        mel = torch.randn(3, 1, 32, 61, generator=generator)
        backbone = loaded(folder, kind=kind, batch_norm="frozen")
        expected = model.audio_model(input_features=mel.transpose(2, 3)).pooler_output
        assert torch.equal(backbone(mel), expected)
        return
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    inputs = {"pixel_values": pixels}
    if model.config.model_type == "siglip2":
        # convert_image_to_patches of transformers' processor, for one square of two patches a side
        patches = pixels.reshape(3, 3, 2, 8, 2, 8).permute(0, 2, 4, 3, 5, 1).reshape(3, 4, -1)
        shapes = torch.tensor([[2, 2]] * 3)
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(3, 4, dtype=torch.int64),
            "spatial_shapes": shapes,
        }
    expected = model.vision_model(**inputs).pooler_output
    assert torch.equal(loaded(folder, kind=kind)(pixels), expected)


@torch.no_grad()
def test_the_text_half_equals_that_of_the_whole_model(saved):
    model, folder, _ = saved
    tokens = texts()
    is_siglip = "siglip" in model.config.model_type
    mask = None if is_siglip else (tokens != PAD).long()
    expected = model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
    backbone = loaded(folder, kind="text", attention_dropout=False)
    assert torch.equal(backbone(tokens), expected)


def test_options_of_a_saved_half_are_in_its_section(saved):
    model, folder, _ = saved
    options = {"text_config": {"output_attentions": True}, "attn_implementation": "eager"}
    backbone = loaded(folder, kind="text", options=options, attention_dropout=False)
    assert backbone.backbone.config.output_attentions
    assert backbone.backbone.config._attn_implementation == "eager"
    with pytest.raises(InputError, match=r"write options: {text_config: {output_attentions: ...}}"):
        loaded(folder, kind="text", options={"output_attentions": True})
    assert model.config.text_config.output_attentions is False


def test_the_folder_of_the_other_half_is_refused(saved, tmp_path):
    model, _, kind = saved
    model.text_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.(image|audio): .*(choose one for|use one of)"):
        loaded(tmp_path, kind=kind)


def test_missing_weights_are_refused(saved):
    from safetensors.torch import load_file, save_file

    _, folder, kind = saved
    path = folder / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if name.startswith(("vision_model", "audio_model")))
    kept = path.read_bytes()
    save_file({name: weights[name] for name in weights if name != gone}, path, {"format": "pt"})
    try:
        with pytest.raises(InputError, match=r"expected weights of a .*, which .* does not hold"):
            loaded(folder, kind=kind, batch_norm="frozen" if kind == "audio" else None)
    finally:
        path.write_bytes(kept)
