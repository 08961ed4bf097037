"""Pixels, spectrograms and token ids against the processors of transformers and open_clip.

Each processor is saved to a folder; our settings are those that are read from the folder.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import (
    ASTFeatureExtractor,
    BitImageProcessor,
    ClapFeatureExtractor,
    CLIPImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
    WhisperFeatureExtractor,
)

from data_prep.errors import ConfigError
from pretrain.data.transforms import AudioToWaveform, ImageToPixels
from pretrain.model.contrastive_model import NormalizedPixels
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.settings.model import Model
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.towers.model_inputs import model_inputs
from pretrain.towers.own_preprocessing import (
    refuse_differences,
    refuse_other_preprocessing,
    settings_of_folder,
)

SMALL = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
SQUARE = {"size": {"height": 48, "width": 48}}
IMAGE_PROCESSORS = {
    "CLIP": CLIPImageProcessor(**SMALL),
    "SigLIP": SiglipImageProcessor(**SQUARE),
    "ViT": ViTImageProcessor(**SQUARE),
    "DINOv2": BitImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}, do_center_crop=True
    ),
}
EXTRACTORS = {
    "CLAP": (ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50), 48000),
    "CLAP, fused": (ClapFeatureExtractor(frequency_min=50, padding="repeat"), 48000),
    "CLAP, padded": (ClapFeatureExtractor(truncation="rand_trunc", padding="pad"), 48000),
    "Whisper": (WhisperFeatureExtractor(chunk_length=4), 16000),
    "Whisper, large": (WhisperFeatureExtractor(feature_size=128, chunk_length=4), 16000),
    "AST": (ASTFeatureExtractor(max_length=512), 16000),
}


def own_section(section, own, **more):
    """Builds a config section from settings under dotted keys."""
    values: dict = {}
    for key, value in (own | more).items():
        *sections, name = key.split(".")
        inner = values
        for each in sections:
            inner = inner.setdefault(each, {})
        inner[name] = value
    return section(**values)


def jpeg(height, width):
    """Encodes a JPEG of smooth colours and noise."""
    rng = np.random.default_rng(height)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 3 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1)
    pixels = (pixels + rng.integers(0, 40, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def our_pixels(config, content):
    transform = ImageToPixels(config)
    return NormalizedPixels(config)(transform(transform.decode(content, "jpg"))[None])


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
@pytest.mark.parametrize("shape", [(60, 97), (97, 60), (131, 50), (48, 48), (30, 41), (75, 200)])
def test_pixels_equal_those_of_transformers(tmp_path, name, shape):
    processor = IMAGE_PROCESSORS[name]
    processor.save_pretrained(tmp_path)
    config = own_section(ImageTransform, settings_of_folder(tmp_path, kind="image"))
    content = jpeg(*shape)
    picture = Image.open(io.BytesIO(content))
    expected = processor(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(our_pixels(config, content), expected, rtol=0, atol=1e-5)


def test_patches_of_a_square_equal_those_of_siglip_2(tmp_path):
    processor = Siglip2ImageProcessor(patch_size=16, max_num_patches=16)
    processor.save_pretrained(tmp_path)
    own = settings_of_folder(tmp_path, kind="image")
    config = own_section(ImageTransform, own, size=64, resize="squash")

    class Config:
        model_type, patch_size = "siglip2_vision_model", 16

    content = jpeg(100, 100)
    found = model_inputs(our_pixels(config, content), Config)
    expected = processor(images=Image.open(io.BytesIO(content)), return_tensors="pt")
    assert expected["pixel_attention_mask"].all()  # as without a mask
    for key in ("pixel_values", "spatial_shapes"):
        torch.testing.assert_close(
            found[key].float(), expected[key].float(), rtol=0, atol=1e-5, msg=key
        )


def wav(seconds, rate):
    """Encodes a WAV with a rising tone in noise."""
    times = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * times) * times)
    noise = 0.05 * rng.standard_normal(len(times))
    buffer = io.BytesIO()
    soundfile.write(buffer, (tone + noise).astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:At least one mel filter")  # AST's own bank
@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("fraction", [0.33, 1.0], ids=["short", "whole"])
def test_spectrograms_equal_those_of_transformers(tmp_path, name, fraction):
    extractor, rate = EXTRACTORS[name]
    extractor.save_pretrained(tmp_path)
    own = settings_of_folder(tmp_path, kind="audio")
    seconds = own.get("clip_seconds", 4.0)
    config = own_section(AudioTransform, own, clip_seconds=seconds)
    content = wav(fraction * seconds, rate)
    transform = AudioToWaveform(config)
    mel = LogMelSpectrogram(config)(transform(transform.decode(content, "wav"))[None])[0, 0]
    clip, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    inputs = extractor(clip, sampling_rate=rate, return_tensors="pt")
    expected = inputs[extractor.model_input_names[0]][0]
    expected = expected[0].T if name.startswith("CLAP") else expected
    expected = expected.T if name == "AST" else expected
    assert mel.shape == expected.shape == (config.log_mel.num_mel_bins, config.num_frames)
    # CLAP's are decibels from -100 to 30, which float32 sums of powers resolve to some 1e-4.
    tolerance = 1e-3 if name.startswith("CLAP") else 1e-5
    torch.testing.assert_close(mel, expected, rtol=0, atol=tolerance)


def test_every_difference_is_named_with_the_line_to_write(tmp_path):
    SiglipImageProcessor(**SQUARE).save_pretrained(tmp_path)
    own = settings_of_folder(tmp_path, kind="image")
    with pytest.raises(ConfigError) as raised:
        refuse_differences(own, ImageTransform(), kind="image", source="a folder")
    message = str(raised.value)
    assert "expected the preprocessing of a folder, mean=[0.5, 0.5, 0.5]" in message
    assert "found mean=[0.48145466, 0.4578275, 0.40821073]" in message
    assert "set image: {mean: [0.5, 0.5, 0.5]" in message
    assert "size: 48, resize: squash" in message
    refuse_differences(own, own_section(ImageTransform, own), kind="image", source="a folder")


def model_with(**tower):
    return Model(embed_dim=8, image=tower, text={"library": "open_clip"})


@pytest.mark.parametrize(
    ("tower", "key"),
    [
        ({"library": "timm", "name": "vit_base_patch16_siglip_224", "pretrained": True}, "mean"),
        (
            {"library": "open_clip", "name": "ViT-B-16-SigLIP", "pretrained": "webli"},
            "resize=squash",
        ),
        (
            {
                "library": "timm",
                "name": "convnext_tiny",
                "start": {"from": "timm:convnext_tiny.in12k_ft_in1k"},
            },
            "crop_fraction=0.95",
        ),
        (
            {
                "library": "timm",
                "name": "vit_base_patch16_siglip_224",
                "start": {"from": "open_clip:ViT-B-16-SigLIP/webli"},
            },
            "std",
        ),
    ],
)
def test_tags_are_compared(tower, key):
    with pytest.raises(ConfigError, match=key):
        refuse_other_preprocessing(
            model_with(**tower),
            image=ImageTransform(),
            audio=AudioTransform(),
            folder_of=lambda location: None,
        )


@pytest.mark.parametrize(
    "tower",
    [
        {"library": "timm", "name": "convnext_tiny"},
        {"library": "timm", "name": "convnext_tiny", "pretrained": "weights.safetensors"},
        {"library": "open_clip", "name": "ViT-B-32", "pretrained": "weights.pt"},
    ],
)
def test_towers_whose_weights_say_nothing_are_not_compared(tower):
    refuse_other_preprocessing(
        model_with(**tower),
        image=ImageTransform(mean=(0.1, 0.1, 0.1)),
        audio=AudioTransform(),
        folder_of=lambda location: None,
    )


def test_the_size_may_differ_where_positions_are_resampled(tmp_path):
    SiglipImageProcessor(**SQUARE).save_pretrained(tmp_path)
    own = settings_of_folder(tmp_path, kind="image")
    image = own_section(ImageTransform, own, size=64)
    tower = {"library": "transformers", "name": "siglip_vision_model"}
    for resample in (True, False):
        start = {"from": str(tmp_path), "resample": resample}
        arguments = {"image": image, "audio": AudioTransform(), "folder_of": Path}
        model = model_with(**tower, start=start)
        if resample:
            refuse_other_preprocessing(model, **arguments)
        else:
            with pytest.raises(ConfigError, match="size=48; found size=64"):
                refuse_other_preprocessing(model, **arguments)


def test_the_size_may_be_that_of_a_segment(tmp_path):
    SiglipImageProcessor(**SQUARE).save_pretrained(tmp_path)
    own = settings_of_folder(tmp_path, kind="image")
    model = model_with(library="transformers", name="siglip_vision_model", pretrained=str(tmp_path))
    for last in (48, 56):
        segments = [{"from_step": 5, "size": last}]
        image = own_section(ImageTransform, own, size=32, segments=segments)
        arguments = {"image": image, "audio": AudioTransform(), "folder_of": Path}
        if last == 48:
            refuse_other_preprocessing(model, **arguments)
        else:
            with pytest.raises(ConfigError, match="size=48; found size=32"):
                refuse_other_preprocessing(model, **arguments)
