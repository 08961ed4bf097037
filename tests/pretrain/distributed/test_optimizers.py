"""Optimizers and averages of the weights under every strategy, resumed on any number of ranks."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from pretrain.checkpoint import open_checkpoint, restore
from pretrain.checkpoints.record import RunState
from pretrain.config import Engine, Run
from pretrain.distributed.collectives import gather_objects, rank, world_size
from pretrain.distributed.start import build_engine, start_accelerator
from pretrain.optimization.optimizer import build_optimizer
from pretrain.settings.optimizer import Optimizer
from pretrain.settings.optimizers import OPTIMIZERS
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_state import writer_of

NUM_STEPS = 4
STOP = 2  # steps before the checkpoint
BATCH = 12  # rows of a step, on all ranks together
TOLERANCE = 3e-5
RATE = 1e-3
# No prefetching, which expects one order of modules; some parameters stay whole between uses, and
# groups are stepped in several parts.
STAGE_3 = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 50,
    "sub_group_size": 300,
}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor([0.0005]))

    def forward(self, outputs):
        return outputs * self.t.exp()


class SmallModel(nn.Module):
    """A regression with every kind of parameter: matrices, vectors, a scale and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(33, 17)
        self.norm = nn.LayerNorm(17)
        self.frozen = nn.Linear(17, 17).requires_grad_(False)
        self.last = nn.Linear(17, 19, bias=False)
        self.log_logit_scale = Scale()

    def forward(self, micro_batches, on_view=None):
        inputs, targets = micro_batches
        hidden = torch.tanh(self.frozen(self.norm(self.first(inputs))))
        return (self.log_logit_scale(self.last(hidden)) - targets).square().mean()


def rows_of_step(step):
    """Returns this rank's rows of a step."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(BATCH, size, generator=generator) for size in (33, 19))
    share = BATCH // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    return inputs[own], targets[own]


def engine_of(name, strategy, folder):
    """Builds an engine in the process group of the previous one."""
    AcceleratorState._reset_state()
    tuning = folder / "deepspeed.json"
    config = Engine(
        strategy=strategy,
        device="cpu",
        precision="fp32",
        deepspeed_config=tuning if strategy == "zero3" else None,
    )
    accelerator = start_accelerator(config, run=Run(folder=folder))
    model = SmallModel()
    config = Optimizer(name=name, learning_rate=RATE, ema={"decay": 0.7})
    return build_engine(
        accelerator,
        strategy=strategy,
        model=model,
        optimizer=build_optimizer(config, model, max_scale=1.001),
        gradient_clipping=1.0,
    )


def copies(engine):
    """Assembles {"<key>/<parameter>": flat tensor}, of any size, from the slices of all ranks."""
    own = [(held.slice, held.values.clone()) for held in engine.slices()]
    parts = list(itertools.chain(*gather_objects(own)))
    sizes = {}
    for part, _ in parts:
        sizes[part.tensor] = max(part.stop, sizes.get(part.tensor, 0))
    whole = {tensor: torch.full((size,), math.nan) for tensor, size in sizes.items()}
    for part, values in parts:
        whole[part.tensor][part.offset : part.stop] = values
    return whole


def take(engine, steps):
    """Takes steps, each after one that is not finite and is skipped."""
    for step in steps:
        for factor in (math.nan, 1.0):
            before = copies(engine) if factor != 1 else {}
            with engine.micro_batch(is_last=True):
                engine.backward(engine.forward(rows_of_step(step)) * factor)
            if factor == 1:
                engine.step(learning_rate=RATE * (step + 1))
                continue
            with pytest.raises(FloatingPointError):
                engine.step(learning_rate=1.0)
            after = copies(engine)
            assert all(torch.equal(before[key], after[key]) for key in before)


def save(engine, folder, step):
    writer = writer_of(engine, folder)
    writer.save(RunState(step, engine.num_updates))
    writer.finish()
    writer.refuse_failure()


def observe(strategy, names, folder, others):
    """Returns {optimizer: ends}: uninterrupted, resumed, resumed from the others' checkpoints."""
    found = {}
    for name in names:
        engine = engine_of(name, strategy, folder)
        take(engine, range(STOP))
        save(engine, folder / name, STOP)
        take(engine, range(STOP, NUM_STEPS))
        found[name] = [numbers(engine)]
        assert_swaps_averages(engine)
        found[name] += [resumed(name, strategy, folder, other) for other in (folder, *others)]
    return found


