"""Optimizers against their libraries, on whole tensors and on uneven parts of flat ones."""

import math
from importlib import import_module

import pytest
import torch
from torch import nn

from pretrain.optimization.optimizer import ema_decay, new_optimizer, num_state_values
from pretrain.settings.optimizer import Ema, Optimizer
from pretrain.settings.optimizers import OPTIMIZERS

SHAPES = [(13, 7), (17, 16), (5, 3, 2, 2), (11,), (1,), (33, 65)]
NUM_STEPS = 5
# Values of each option to try in addition to the default.
OTHER_VALUES = {
    "no_prox": True,
    "clip_exp": None,
    "delta": 0.5,
    "wd_ratio": 1.0,
    "nesterov": True,
    "gamma": 0.1,
    "optimize_1d": True,
    "grad_averaging": True,
    "momentum": 0.5,
    "beta2_cap": 0.9,
    "decay_rate": 0.5,
    "clipping_threshold": 1.0,
    "min_dim_size_to_factor": 4,
    "trust_clip": True,
    "always_adapt": True,
    "ns_steps": 2,
    "fallback_lr_scale": 0.5,
}
VARIANTS = [
    (name, options)
    for name, row in OPTIMIZERS.items()
    for options in ({}, *({key: OTHER_VALUES[key]} for key in row.options))
]


def section(name="adamw", **settings):
    return Optimizer(name=name, learning_rate=1e-3, **settings)


def problem():
    """Returns parameters and the gradients of every step.

    The first gradients are orthogonal to their parameters, for optimizers that test for it.
    """
    generator = torch.Generator().manual_seed(0)

    def draw():
        return [torch.randn(shape, generator=generator) for shape in SHAPES]

    parameters, gradients = draw(), [draw() for _ in range(NUM_STEPS)]
    gradients[0] = [
        g - (g * p).sum() / p.square().sum() * p
        for g, p in zip(gradients[0], parameters, strict=True)
    ]
    return parameters, gradients


def whole(tensors):
    return [each.clone() for each in tensors]


def in_uneven_parts(tensors):
    flat = torch.cat([each.flatten() for each in tensors])
    sizes = [100, 1, 37, 500, 1700]
    return [part.clone() for part in flat.split([*sizes, len(flat) - sum(sizes)])]


def stepped(optimizer, parameters, steps, gradients, cut, *, in_turns=False):
    """Takes steps as the engine does, or as ZeRO 3 does: one call of `step` per part."""
    [group] = optimizer.param_groups
    for step in steps:
        optimizer.num_updates = step
        group["lr"] = 1e-3 * (step + 1)
        for parameter, gradient in zip(parameters, cut(gradients[step]), strict=True):
            parameter.grad = gradient
        for part in [[each] for each in parameters] if in_turns else [parameters]:
            group["params"] = part
            optimizer.step()
    group["params"] = parameters
    return torch.cat([each.detach().flatten() for each in parameters])


