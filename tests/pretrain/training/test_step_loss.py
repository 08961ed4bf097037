"""Every accepted config gives the gradient of the loss over the whole global batch."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from pretrain.distributed.collectives import RowGather, counted_traffic
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.loss.reference import dense_loss
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.assembly import build_step, build_training_optimizer, open_step_loader
from pretrain.training.micro_batch_size import StepSizes, num_micro_batches_of_size
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

LOSSES = {
    "softmax": {"loss": "softmax"},
    "sigmoid": {"loss": "sigmoid"},
    "forward": {"loss": "softmax", "direction": "forward"},
    "all_pairs": {"loss": "softmax", "negatives": "all_pairs"},
}
CHOICES = {
    "loss": list(LOSSES),
    "label_smoothing": [0.0, 0.1],
    "duplicates": ["negatives", "positives", "masked"],
    "loss_mode": ["strip1", "strip2"],
    "micro_batch_size": [24, 3],
    "streams_per_step": ["all", "one"],
}
OPTIONS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]


def is_defined(options):
    return options["loss"] != "sigmoid" or options["label_smoothing"] == 0


ACCEPTED = [options for options in OPTIONS if is_defined(options)]


def config_of(toy_data, folder, options, *, precision="fp32"):
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    for weight, stream in zip((1.0, 0.5), streams.values(), strict=True):
        [objective] = stream["objectives"].values()
        objective |= {key: options[key] for key in ("label_smoothing", "duplicates")}
        objective |= LOSSES[options["loss"]] | {"weight": weight}
    return toy_config(
        toy_data,
        folder,
        streams=streams,
        streams_per_step=options["streams_per_step"],
        micro_batch_size=options["micro_batch_size"],
        engine={"precision": precision, "loss_mode": options["loss_mode"]},
    )


def batch_of(config, tokenizer, **share):
    """Returns a step in which many pairs are duplicates of one another."""
    batch = open_step_loader(config, tokenizer, **share).load(0)
    return replace(batch, streams={n: with_duplicates(p) for n, p in batch.streams.items()})


def with_duplicates(stream):
    views = {name: replace(view, keys=view.keys % 11) for name, view in stream.views.items()}
    return replace(stream, views=views)


def rounded(features):
    """Returns the features rounded to bf16; their gradients are not rounded."""
    return features + (features.bfloat16().float() - features).detach()


def true_gradients(config, model, tokenizer):
    """Returns (loss, gradient of every parameter) of one process with all pairs at once."""
    batch = batch_of(config, tokenizer, rank=0, world_size=1)
    is_rounded = config.engine.precision == "bf16"
    total = 0
    for name in batch.taken:
        views = batch.streams[name].views
        [(objective, section)] = config.streams[name].objectives.items()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            media, text = (model.encode(view, each.values) for view, each in views.items())
        sides = [rounded(x) if is_rounded else x for x in (media, text)]
        loss = dense_loss(
            *(side.double() for side in sides),
            model.log_logit_scale[objective].exp().double(),
            model.logit_bias[objective].double() if section.loss == "sigmoid" else None,
            kind=section.loss,
            direction=section.direction,
            negatives=section.negatives,
            duplicates=section.duplicates,
            label_smoothing=section.label_smoothing,
            keys=[view.keys for view in views.values()],
        )
        total = total + loss * section.weight
    total.backward()
    return total.item(), taken_gradients(model)


def taken_gradients(model):
    """Returns the gradients, and clears them; zeros where a tower was not used."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad()
    return gradients


def errors_of_options(toy_data, folder, all_options, precision):
    """Returns [(options, error of the loss, worst error of a gradient)] on this rank."""
    configs = [config_of(toy_data, folder, each, precision=precision) for each in all_options]
    accelerator = start_accelerator(configs[0].engine, run=configs[0].run)
    tokenizer = build_tokenizer(configs[0].model.text)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    found = []
    for options, config in zip(all_options, configs, strict=True):
        model = build_toy_model(config, tokenizer)
        truth, expected = true_gradients(config, model, tokenizer)
        optimizer = build_training_optimizer(config, model)
        engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
        num_micro_batches = num_micro_batches_of_size(
            StepSizes.of_config(config), num_processes=accelerator.num_processes
        )
        batch = batch_of(config, tokenizer, **share)
        step = build_step(config, engine, num_micro_batches=num_micro_batches)
        losses = step.backward(batch, PhaseTimer(engine.device))
        gradients = taken_gradients(model)
        length = torch.cat([value.flatten() for value in expected.values()]).norm()
        worst = max(
            ((gradients[name] - value).norm() / max(value.norm(), 1e-3 * length)).item()
            for name, value in expected.items()
        )
        found.append((options, abs(losses.total / truth - 1), worst))
    return found


