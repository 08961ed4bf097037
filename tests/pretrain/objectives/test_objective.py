"""Several objectives on one stream, temperatures that streams share, and an objective of a test."""

from collections import Counter
from typing import Literal

import torch

from pretrain.distributed.collectives import sum_over_ranks, world_size
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.loss.reference import dense_loss
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    ObjectiveSection,
)
from pretrain.training.assembly import build_step, build_training_optimizer, open_step_loader
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model


class ToySection(ObjectiveSection):
    """Pulls one view towards the first axis."""

    kind: Literal["toy"] = "toy"
    view: str = "text"

    def views(self, name: str) -> tuple[str]:
        return (self.view,)


class ToyObjective(Objective, section=ToySection):
    """Mean of (1 - first coordinate)^2 over the global batch: not coupled, without temperature."""

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveLoss:
        [features] = (inputs.features[view] for view in self.views)
        num_samples = sum(inputs.counts)
        own = (1 - features[:, 0]).square().sum() / num_samples
        value = sum_over_ranks(own.detach().clone()).item()
        return ObjectiveLoss(own * world_size(), value, num_samples, {"toy": value})


OBJECTIVES = {
    "image-text": {
        "image-text": {"weight": 2.0, "duplicates": "positives"},
        "image_sigmoid": {"left": "text", "right": "image", "loss": "sigmoid", "weight": 0.5},
        "axis": {"kind": "toy", "weight": 3.0},
    },
    # its temperature is that of the other stream
    "audio-text": {"sounds": {"left": "audio", "right": "text", "temperature": "image-text"}},
}


def config_of(toy_data, folder, *, micro_batch_size):
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    for name, of_stream in OBJECTIVES.items():
        streams[name]["objectives"] = of_stream
    return toy_config(toy_data, folder, streams=streams, micro_batch_size=micro_batch_size)


def true_loss(config, model, batch):
    """Returns the loss of the whole batch with an autograd graph, by the obvious way."""
    total = 0.0
    for name, stream in config.streams.items():
        views = batch.streams[name].views
        features = {view: model.encode(view, each.values) for view, each in views.items()}
        for key, section in stream.objectives.items():
            if section.kind == "toy":
                loss = (1 - features[section.view][:, 0]).square().mean()
            else:
                left, right = section.views(key)
                temperature = section.temperature_name(key)
                loss = dense_loss(
                    features[left].double(),
                    features[right].double(),
                    model.log_logit_scale[temperature].exp().double(),
                    model.logit_bias[temperature].double() if section.has_bias else None,
                    kind=section.loss,
                    duplicates=section.duplicates,
                    keys=[views[left].keys, views[right].keys],
                )
            total = total + section.weight * loss
    return total


def errors_of_step(toy_data, folder):
    """Returns [(errors of loss and gradients, samples encoded, metrics)] on this rank."""
    found = []
    config = config_of(toy_data, folder, micro_batch_size=64)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    for micro_batch_size in (64, 3):
        config = config_of(toy_data, folder, micro_batch_size=micro_batch_size)
        model = build_toy_model(config, tokenizer)
        truth = true_loss(config, model, whole)
        truth.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        encoded = Counter()
        for view, tower in model.towers.items():
            tower.register_forward_pre_hook(
                lambda _, inputs, view=view, encoded=encoded: encoded.update(
                    {(view, torch.is_grad_enabled()): len(inputs[0])}
                )
            )
        optimizer = build_training_optimizer(config, model)
        engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
        share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        batch = open_step_loader(config, tokenizer, **share).load(0)
        num_micro_batches = 1 if micro_batch_size == 64 else 6
        step = build_step(config, engine, num_micro_batches=num_micro_batches)
        losses = step.backward(batch, PhaseTimer(engine.device))
        length = torch.cat([value.flatten() for value in expected.values()]).norm()
        worst = max(
            ((p.grad - expected[name]).norm() / max(expected[name].norm(), 1e-3 * length)).item()
            for name, p in model.named_parameters()
        )
        found.append((abs(losses.total / truth.item() - 1), worst, dict(encoded), losses.row()))
    return found


def test_gradients_are_those_of_the_whole_batch_and_each_view_is_encoded_once(toy_data, tmp_path):
    of_ranks = run_in_processes(1, errors_of_step, toy_data, tmp_path)
    of_ranks += run_in_processes(2, errors_of_step, toy_data, tmp_path)
    for found in of_ranks:
        for error, worst, _, row in found:
            assert error < 1e-6
            assert worst < 1e-5
            assert list(row["loss"]) == [
                "image-text/image-text",
                "image-text/image_sigmoid",
                "image-text/axis",
                "audio-text/sounds",
            ]
            assert list(row["toy"]) == ["image-text/axis"]
            assert list(row["text_to_image_recall@1"]) == [
                "image-text/image-text",
                "image-text/image_sigmoid",
            ]
            assert list(row["logit_scale"]) == ["image-text", "image_sigmoid"]
            assert list(row["logit_bias"]) == ["image_sigmoid"]
    for found, num_ranks in zip(of_ranks, (1, 2, 2), strict=True):
        counts = {"image": 16 // num_ranks, "audio": 8 // num_ranks, "text": 24 // num_ranks}
        (_, _, at_once, _), (_, _, in_parts, _) = found
        assert at_once == {(view, True): count for view, count in counts.items()}
        twice = {(view, is_graph): count for view, count in counts.items() for is_graph in (0, 1)}
        # a rank without rows of a micro-batch encodes one row
        assert all(in_parts[key] >= count for key, count in twice.items())