def ours(config, cut=whole, **how):
    start, gradients = problem()
    parameters = cut(start)
    optimizer = new_optimizer(config, [{"params": parameters, "weight_decay": 0.1}])
    return stepped(optimizer, parameters, range(NUM_STEPS), gradients, cut, **how)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_table_says_which_optimizers_step_parts_as_whole_tensors(name, options):
    config = section(name, options=options)
    expected = ours(config)
    is_equal = torch.equal(ours(config, in_uneven_parts, in_turns=True), expected)
    if config.row.needs_whole is None:
        assert is_equal
    elif not options:  # refused by name, whatever the options
        assert not is_equal


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_without_bounds_they_are_their_librarys(name, options):
    config = section(name, options=options)
    module, _, of_class = config.row.path.rpartition(".")
    start, gradients = problem()
    parameters = [nn.Parameter(each) for each in whole(start)]
    settings = config.arguments() | {"lr": 0.0, "weight_decay": 0.1}
    theirs = getattr(import_module(module), of_class)(parameters, **settings)
    theirs.num_updates = 0
    expected = stepped(theirs, parameters, range(NUM_STEPS), gradients, whole)
    assert torch.equal(ours(config), expected)
    assert not torch.equal(expected, torch.cat([each.flatten() for each in start]))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_state_moves_to_other_parts_between_steps(name, after):
    """Copies tensors and numbers of the state as checkpoints do, and steps on."""
    config = section(name, ema={"decay": 0.5})
    start, gradients = problem()
    cut = whole if config.row.needs_whole else in_uneven_parts
    first = whole(start)
    optimizer = new_optimizer(config, [{"params": first, "weight_decay": 0.1}])
    for parameter in first:
        optimizer.tensors_of(parameter)  # as a checkpoint writer does before the first step
    stepped(optimizer, first, range(after), gradients, whole)

    second = cut([each.detach() for each in first])
    resumed = new_optimizer(config, [{"params": second, "weight_decay": 0.1}])
    stored = [optimizer.tensors_of(each) for each in first]
    held = [resumed.tensors_of(each) for each in second]
    for key in {key for each in stored for key in each}:
        if cut is whole:
            for source, target in zip(stored, held, strict=True):
                if key in source:
                    target[key].copy_(source[key])
        else:
            for source, target in zip(cut([each[key] for each in stored]), held, strict=True):
                target[key].copy_(source)
    resumed.set_scalars(optimizer.scalars)
    for parameter in second:
        resumed.set_updates(parameter, after)
    steps = range(after, NUM_STEPS)
    ends = [
        stepped(optimizer, first, steps, gradients, whole),
        stepped(resumed, second, steps, gradients, cut, in_turns=cut is not whole),
    ]
    assert torch.equal(*ends)
    averages = [
        torch.cat([each.tensors_of(p)["ema"].flatten() for p in parameters])
        for each, parameters in ((optimizer, first), (resumed, second))
    ]
    assert torch.equal(*averages)
    assert optimizer.scalars == resumed.scalars


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_keeps_scales_within_their_bounds(name):
    scale = nn.Parameter(torch.tensor([4.6]))
    groups = [{"params": [scale], "weight_decay": 0.0, "clamp": (0.0, math.log(100))}]
    optimizer = new_optimizer(section(name), groups)
    optimizer.param_groups[0]["lr"] = 1.0
    for update in range(3):
        scale.grad = torch.tensor([-1.0])
        optimizer.num_updates = update
        optimizer.step()
    assert scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ema", [None, {}])
def test_the_elements_of_the_state_are_counted(name, ema):
    config = section(name, ema=ema)
    start, gradients = problem()
    parameters = whole(start)
    optimizer = new_optimizer(config, [{"params": parameters, "weight_decay": 0.1}])
    stepped(optimizer, parameters, range(2), gradients, whole)
    held = [each for parameter in parameters for each in optimizer.tensors_of(parameter).values()]
    assert num_state_values(config, start) == sum(each.numel() for each in held)


# ------------------------------------------------------------------------------------ averages


def test_averages_follow_the_weights_and_nothing_else():
    start, gradients = problem()
    config = section(ema={"decay": 0.6, "warmup": True})
    parameters = whole(start)
    frozen = torch.ones(3)  # without a gradient, as before it is trained
    groups = [{"params": [*parameters, frozen], "weight_decay": 0.1, "clamp": (-1.0, 1.0)}]
    optimizer = new_optimizer(config, groups)
    expected, decays = whole(start), []
    for step in range(NUM_STEPS):
        stepped_weights = []
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = 1e-1
        optimizer.num_updates = step
        optimizer.step()
        stepped_weights = [each.clone() for each in parameters]
        decays.append(min(0.6, 1 - (step + 1) ** (-2 / 3)))
        expected = [
            decays[-1] * average + (1 - decays[-1]) * weights
            for average, weights in zip(expected, stepped_weights, strict=True)
        ]
    assert decays[0] == 0 < decays[1] < decays[2] < decays[3] == 0.6
    for parameter, average in zip(parameters, expected, strict=True):
        torch.testing.assert_close(optimizer.tensors_of(parameter)["ema"], average)
        assert parameter.abs().max() <= 1
    assert torch.equal(optimizer.tensors_of(frozen)["ema"], frozen)
    without = whole(start)
    other = new_optimizer(section(), [{"params": without, "weight_decay": 0.1, "clamp": (-1, 1)}])
    for step in range(NUM_STEPS):
        other.num_updates = step
        other.param_groups[0]["lr"] = 1e-1
        for parameter, gradient in zip(without, gradients[step], strict=True):
            parameter.grad = gradient
        other.step()
    assert all(map(torch.equal, parameters, without))


def test_the_warm_up_of_the_decay_is_timms():
    timm_utils = import_module("timm.utils.model_ema")
    theirs = timm_utils.ModelEmaV3(nn.Linear(1, 1), decay=0.99, use_warmup=True)
    config = Ema(decay=0.99)
    for update in (1, 2, 3, 10, 100, 999, 1000, 1001, 10**6):
        assert ema_decay(config, update=update) == pytest.approx(theirs.get_decay(update))
    assert ema_decay(Ema(decay=0.99, warmup=False), update=1) == 0.99
