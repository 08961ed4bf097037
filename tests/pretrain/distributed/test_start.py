"""Towers of all libraries, trained, frozen and as teachers, under every strategy."""

import open_clip
import pytest

from pretrain.checkpoint import read_model_state
from pretrain.distributed.start import start_accelerator
from tests.pretrain.model.test_towers import TINY_AST, TINY_VIT
from tests.pretrain.test_train import assert_same_run, train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import (
    TINY_BERT,
    build_toy_model,
    write_clip_tokenizer,
    write_tiny_open_clip,
)

NUM_STEPS = 4
TIMM = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
OPEN_CLIP = {"library": "open_clip", "name": "tiny"}
VIT = {"library": "transformers", "name": "vit", "options": TINY_VIT}
AST = {"library": "transformers", "name": "audio-spectrogram-transformer", "options": TINY_AST}
BERT = {"library": "transformers", "name": "bert", "options": TINY_BERT}
OPEN_CLIP_TEXT = {
    "library": "open_clip",
    "options": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408},
}
FROZEN = {"frozen": True}
# Towers of a run, and of the teacher of its images.
MIXES = {
    "mostly transformers": (
        {"image": VIT, "audio": TIMM | FROZEN, "text": BERT},
        {"image": OPEN_CLIP, "audio": AST, "text": BERT},
    ),
    "mostly open_clip": (
        {"image": OPEN_CLIP, "audio": AST | FROZEN, "text": OPEN_CLIP_TEXT},
        {"image": VIT, "audio": TIMM, "text": OPEN_CLIP_TEXT},
    ),
    "frozen images and captions": (
        {"image": VIT | FROZEN, "audio": TIMM, "text": BERT | FROZEN},
        {"image": TIMM, "audio": TIMM, "text": BERT},
    ),
}
# Mix -> strategies of the slow tests; the exhaustive ones take the rest.
STRATEGIES = {
    "mostly transformers": ("ddp", "zero1", "zero2", "zero3"),
    "mostly open_clip": ("zero2", "zero3"),
    "frozen images and captions": ("ddp", "zero3"),
}


def config_of(toy_data, folder, towers, tokenizer, *, teacher=None, **sections):
    text = {"context_length": 12, "tokenizer": str(tokenizer)} | towers["text"]
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    if teacher is not None:
        objective = streams["image-text"]["objectives"]["image-text"]
        objective["teacher"] = {"checkpoint": str(teacher)}
    # Gradients of key biases are rounding noise, which a small eps would amplify.
    sections = {
        "schedule": {"num_steps": NUM_STEPS, "warmup_steps": 1},
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-4},
    } | sections
    return toy_config(toy_data, folder, model=towers | {"text": text}, streams=streams, **sections)


def train_with_tiny_open_clip(configs, folder):
    open_clip.add_model_config(folder / "configs")
    train(configs)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    write_tiny_open_clip(folder)
    return folder


@pytest.fixture(scope="module")
def mix(request, toy_data, tmp_path_factory, tokenizer, open_clip_folder):
    """Returns (towers, folder of the teacher's run, folder of the run of one process)."""
    folder = tmp_path_factory.mktemp("mix")
    towers, towers_of_teacher = MIXES[request.param]
    one_step = {"num_steps": 1, "warmup_steps": 0}
    teacher = config_of(
        toy_data, folder / "teacher", towers_of_teacher, tokenizer, seed=1, schedule=one_step
    )
    alone = config_of(toy_data, folder / "alone", towers, tokenizer, teacher=folder / "teacher")
    for config in (teacher, alone):
        run_in_processes(1, train_with_tiny_open_clip, config, open_clip_folder)
    return towers, teacher.run.folder, alone.run.folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mix", "strategy"),
    [
        pytest.param(mix, strategy, marks=[] if strategy in strategies else pytest.mark.exhaustive)
        for mix, strategies in STRATEGIES.items()
        for strategy in ("ddp", "zero0", "zero1", "zero2", "zero3")
    ],
    indirect=["mix"],
)
def test_towers_of_all_libraries_train_alike_under_every_strategy(
    toy_data, tmp_path, mix, tokenizer, open_clip_folder, strategy
):
    towers, teacher, alone = mix
    config = config_of(
        toy_data,
        tmp_path / "run",
        towers,
        tokenizer,
        teacher=teacher,
        engine={"strategy": strategy},
        micro_batch_size=3,
    )
    run_in_processes(2, train_with_tiny_open_clip, config, open_clip_folder)
    assert_same_run(tmp_path / "run", alone)
    assert_same_parameters(config, alone)


def assert_same_parameters(config, expected):
    """Asserts that parameters differ by at most a thousandth of the distance they moved."""
    beginning = dict(build_toy_model(config).named_parameters())
    final = f"checkpoints/step_{NUM_STEPS:08d}"
    ours, theirs = (read_model_state(each / final) for each in (config.run.folder, expected))
    moved = 0
    for name, start in beginning.items():
        distance = (theirs[name] - start.detach()).norm()
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * distance + 1e-7, name
        assert start.requires_grad or distance == 0
        moved += bool(distance > 0)
    assert moved > 4


def shapes_under_zero3(config):
    start_accelerator(config.engine, run=config.run)
    return {name: tuple(each.shape) for name, each in build_toy_model(config).named_parameters()}


def test_transformers_builds_whole_towers_under_zero3(toy_data, tmp_path, tokenizer):
    towers = {"image": VIT, "audio": AST | FROZEN, "text": BERT}
    config = config_of(toy_data, tmp_path, towers, tokenizer, engine={"strategy": "zero3"})
    expected = {
        name: tuple(each.shape) for name, each in build_toy_model(config).named_parameters()
    }
    assert run_in_processes(1, shapes_under_zero3, config) == [expected]