def test_a_loss_is_refused_where_it_is_not_defined(toy_data, tmp_path):
    for options in OPTIONS:
        if is_defined(options):
            config_of(toy_data, tmp_path, options)
        else:
            with pytest.raises(ValidationError, match="it is for loss=softmax alone"):
                config_of(toy_data, tmp_path, options)


@pytest.mark.parametrize(
    ("num_processes", "accepted"),
    [
        (2, ACCEPTED[::13]),  # every choice stands in one of them
        pytest.param(1, ACCEPTED, marks=pytest.mark.exhaustive),
        pytest.param(3, ACCEPTED, marks=pytest.mark.exhaustive),
    ],
)
def test_every_accepted_config_gives_the_gradient_of_the_whole_batch(
    toy_data, tmp_path, num_processes, accepted
):
    arguments = (toy_data, tmp_path, accepted, "fp32")
    for found in run_in_processes(num_processes, errors_of_options, *arguments):
        for options, of_loss, of_gradient in found:
            assert of_loss < 1e-6, options
            assert of_gradient < 1e-5, options


def test_in_bfloat16_the_gradient_is_that_of_the_rounded_features(toy_data, tmp_path):
    accepted = [{**ACCEPTED[0], "loss": loss} for loss in CHOICES["loss"]]
    [found] = run_in_processes(1, errors_of_options, toy_data, tmp_path, accepted, "bf16")
    for options, of_loss, of_gradient in found:
        assert of_loss < 1e-6, options
        assert of_gradient < 1e-2, options


# --------------------------------------------------------------------------------- what a step does


def events_of_a_step(toy_data, folder, micro_batch_size):
    """Returns (events in order, pairs encoded by each tower, collectives) of a step."""
    options = ACCEPTED[0] | {"micro_batch_size": micro_batch_size}
    config = config_of(toy_data, folder, options)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer)
    optimizer = build_training_optimizer(config, model)
    engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    events, num_encoded = [], Counter()

    def encoded(tower, inputs, kind):
        events.append(kind)
        num_encoded[kind, torch.is_grad_enabled()] += len(inputs[0])

    for kind, tower in model.towers.items():
        tower.register_forward_pre_hook(lambda t, inputs, kind=kind: encoded(t, inputs, kind))
    start = RowGather._start

    def noted_start(gather):
        events.append(f"{len(gather.tensors)} tensors sent")
        start(gather)

    RowGather._start = noted_start
    batch = batch_of(config, tokenizer, **share)
    num_micro_batches = num_micro_batches_of_size(
        StepSizes.of_config(config), num_processes=accelerator.num_processes
    )
    step = build_step(config, engine, num_micro_batches=num_micro_batches)
    with (
        counted_traffic() as traffic,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        step.backward(batch, PhaseTimer(engine.device))
    all_reduces = sum(event.name == "c10d::allreduce_" for event in profile.events())
    return events, num_encoded, traffic.calls, all_reduces


def test_media_travel_while_captions_are_encoded(toy_data, tmp_path):
    for events, *_ in run_in_processes(2, events_of_a_step, toy_data, tmp_path, 24):
        assert events == [
            *("image", "1 tensors sent", "text"),
            *("audio", "1 tensors sent", "text"),
            *("1 tensors sent", "1 tensors sent"),  # positives of both streams
        ]


def test_micro_batches_cost_one_more_forward_pass_and_nothing_else(toy_data, tmp_path):
    whole, in_micro_batches = (
        run_in_processes(2, events_of_a_step, toy_data, tmp_path, size)[0] for size in (24, 3)
    )
    num_pairs = {"image": 8, "audio": 4, "text": 12}
    assert whole[1] == {(kind, True): count for kind, count in num_pairs.items()}
    for has_graph in (False, True):
        assert {k: n for (k, g), n in in_micro_batches[1].items() if g == has_graph} == num_pairs
    assert in_micro_batches[2] == whole[2]  # one loss of each stream
    assert in_micro_batches[3] == whole[3]  # one reduction of the gradients
