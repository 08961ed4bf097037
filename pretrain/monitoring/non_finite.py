"""Report on a step with a non-finite loss or gradient, for finding the cause.

    non_finite/step_00000123.json
      cause, logit_scale
      samples    {stream: samples of the step}, each with slot, source, epoch, ordinal, shard and
                 its non-finite tensors
      norms      norm of each parameter, its moments and, if the loss is finite, its gradient

Finite steps store no such data: a non-finite step is recomputed, with the same result.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_prep.storage.atomic import write_atomically
from pretrain.data.batch import StepBatch
from pretrain.data.step_loader import StepLoader
from pretrain.distributed.collectives import gather_objects, on_main_process, sum_over_ranks
from pretrain.distributed.engine import Engine
from pretrain.model.contrastive_model import StepFeatures
from pretrain.monitoring.timing import PhaseTimer

if TYPE_CHECKING:
    from pretrain.training.step import TrainingStep

FOLDER = "non_finite"


def dump_step(
    folder: Path,
    batch: StepBatch,
    *,
    cause: str,
    engine: Engine,
    loader: StepLoader,
    step: TrainingStep,
    has_gradient: bool,
) -> Path:
    """Writes the report on a step that was not applied; every rank must call it.

    Args:
        folder: run folder.
        batch: this rank's part of the step.
        cause: message of the error.
        engine: engine in the state before the step.
        loader: reader of the step.
        step: computes the gradient and micro-batches of the step.
        has_gradient: whether the loss is finite, so that there is a gradient.

    Returns:
        Path of the report.
    """
    with torch.no_grad():
        features = engine.forward(step.micro_batches(batch))
    samples = _samples_of_step(batch, loader, features)
    norms = state_norms(engine)
    if has_gradient:
        step.backward(batch, PhaseTimer(engine.device))
        norms["gradient"] = engine.gradient_norms()
        engine.drop_gradients()
    samples_by_rank = gather_objects(samples)
    values = {
        "step": batch.step + 1,
        "cause": cause,
        "logit_scale": {name: scale.item() for name, scale in features.scales.items()},
        "samples": {name: [s for own in samples_by_rank for s in own[name]] for name in samples},
        "norms": norms,
    }
    path = folder / FOLDER / f"step_{batch.step + 1:08d}.json"
    on_main_process(lambda: _write(path, values))
    return path


def _samples_of_step(
    batch: StepBatch, loader: StepLoader, features: StepFeatures
) -> dict[str, list[dict[str, Any]]]:
    """This rank's samples, by stream."""
    described = {}
    for name, stream in batch.streams.items():
        samples = loader.schedule.samples_of_step(name, batch.step, lanes=loader.lanes)
        parts = {view: each.values for view, each in stream.views.items()}
        parts |= {f"{view}_embedding": each for view, each in features.views[name].items()}
        bad = {part: _bad_rows(values) for part, values in parts.items()}
        described[name] = []
        for row in range(len(samples)):
            source = loader.readers[name].sources[samples.sources[row]]
            ordinal = int(samples.ordinals[row])
            described[name].append(
                {
                    "slot": int(samples.slots[row]),
                    "source": source.source,
                    "epoch": int(samples.epochs[row]),
                    "ordinal": ordinal,
                    "shard": source.dataset.manifest[source.dataset.locate(ordinal)[0]].name,
                    "not_finite": [part for part, rows in bad.items() if rows[row]],
                }
            )
    return described


def _bad_rows(values: Tensor) -> list[bool]:
    """[B] whether a row has a value that is not finite."""
    if not values.is_floating_point():
        return [False] * len(values)
    return (~torch.isfinite(values)).flatten(1).any(dim=1).tolist()


def state_norms(engine: Engine) -> dict[str, dict[str, float]]:
    """Returns {"parameter" or a moment: {parameter: norm}}; every rank must call it."""
    names = [name for name, _ in engine.model.named_parameters()]
    squares: dict[str, Tensor] = {}
    for each in engine.slices():
        sums = squares.setdefault(
            each.slice.key, torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        )
        if not each.is_replicated or engine.is_main_process:
            sums[names.index(each.slice.parameter)] += each.values.double().square().sum()
    # A rank may hold no moment, if few parameters are trained.
    keys = sorted(set().union(*gather_objects(set(squares))))
    zeros = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
    return {
        key: dict(zip(names, sum_over_ranks(squares.get(key, zeros)).sqrt().tolist(), strict=True))
        for key in keys
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(_as_json(values), indent=1).encode() + b"\n")


def _as_json(value: Any) -> Any:
    """The same value with NaN and infinities as text, because JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
