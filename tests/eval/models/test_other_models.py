"""Models of other libraries, compared with those libraries on the same media and texts."""

import io
import json
import shutil

import numpy as np
import open_clip
import pytest
import sentencepiece
import soundfile
import tokenizers
import torch
from PIL import Image

from data_prep.errors import InputError
from eval.config import EmbedConfig
from eval.models.encoder import load_encoder
from eval.models.model_source import find_model
from eval.models.preprocessing import windows_of
from tests.support.toy_models import (
    OPEN_CLIP_SIZES,
    write_hugging_face_folder,
    write_open_clip_folder,
)

TEXTS = ["a red square", "two dogs on the grass", "it's 5 o'clock &amp; raining"]
CAPITALS = ["A Red Car on THE ROAD", "\u039f\u0394\u039f\u03a3 \u00c9", "Dog"]


def encoder_of(checkpoint, **settings):
    values = {"checkpoint": checkpoint, "dataset": "unused", "output": "unused", "batch_size": 4}
    return load_encoder(EmbedConfig.model_validate(values | settings))


def add_architecture(folder):
    """Makes "tiny77" known to open_clip."""
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny77.json").write_text(json.dumps(OPEN_CLIP_SIZES))
    open_clip.add_model_config(folder / "configs")


def picture(seed):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    )


def png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def wav(num_samples, seed):
    file = io.BytesIO()
    waveform = np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples)
    soundfile.write(file, waveform, 8000, format="WAV", subtype="FLOAT")
    return file.getvalue(), waveform.astype(np.float32)


def embedded(encoder, kind, contents, extension):
    prepared = [encoder.front_ends[kind].prepare_file(each, extension) for each in contents]
    return encoder.encode_items(kind, torch.cat(prepared), [len(each) for each in prepared])


def unit(rows):
    return torch.nn.functional.normalize(rows.detach().float(), dim=-1)


@pytest.mark.parametrize("form", ["folder", "local-dir", "file"])
def test_open_clip_folders_and_files_embed_as_open_clip_does(tmp_path, form):
    folder = write_open_clip_folder(tmp_path / "tiny")
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    if form == "file":
        add_architecture(tmp_path)
        file = folder / "open_clip_model.safetensors"
        encoder = encoder_of(file, open_clip_architecture="tiny77")
        prepare = open_clip.create_model_and_transforms("tiny77")[
            2
        ]  # a file of weights has no transform
    else:
        encoder = encoder_of(f"local-dir:{folder}" if form == "local-dir" else folder)
    images = [picture(seed) for seed in range(3)]
    found = embedded(encoder, "image", map(png, images), "png")
    with torch.no_grad():
        expected = model.encode_image(torch.stack([prepare(image) for image in images]))
        texts = model.encode_text(open_clip.tokenize(TEXTS))
    torch.testing.assert_close(found, unit(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), unit(texts), rtol=0, atol=1e-6)
    assert (encoder.origin.library, encoder.embed_dim) == ("open_clip", 16)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_hugging_face_image_models_embed_as_transformers_does(tmp_path, kind):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = write_hugging_face_folder(tmp_path / "tiny", kind)
    encoder = encoder_of(folder)
    images = [picture(seed) for seed in range(3)]
    found = embedded(encoder, "image", map(png, images), "png")
    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=20, return_tensors="pt")
    if kind == "siglip":
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        both = model(**tokens, **pixels)
    torch.testing.assert_close(found, unit(both.image_embeds), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        encoder.encode_texts(TEXTS), unit(both.text_embeds), rtol=0, atol=1e-6
    )


