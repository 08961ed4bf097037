"""Random transforms and towers of `random_configs`, of all libraries, trained or frozen."""

from tests.support.toy_droppers import SWIN, VIT
from tests.support.toy_material import (
    BERT,
    CLIP_NAME,
    CLIP_SIZE,
    CLIP_TEXT,
    CONTEXT_LENGTH,
    CONVNEXT,
    VOCABULARY,
)

PLAIN_SIZE = 16  # of images: that of teachers and of open_clip's tower
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAUSAL = ("clip_text_model", "gpt2", "llama")
VOCABULARY_SIZE = {"vocab_size": len(VOCABULARY)}
FNET = VOCABULARY_SIZE | {key: SIZES[key] for key in SIZES if key != "num_attention_heads"}


def draw_image(rng, *, is_plain):
    """Draws the section `image`; a plain one has the size of a teacher's images."""
    return {
        "size": PLAIN_SIZE if is_plain else rng.choice((PLAIN_SIZE, PLAIN_SIZE, 20)),
        "resize": rng.choice(("shortest", "squash")),
        "interpolation": rng.choice(("bicubic", "bilinear")),
        "crop_area": sorted((rng.uniform(0.2, 1), rng.uniform(0.2, 1))),
        "crop_ratio": sorted((rng.uniform(0.6, 1.6), rng.uniform(0.6, 1.6))),
        "flip_probability": rng.choice((0, 0.5)),
        "color_jitter": rng.choice((None, _draw_jitter(rng))),
        "grey_probability": rng.choice((0, 0.3)),
        "scaled_decoding": rng.random() < 0.5,
        "mean": [rng.uniform(0.3, 0.6) for _ in range(3)],
        "std": [rng.uniform(0.2, 0.4) for _ in range(3)],
    }


def _draw_jitter(rng):
    names = ("probability", "brightness", "contrast", "saturation", "hue")
    return {name: rng.uniform(0.1, 0.5) for name in names}


def draw_audio(rng, *, is_plain):
    """Draws the section `audio`; a plain one has the rate and length of a teacher's clips."""
    rate, seconds = (4000, 0.4) if is_plain else (rng.choice((4000, 3000)), rng.choice((0.4, 0.3)))
    hop = rng.choice((64, 50))
    log_mel = {
        "fft_samples": rng.choice((128, 96)),
        "hop_samples": hop,
        "num_mel_bins": rng.choice((16, 24)),
        "low_hz": rng.choice((0, 50)),
        "high_hz": rng.choice((rate / 2, 1200)),
        "mel_scale": rng.choice(("htk", "slaney")),
        "mel_norm": rng.choice(("slaney", None)),
        "mean_db": rng.uniform(-40, -20),
        "std_db": rng.uniform(15, 30),
    }
    masks = {
        "num_mel_stripes": rng.choice((0, 1, 2)),
        "mel_bins": rng.randint(1, 8),
        "num_time_stripes": rng.choice((0, 1, 3)),
        "frames": rng.randint(1, 12),
    }
    return {
        "sample_rate_hz": rate,
        "clip_seconds": seconds,
        "padding": rng.choice(("repeat", "silence", "repeatpad")),
        "log_mel": log_mel,
        "spec_augment": rng.choice((None, masks)),
    }


# ------------------------------------------------------------------------------------ towers


def draw_model(rng, kinds, image, audio, *, material, has_teacher):
    """Draws the section `model`.

    Args:
        kinds: kinds of media, and `text`, that have a tower.
        image: section `image`.
        audio: section `audio`.
        material: files that towers are loaded from.
        has_teacher: whether the model reads the tokens of a teacher.

    Returns:
        (the section, the section `audio` with the spectrogram that its tower needs)
    """
    model = {"embed_dim": rng.choice((8, 12, CLIP_SIZE, CLIP_SIZE, 20))}
    if "image" in kinds:
        model["image"] = _draw_image_tower(rng, image["size"], model["embed_dim"], material)
    if "audio" in kinds:
        model["audio"], audio = _draw_audio_tower(rng, audio, material)
    if "text" in kinds:
        model["text"] = _draw_text_tower(rng, material, has_teacher=has_teacher)
    for kind in sorted({*kinds}.intersection(model)):
        if model[kind]["library"] != "open_clip" or "name" not in model[kind]:
            model[kind] = model[kind] | {"projection": rng.choice(("linear", "linear", "mlp"))}
        model[kind] = model[kind] | draw_rates(rng, is_frozen=model[kind]["frozen"])
    initial = rng.uniform(1, 20)
    model["logit_scale"] = {
        "initial": initial,
        "maximum": rng.choice((100, initial * rng.uniform(1, 1.01))),
    }
    model["initial_logit_bias"] = rng.choice((-10, -1))
    return model, audio


