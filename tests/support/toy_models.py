"""Tiny models of open_clip and Hugging Face with random weights, written as these libraries do."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from tests.support.toy_towers import write_clip_tokenizer

OPEN_CLIP_SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"width": 16, "layers": 1, "image_size": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"width": 16, "layers": 1, "context_length": 77, "vocab_size": 49408, "heads": 2},
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def write_open_clip_folder(folder: Path) -> Path:
    """Writes a folder that open_clip reads as local-dir:."""
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**OPEN_CLIP_SIZES)
    preprocessing = {
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": OPEN_CLIP_SIZES, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_hugging_face_folder(folder: Path, kind: str) -> Path:
    """Writes a CLIP, SigLIP or CLAP with its tokenizer and its preparation of media."""
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
    )

    write_clip_tokenizer(folder)
    torch.manual_seed(0)
    image = TOWER | {"image_size": 16, "patch_size": 8}
    text = TOWER | {"vocab_size": 49408, "max_position_embeddings": 20}
    if kind == "clip":
        config = CLIPConfig(
            text_config=text | {"eos_token_id": 49407}, vision_config=image, projection_dim=16
        )
        CLIPModel(config).save_pretrained(folder)
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        CLIPImageProcessor(**size).save_pretrained(folder)
    elif kind == "siglip":
        SiglipModel(SiglipConfig(text_config=text, vision_config=image)).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        audio = {
            "hidden_size": 32,
            "patch_embeds_hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "spec_size": 64,
            "num_mel_bins": 16,
            "window_size": 4,
            "enable_fusion": kind == "fused clap",
        }
        config = ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
        ClapModel(config).save_pretrained(folder)
        ClapFeatureExtractor(
            feature_size=16,
            sampling_rate=8000,
            hop_length=100,
            fft_window_size=256,
            max_length_s=1,
            frequency_min=50,
            frequency_max=4000,
            truncation="fusion" if kind == "fused clap" else "rand_trunc",
        ).save_pretrained(folder)
    return folder
