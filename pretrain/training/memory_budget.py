"""Memory that a rank needs during a step, excluding the autograd graph of its micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

from pretrain.config import Engine
from pretrain.data.batch import StreamLayout, step_bytes
from pretrain.distributed.deepspeed_config import read_deepspeed_file
from pretrain.loss.logit_tiles import TILE_SHAPES
from pretrain.loss.two_passes import GATHERED_BYTES
from pretrain.settings.data import StreamName

FLOAT_BYTES = 4  # parameters, gradients, moments and features are fp32
REDUCE_BUCKET_SIZE = 500_000_000  # elements; DeepSpeed's default
# Tensors of a tile's size at once: two are kept, a product and a comparison are temporary.
TILES_AT_ONCE = 4
# Copies of media or text features: as encoded, joined, their gradient, the loss's gradient.
COPIES_OF_FEATURES = 4
BYTES_PER_PAIR_OF_SUMS = 80  # per pair of the global batch: float64 sums over rows and columns
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Files of a control group by version of the interface: limits, usage, and the row of memory.stat
# with the part of the usage that is inactive file cache.
CGROUP_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
CGROUP_V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")


def bytes_without_graph(
    config: Engine,
    layouts: Mapping[StreamName, tuple[StreamLayout, int]],
    *,
    global_num_pairs: int,
    width: int,
    batches_ahead: int,
    num_trained: int,
    num_state_values: int,
    num_processes: int,
    device_type: str,
) -> dict[str, int]:
    """Returns {purpose: bytes} of the memory needed in addition to the model and its graph.

    Args:
        config: config section `engine`.
        layouts: (layout, largest number of rows in a step) of each stream on this rank.
        global_num_pairs: largest global batch size of a stream.
        width: D.
        batches_ahead: steps loaded ahead.
        num_trained: number of trained parameters.
        num_state_values: number of elements of the optimizer's tensors.
        num_processes: number of ranks.
        device_type: type of the device whose memory is counted.
    """
    return {
        "gradients and optimizer": optimizer_bytes(
            config,
            num_trained=num_trained,
            num_state_values=num_state_values,
            num_processes=num_processes,
            device_type=device_type,
        ),
        "features and loss": loss_bytes(
            num_pairs=sum(num_rows for _, num_rows in layouts.values()),
            global_num_pairs=global_num_pairs,
            width=width,
            num_processes=num_processes,
            device_type=device_type,
        ),
        "batches": num_batches_held(batches_ahead, device_type=device_type) * step_bytes(layouts),
    }


def optimizer_bytes(
    config: Engine,
    *,
    num_trained: int,
    num_state_values: int,
    num_processes: int,
    device_type: str,
) -> int:
    """Returns the bytes of gradients, of the optimizer's tensors and of copies for a strategy.

    The optimizer's tensors are moments and averages of the weights. Copies are gradients on their
    way to other ranks, and ZeRO's fp32 copies.

    Args:
        config: config section `engine`.
        num_trained: number of trained parameters.
        num_state_values: number of elements of the optimizer's tensors.
        num_processes: number of processes that the strategy partitions state over.
        device_type: type of the device whose memory is counted.
    """
    strategy = config.strategy
    all_bytes = FLOAT_BYTES * num_trained  # one fp32 value per trained parameter
    tuning = read_deepspeed_file(config)
    gradients = all_bytes  # not partitioned until the last micro-batch, with any strategy
    moments = FLOAT_BYTES * num_state_values
    if strategy in ("ddp", "zero0"):
        is_alone = strategy == "ddp" and num_processes == 1
        return gradients + moments + (0 if is_alone else all_bytes)
    copies = all_bytes  # copies of the parameters, which the optimizer updates
    reduced = all_bytes
    parts = all_bytes if strategy == "zero3" else 0  # partitions of the parameters
    offload = tuning.get("offload_optimizer", {}).get("device", "none")
    is_offloaded = offload == "cpu" and device_type == "cuda"
    partitioned = parts if is_offloaded else moments + copies + reduced + parts
    bucket = tuning.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    num_buckets = 2 if tuning.get("overlap_comm", strategy == "zero3") else 1
    if device_type == "cpu":  # its memory is allocated when it is written to
        bucket = min(bucket, num_trained)
    return gradients + -(-partitioned // num_processes) + num_buckets * bucket * FLOAT_BYTES


def loss_bytes(
    *, num_pairs: int, global_num_pairs: int, width: int, num_processes: int, device_type: str
) -> int:
    """Returns the bytes of features, their gradients, and the loss's tiles and sums.

    Args:
        num_pairs: pairs of this rank, in all streams together.
        global_num_pairs: largest global batch size of a stream.
        width: D.
        num_processes: number of ranks.
        device_type: type of the device whose memory is counted.
    """
    features = COPIES_OF_FEATURES * 2 * num_pairs * width * FLOAT_BYTES
    of_all_ranks = min(2 * global_num_pairs * width * FLOAT_BYTES, GATHERED_BYTES)
    gathered = of_all_ranks if num_processes > 1 else 0
    rows, columns = TILE_SHAPES[device_type]
    tile = min(rows, global_num_pairs) * min(columns, global_num_pairs) * FLOAT_BYTES
    return features + gathered + TILES_AT_ONCE * tile + BYTES_PER_PAIR_OF_SUMS * global_num_pairs


def num_batches_held(batches_ahead: int, *, device_type: str) -> int:
    """Returns the number of batches in the device's memory.

    On a GPU these are the batch in use and the next one; on a CPU also those loaded ahead.
    """
    return 2 if device_type == "cuda" else batches_ahead + 2


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can still be allocated by all processes that share the memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *free_bytes_of_cgroups())


def memory_name(device: torch.device) -> str:
    """Returns a name that is equal for the processes of one machine that share a memory."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    return "RAM"


def free_bytes_of_cgroups(*, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Returns the bytes that this process can still allocate in each of its control groups.

    Batch systems and containers limit memory with such groups. The list is empty if there are no
    limits, or the system has no control groups.
    """
    if not own.exists():
        return []
    free = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":
            free += _free_along(root, path, *CGROUP_V2)
        elif "memory" in controllers.split(","):
            free += _free_along(root / "memory", path, *CGROUP_V1)
    return free


def _free_along(
    base: Path, path: str, limits: tuple[str, ...], use: str, unread_files: str
) -> Iterator[int]:
    """Bytes left in a group and in all its ancestors; inside a container, only the outermost may
    be visible."""
    innermost = base / path.lstrip("/")
    for folder in (innermost, *innermost.parents):
        if not folder.is_relative_to(base) or not (folder / use).exists():
            continue
        used = int((folder / use).read_text())
        rows = (row.split() for row in (folder / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(value) for key, value in rows if key == unread_files)
        for limit in limits:
            text = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if text != "max":
                yield max(0, int(text) - (used - reclaimable))
