"""From a JPEG, a WAV and a caption to embeddings: a started tower and its source, each by itself.

The source is a folder that transformers has written: model, processor and tokenizer.
"""

import io
from functools import partial

import pytest
import soundfile
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from pretrain.data.transforms import build_transforms
from pretrain.model.tokenizer import build_tokenizer
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.towers.own_preprocessing import refuse_other_preprocessing, settings_of_folder
from pretrain.warm_start.source import folder_of
from tests.pretrain.towers.test_own_preprocessing import jpeg, own_section, wav
from tests.pretrain.warm_start.test_transformers_sources import SIZES
from tests.support.toy_run import toy_config
from tests.support.toy_starts import randomize, start, tables_of
from tests.support.toy_towers import write_clip_tokenizer, write_word_tokenizer

CAPTIONS = ["a red circle", "Rain, and a DOG's bell!", "x"]
WORDS = ["a", "red", "circle", "Rain", "and", "DOG", "bell", "x"]
TEXT = SIZES | {"pad_token_id": 0}


def vision(**sizes):
    return SIZES | {"image_size": 32, "patch_size": 8} | sizes


def write_clip(folder, *, pads_with_end=False):
    write_clip_tokenizer(folder)
    if pads_with_end:  # as in the folders of the hub
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    text = TEXT | {"vocab_size": 49408, "max_position_embeddings": 12, "eos_token_id": 49407}
    config = transformers.CLIPConfig(
        vision_config=vision(), text_config=text | {"bos_token_id": 49406}, projection_dim=16
    )
    size = {"shortest_edge": 32}
    transformers.CLIPImageProcessor(
        size=size, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return transformers.CLIPModel(config)


def write_siglip(folder):
    write_word_tokenizer(folder, WORDS)
    text = TEXT | {"vocab_size": 16, "max_position_embeddings": 12}
    config = transformers.SiglipConfig(vision_config=vision(), text_config=text)
    size = {"height": 32, "width": 32}
    transformers.SiglipImageProcessor(size=size).save_pretrained(folder)
    return transformers.SiglipModel(config)


def write_siglip2(folder):
    write_word_tokenizer(folder, WORDS)
    text = TEXT | {"vocab_size": 16, "max_position_embeddings": 12}
    naflex = SIZES | {"patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(vision_config=naflex, text_config=text)
    transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return transformers.Siglip2Model(config)


def write_clap(folder):
    write_word_tokenizer(folder, WORDS)
    audio = {
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "hidden_size": 16,
    }
    text = TEXT | {"vocab_size": 16, "max_position_embeddings": 14}
    config = transformers.ClapConfig(audio_config=audio, text_config=text, projection_dim=16)
    transformers.ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50).save_pretrained(
        folder
    )
    model = transformers.ClapModel(config)
    norm = model.audio_model.audio_encoder.batch_norm
    norm.running_mean.fill_(-30.0)
    norm.running_var.fill_(400.0)
    return model


WRITERS = {
    "CLIP": write_clip,
    "CLIP, padded with its end token": partial(write_clip, pads_with_end=True),
    "SigLIP": write_siglip,
    "SigLIP 2": write_siglip2,
    "CLAP": write_clap,
}


def config_of(folder, tmp_path, *, kind, projection):
    shared = {"library": "transformers", "name": str(folder), "start": {"from": str(folder)}}
    shared |= {"pooling": "own", "projection": projection, "attention_dropout": False}
    own = settings_of_folder(folder, kind=kind)
    section = own_section(ImageTransform if kind == "image" else AudioTransform, own)
    if kind == "image" and "size" not in own:  # NaFlex: any square
        section = section.model_copy(update={"size": 32})
    media = shared | ({} if kind == "image" else {"batch_norm": "frozen"})
    model = {"embed_dim": 16, "text": shared | {"context_length": 12}, kind: media}
    sections = {"model": model, kind: section.model_dump()}
    return toy_config(tmp_path, tmp_path / "run", **sections)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_embeddings_of_a_jpeg_a_wav_and_a_caption_equal_those_of_transformers(tmp_path, name):
    torch.manual_seed(0)
    folder = tmp_path / "source"
    oracle = randomize(WRITERS[name](folder))
    oracle.save_pretrained(folder)
    kind = "audio" if name == "CLAP" else "image"
    projection = {"CLIP": "linear", "CLAP": "mlp"}.get(name[:4], "none")
    config = config_of(folder, tmp_path, kind=kind, projection=projection)
    refuse_other_preprocessing(
        config.model, image=config.image, audio=config.audio, folder_of=folder_of
    )
    model, warm_start = start(config)
    assert tables_of(warm_start).keys() == {kind, "text"}
    transform = build_transforms(config.model, image=config.image, audio=config.audio)[kind]
    if kind == "image":
        content = jpeg(64, 64)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        inputs = processor(images=Image.open(io.BytesIO(content)), return_tensors="pt")
        expected = oracle.get_image_features(**inputs).pooler_output
        found = model.encode_image(transform(transform.decode(content, "jpg"))[None])
    else:
        content = wav(10.0, 48000)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        clip, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        inputs = extractor(clip, sampling_rate=rate, return_tensors="pt")
        expected = oracle.get_audio_features(**inputs).pooler_output
        found = model.encode_audio(transform(transform.decode(content, "wav"))[None])
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    tokenizer = build_tokenizer(config.model.text)
    own_ids = tokenizer(CAPTIONS)
    assert torch.equal(own_ids, ids["input_ids"])
    masked = {} if name.startswith("SigLIP") else {"attention_mask": ids["attention_mask"]}
    expected = oracle.get_text_features(input_ids=ids["input_ids"], **masked).pooler_output
    found = model.encode_text(own_ids)
    if model.takes_trimmed_captions:  # as in training
        found = model.encode_text(own_ids[:, : tokenizer.lengths(own_ids).max()])
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
