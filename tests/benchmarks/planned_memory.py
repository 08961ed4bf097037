"""Memory of training steps on the CPU, measured by the system, next to the plan's.

    python -m tests.benchmarks.planned_memory

A process per size trains two steps. malloc returns freed memory at once (MALLOC_MMAP_THRESHOLD_),
so that the largest resident set, less that before the model, is the peak of live memory.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Name -> (model, image size, samples, micro_batch_size)
TEXT = {"library": "open_clip", "context_length": 32}
SIZES = {
    "ViT 192 wide, one micro-batch": (
        {"img_size": 96, "patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3},
        {"width": 128, "heads": 2, "layers": 3},
        96,
        64,
        64,
    ),
    "ViT 384 wide, four micro-batches": (
        {"img_size": 128, "patch_size": 16, "embed_dim": 384, "depth": 8, "num_heads": 6},
        {"width": 256, "heads": 4, "layers": 4},
        128,
        64,
        16,
    ),
    "ViT 768 wide, two micro-batches": (
        {"img_size": 96, "patch_size": 16, "embed_dim": 768, "depth": 8, "num_heads": 12},
        {"width": 512, "heads": 8, "layers": 4},
        96,
        32,
        16,
    ),
}


def config_of(name, folder):
    """Returns the config of a size."""
    from pretrain.config import PretrainConfig

    image, text, size, num_samples, micro_batch_size = SIZES[name]
    model = {
        "embed_dim": 128,
        "image": {"library": "timm", "name": "vit_tiny_patch16_224", "options": image},
        "text": TEXT | {"options": text},
    }
    source = {"name": "none", "dataset": "none"}
    stream = {"global_batch_size": num_samples, "sources": [source]}
    return PretrainConfig.model_validate(
        {
            "lanes": 4,
            "micro_batch_size": micro_batch_size,
            "run": {"folder": str(folder), "trackers": []},
            "model": model,
            "image": {"size": size},
            "streams": {"pairs": stream | {"objectives": {"image-text": {}}}},
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"num_steps": 2},
            "engine": {"precision": "fp32", "device": "cpu"},
        }
    )


def planned_bytes(name, folder):
    """Returns the plan's peak, without the batches that a loader holds ahead; and its phase."""
    from pretrain.planning.memory import StepMemory
    from pretrain.planning.model_sizes import measure_model
    from pretrain.planning.planned_model import plan_model

    config = config_of(name, folder)
    sizes = measure_model(config, plan_model(config), is_gpu=False)
    rows = SIZES[name][3] // SIZES[name][4]
    plan = StepMemory(config, sizes, 1, "cpu").plan(rows)
    return plan.total - plan.parts["batches"], plan.phase


def measured_bytes(name, folder):
    """Measures the peak of two steps, in a process of its own."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    settings |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.benchmarks.planned_memory", name, str(folder)]
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        command, env=os.environ | settings, cwd=root, capture_output=True, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def _peak_of_steps(name, folder):
    import numpy as np
    import torch

    from pretrain.data.batch import StepBatch, StreamBuffers
    from pretrain.data.stream_reader import build_formats
    from pretrain.data.transforms import build_transforms
    from pretrain.distributed.start import build_engine, start_accelerator
    from pretrain.model.tokenizer import build_tokenizer
    from pretrain.monitoring.timing import PhaseTimer
    from pretrain.training.assembly import build_step, build_training_optimizer
    from pretrain.training.micro_batch_size import StepSizes, num_micro_batches_of_size

    config = config_of(name, folder)
    tokenizer = build_tokenizer(config.model.text)
    transforms = build_transforms(config.model, image=config.image, audio=config.audio)
    formats = build_formats(
        ["image", "text"], config.model, transforms=transforms, tokenizer=tokenizer
    )
    from pretrain.data.batch import StreamLayout

    layout = StreamLayout({view: each.layout for view, each in formats.items()})
    buffers = StreamBuffers.new(layout, num_rows=SIZES[name][3])
    for view in buffers.views.values():
        for tensor in view.tensors.values():
            tensor.copy_(torch.randint(1, 100, tensor.shape))
    buffers.views["text"].lengths.fill_(32)
    batch = buffers.to_batch(
        first_slot=0, digest=np.zeros(2, np.int64), bad_samples=[], num_read=Counter()
    )
    from pretrain.checkpoint import build_model_of

    build_model_of(config, tokenizer)  # imports all that the model needs
    accelerator = start_accelerator(config.engine, run=config.run)
    torch.randn(2, 2, requires_grad=True).sum().backward()
    before = _status("VmRSS")
    model = build_model_of(config, tokenizer)
    engine = build_engine(
        accelerator,
        strategy="ddp",
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=1.0,
    )
    number = num_micro_batches_of_size(StepSizes.of_config(config), num_processes=1)
    step = build_step(config, engine, num_micro_batches=number)
    for number in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        step.backward(StepBatch(number, {"pairs": batch}, ["pairs"]), PhaseTimer(engine.device))
        engine.step(learning_rate=1e-4)
    return _status("VmHWM") - before


def _status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def main():
    """Prints a row per size."""
    folder = Path("runs/planned_memory")
    for name in SIZES:
        planned, phase = planned_bytes(name, folder)
        measured = measured_bytes(name, folder)
        print(
            f"{name}: planned {planned / 1e6:,.0f} MB ({phase}), measured {measured / 1e6:,.0f} "
            f"MB, {planned / measured - 1:+.1%}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_peak_of_steps(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
