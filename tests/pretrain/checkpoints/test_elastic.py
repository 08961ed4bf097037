"""A checkpoint of any strategy on any number of processes loads into any other, bit for bit."""

import zlib

import pytest
import torch

from pretrain.checkpoint import open_checkpoint, read_model_state, restore
from pretrain.checkpoints.record import RunState
from pretrain.distributed.start import (
    build_engine,
    start_accelerator,
)
from pretrain.training.assembly import build_training_optimizer
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_state import writer_of
from tests.support.toy_towers import build_toy_model

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
ENGINES = [(strategy, count) for strategy in STRATEGIES for count in (1, 2, 4)]
# Covers saving and loading with every strategy and every number of processes.
SOME = [
    *[("ddp", 4), ("ddp", 1), ("zero0", 1), ("zero0", 2), ("zero1", 2), ("zero1", 4)],
    *[("zero2", 4), ("zero2", 1), ("zero3", 2), ("zero3", 4)],
]
FROZEN = {"image": {"library": "timm", "name": "test_vit", "frozen": True}}


def expected(key, name, places):
    """Computes values of a tensor by position, distinct from those of other tensors."""
    generator = zlib.crc32(f"{key}/{name}".encode())
    return torch.sin(places.to(torch.float64) + generator).float()


def expected_slice(held):
    places = torch.arange(held.offset, held.stop)
    return expected(held.key, held.parameter, places)


def engine_of(toy_data, folder, strategy):
    config = toy_config(
        toy_data, folder, engine={"strategy": strategy}, image={"size": 160}, model=FROZEN
    )
    accelerator = start_accelerator(config.engine, run=config.run)
    model = build_toy_model(config)
    optimizer = build_training_optimizer(config, model)
    return build_engine(
        accelerator,
        strategy=config.engine.strategy,
        model=model,
        optimizer=optimizer,
        gradient_clipping=config.optimizer.gradient_clipping,
    )


def save(toy_data, folder, strategy):
    engine = engine_of(toy_data, folder, strategy)
    for held in engine.slices():
        held.values.copy_(expected_slice(held.slice))
    engine.after_load(num_updates=7)
    writer = writer_of(engine, folder)
    writer.save(RunState(7, engine.num_updates))
    writer.finish()
    writer.refuse_failure()
    engine.close()


def load(toy_data, folders, strategy):
    """Returns [(folder, key, parameter)] of the tensors that differ after loading."""
    engine = engine_of(toy_data, folders[0], strategy)
    different = []
    for folder in folders:
        for held in engine.slices():
            held.values.fill_(torch.nan)
        restore(engine, open_checkpoint(str(folder / "step_00000007")))
        assert engine.num_updates == 7
        steps = {state["step"].item() for state in engine.optimizer.state.values()}
        assert steps == {7.0}
        different += [
            (folder.name, held.slice.key, held.slice.parameter)
            for held in engine.slices()
            if not torch.equal(held.values, expected_slice(held.slice))
        ]
        different += [
            (folder.name, "model", name)
            for name, parameter in engine.model.named_parameters()
            if strategy != "zero3"
            and not torch.equal(
                parameter.flatten(),
                expected("parameter", name, torch.arange(parameter.numel())),
            )
        ]
    engine.close()
    return different


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ([("zero3", 2)], [("ddp", 1)]),
        pytest.param(SOME[::2], SOME[1::2], marks=pytest.mark.slow),
        pytest.param(ENGINES, ENGINES, marks=pytest.mark.exhaustive),
    ],
    ids=["zero3 to one process", "some", "all"],
)
def test_any_engine_loads_what_any_other_saved(toy_data, tmp_path, saved, loaded):
    folders = [tmp_path / f"{strategy}_{count}" for strategy, count in saved]
    for (strategy, count), folder in zip(saved, folders, strict=True):
        run_in_processes(count, save, toy_data, folder, strategy)
        for name, values in read_model_state(folder / "step_00000007").items():
            places = torch.arange(values.numel())
            assert torch.equal(values.flatten(), expected("parameter", name, places)), name
    for strategy, count in loaded:
        for different in run_in_processes(count, load, toy_data, folders, strategy):
            assert different == [], (strategy, count)
