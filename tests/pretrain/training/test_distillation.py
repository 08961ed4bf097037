"""Distillation: the teacher is loaded, checked, and changes the targets as it should."""

import pytest
import torch

from data_prep.errors import (
    ConfigError,
    InputError,
)
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.loss.reference import dense_loss
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.assembly import (
    build_step,
    build_training_optimizer,
    open_step_loader,
    open_teachers,
)
from pretrain.training.distillation import ObjectiveTeacher
from pretrain.training.gradient_cache import split_into_micro_batches
from tests.pretrain.test_train import train
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher_run(toy_data, tmp_path_factory):
    config = toy_config(toy_data, tmp_path_factory.mktemp("teacher") / "run", seed=1)
    run_in_processes(1, train, config.model_copy(update={"run": stopping(config, 2)}))
    return config.run.folder


def stopping(config, step):
    return config.run.model_copy(update={"stop_after_step": step})


def student_config(toy_data, folder, teacher, *, weight=0.5, **sections):
    """Returns the config of a run with a teacher for images, and none for sounds."""
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    streams["image-text"]["objectives"]["image-text"]["teacher"] = {
        "checkpoint": str(teacher),
        "weight": weight,
    }
    return toy_config(toy_data, folder, streams=streams, **sections)


def errors_of_gradients(config, num_micro_batches):
    """Returns (loss error, worst gradient error) against the dense loss of one process."""
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer)
    teachers = open_teachers(config, tokenizer, device=CPU)
    truth = true_loss(config, model, tokenizer, teachers)
    truth.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    optimizer = build_training_optimizer(config, model)
    engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batch = open_step_loader(config, tokenizer, **share).load(0)
    step = build_step(config, engine, num_micro_batches=num_micro_batches, teachers=teachers)
    losses = step.backward(batch, PhaseTimer(engine.device))
    length = torch.cat([value.flatten() for value in expected.values()]).norm()
    worst = max(
        (
            (parameter.grad - expected[name]).norm() / max(expected[name].norm(), 1e-3 * length)
        ).item()
        for name, parameter in model.named_parameters()
    )
    return abs(losses.total / truth.item() - 1), worst


def true_loss(config, model, tokenizer, teachers):
    batch = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    [whole] = split_into_micro_batches(batch, num_micro_batches=1, trims_captions=False)
    total = 0
    for name, stream in whole.items():
        sides = [model.encode(view, *inputs).double() for view, inputs in stream.views.items()]
        teacher = teachers.get(f"{name}/{name}")
        lesson = None if teacher is None else teacher.encode([whole])
        total = total + dense_loss(
            *sides, model.log_logit_scale[name].exp().double(), teacher=lesson
        )
    return total


def test_the_gradient_is_that_of_the_whole_batch_on_any_split(toy_data, tmp_path, teacher_run):
    config = student_config(toy_data, tmp_path / "run", teacher_run)
    for errors in run_in_processes(2, errors_of_gradients, config, 3):
        assert errors[0] < 1e-6
        assert errors[1] < 1e-5


def test_who_knows_what_the_teacher_knows_learns_nothing(toy_data, tmp_path, teacher_run):
    """Checks a minimum: with weight 1 the targets are the teacher's softmaxes."""
    config = student_config(toy_data, tmp_path / "run", teacher_run, weight=1.0)
    tokenizer = build_tokenizer(config.model.text)
    teachers = open_teachers(config, tokenizer, device=CPU)
    model = teachers["image-text/image-text"].model.requires_grad_(True)
    engine = Engine(
        start_accelerator(config.engine, run=config.run),
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=None,
    )
    batch = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    engine.train_mode(False)
    step = build_step(config, engine, num_micro_batches=1, teachers=teachers)
    step.backward(batch, PhaseTimer(engine.device))
    of_images = model.towers["image"].projection.weight.grad.norm()
    of_sounds = model.towers["audio"].projection.weight.grad.norm()
    assert of_images < 1e-5 * of_sounds
    engine.close()


