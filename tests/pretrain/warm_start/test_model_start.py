"""Towers that start from models of open_clip, timm and Isopair, compared with those models."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from data_prep.errors import ConfigError, InputError
from pretrain.config import PretrainConfig
from tests.support.toy_starts import (
    assert_equal_embeddings_and_gradients,
    randomize,
    start,
    start_config,
    tables_of,
    write_siglip_of_open_clip,
)
from tests.support.toy_towers import write_tiny_open_clip

CLIP = {"library": "open_clip", "name": "tiny"}
TOKENS = torch.tensor([[49406, 320, 1125, 49407] + [0] * 8, [49406, 7, 49407] + [0] * 9])


def pixels(size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Returns a folder with weights of the open_clip model "tiny", and the model."""
    folder = tmp_path_factory.mktemp("clip")
    model = randomize(write_tiny_open_clip(folder))
    model.logit_scale.data.fill_(4.25)
    state = model.state_dict()
    torch.save(state, folder / "clip.pt")
    return folder, model


def write_open_clip(folder, form, model):
    """Writes the weights of an open_clip model in one of its formats; returns the location."""
    state = model.state_dict()
    if form == "training .pt":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, folder / "epoch_3.pt")
        return str(folder / "epoch_3.pt")
    if form == "text at the top":
        at_top = {name.removeprefix("text."): tensor for name, tensor in state.items()}
        save_file(at_top, folder / "clip.safetensors")
        return str(folder / "clip.safetensors")
    if form == ".bin":
        torch.save(state, folder / "open_clip_pytorch_model.bin")
        return str(folder / "open_clip_pytorch_model.bin")
    (folder / "local").mkdir()
    (folder / "local" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    save_file(state, folder / "local" / "open_clip_model.safetensors")
    return f"local-dir:{folder / 'local'}" if form == "local-dir" else str(folder / "local")


@pytest.mark.parametrize("form", ["training .pt", "text at the top", ".bin", "local-dir", "folder"])
def test_a_clip_of_open_clip_starts_both_towers_and_the_temperature(clip, tmp_path, form):
    _, oracle = clip
    tower = CLIP | {"start": {"from": write_open_clip(tmp_path, form, oracle)}}
    model, warm_start = start(start_config(tmp_path, image=tower, text=tower))
    tables = tables_of(warm_start)
    image, text = model.towers["image"], model.towers["text"]
    assert_equal_embeddings_and_gradients(
        model.encode_image,
        image,
        oracle,
        lambda x: oracle.encode_image(image.input_stage(x)),
        pixels(),
        tables["image"],
    )
    assert_equal_embeddings_and_gradients(
        model.encode_text, text, oracle, oracle.encode_text, TOKENS, tables["text"]
    )
    assert model.log_logit_scale["image-text"].item() == 4.25
    assert "towers do not start from one source" in warm_start.temperatures[0]  # audio-text


def test_a_siglip_of_open_clip_starts_with_its_scale_and_bias(tmp_path):
    oracle = write_siglip_of_open_clip(tmp_path)
    oracle.logit_scale.data.fill_(4.0)
    oracle.logit_bias.data.fill_(-12.5)
    save_file(oracle.state_dict(), tmp_path / "siglip.safetensors")
    tower = {"library": "open_clip", "name": "tiny-siglip"}
    tower |= {"start": {"from": str(tmp_path / "siglip.safetensors")}}
    config = start_config(tmp_path, image_size=160, embed_dim=64, image=tower, text=tower)
    streams = config.model_dump(mode="json")["streams"]
    for stream in streams.values():
        for objective in stream["objectives"].values():
            objective["loss"] = "sigmoid"
    model, warm_start = start(
        PretrainConfig.model_validate(config.model_dump() | {"streams": streams})
    )
    tables = tables_of(warm_start)
    image = model.towers["image"]
    assert_equal_embeddings_and_gradients(
        model.encode_image,
        image,
        oracle,
        lambda x: oracle.encode_image(image.input_stage(x)),
        pixels(160),
        tables["image"],
    )
    assert_equal_embeddings_and_gradients(
        model.encode_text,
        model.towers["text"],
        oracle,
        oracle.encode_text,
        TOKENS,
        tables["text"],
    )
    assert model.log_logit_scale["image-text"].item() == 4.0
    assert model.logit_bias["image-text"].item() == -12.5


def test_positions_of_another_size_are_those_of_timm_and_longer_captions_keep_theirs(
    clip, tmp_path
):
    folder, oracle = clip
    source = {"start": {"from": str(folder / "clip.pt")}}
    image = CLIP | source | {"options": {"force_image_size": 32}}
    text = CLIP | source | {"options": {"force_context_length": 20}, "context_length": 20}
    model, warm_start = start(start_config(tmp_path, image_size=32, image=image, text=text))
    assert [table.counts()["resampled"] for table in warm_start.tables] == [1, 1]
    positions = model.towers["image"].backbone.positional_embedding
    expected = resample_abs_pos_embed(oracle.visual.positional_embedding[None], [4, 4])[0]
    torch.testing.assert_close(positions, expected, atol=0, rtol=0)
    fresh, _ = start(
        start_config(tmp_path, image_size=32, image=image, text=text | {"start": None})
    )
    positions, old = model.towers["text"].backbone, oracle.text.positional_embedding
    assert torch.equal(positions.positional_embedding[:12], old)
    new = fresh.towers["text"].backbone.positional_embedding[12:]
    assert torch.equal(positions.positional_embedding[12:], new)
    refused = image | {"start": source["start"] | {"resample": False}}
    with pytest.raises(ConfigError, match=r"visual\.positional_embedding: .*set resample: true"):
        start(start_config(tmp_path, image_size=32, image=refused))


VIT = {"library": "timm", "name": "test_vit"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Returns a file of a timm classifier, and the classifier."""
    folder = tmp_path_factory.mktemp("timm")
    model = randomize(timm.create_model("test_vit", img_size=64))
    torch.save({"model": model.state_dict()}, folder / "vit.pth")
    return folder / "vit.pth", model


def timm_start(path, **settings):
    named = {"expect_missing": ["projection.weight"], "ignore": ["head.*"]}
    return {"start": {"from": str(path)} | named | settings}


def test_a_file_of_timm_starts_an_image_tower_without_its_head(vit, tmp_path):
    path, oracle = vit
    tower = VIT | {"options": {"img_size": 64}} | timm_start(path)
    model, warm_start = start(start_config(tmp_path, image_size=64, image=tower))
    counts = warm_start.tables[0].counts()
    assert (counts["unused"], counts["missing"], counts["resampled"]) == (2, 1, 0)
    x = model.towers["image"].input_stage(pixels(64))
    expected = oracle.forward_head(oracle.forward_features(x), pre_logits=True)
    assert torch.equal(model.towers["image"].backbone(x), expected)


def test_a_file_of_timm_is_resampled_by_timm_for_spectrograms(vit, tmp_path):
    path, oracle = vit
    tower = VIT | {"options": {"img_size": [16, 26], "patch_size": 2}} | timm_start(path)
    config = start_config(tmp_path, audio=tower)
    model, warm_start = start(config)
    rows = {row.tower for row in warm_start.tables[0].rows if row.status == "resampled"}
    assert rows == {"backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    found = dict(model.towers["audio"].backbone.named_parameters())
    kernels = resample_patch_embed(oracle.patch_embed.proj.weight, [2, 2]).sum(dim=1, keepdim=True)
    torch.testing.assert_close(found["patch_embed.proj.weight"], kernels)
    positions = resample_abs_pos_embed(oracle.pos_embed, [8, 13])
    torch.testing.assert_close(found["pos_embed"], positions, atol=0, rtol=0)


def test_each_layout_of_open_clip_starts_a_tower_of_timm(clip, tmp_path):
    """Compares with open_clip: CLIP's Vision Transformer is one of timm's, too."""
    folder, oracle = clip
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    tower = {"library": "timm", "name": "vit_base_patch32_clip_224", "options": options}
    config = start_config(
        tmp_path, image=tower | {"start": {"from": str(folder / "clip.pt")}}, embed_dim=16
    )
    model, warm_start = start(config)
    tables_of(warm_start)
    x = model.towers["image"].input_stage(pixels())
    expected = oracle.encode_image(x, normalize=True)
    torch.testing.assert_close(model.encode_image(pixels()), expected, atol=1e-5, rtol=0)


def test_missing_and_unused_tensors_stop_the_run_with_the_lines_to_write(vit, tmp_path):
    path, _ = vit
    tower = VIT | {"options": {"img_size": 64, "depth": 7}} | {"start": {"from": str(path)}}
    with pytest.raises(ConfigError) as raised:
        start(start_config(tmp_path, image_size=64, image=tower))
    message = str(raised.value)
    assert "model.image.start: expected a value for every tensor" in message
    advice = 'expect_missing: ["backbone.blocks.6.*", "projection.*"], ignore: ["head.*"]'
    assert message.endswith(f"if this is intended, write under model.image.start: {advice}")
    advised = {"expect_missing": ["backbone.blocks.6.*", "projection.*"], "ignore": ["head.*"]}
    start(start_config(tmp_path, image_size=64, image=tower | timm_start(path, **advised)))
    wrong = timm_start(path, **advised | {"ignore": ["head.*", "tail.*"]})
    with pytest.raises(ConfigError, match=r"ignore: 'tail\.\*' fits no tensor"):
        start(start_config(tmp_path, image_size=64, image=tower | wrong))


def test_sizes_that_nothing_resamples_and_other_towers_are_refused(vit, clip, tmp_path):
    path, _ = vit
    folder, _ = clip
    narrow = VIT | {"options": {"img_size": 64, "embed_dim": 32, "num_heads": 2}} | timm_start(path)
    with pytest.raises(InputError, match=r"which is not resampled; build the tower with"):
        start(start_config(tmp_path, image_size=64, image=narrow))
    start_of_sound = CLIP | {"start": {"from": str(folder / "clip.pt"), "tower": "audio"}}
    with pytest.raises(ConfigError, match="expected a tower for audio, found towers for image and"):
        start(start_config(tmp_path, image=start_of_sound))
    state = torch.load(path)["model"]
    state["norm.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    tower = VIT | {"options": {"img_size": 64}} | timm_start(tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"norm\.bias: expected finite numbers"):
        start(start_config(tmp_path, image_size=64, image=tower))
