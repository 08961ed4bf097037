"""Gradients of training steps on any number of processes, compared with plain autograd."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional

from pretrain.data.batch import StepBatch
from pretrain.distributed.start import build_engine, start_accelerator
from pretrain.loss.reference import dense_loss
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.sample_dropout import DropKeys, pair_keys
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.probe.float64 import ComputeInFloat64
from pretrain.settings.views import View
from pretrain.training.assembly import (
    build_step,
    build_training_optimizer,
    measure_batch_norms,
    open_step_loader,
    standardize_inputs,
)
from tests.support.toy_towers import build_toy_model

# (precision, step)
SOME_STEPS = (("float32", 0), ("float64", 1))
ALL_STEPS = tuple((precision, step) for precision in ("float32", "float64") for step in (0, 1))


def loaded_model(config, loader):
    """Builds the model of a run at its start, without probing its towers."""
    model = build_toy_model(config, build_text_tokenizer(config.model))
    standardize_inputs(config, model, loader)
    measure_batch_norms(config, model, loader)
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
                features_of(
                    model,
                    key,
                    section,
                    view,
                    [values[rows] for values in side.inputs],
                    keys=drop_keys(config, batch, name, view)[rows],
                )
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


def drop_keys(config, batch, stream, view):
    """Returns the keys of dropout, int64 [N], of the whole batch."""
    slots = torch.arange(len(batch.streams[stream]))
    keys = DropKeys(torch.tensor(batch.step), slots)
    return pair_keys(keys, seed=config.seed, stream=stream, view=view)


def features_of(model, key, section, view, inputs, *, keys):
    """Returns [B, D] in float64, L2-normalised, under the objective's projection."""
    if section.projection == "shared":
        return model.encode(view, *inputs, keys=keys).double()
    name = model.tower_names[View.parse(view).modality]
    tower = model.towers[name]
    with tower.drop_keys.set_pairs(keys):
        features = tower.backbone(tower.input_stage(*inputs))
    return functional.normalize(model.heads[f"{key}:{name}"](features).double(), dim=-1)


def errors_of_steps(config, steps=SOME_STEPS, *, micro_batches=(1, 3), accelerator=None):
    """Compares steps of this process group with one process.

    Args:
        steps: (precision, step) of each.
        micro_batches: numbers of micro-batches.
        accelerator: accelerator of this process; None starts it.

    Returns:
        {precision: StepErrors of each step, for each number of micro-batches}.
    """
    accelerator = accelerator or start_accelerator(config.engine, run=config.run)
    tokenizer = build_text_tokenizer(config.model)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1)
    own = open_step_loader(config, tokenizer, **share)
    found = {}
    for precision, number in steps:
        truth = true_step(config, whole, number, getattr(torch, precision))
        found.setdefault(precision, []).extend(
            errors_of_step(config, accelerator, truth, own.load(number), num_micro_batches)
            for num_micro_batches in micro_batches
        )
    return found


@dataclass(frozen=True)
class StepErrors:
    """A step on this rank, compared with plain autograd."""

    loss: float
    gradient: float  # worst of all parameters, as a fraction of the gradient's norm
    has_counts: bool  # whether as many samples took part in every objective
    counts: dict[str, int]  # samples of each objective
    encoded: dict[bool, int]  # calls of towers, with and without a graph
    rows: dict[str, tuple[int, int]]  # view -> samples that have it, on this rank and on all


@dataclass(frozen=True)
class TrueStep:
    """A step of one process by plain autograd."""

    model: ContrastiveModel
    batch: StepBatch
    loss: float
    gradients: dict[str, torch.Tensor]
    counts: dict[str, int]  # samples of each objective
    dtype: torch.dtype


def computing_in(dtype):
    return ComputeInFloat64() if dtype is torch.float64 else nullcontext()


def true_step(config, loader, number, dtype):
    model, batch = loaded_model(config, loader).to(dtype), loader.load(number)
    with computing_in(dtype):
        loss, counts = true_loss(config, model, batch)
        loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return TrueStep(model, batch, loss.item(), gradients, counts, dtype)


def errors_of_step(config, accelerator, truth, batch, num_micro_batches):
    encoded, model = Counter(), copy.deepcopy(truth.model)
    for tower in model.towers.values():
        tower.register_forward_pre_hook(lambda *_: encoded.update([torch.is_grad_enabled()]))
    with computing_in(truth.dtype):
        engine = build_engine(
            accelerator,
            strategy=config.engine.strategy,
            model=model,
            optimizer=build_training_optimizer(config, model),
            gradient_clipping=None,
        )
        step = build_step(config, engine, num_micro_batches=num_micro_batches)
        losses = step.backward(batch, PhaseTimer(engine.device))
        found = {name: gradient_of(engine, p) for name, p in model.named_parameters()}
    assert {each.dtype for each in found.values()} == {truth.dtype}
    length = torch.cat([value.flatten() for value in truth.gradients.values()]).norm() + 1e-6
    worst = max(
        ((found[name] - each).norm() / max(each.norm(), 1e-3 * length)).item()
        for name, each in truth.gradients.items()
    )
    return StepErrors(
        abs(losses.total - truth.loss) / max(truth.loss, 1e-3),
        worst,
        {key: loss.num_samples for key, loss in losses.by_objective.items()} == truth.counts,
        truth.counts,
        dict(encoded),
        {
            f"{name}/{view}": (
                num_present(each),
                num_present(truth.batch.streams[name].views[view]),
            )
            for name, stream in batch.streams.items()
            for view, each in stream.views.items()
        },
    )


def gradient_of(engine, parameter):
    if not hasattr(engine, "stage"):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def num_present(view):
    return len(view.inputs[0]) if view.present is None else int(view.present.sum())


def assert_exact(of_ranks):
    limits = {"float32": (1e-6, 1e-5), "float64": (1e-12, 1e-12)}
    for of_precisions in of_ranks:
        for precision, steps in of_precisions.items():
            for errors in steps:
                print(precision, errors.loss, errors.gradient)
                assert errors.has_counts
                assert errors.loss < limits[precision][0]
                assert errors.gradient < limits[precision][1]