def test_a_run_is_taught_and_keeps_to_its_teacher(toy_data, tmp_path, teacher_run):
    config = student_config(toy_data, tmp_path / "run", teacher_run)
    config = config.model_copy(update={"run": stopping(config, 1)})
    run_in_processes(1, train, config)
    other = tmp_path / "run" / "checkpoints" / "step_00000001"
    changed = student_config(toy_data, tmp_path / "run", other)
    with pytest.raises(AssertionError, match=r"fingerprint.teacher/image-text/image-text"):
        run_in_processes(1, train, changed)


@pytest.mark.parametrize(
    ("sections", "view", "shape"),
    [
        ({"image": {"size": 20}}, "image", (16, 16, 3)),
        ({"model": {"text": {"library": "open_clip", "context_length": 9}}}, "text", (12,)),
    ],
)
def test_a_teacher_of_other_inputs_reads_its_own(
    toy_data, tmp_path, teacher_run, sections, view, shape
):
    config = student_config(toy_data, tmp_path / "run", teacher_run, **sections)
    tokenizer = build_tokenizer(config.model.text)
    [teacher] = open_teachers(config, tokenizer, device=CPU).values()
    assert {name: form.layout.shape for name, form in teacher.formats.items()} == {view: shape}


def test_a_missing_teacher_and_a_sigmoid_loss_are_refused(toy_data, tmp_path):
    config = student_config(toy_data, tmp_path / "run", tmp_path / "nothing")
    tokenizer = build_tokenizer(config.model.text)
    with pytest.raises(InputError, match=r"nothing: expected a run folder with a checkpoint"):
        open_teachers(config, tokenizer, device=CPU)
    streams = config.model_dump(mode="json")["streams"]
    streams["image-text"]["objectives"]["image-text"]["loss"] = "sigmoid"
    with pytest.raises(
        (ConfigError, ValueError), match="teacher with loss=sigmoid: it is for loss=softmax alone"
    ):
        toy_config(toy_data, tmp_path / "run", streams=streams)


@pytest.mark.parametrize("is_causal", [True, False])
def test_captions_are_trimmed_for_each_model_by_its_own_property(toy_data, tmp_path, is_causal):
    """Tests a causal student with a bidirectional teacher, and the reverse."""
    config, student = model_with(toy_data, tmp_path, is_causal=is_causal)
    _, teacher = model_with(toy_data, tmp_path, is_causal=not is_causal)
    views = ("image", "text")
    teacher = teacher.eval()
    teachers = {
        "image-text/image-text": ObjectiveTeacher(
            "image-text", views, "image-text", teacher, 0.5, "", False
        )
    }
    engine = Engine(
        start_accelerator(config.engine, run=config.run),
        model=student,
        optimizer=build_training_optimizer(config, student),
        gradient_clipping=None,
    )
    step = build_step(config, engine, num_micro_batches=5, teachers=teachers)
    tokenizer = build_tokenizer(config.model.text)
    batch = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    tokens = batch.streams["image-text"].views["text"].values
    with torch.no_grad():
        expected = teacher.towers["text"](tokens)
    calls = {model: [] for model in (student, teacher)}
    for model, recorded in calls.items():
        model.towers["text"].register_forward_hook(
            lambda _, args, output, recorded=recorded: recorded.append((args[0], output))
        )
    step.backward(batch, PhaseTimer(engine.device))
    torch.testing.assert_close(torch.cat([output for _, output in calls[teacher]]), expected)
    assert all((tokens.shape[1] < 24) == is_causal for tokens, _ in calls[student])
    assert all((tokens.shape[1] < 24) != is_causal for tokens, _ in calls[teacher])
    engine.close()


def model_with(toy_data, folder, *, is_causal):
    """Returns a config and its model; only causal text towers take trimmed captions."""
    options = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
    options["no_causal_mask"] = not is_causal
    text = {"library": "open_clip", "context_length": 24, "options": options}
    config = toy_config(toy_data, folder, model={"text": text})
    return config, build_toy_model(config)
