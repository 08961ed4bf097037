"""Every tower of the three libraries builds, or is refused with the option that helps.

open_clip's and timm's models are built in full size on the meta device. transformers' model types
are tiny models on the CPU, where dropout draws from generators.
"""

import json
import logging
from functools import partial

import open_clip
import pytest
import timm
import torch

from data_prep.errors import InputError
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import (
    build_media_backbone,
    build_text_backbone,
    probe_backbone,
    save_tower_config,
)
from pretrain.settings.model import MediaTower, TextTower

BATCH_NORM = "set batch_norm: frozen"
NAFLEX_VIT = "naflexvit_base_patch16_gap"
FROM_TRANSFORMERS = "build it with library: transformers, name: "

# Without batch norm: these build as they are.
TIMM = (
    *("vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"),
    *("vit_base_patch16_siglip_gap_224", "vit_so150m2_patch16_reg1_gap_256"),
    *(
        "vit_betwixt_patch16_reg4_gap_256",
        "vit_small_patch16_dinov3",
        "vit_pe_core_base_patch16_224",
    ),
    *("vit_tiny_patch16_dinov3_qkvb", "vit_base_patch14_reg4_dinov2", "eva02_small_patch14_224"),
    *("vit_pe_spatial_base_patch16_512", "beit_base_patch16_224", "deit3_small_patch16_224"),
    *("flexivit_small", "convnext_tiny", "convnextv2_tiny", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "hiera_tiny_224", "vitamin_small_224"),
    *("cait_xxs24_224", "mixer_s16_224", "gmlp_s16_224", "edgenext_small", "nfnet_l0"),
    *("eca_nfnet_l0", "dm_nfnet_f0", "naflexvit_base_patch16_gap", "crossvit_tiny_240"),
    *("vit_relpos_medium_patch16_cls_224", "coat_tiny", "davit_tiny", "pvt_v2_b0"),
    *("poolformer_s12", "twins_svt_small"),
)
TIMM_WITH_BATCH_NORM = (
    *("resnet18", "resnet50", "resnetv2_50", "resnet50_clip", "regnety_004"),
    *("mobilenetv3_small_100", "mobilenetv4_conv_small", "efficientnet_b0", "efficientnet_lite0"),
    *("efficientvit_b0", "fastvit_t8", "fastvit_mci0", "vit_base_mci_224", "repvit_m0_9"),
    *("maxvit_tiny_tf_224", "coatnet_0_rw_224", "tiny_vit_5m_224", "xcit_nano_12_p16_224"),
    *("mobilevit_s", "convmixer_768_32", "densenet121", "volo_d1_224", "levit_128"),
    *("inception_next_tiny", "starnet_s1"),
)
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT_SIZES = SIZES | {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT_SIZES | {"num_key_value_heads": 1, "head_dim": 8}
HALVES = {
    "text_config": TEXT_SIZES | {"max_position_embeddings": 20},
    "vision_config": SIZES | {"image_size": 16, "patch_size": 8},
}
NAFLEX = SIZES | {"patch_size": 8, "num_patches": 4}
HTSAT = {
    "spec_size": 64,
    "window_size": 4,
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
}
T5 = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
WHISPER = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
ATTENTION = "attention_dropout: off"
# (kind, model type, options, what a refusal names, keys that help)
TRANSFORMERS = [
    *(
        ("text", name, TEXT_SIZES, ATTENTION, {"attention_dropout": False})
        for name in ("bert", "roberta", "xlm-roberta", "electra", "xlm-roberta-xl")
    ),
    (
        "text",
        "distilbert",
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 100},
        ATTENTION,
        {"attention_dropout": False},
    ),
    (
        "text",
        "gpt2",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 100},
        ATTENTION,
        {"attention_dropout": False},
    ),
    ("text", "t5", T5, ATTENTION, {"attention_dropout": False}),
    ("text", "mt5", T5, ATTENTION, {"attention_dropout": False}),
    *(
        ("text", name, TEXT_SIZES, None, {})
        for name in ("modernbert", "mpnet", "deberta-v2", "albert", "clip_text_model")
    ),
    *(("text", name, DECODER, None, {}) for name in ("qwen3", "gemma3_text", "eurobert")),
    *(
        ("text", name, TEXT_SIZES | {"max_position_embeddings": 20}, None, {})
        for name in ("siglip_text_model", "siglip2_text_model", "metaclip_2_text_model")
    ),
    ("text", "clap_text_model", TEXT_SIZES, ATTENTION, {"attention_dropout": False}),
    *(
        (kind, name, HALVES, None, {})
        for kind in ("image", "text")
        for name in ("clip", "siglip", "metaclip_2")
    ),
    ("text", "siglip2", HALVES, None, {}),
    ("image", "siglip2", {"vision_config": NAFLEX}, None, {}),
    *(
        ("image", name, SIZES | {"patch_size": 8}, None, {})
        for name in (
            *("clip_vision_model", "siglip_vision_model", "metaclip_2_vision_model"),
            *("vit", "ijepa", "deit"),
        )
    ),
    ("image", "siglip2_vision_model", NAFLEX, None, {}),
    ("image", "aimv2_vision_model", SIZES | {"patch_size": 8}, None, {}),
    (
        "image",
        "dinov2",
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
        None,
        {},
    ),
    (
        "image",
        "convnext",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        None,
        {},
    ),
    (
        "image",
        "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2]}
        | {"window_size": 4},
        None,
        {},
    ),
    (
        "image",
        "dinov3_vit",
        SIZES | {"patch_size": 8, "image_size": 16},
        "pos_embed_rescale: null",
        {"options": {"pos_embed_rescale": None}},
    ),
    (
        "image",
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"},
        BATCH_NORM,
        {"batch_norm": "frozen"},
    ),
    ("image", "mobilenet_v2", {"depth_multiplier": 0.25}, BATCH_NORM, {"batch_norm": "frozen"}),
    ("audio", "clap_audio_model", HTSAT, BATCH_NORM, {"batch_norm": "frozen"}),
    (
        "audio",
        "clap",
        {"audio_config": HTSAT, "text_config": TEXT_SIZES},
        BATCH_NORM,
        {"batch_norm": "frozen"},
    ),
    ("text", "clap", {"text_config": TEXT_SIZES}, ATTENTION, {"attention_dropout": False}),
    (
        "audio",
        "clap_audio_model",
        HTSAT | {"enable_fusion": True},
        "set options: {enable_fusion: false}",
        {"options": {"enable_fusion": False}, "batch_norm": "frozen"},
    ),
    ("audio", "audio-spectrogram-transformer", SIZES | {"patch_size": 8}, None, {}),
    ("audio", "whisper", WHISPER, None, {}),
    ("audio", "wav2vec2", {}, "audio-spectrogram-transformer, clap_audio_model, whisper", {}),
    ("audio", "hubert", {}, "use one of them or library: timm", {}),
]