def write_siglip_tokenizer(folder, tokenizer_class, **settings):
    """Gives a folder a vocabulary that knows capitals, as SigLIP 2's does.

    SiglipTokenizer reads spiece.model, as of the first SigLIP; the other classes tokenizer.json.
    """
    for file in folder.glob("*token*"):
        file.unlink()
    words = " ".join([*CAPITALS, "a red car on the road \u03bf\u03b4\u03bf\u03c3 \u00e9 dog"])
    if tokenizer_class == "SiglipTokenizer":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([words] * 20),
            model_prefix=str(folder / "spiece"),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        names = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        special = ["<pad>", "<eos>", "<bos>", "<unk>"]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=special)
        tokenizer.train_from_iterator([words] * 20, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {f"{token[1:-1]}_token": token for token in special}
    config = {"tokenizer_class": tokenizer_class, "padding_side": "right", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_text_of_siglip_is_lower_cased_whichever_tokenizer_the_folder_names(tmp_path):
    from transformers import AutoTokenizer

    folder = write_hugging_face_folder(tmp_path / "tiny", "siglip")
    write_siglip_tokenizer(folder, "Siglip2Tokenizer")
    oracle = AutoTokenizer.from_pretrained(folder)  # the class that lower-cases by itself
    length = {"padding": "max_length", "max_length": 20}
    expected = oracle(CAPITALS, **length)["input_ids"]
    backend = oracle.backend_tokenizer
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    with_capitals = oracle(CAPITALS, **length)["input_ids"]
    assert with_capitals != expected
    classes = ["GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast"]
    for tokenizer_class in ["Siglip2Tokenizer", *classes]:
        for settings in ({}, {"do_lower_case": True}):
            write_siglip_tokenizer(folder, tokenizer_class, **settings)
            encoder = encoder_of(folder)
            assert encoder.tokenizer(CAPITALS)["input_ids"].tolist() == expected, tokenizer_class
    for tokenizer_class in classes:
        write_siglip_tokenizer(folder, tokenizer_class, do_lower_case=False)
        encoder = encoder_of(folder)
        assert encoder.tokenizer(CAPITALS)["input_ids"].tolist() == with_capitals
        assert encoder.origin.settings["lower_case"] is False


def test_the_first_siglip_reads_its_sentencepiece_vocabulary(tmp_path):
    folder = write_hugging_face_folder(tmp_path / "tiny", "siglip")
    write_siglip_tokenizer(folder, "SiglipTokenizer")
    encoder = encoder_of(folder)
    found = encoder.tokenizer(["A Red Car!", "a red car", "a  RED, car."])["input_ids"].tolist()
    assert found[0] == found[1] == found[2]
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids = vocabulary.encode("a red car")
    assert found[1] == [*ids, *[vocabulary.eos_id()] * (20 - len(ids))]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ImportError("\nX requires the Y library\nbut it was not found"),
            "X requires the Y library",
        ),
        (ModuleNotFoundError("No module named 'yy'", name="yy"), "install the package .* yy"),
        (AttributeError("odd"), "AttributeError: odd"),
    ],
)
def test_errors_of_libraries_are_one_sentence_that_says_what_to_install(
    tmp_path, monkeypatch, error, advice
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    folder = write_hugging_face_folder(tmp_path / "tiny", "clip")
    with pytest.raises(InputError, match=f"tiny: transformers cannot load it: .*{advice}") as found:
        encoder_of(folder)
    assert "\n" not in str(found.value)
    monkeypatch.setattr("open_clip.get_tokenizer", fail)
    folder = write_open_clip_folder(tmp_path / "open_clip")
    with pytest.raises(InputError, match=f"open_clip: open_clip cannot load it: .*{advice}"):
        encoder_of(folder)


@pytest.mark.parametrize("kind", ["clap", "fused clap"])
def test_clap_embeds_as_transformers_does_and_leaves_nothing_to_chance(tmp_path, kind):
    from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer

    folder = write_hugging_face_folder(tmp_path / "tiny", kind)
    encoder = encoder_of(folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    short, waveform = wav(5000, seed=1)
    features = extractor(waveform, sampling_rate=8000, return_tensors="pt")["input_features"]
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_audio_features(features.float(), is_longer=torch.tensor([[False]]))
        texts = model.get_text_features(**tokens)
    found = embedded(encoder, "audio", [short], "wav")
    torch.testing.assert_close(found, unit(expected.pooler_output), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        encoder.encode_texts(TEXTS), unit(texts.pooler_output), rtol=0, atol=1e-5
    )
    # A clip of 2.5 seconds has three windows; alone or in a batch, its embedding is the same.
    long, whole = wav(20_000, seed=2)
    alone = embedded(encoder, "audio", [long], "wav")
    beside = embedded(encoder, "audio", [short, short, long, short], "wav")
    assert torch.equal(alone[0], beside[2])
    parts = [
        encoder.encode_windows("audio", encoder.front_ends["audio"].transform(part)[None])
        for part in (whole[:8000], whole[6000:14_000], whole[12_000:])
    ]
    mean = unit(torch.cat(parts).mean(dim=0, keepdim=True))
    torch.testing.assert_close(alone, mean, rtol=0, atol=1e-6)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent: expected a run folder with a checkpoint"):
        find_model(tmp_path / "absent")
    file = tmp_path / "weights.pt"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="for a weights file set open_clip_architecture"):
        find_model(file)
    with pytest.raises(InputError, match=r"absent: expected a weights file"):
        find_model(tmp_path / "absent", architecture="ViT-B-32")
    with pytest.raises(InputError, match=r"expected one of .*ViT-B-32.*; found 'ViT-Q'"):
        encoder_of(file, open_clip_architecture="ViT-Q")
    add_architecture(tmp_path)
    with pytest.raises(InputError, match=r"weights.pt: open_clip cannot load it"):
        encoder_of(file, open_clip_architecture="tiny77")


def test_folders_that_lack_a_part_are_named(tmp_path):
    folder = write_hugging_face_folder(tmp_path / "tiny", "clip")
    weights = folder / "model.safetensors"
    moved = shutil.move(weights, tmp_path / "moved")
    with pytest.raises(InputError, match=r"tiny: expected weights .*found none; copy all files"):
        encoder_of(folder)
    shutil.move(moved, weights)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="transformers cannot load it"):
        encoder_of(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"expected model_type clip, siglip, clap; found 'bert'"):
        encoder_of(folder)


def test_windows_cover_a_clip_evenly_and_parts_are_where_they_are_said_to_be():
    wave = np.arange(25)
    starts = [part[0] for part in windows_of(wave, 10, long_clips="windows")]
    assert starts == [0, 7, 15]
    assert [part[0] for part in windows_of(wave[:20], 10, long_clips="windows")] == [0, 10]
    assert [part.tolist() for part in windows_of(wave, 10, long_clips="first")] == [[*range(10)]]
    assert [part[0] for part in windows_of(wave, 10, long_clips="centre")] == [7]
    for policy in ("windows", "first", "centre"):
        assert [len(part) for part in windows_of(wave[:7], 10, long_clips=policy)] == [7]
