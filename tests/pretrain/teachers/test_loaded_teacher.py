"""Models of other libraries as teachers, each compared with the library itself."""

import io
import json
from pathlib import Path

import open_clip
import pytest
import soundfile
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from data_prep.errors import InputError
from pretrain.data.transforms import AudioToWaveform, ImageToPixels
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.run.attempts import read_metrics
from pretrain.settings.views import view_of_teacher
from pretrain.teachers.loaded_teacher import load_teacher
from pretrain.train import pretrain
from pretrain.training.assembly import (
    build_step,
    build_training_optimizer,
    open_step_loader,
    open_teachers,
)
from tests.pretrain.towers.test_own_preprocessing import jpeg, wav
from tests.pretrain.warm_start.test_whole_path import CAPTIONS, WRITERS
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_models import OPEN_CLIP_SIZES, write_open_clip_folder
from tests.support.toy_run import toy_config
from tests.support.toy_starts import randomize
from tests.support.toy_towers import build_toy_model

CPU = torch.device("cpu")
WHERE = "teacher.checkpoint"


def load(location, *, modalities=("image", "text")):
    return load_teacher(
        str(location), where=WHERE, temperature="t", modalities=modalities, device=CPU
    )


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """Returns a folder of a small CLIP, which open_clip knows by a name."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny-teacher.json").write_text(json.dumps(OPEN_CLIP_SIZES))
    open_clip.add_model_config(folder / "configs")
    return write_open_clip_folder(folder / "model")


def config_of(toy_data, folder, teacher, **sections):
    values = toy_config(toy_data, folder, **sections).model_dump(mode="json")
    values["model"]["audio"] = None
    values["streams"] = {"image-text": values["streams"]["image-text"]}
    if teacher is not None:
        of_teacher = {"checkpoint": str(teacher), "weight": 0.3}
        values["streams"]["image-text"]["objectives"]["image-text"]["teacher"] = of_teacher
    return type(toy_config(toy_data, folder)).model_validate(values)


@pytest.mark.parametrize(
    "name",
    [
        "CLIP",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("SigLIP", "SigLIP 2", "CLAP")),
    ],
)
def test_embeddings_of_files_are_those_of_transformers(tmp_path, name):
    torch.manual_seed(0)
    folder = tmp_path / "source"
    oracle = randomize(WRITERS[name](folder))
    oracle.save_pretrained(folder)
    kind = "audio" if name == "CLAP" else "image"
    teacher = load(folder, modalities=(kind, "text"))
    if kind == "image":
        content = jpeg(64, 64)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        inputs = processor(images=Image.open(io.BytesIO(content)), return_tensors="pt")
        expected = oracle.get_image_features(**inputs).pooler_output
        transform = ImageToPixels(teacher.inputs.image)
        media = transform(transform.decode(content, "jpg"))[None]
    else:
        content = wav(10.0, 48000)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        clip, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        inputs = extractor(clip, sampling_rate=rate, return_tensors="pt")
        expected = oracle.get_audio_features(**inputs).pooler_output
        transform = AudioToWaveform(teacher.inputs.audio)
        media = transform(transform.decode(content, "wav"))[None]
    found = teacher.model.encode_media(kind, media)
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    masked = {} if name.startswith("SigLIP") else {"attention_mask": ids["attention_mask"]}
    expected = oracle.get_text_features(input_ids=ids["input_ids"], **masked).pooler_output
    found = teacher.model.encode_text(teacher.inputs.tokenizer(CAPTIONS))
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=0, atol=1e-5)
    scale = getattr(oracle, "logit_scale", None)
    scale = oracle.logit_scale_a if scale is None else scale
    torch.testing.assert_close(teacher.model.log_logit_scale["t"].flatten(), scale.flatten())


def test_a_step_has_the_loss_of_open_clips_distillation(toy_data, tmp_path, open_clip_folder):
    """Checks the whole path: a teacher of another size and tokenizer, from shards to the loss."""
    config = config_of(toy_data, tmp_path, open_clip_folder, image={"size": 24})
    tokenizer = build_tokenizer(config.model.text)
    teachers = open_teachers(config, tokenizer, device=CPU)
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1, teachers=teachers)
    batch, model = loader.load(0), build_toy_model(config, tokenizer)
    engine = Engine(
        start_accelerator(config.engine, run=config.run),
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=None,
    )
    step = build_step(config, engine, num_micro_batches=3, teachers=teachers)
    losses = step.backward(batch, PhaseTimer(engine.device))
    engine.close()

    oracle, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    oracle.eval()
    views = batch.streams["image-text"].views
    pixels = views[view_of_teacher("image", "image-text")].values
    assert pixels.shape[2:] == (16, 16) and views["image"].values.shape[2:] == (24, 24)
    texts = texts_of_first_step(config, loader)
    with torch.no_grad():
        normalized = prepare.transforms[-1](pixels.float() / 255)
        theirs = [
            oracle.encode_image(normalized, normalize=True),
            oracle.encode_text(open_clip.get_tokenizer("tiny-teacher")(texts), normalize=True),
        ]
        mine = [model.encode(view, views[view].values) for view in ("image", "text")]
        contrastive, distillation = open_clip.loss.DistillClipLoss()(
            *mine,
            model.log_logit_scale["image-text"].exp(),
            *theirs,
            oracle.logit_scale.exp(),
        )
    expected = 0.7 * contrastive + 0.3 * distillation
    assert abs(losses.total - expected.item()) < 1e-5
    assert abs(distillation - contrastive) > 1e-3


def texts_of_first_step(config, loader):
    """Returns the captions of the rows of step 0, from the tokens of the run's tokenizer."""
    rows = loader.load(0).streams["image-text"].views["text"].values
    simple = open_clip.tokenizer.SimpleTokenizer()
    return [
        simple.decode(row.tolist()).split("<end_of_text>")[0].removeprefix("<start_of_text>")
        for row in rows
    ]


