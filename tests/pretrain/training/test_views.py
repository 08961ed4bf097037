"""Steps of samples with any subset of several modalities, against plain autograd."""

from collections import Counter

import pytest
import torch
from torch.nn import functional

from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.loss.reference import dense_loss
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.assembly import (
    build_step,
    build_training_optimizer,
    open_step_loader,
    standardize_inputs,
)
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_towers import build_toy_model
from tests.support.toy_views import views_config, write_views

STEPS = (0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "clips", fraction=0.55)
    write_views(folder / "texts", seed=1, always=["title", "text"], never=["image"])
    return folder


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """Hardly any sample has a modality, so that some objectives have one sample or none."""
    folder = tmp_path_factory.mktemp("rare")
    write_views(folder / "clips", fraction=0.12)
    write_views(folder / "texts", seed=1, fraction=0.2, never=["image"])
    return folder


def loaded_model(config, loader):
    tokenizer = build_text_tokenizer(config.model)
    model = build_toy_model(config, tokenizer)
    standardize_inputs(config, model, loader)
    return model


def true_loss(config, model, batch):
    """Returns (loss of the whole batch with a graph, samples of each objective)."""
    total, counts = 0.0, {}
    for name, stream in config.streams.items():
        views = batch.streams[name].views
        for key, section in stream.objectives.items():
            sides = [views[view] for view in section.views(key)]
            rows = torch.ones(len(sides[0]), dtype=torch.bool)
            for side in sides:
                rows &= True if side.present is None else side.present
            counts[f"{name}/{key}"] = int(rows.sum())
            if not rows.any():
                continue
            left, right = (
                features_of(model, key, section, view, [values[rows] for values in side.inputs])
                for view, side in zip(section.views(key), sides, strict=True)
            )
            temperature = section.temperature_name(key)
            loss = dense_loss(
                left,
                right,
                model.log_logit_scale[temperature].exp().double(),
                model.logit_bias[temperature].double() if section.has_bias else None,
                kind=section.loss,
                direction=section.direction,
                negatives=section.negatives,
                duplicates=section.duplicates,
                label_smoothing=section.label_smoothing,
                keys=[side.keys[rows] for side in sides],
            )
            total = total + section.weight * loss
    return total, counts


def features_of(model, key, section, view, inputs):
    """Returns [B, D] in float64, L2-normalised, under the objective's projection."""
    if section.projection == "shared":
        return model.encode(view, *inputs).double()
    tower = model.towers["image"]
    features = tower.backbone(tower.input_stage(*inputs))
    return functional.normalize(model.heads[f"{key}:image"](features).double(), dim=-1)


def errors_of_steps(data, folder):
    """Returns [(error of the loss, worst error of a gradient, counts, encoded rows)]."""
    found = []
    config = views_config(data, folder)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_text_tokenizer(config.model)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1)
    own = open_step_loader(config, tokenizer, **share)
    for number in STEPS:
        for num_micro_batches in (1, 3):
            model = loaded_model(config, whole)
            truth, counts = true_loss(config, model, whole.load(number))
            truth.backward()
            expected = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
            }
            model.zero_grad()
            encoded = Counter()
            for tower in model.towers.values():
                tower.register_forward_pre_hook(
                    lambda *_, encoded=encoded: encoded.update([torch.is_grad_enabled()])
                )
            optimizer = build_training_optimizer(config, model)
            engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
            step = build_step(config, engine, num_micro_batches=num_micro_batches)
            losses = step.backward(own.load(number), PhaseTimer(engine.device))
            length = torch.cat([value.flatten() for value in expected.values()]).norm() + 1e-6
            worst = max(
                (
                    (p.grad - expected[name]).norm() / max(expected[name].norm(), 1e-3 * length)
                ).item()
                for name, p in model.named_parameters()
            )
            taking_part = {key: loss.num_samples for key, loss in losses.by_objective.items()}
            error = abs(losses.total - truth.item()) / max(truth.item(), 1e-3)
            found.append((error, worst, taking_part == counts, counts, dict(encoded)))
    return found


def assert_exact(of_ranks):
    for found in of_ranks:
        for error, worst, has_counts, _, _ in found:
            assert has_counts
            assert error < 1e-6
            assert worst < 1e-5


@pytest.mark.parametrize(
    "num_processes", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_gradients_are_those_of_the_samples_that_have_both_views(data, tmp_path, num_processes):
    of_ranks = run_in_processes(num_processes, errors_of_steps, data, tmp_path)
    assert_exact(of_ranks)
    # 7 views in clips: image, image.2, scan, audio, text, text.title, values, series; 3 in texts
    num_views = 8 + 3
    for *_, encoded in of_ranks[0][::2]:
        assert encoded == {True: num_views}
    for *_, encoded in of_ranks[0][1::2]:
        assert encoded == {False: 3 * num_views, True: 3 * num_views}


@pytest.mark.parametrize("num_processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_objectives_with_one_sample_or_none_have_its_gradient_or_zero(
    rare, tmp_path, num_processes
):
    of_ranks = run_in_processes(num_processes, errors_of_steps, rare, tmp_path)
    assert_exact(of_ranks)
    counts = [count for *_, counts, _ in of_ranks[0] for count in counts.values()]
    assert {0, 1} <= set(counts)
