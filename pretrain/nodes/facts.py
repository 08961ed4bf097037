"""What a rank finds out about its machine by itself: versions, memory, shards, disks, one clock.

Nothing here talks to other ranks, so a machine that is not well can still say so.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from data_prep.config_file import to_yaml
from data_prep.errors import InputError
from data_prep.shards.manifest import (
    ManifestRow,
    parse_info,
    parse_manifest,
)
from data_prep.storage.remote_file import join, local_path, open_binary, read_bytes, size_of
from pretrain.config import PretrainConfig
from pretrain.run.attempts import machine_name

LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "timm", "open_clip_torch", "numpy")
PIECE_BYTES = 1 << 20
SECONDS_TO_BE_SEEN = 10.0  # a network file system may keep old listings for a while


@dataclass
class MachineFacts:
    """Of one rank."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    config_sum: str = ""
    gpu_free_share: float | None = None  # None without a GPU
    shard_megabytes_per_second: float | None = None  # None where another rank of the node reads
    free_bytes: dict[str, int] = field(default_factory=dict)  # by folder
    problems: list[str] = field(default_factory=list)


def versions_here(device: torch.device) -> dict[str, str]:
    """Of everything that computes, with a sum of this project's own sources."""
    found = {name: version(name) for name in LIBRARIES}
    found |= {"python": platform.python_version(), "processor": platform.machine()}
    found["isopair's sources"] = sum_of_sources()
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def sum_of_sources() -> str:
    """Equal wherever the same code runs."""
    root = Path(__file__).parents[2]
    total = hashlib.sha256()
    for package in ("data_prep", "pretrain"):
        for path in sorted((root / package).rglob("*.py")):
            total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def sum_of_config(config: PretrainConfig) -> str:
    """Of all settings, also of those that may differ between attempts."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]


def gpu_free_share(device: torch.device) -> float | None:
    """Of a GPU's memory; None without one."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free / total


# ----------------------------------------------------------------------------------------- data


def read_shards(
    datasets: Sequence[str], *, first: int, num_shards: int, max_bytes: int
) -> tuple[float, list[str]]:
    """Reads the beginnings of some shards of every dataset.

    Args:
        datasets: folders or URLs.
        first: which shards: nodes that give different numbers read different ones, as far as there
            are so many.
        num_shards: of each dataset.
        max_bytes: in all.

    Returns:
        Megabytes per second, and what could not be read, or was not as large as it should be.
    """
    num_bytes, problems = 0, []
    start = time.perf_counter()
    for dataset in datasets:
        try:
            tars = _tars_of(dataset)
            chosen = [tars[(first + n) % len(tars)] for n in range(min(num_shards, len(tars)))]
            for tar, expected in chosen:
                share = max_bytes // (len(datasets) * len(chosen))
                num_bytes += _read_tar(tar, expected_bytes=expected, max_bytes=share)
        except InputError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename or dataset}: {error.strerror or error}")
    return num_bytes / 1e6 / max(time.perf_counter() - start, 1e-9), problems


def _tars_of(dataset: str) -> list[tuple[str, int]]:
    info_file, manifest_file = (join(dataset, name) for name in ("dataset.json", "manifest.jsonl"))
    info = parse_info(read_bytes(info_file), info_file)
    rows: list[ManifestRow] = parse_manifest(read_bytes(manifest_file), manifest_file)
    folder = dataset if info.tar_folder == "." else join(dataset, info.tar_folder)
    return [(join(folder, f"{row.name}.tar"), row.tar_bytes) for row in rows]


def _read_tar(tar: str, *, expected_bytes: int, max_bytes: int) -> int:
    found = size_of(tar)
    if found is not None and found != expected_bytes:
        raise InputError(f"{tar}: expected {expected_bytes:,} bytes, found {found:,}")
    num_bytes = 0
    with open_binary(tar) as stream:
        while num_bytes < max_bytes and (piece := stream.read(PIECE_BYTES)):
            num_bytes += len(piece)
    return num_bytes


# ----------------------------------------------------------------------------------------- disks


def free_bytes_of(folders: Sequence[Path | str]) -> dict[str, int]:
    """Free bytes where each folder is, or would be made; URLs are left out."""
    found = {}
    for folder in folders:
        path = local_path(str(folder))
        if path is None:
            continue
        nearest = path.absolute()
        while not nearest.exists():
            nearest = nearest.parent
        found[str(folder)] = shutil.disk_usage(nearest).free
    return found


def sees_file(path: Path, content: str) -> bool:
    """Whether a file that another machine wrote is here, within a while."""
    end = time.monotonic() + SECONDS_TO_BE_SEEN
    while True:
        try:
            if path.read_text() == content:
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def gather_facts(
    config: PretrainConfig,
    *,
    rank: int,
    local_rank: int,
    node: int,
    device: torch.device,
    says: Callable[[str], None],
) -> MachineFacts:
    """What a rank finds out by itself.

    Args:
        config: of the run.
        rank: of this process.
        local_rank: its number on its machine: the first one reads shards and looks at disks.
        node: number of its machine.
        device: that it trains on.
        says: is told what is looked at now, for whoever waits.
    """
    facts = MachineFacts(rank, machine_name())
    says("reading versions")
    facts.versions = versions_here(device)
    facts.config_sum = sum_of_config(config)
    facts.gpu_free_share = gpu_free_share(device)
    if local_rank == 0:
        says("reading shards")
        sources = {s.dataset for p in config.pairings.values() for s in p.all_sources}
        facts.shard_megabytes_per_second, facts.problems = read_shards(
            sorted(sources),
            first=node * config.preflight.shards_read,
            num_shards=config.preflight.shards_read,
            max_bytes=round(1e6 * config.preflight.megabytes_read),
        )
        says("looking at disks")
        facts.free_bytes = free_bytes_of([config.run.folder, config.run.checkpoints])
    return facts
