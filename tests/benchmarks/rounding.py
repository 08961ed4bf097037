"""Measures how far runs differ that are equal except for the order of their sums.

    python -m tests.benchmarks.rounding [--precision bf16] [--variants "3 processes" ...]

Trains a ViT of timm and a text transformer of open_clip for 12 steps on CPUs, in several variants.
Prints, compared with one process and one micro-batch:

    gradient    |g - g0| / |g0| of the gradient of step 1
    way         |p - p0| / |p0 - p at initialisation| of the parameters after 12 steps

Both are norms over all parameters.
"""

from __future__ import annotations

import argparse
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import open_checkpoint
from pretrain.checkpoints.state import PARAMETER, read_whole
from pretrain.config import PretrainConfig
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config, write_toy_data
from tests.support.toy_towers import build_toy_model

NUM_STEPS = 12
NUM_PAIRS = 96
MODEL = {
    "embed_dim": 64,
    "image": {
        "library": "timm",
        "name": "vit_tiny_patch16_224",
        "options": {"img_size": 32, "patch_size": 8, "depth": 4},
    },
    "text": {
        "library": "open_clip",
        "context_length": 20,
        "options": {"width": 128, "heads": 4, "layers": 4},
    },
}
# Name -> (processes, pairs of a micro-batch, strategy)
VARIANTS = {
    "again": (1, NUM_PAIRS, "ddp"),
    "3 micro-batches": (1, NUM_PAIRS // 3, "ddp"),
    "2 processes": (2, NUM_PAIRS, "ddp"),
    "3 processes": (3, NUM_PAIRS, "ddp"),
    "2 processes, zero1": (2, NUM_PAIRS, "zero1"),
    "2 processes, zero3": (2, NUM_PAIRS, "zero3"),
}
State = tuple[Tensor, Tensor]  # gradient of step 1, parameters at the end


def main() -> None:
    """Runs the variants and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("bf16", "fp32"), nargs="+", default=["bf16"])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = write_toy_data(Path(scratch) / "data")
        initial = initial_parameters(config_of(data, Path(scratch) / "none", "fp32"))
        reference = {}
        for precision in arguments.precision:
            folder = Path(scratch) / precision
            reference[precision] = train_and_read(config_of(data, folder / "reference", precision))
            for name in arguments.variants:
                world_size, micro_batch_size, strategy = VARIANTS[name]
                config = config_of(data, folder / name, precision, micro_batch_size, strategy)
                state = train_and_read(config, world_size)
                print_comparison(f"{precision}, {name}", state, reference[precision], initial)
        if len(reference) == 2:
            print_comparison("bf16 with fp32", reference["bf16"], reference["fp32"], initial)


def config_of(
    data: Path,
    folder: Path,
    precision: str,
    micro_batch_size: int = NUM_PAIRS,
    strategy: str = "ddp",
) -> PretrainConfig:
    """Returns a config with images alone, whose first and last steps are saved."""
    values: dict[str, Any] = toy_config(data, folder).model_dump(exclude_unset=True)
    del values["streams"]["audio-text"], values["audio"]
    values["streams"]["image-text"]["global_batch_size"] = NUM_PAIRS
    values["lanes"] = 12
    values["run"] |= {"checkpoint_every_steps": 1, "keep_checkpoints": NUM_STEPS, "trackers": []}
    changes = {
        "model": MODEL,
        "image": {"size": 32},
        "micro_batch_size": micro_batch_size,
        "optimizer": {"learning_rate": 1e-3, "gradient_clipping": None},
        "schedule": {"num_steps": NUM_STEPS, "warmup_steps": 2},
        "engine": values["engine"] | {"precision": precision, "strategy": strategy},
    }
    return PretrainConfig.model_validate(values | changes)


def train(config: PretrainConfig) -> None:
    """Trains in this process of the group."""
    from pretrain.train import pretrain

    pretrain(config)


def train_and_read(config: PretrainConfig, world_size: int = 1) -> State:
    """Trains, and returns the first gradient (up to a factor) and the last parameters."""
    run_in_processes(world_size, train, config)
    folder = config.run.folder / "checkpoints"
    # The first moment after the first step is (1 - beta) * gradient.
    return (
        read_state(folder / "step_00000001", "exp_avg"),
        read_state(folder / f"step_{NUM_STEPS:08d}", PARAMETER),
    )


def read_state(checkpoint: Path, key: str) -> Tensor:
    """Reads all parameters, or a moment of them, as one float64 vector."""
    opened = open_checkpoint(str(checkpoint))
    shapes = opened.record.shapes
    sizes = {f"{key}/{name}": prod(shape) for name, shape in shapes.items()}
    values = read_whole(opened.location, opened.index, sizes=sizes)
    return torch.cat([values[f"{key}/{name}"].double() for name in sorted(shapes)])


def initial_parameters(config: PretrainConfig) -> Tensor:
    """Returns the parameters before the first step, in the same order."""
    parameters = dict(build_toy_model(config).named_parameters())
    return torch.cat([parameters[n].detach().double().flatten() for n in sorted(parameters)])


def print_comparison(title: str, state: State, reference: State, initial: Tensor) -> None:
    """Prints the relative differences of two runs."""
    gradient, way = (each - other for each, other in zip(state, reference, strict=True))
    gradient = gradient.norm() / reference[0].norm()
    way = way.norm() / (reference[1] - initial).norm()
    print(f"{title:30} gradient {gradient:.1e}  way {way:.1e}", flush=True)


if __name__ == "__main__":
    main()