@pytest.fixture(autouse=True)
def quiet():
    """Drops the messages of the libraries."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def width_of(kind, *, device="meta", vocab_size=100, input_shape=None, **tower):
    """Builds and probes a tower, as `build_model` does, and returns its width."""
    with torch.device(device):
        if kind == "text":
            config = TextTower(**tower)
            tokenizer = Tokenizer(
                None, context_length=config.context_length, pad_id=0, vocab_size=vocab_size
            )
            backbone = build_text_backbone(config, tokenizer=tokenizer)
            examples = torch.tensor([[1, 3, 4, 2], [1, 5, 2, 0]], device="cpu")
            padding = (0, config.context_length - examples.shape[1])
            examples = torch.nn.functional.pad(examples, padding).to(device)
        else:
            config = MediaTower(**tower)
            backbone = build_media_backbone(config, kind=kind, input_shape=input_shape[1:])
            examples = torch.rand(2, *input_shape)
        keys = replace_drop_layers(backbone, kind=kind) if not config.frozen else TowerDropKeys()
        return probe_backbone(backbone, examples, where=f"model.{kind}", drop_keys=keys)


def refusal(kind, **tower):
    """Returns the message with which a tower is refused; None if it builds."""
    try:
        width_of(kind, **tower)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 900, message
        return message
    return None


def check_row(kind, *, help_with, expected, **tower):
    """Checks that a tower builds or that its refusal names what helps, and that this helps."""
    message = refusal(kind, **tower)
    if expected is None:
        assert message is None, message
        return
    assert message is not None
    assert expected in message, message
    if help_with:
        options = tower.get("options", {}) | help_with.get("options", {})
        assert refusal(kind, **(tower | help_with | {"options": options})) is None


# -------------------------------------------------------------------------------------- open_clip


def check_open_clip(name):
    sizes = open_clip.get_model_config(name)
    side = sizes["vision_cfg"].get("image_size", 224)
    side = side if isinstance(side, int) else side[0]
    tower = {"library": "open_clip", "name": name}
    text = sizes["text_cfg"]
    hub = text.get("hf_model_name")
    shape = {"input_shape": (3, side, side)}
    has_batch_norm = name.startswith("RN") or (name.startswith("MobileCLIP") and name[-3:] != "-14")
    return (
        ("image", tower | shape, BATCH_NORM if has_batch_norm else None),
        (
            "text",
            tower
            | {"context_length": text.get("context_length", 77)}
            | {"vocab_size": text.get("vocab_size", 49408)},
            f"{FROM_TRANSFORMERS}{hub}" if hub else None,
        ),
    )


def walk_open_clip(names):
    """Checks the towers of models; equal ones once."""
    seen = set()
    for name in names:
        sizes = open_clip.get_model_config(name)
        for (kind, tower, expected), section in zip(
            check_open_clip(name), ("vision_cfg", "text_cfg"), strict=True
        ):
            # Towers of different sizes of the input have the same layers.
            section = {key: sizes[section][key] for key in sizes[section] if key != "image_size"}
            key = json.dumps([kind, section], sort_keys=True)
            if key not in seen:
                seen.add(key)
                help_with = {"batch_norm": "frozen"} if expected == BATCH_NORM else {}
                check_row(kind, help_with=help_with, expected=expected, **tower)
    return len(names)


@pytest.mark.slow
def test_every_open_clip_name_builds_or_names_what_helps():
    assert walk_open_clip(open_clip.list_models()) >= 144


def test_some_open_clip_names_build_or_name_what_helps():
    walk_open_clip(["ViT-B-32", "coca_ViT-B-32", "RN50", "roberta-ViT-B-32", "ViT-B-16-SigLIP"])


# ------------------------------------------------------------------------------------ timm


def timm_row(name, **more):
    side = timm.get_pretrained_cfg(name).input_size[1]
    return {"library": "timm", "name": name, "input_shape": (3, side, side)} | more


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_models_build(name):
    assert refusal("image", **timm_row(name)) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_WITH_BATCH_NORM)
def test_timm_models_with_batch_norm_build_with_frozen_statistics(name):
    check_row("image", help_with={"batch_norm": "frozen"}, expected=BATCH_NORM, **timm_row(name))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize(("kind", "shape"), [("image", (3, 96, 96)), ("audio", (1, 64, 1024))])
def test_timm_models_of_a_fixed_size_are_built_for_the_size_of_their_input(name, kind, shape):
    options = {"options": {"window_size": 4}} if "swin" in name and kind == "audio" else {}
    if "swin" in name and kind == "image":
        shape = (3, 112, 112)
    assert width_of(kind, library="timm", name=name, input_shape=shape, **options)


@pytest.mark.parametrize(
    ("kind", "shape", "tower", "expected"),
    [
        (
            "audio",
            (1, 64, 1001),
            ("timm", "naflexvit_base_patch16_gap"),
            "audio.log_mel.num_frames",
        ),
        ("audio", (1, 80, 2999), ("transformers", "whisper"), "audio.log_mel.num_frames"),
        ("image", (3, 96, 96), ("open_clip", "ViTamin-S"), "set image.size to one that"),
        ("image", (3, 40, 40), ("open_clip", "ViT-B-16"), None),
        ("audio", (1, 64, 1008), ("timm", NAFLEX_VIT), None),
        ("audio", (1, 64, 1024), ("timm", "hiera_tiny_224"), None),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused_with_the_setting(kind, shape, tower, expected):
    library, name = tower
    row = {"library": library, "name": name, "input_shape": shape}
    check_row(kind, help_with={}, expected=expected, **row)


def test_dropout_in_the_position_bias_of_swin_v2_is_refused_or_turned_off():
    options = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "window_size": 4}
    check_row(
        "image",
        help_with={"attention_dropout": False},
        expected=ATTENTION,
        device="cpu",
        **timm_row("swinv2_cr_tiny_224", options=options | {"img_size": 32})
        | {"input_shape": (3, 32, 32)},
    )


def test_dropout_of_timms_attention_is_refused_or_turned_off():
    options = {"depth": 1, "embed_dim": 16, "num_heads": 2, "attn_drop_rate": 0.1}
    check_row(
        "image",
        help_with={"attention_dropout": False},
        expected=ATTENTION,
        device="cpu",
        **timm_row("vit_tiny_patch16_224", options=options),
    )


# ---------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    ("kind", "name", "options", "expected", "help_with"),
    TRANSFORMERS,
    ids=[f"{kind} {name}" for kind, name, *_ in TRANSFORMERS],
)
def test_every_transformers_type_builds_or_names_what_helps(
    kind, name, options, expected, help_with
):
    shape = {"image": (3, 16, 16), "audio": (1, 32, 64), "text": None}[kind]
    row = {"library": "transformers", "name": name, "options": options, "input_shape": shape}
    if kind == "text":
        row["context_length"] = 16
    check_row(kind, help_with=help_with, expected=expected, device="cpu", **row)


@pytest.mark.parametrize(
    ("kind", "name", "options", "help_with"),
    [(*row[:3], row[4]) for row in TRANSFORMERS if row[3] is None or row[4]],
    ids=[f"{kind} {name}" for kind, name, _, why, keys in TRANSFORMERS if why is None or keys],
)
def test_every_transformers_type_is_built_again_from_a_checkpoints_assets(
    kind, name, options, help_with, tmp_path
):
    tower = {"library": "transformers", "name": name} | help_with
    tower["options"] = options | help_with.get("options", {})
    if kind == "text":
        tokenizer = Tokenizer(None, context_length=16, pad_id=0, vocab_size=100)
        build = partial(build_text_backbone, TextTower(**tower), tokenizer=tokenizer)
    else:
        shape = (16, 16) if kind == "image" else (32, 64)
        build = partial(build_media_backbone, MediaTower(**tower), kind=kind, input_shape=shape)
    backbone = build()
    save_tower_config(backbone, tmp_path, name=kind)
    again = build(assets=tmp_path)
    shapes, found = (
        {key: value.shape for key, value in each.state_dict().items()} for each in (backbone, again)
    )
    assert found == shapes
