"""Machines, libraries and settings of an attempt, which affect the rounding of its results.

They are stored with every attempt. A resumed run is warned if they differ. With micro_batch_size
auto, it keeps the number of micro-batches if nothing that affects memory differs.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from data_prep.versions import package_version
from pretrain.checkpoints.record import CheckpointRecord, read_record
from pretrain.checkpoints.store import DamagedCheckpointError, open_store
from pretrain.config import PretrainConfig
from pretrain.distributed.collectives import gather_objects, on_main_process
from pretrain.run.attempts import Attempt, read_attempts
from pretrain.run.end_causes import causes_of_end

logger = logging.getLogger(__name__)

# They compute, or decode samples.
LIBRARIES = (
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "transformers",
    "tokenizers",
    "timm",
    "open_clip_torch",
    "numpy",
    "scipy",
    "pillow",
    "soundfile",
    "soxr",
)
SETTINGS_OF_MEMORY = ("micro_batch_size", "loading.batches_ahead")  # they do not affect rounding
SETTINGS_OF_BOTH = (
    "engine.strategy",
    "engine.deepspeed_config",
    "engine.loss_mode",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.deterministic",
)
WORLD_SIZE, DEVICE, DEVICE_MEMORY = "processes", "device", "device memory"
LARGEST_IMAGES = "largest images"  # of segments
KEYS_OF_MEMORY = (DEVICE_MEMORY, LARGEST_IMAGES, *SETTINGS_OF_MEMORY)  # do not affect rounding
MEMORY_KEYS = (WORLD_SIZE, DEVICE, *KEYS_OF_MEMORY, *SETTINGS_OF_BOTH)
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|can't allocate memory")


def describe_computation(config: PretrainConfig, device: torch.device) -> dict[str, str]:
    """Returns what this run computes on, {key: value}; every rank must call it.

    Where ranks differ, a value lists all.

    Args:
        config: config of the run.
        device: device of this rank.
    """
    own = _describe_rank(device)
    # A digest per rank, because the descriptions themselves are equal almost always.
    digest = hashlib.sha256(repr(own).encode()).hexdigest()[:16]
    digests = gather_objects(digest)
    ranks = [own] if len(set(digests)) == 1 else gather_objects(own)
    keys = {key: None for each in ranks for key in each}
    found = {key: " and ".join(sorted({each.get(key, "none") for each in ranks})) for key in keys}
    found["isopair"] = on_main_process(git_commit) or "none"
    return found | {WORLD_SIZE: str(len(digests))} | _settings(config)


def _describe_rank(device: torch.device) -> dict[str, str]:
    found = {DEVICE: device.type, "processor": _processor()}
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["threads"] = str(torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found[DEVICE] = properties.name
        found[DEVICE_MEMORY] = f"{properties.total_memory / 1e9:.0f} GB"
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found |= {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}
    return found | {name: package_version(name) or "none" for name in LIBRARIES}


def _processor() -> str:
    """Model of the processor; its architecture where Linux does not tell the model."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.machine()


def _settings(config: PretrainConfig) -> dict[str, str]:
    values = config.model_dump()
    found = {}
    for key in SETTINGS_OF_MEMORY + SETTINGS_OF_BOTH:
        value = values
        for name in key.split("."):
            value = value[name]
        found[key] = str(value)
    if config.image.segments:
        size, rates = max(config.image.sizes.values()), config.image.patch_dropouts.values()
        found[LARGEST_IMAGES] = f"{size} pixels, patch dropout from {min(rates, default=None)}"
    if config.engine.deepspeed_config is not None:
        content = config.engine.deepspeed_config.read_bytes()
        found["engine.deepspeed_config"] = f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    return found


def git_commit() -> str | None:
    """Returns the commit of the running code, with "-dirty" if it was changed.

    Returns None outside a checkout.
    """
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


# -------------------------------------------------------------------------------------- on resume


def warn_of_other_rounding(folder: Path, attempt: Attempt, record: CheckpointRecord) -> None:
    """Warns if an attempt resumes a checkpoint that was computed on something else.

    Args:
        folder: run folder.
        attempt: this attempt.
        record: record of the checkpoint that it resumes from.
    """
    earlier = _writer_of(record, read_attempts(folder))
    if earlier is None or not earlier.computed_on:  # of an earlier version
        return
    old, new = (
        {k: v for k, v in each.computed_on.items() if k not in KEYS_OF_MEMORY}
        | {"micro-batches": str(each.num_micro_batches)}
        for each in (earlier, attempt)
    )
    different = describe_differences_of(old, new)
    if different:
        logger.warning(
            "attempt %s, which saved step %d, computed on something else: %s; results now agree "
            "with an uninterrupted run up to rounding, not bit for bit (docs/reproducibility.md)",
            earlier.attempt,
            record.state.step,
            different,
        )


def describe_differences_of(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Describes the differences between two computations; empty if there are none."""
    keys = [*old, *(key for key in new if key not in old)]
    return ", ".join(
        f"{key} {old.get(key, 'none')!r} then, {new.get(key, 'none')!r} now"
        for key in keys
        if old.get(key) != new.get(key)
    )


def kept_num_micro_batches(config: PretrainConfig, computed_on: Mapping[str, str]) -> int | None:
    """Returns the number of micro-batches that a resumed run keeps; for the main process.

    It is that of the attempt that wrote the newest checkpoint, so that sums keep their order.
    Returns None if nothing was saved, or if a setting or device that affects memory has changed.
    The same holds if an attempt with this number has run out of memory since.

    Args:
        config: config of the run.
        computed_on: result of `describe_computation`.
    """
    if config.micro_batch_size != "auto":
        return None
    attempts = read_attempts(config.run.folder)
    record = _newest_record(config)
    earlier = None if record is None else _writer_of(record, attempts)
    if earlier is None or not earlier.computed_on:  # written by an earlier version
        return None
    old, new = (
        {key: each[key] for key in MEMORY_KEYS if key in each}
        for each in (earlier.computed_on, computed_on)
    )
    reason = describe_differences_of(old, new)
    if reason or _ran_out_of_memory(config.run.folder, attempts, since=earlier.number):
        logger.info(
            "micro_batch_size auto: not the %d micro-batches of attempt %s, but a new choice: %s",
            earlier.num_micro_batches,
            earlier.attempt,
            reason or "the memory did not suffice",
        )
        return None
    logger.info(
        "micro_batch_size auto: %d micro-batches, as in attempt %s",
        earlier.num_micro_batches,
        earlier.attempt,
    )
    return earlier.num_micro_batches


def _newest_record(config: PretrainConfig) -> CheckpointRecord | None:
    for each in open_store(config.run.checkpoints).checkpoints():
        try:
            return read_record(each.location)
        except DamagedCheckpointError:
            continue  # named when the run resumes
    return None


def _writer_of(record: CheckpointRecord, attempts: Sequence[Attempt]) -> Attempt | None:
    name = record.written_by["attempt"]
    return next((each for each in attempts if each.attempt == name), None)


def _ran_out_of_memory(folder: Path, attempts: Sequence[Attempt], *, since: int) -> bool:
    return any(
        OUT_OF_MEMORY.search(" ".join([each.outcome, *causes_of_end(folder, attempts, index)]))
        for index, each in enumerate(attempts)
        if each.number >= since
    )