def resumed(name, strategy, folder, other):
    """Returns the end of a run that another one, in a folder, has begun."""
    engine = engine_of(name, strategy, folder)
    restore(engine, open_checkpoint(str(other / name / f"step_{STOP:08d}")))
    take(engine, range(STOP, NUM_STEPS))
    return numbers(engine)


def assert_swaps_averages(engine):
    """Asserts that the model has the averages as weights inside the context, and only there."""

    @torch.no_grad()
    def loss():
        engine.train_mode(False)
        value = engine.forward(rows_of_step(0)).item()
        engine.train_mode(True)
        return value

    before, with_weights = copies(engine), loss()
    with engine.averaged_weights():
        inside, with_averages = copies(engine), loss()
    after = copies(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(values, before[key]) for key, values in after.items())
    names = [key.removeprefix("ema/") for key in before if key.startswith("ema/")]
    assert names
    for name in names:
        assert torch.equal(inside[f"parameter/{name}"], before[f"ema/{name}"])
    assert loss() == with_weights != with_averages


def numbers(engine):
    scalars = {f"numbers of {name}": values for name, values in engine.scalars().items()}
    return {key: values.numpy() for key, values in copies(engine).items()} | scalars


EVERYWHERE = [name for name, row in OPTIMIZERS.items() if row.needs_whole is None]
SOME = ["adamw", "adan", "laprop"]  # state of a parameter, of a group, and numbers of a group
CASES = [
    *[("ddp", 2, list(OPTIMIZERS)), ("zero0", 1, SOME), ("zero0", 2, SOME)],
    *[("zero1", 1, SOME), ("zero1", 2, EVERYWHERE), ("zero2", 1, SOME), ("zero2", 2, EVERYWHERE)],
    *[("zero3", 1, SOME), ("zero3", 2, EVERYWHERE)],
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns the folder of checkpoints and the ends of one process."""
    folder = tmp_path_factory.mktemp("alone")
    [found] = run_in_processes(1, observe, "ddp", list(OPTIMIZERS), folder, [])
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "num_processes", "names"), CASES)
def test_steps_and_averages_depend_neither_on_strategy_nor_on_stops(
    tmp_path, alone, strategy, num_processes, names
):
    folder, expected = alone
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": STAGE_3}))
    found, *others = run_in_processes(num_processes, observe, strategy, names, tmp_path, [folder])
    for name in names:
        uninterrupted, same, from_one_process = found[name]
        assert_close(uninterrupted, expected[name][0], name)
        assert_close(from_one_process, expected[name][0], name)
        assert_equal(same, uninterrupted, name)
        assert_equal(expected[name][1], expected[name][0], name)
        assert all(each[name][0].keys() == uninterrupted.keys() for each in others)
        [scale] = uninterrupted["parameter/log_logit_scale.t"]
        assert scale <= np.float32(math.log(1.001))
    [of_one_process] = run_in_processes(1, resumed, names[-1], "ddp", tmp_path, tmp_path)
    assert_close(of_one_process, expected[names[-1]][0], names[-1])


def assert_equal(found, expected, name):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), (name, key)


def assert_close(found, expected, name):
    assert found.keys() == expected.keys()
    assert any(key.startswith("ema/") for key in found)
    for key, value in expected.items():
        if key.startswith(("parameter/", "ema/")):
            np.testing.assert_allclose(
                found[key], value, rtol=0, atol=TOLERANCE, err_msg=f"{name} {key}"
            )
        elif isinstance(value, dict):  # numbers of the state
            assert found[key] == value, (name, key)