def draw_rates(rng, *, is_frozen):
    return {
        "learning_rate_scale": rng.choice((1, 1, 0.3)),
        "layer_decay": None if is_frozen else rng.choice((None, None, 0.7)),
        "frozen_blocks": None if is_frozen else rng.choice((None, None, 0, -1)),
    }


def _draw_image_tower(rng, size, embed_dim, material):
    vit = {"options": {"img_size": size, "patch_size": 4, "depth": 1}}
    towers = [
        CONVNEXT,
        VIT | vit,
        VIT | {"options": VIT["options"] | {"img_size": size}},
        CONVNEXT | {"pretrained": str(material.weights("image"))},
        {
            "library": "transformers",
            "name": "vit",
            "options": TINY | {"image_size": size, "patch_size": size // 2},
        },
    ]
    if size == PLAIN_SIZE and embed_dim == CLIP_SIZE:
        weights = rng.choice((False, str(material.weights("clip"))))
        towers.append({"library": "open_clip", "name": CLIP_NAME, "pretrained": weights})
    return rng.choice(towers) | {"frozen": rng.random() < 0.25}


def _draw_audio_tower(rng, audio, material):
    log_mel, is_plain = audio["log_mel"], audio["clip_seconds"] * audio["sample_rate_hz"] == 1600
    num_frames = (
        1 + round(audio["clip_seconds"] * audio["sample_rate_hz"]) // (log_mel["hop_samples"])
    )
    ast = {"max_length": num_frames, "num_mel_bins": log_mel["num_mel_bins"], "patch_size": 8}
    strides = {"frequency_stride": 8, "time_stride": 6}
    towers = [
        CONVNEXT,
        CONVNEXT | {"pretrained": str(material.weights("audio"))},
        {
            "library": "transformers",
            "name": "audio-spectrogram-transformer",
            "options": TINY | ast | strides,
        },
    ]
    if is_plain:
        towers.append(SWIN)
    tower = rng.choice(towers)
    if tower is SWIN:  # it takes 16 bins and 24 frames
        audio = audio | {"log_mel": log_mel | {"hop_samples": 68, "num_mel_bins": 16}}
    return tower | {"frozen": rng.random() < 0.25}, audio


def _draw_text_tower(rng, material, *, has_teacher):
    dropping = rng.choice((0.0, 0.2))
    towers = [
        _open_clip(),
        _open_clip(no_causal_mask=True),
        _open_clip(pool_type="first", no_causal_mask=True),
        _open_clip(pool_type="last"),
        _open_clip(embed_cls=True),
        _transformers("bert", BERT | {"hidden_dropout_prob": dropping}),
        _transformers("bert", BERT | {"num_hidden_layers": 2}),
        _transformers("fnet", FNET | {"hidden_dropout_prob": dropping}),
        _transformers(
            "clip_text_model",
            SIZES | VOCABULARY_SIZE | {"max_position_embeddings": 20},
        ),
        _transformers(
            "gpt2",
            VOCABULARY_SIZE
            | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
            | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        ),
        _transformers(
            "llama",
            SIZES | VOCABULARY_SIZE | {"num_key_value_heads": 1},
        ),
        {
            "library": "transformers",
            "name": rng.choice(("bert", str(material.weights("bert")))),
            "pretrained": str(material.weights("bert")),
        },
    ]
    tower = rng.choice(towers)
    # The first token of a causal model does not depend on the caption.
    poolings = ("mean",) if tower.get("name") in CAUSAL else ("mean", "first")
    has_clip_tokens = not has_teacher and tower["library"] == "open_clip" and rng.random() < 0.2
    return tower | {
        "tokenizer": None if has_clip_tokens else str(material.tokenizer),
        "context_length": CONTEXT_LENGTH if has_teacher else rng.choice((CONTEXT_LENGTH, 8, 15)),
        "pooling": rng.choice(poolings),
        "frozen": rng.random() < 0.2,
    }


def _open_clip(**options):
    return {"library": "open_clip", "options": CLIP_TEXT | options}


def _transformers(name, options):
    return {"library": "transformers", "name": name, "options": options}
