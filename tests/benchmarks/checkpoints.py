"""Benchmark of saving and resuming: ours, torch.save, and DeepSpeed's save_checkpoint.

    python -m tests.benchmarks.checkpoints

Two processes train a model of 66 million parameters with AdamW's moments (0.8 GB in fp32). Most
trainers use `torch.save`: the main process writes model and optimizer of DDP while the others wait.
`save_checkpoint` is measured at ZeRO stage 2. Both neither flush the files nor compute checksums.
Ours does both and reads the files back, in the background. As in a run, a few seconds pass before
the first save, in which a thread allocates its memory.

Resuming is measured until the engine is ready for its first step, and until that step is done, with
one pair per process. The files are in the page cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint import newest_checkpoint, restore
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.state import shapes_of
from pretrain.checkpoints.store import open_store
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import PretrainConfig
from pretrain.distributed.collectives import gather_objects, rank
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import (
    build_engine,
    start_accelerator,
)
from pretrain.model.contrastive_model import StreamInputs
from pretrain.training.assembly import build_training_optimizer
from tests.support.toy_towers import build_toy_model

NUM_PROCESSES = 2
NUM_SAVES = 4
MODEL = {
    "embed_dim": 512,
    "image": {"library": "timm", "name": "vit_small_patch16_224"},
    "text": {
        "library": "open_clip",
        "options": {"width": 512, "heads": 8, "layers": 6, "vocab_size": 49408},
    },
}


def main() -> None:
    for strategy in ("ddp", "zero2"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(NUM_PROCESSES), __file__, strategy]
        subprocess.run([sys.executable, *command], check=True)


def measure(strategy: str) -> None:
    """Measures in one process of a group."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(gather_first(own))
        config = config_of(folder, strategy)
        engine = engine_of(config)
        report(f"{strategy}, {NUM_PROCESSES} processes, {size_of_state(engine) / 1e6:,.0f} MB")
        measure_ours(config, engine)
        if strategy == "ddp":
            measure_torch(engine, folder)
        else:
            measure_deepspeed(engine, folder)
        engine.close()


def gather_first(own: str) -> str:
    """Broadcasts the main process's temporary folder, before an engine exists."""
    dist.init_process_group("gloo")
    return gather_objects(own)[0]


def config_of(folder: Path, strategy: str) -> PretrainConfig:
    values: dict[str, Any] = {
        "lanes": 2,
        "run": {"folder": folder / "run", "keep_checkpoints": 2},
        "model": MODEL,
        "streams": {
            "image-text": {
                "global_batch_size": 2,
                "objectives": {"image-text": {}},
                "sources": [{"name": "none", "dataset": folder / "none"}],
            }
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"num_steps": 1},
        "engine": {"strategy": strategy, "precision": "fp32", "device": "cpu"},
    }
    return PretrainConfig.model_validate(values)


def engine_of(config: PretrainConfig) -> Engine:
    """Builds an engine and takes a step, because the first step of a process is slower."""
    accelerator = start_accelerator(config.engine, run=config.run)
    model = build_toy_model(config)
    engine = build_engine(
        accelerator,
        strategy=config.engine.strategy,
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=config.optimizer.gradient_clipping,
    )
    take_step(engine)
    return engine


def size_of_state(engine: Engine) -> int:
    shapes = shapes_of(engine.model)
    sizes = {held.slice.tensor: prod(shapes[held.slice.parameter]) for held in engine.slices()}
    whole: dict[str, int] = {}
    for held in gather_objects(sizes):
        whole |= held
    return 4 * sum(whole.values())


def measure_ours(config: PretrainConfig, engine: Engine) -> None:
    store = open_store(config.run.checkpoints)
    writer = CheckpointWriter(
        config.run,
        engine,
        store=store,
        attempt="0001",
        origin={},
        model_files={},
        refuse_if_superseded=lambda: None,
    )
    time.sleep(5)
    for step in range(1, NUM_SAVES + 1):
        writer.save(RunState(step, step))
        writer.finish()
    for nth, save in enumerate(writer.take_reports(), 1):
        report(
            f"  ours, save {nth}: training waits {save.waited_seconds:.3f} s; "
            f"whole, flushed and checked after {save.written_seconds:.2f} s"
        )
    measure_resume("ours", lambda: restore(engine, newest_checkpoint(store)), engine=engine)


def measure_torch(engine: Engine, folder: Path) -> None:
    file = folder / "plain.pt"

    def save() -> None:
        if rank() == 0:
            state = {"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}
            torch.save(state, file)

    def load() -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        engine.model.load_state_dict(state["model"])
        engine.optimizer.load_state_dict(state["optimizer"])

    show("torch.save", save, load, engine=engine)


def measure_deepspeed(engine: Engine, folder: Path) -> None:
    wrapped = engine._wrapped_model
    folder = folder / "deepspeed"
    show(
        "DeepSpeed's save",
        lambda: wrapped.save_checkpoint(str(folder), tag="x"),
        lambda: wrapped.load_checkpoint(str(folder), tag="x"),
        engine=engine,
    )


def show(name: str, save: Callable[[], Any], load: Callable[[], Any], *, engine: Engine) -> None:
    for nth in range(1, NUM_SAVES + 1):
        report(f"  {name}, save {nth}: training waits {timed(save):.3f} s")
    measure_resume(name, load, engine=engine)


def measure_resume(name: str, load: Callable[[], Any], *, engine: Engine) -> None:
    loaded = timed(load)
    stepped = timed(lambda: take_step(engine))
    report(
        f"  {name}, resume: loaded in {loaded:.2f} s, first step done after "
        f"{loaded + stepped:.2f} s"
    )


def take_step(engine: Engine) -> None:
    """Takes a step on one pair per process; the loss is the distance of the embeddings."""
    pixels = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    tokens = torch.ones(1, 77, dtype=torch.int64)
    inputs = StreamInputs({"image": (pixels,), "text": (tokens,)})
    features = engine.forward([{"image-text": inputs}])
    image, text = features.views["image-text"].values()
    engine.backward(features.scales["image-text"].sum() - (image * text).sum())
    engine.step(learning_rate=1e-6)


def timed(action: Callable[[], Any]) -> float:
    """Measures the seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def report(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        measure(sys.argv[1])
