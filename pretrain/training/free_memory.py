"""How much memory a device has left: a GPU, or the machine within the limits set for this job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# Files of a control group, by version of the interface: limits, use, and in memory.stat the part of
# the use that is cached files which nobody reads at the moment.
CGROUP_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
CGROUP_V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated, by all processes that share the memory together."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *free_bytes_of_cgroups())


def memory_name(device: torch.device) -> str:
    """What processes of one machine that share a memory have in common."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    return "RAM"


def free_bytes_of_cgroups(*, root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """What each control group around this process, as those of batch systems and containers, leaves
    to it; none without limits, or where the system has no such groups."""
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
    """In a group and all that it is in; a container may see only the outermost of them."""
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