def test_a_teacher_sees_the_crop_of_the_model_at_its_own_size(toy_data, tmp_path, open_clip_folder):
    config = config_of(toy_data, tmp_path, open_clip_folder, image={"size": 24})
    of_its_size = config_of(toy_data, tmp_path, None, image={"size": 16})
    plain = config_of(toy_data, tmp_path, None, image={"size": 24})
    tokenizer = build_tokenizer(config.model.text)
    teachers = open_teachers(config, tokenizer, device=CPU)
    share = {"rank": 0, "world_size": 1}
    views = open_step_loader(config, tokenizer, **share, teachers=teachers).load(3)
    views = views.streams["image-text"].views
    small, same = (
        open_step_loader(each, tokenizer, **share).load(3).streams["image-text"].views
        for each in (of_its_size, plain)
    )
    of_teacher = view_of_teacher("image", "image-text")
    assert torch.equal(views[of_teacher].values, small["image"].values)
    for view in ("image", "text"):  # what the model reads does not change
        assert torch.equal(views[view].values, same[view].values)
        assert torch.equal(views[view].keys, same[view].keys)


def test_every_file_of_a_teacher_counts(open_clip_folder):
    before = load(open_clip_folder).fingerprint
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        path = open_clip_folder / name
        content = path.read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1])
        if name.endswith(".json"):
            changed = content + b"\n"
        path.write_bytes(changed)
        assert load(open_clip_folder).fingerprint != before
        path.write_bytes(content)
    assert load(open_clip_folder).fingerprint == before


def test_teachers_that_cannot_teach_are_refused(toy_data, tmp_path, open_clip_folder):
    weights = open_clip_folder / "open_clip_model.safetensors"
    with pytest.raises(InputError, match="a file of weights does not describe its model"):
        load(weights)
    with pytest.raises(InputError, match="expected a model of audio and text, found one of image"):
        load(open_clip_folder, modalities=("audio", "text"))
    with pytest.raises(InputError, match=r"teacher\.checkpoint"):
        load("open_clip:no-such-model/tag")
    with pytest.raises(InputError, match=r"run python -m pretrain\.fetch CONFIG where there is"):
        load("nobody/has-this")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"expected a model of type clip, .* found 'bert'"):
        load(folder)
    WRITERS["CLIP"](tmp_path / "clip").save_pretrained(tmp_path / "clip")
    processor = tmp_path / "clip" / "preprocessor_config.json"
    processor.write_text(json.dumps(json.loads(processor.read_bytes()) | {"resample": 1}))
    with pytest.raises(InputError, match=r"clip: this preprocessing .* interpolation=lanczos: "):
        load(tmp_path / "clip")
    sections = {"image": {"size": 8, "scaled_decoding": True}}
    config = config_of(toy_data, tmp_path, open_clip_folder, **sections)
    tokenizer = build_tokenizer(config.model.text)
    with pytest.raises(InputError, match=r"set image\.scaled_decoding: false"):
        open_teachers(config, tokenizer, device=CPU)


@pytest.mark.slow
def test_a_taught_run_does_not_depend_on_what_it_ran_on(toy_data, tmp_path, open_clip_folder):
    steps = {"num_steps": 4, "warmup_steps": 1}
    sections = {"schedule": steps, "image": {"size": 24}}
    pretrain(config_of(toy_data, tmp_path / "alone", open_clip_folder, **sections))
    sections |= {"micro_batch_size": 3, "loading": {"num_workers": 2, "window": 16}}
    config = config_of(toy_data, tmp_path / "run", open_clip_folder, **sections)
    stopping = config.run.model_copy(update={"stop_after_step": 2})
    run_in_processes(2, train_with_teacher, config.model_copy(update={"run": stopping}))
    pretrain(config)
    rows, expected = (read_metrics(tmp_path / name) for name in ("run", "alone"))
    for row, truth in zip(rows, expected, strict=True):
        assert row["data_digest"] == truth["data_digest"]
        assert row["loss"] == pytest.approx(truth["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-3)


def train_with_teacher(config):
    folder = Path(config.streams["image-text"].objectives["image-text"].teacher.checkpoint)
    open_clip.add_model_config(folder.parent / "configs")
    pretrain(config)
