"""Facts about the machine of one rank: versions, memory, shards and disks.

No function here communicates with other ranks, so that a bad machine can still report its problems.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_prep.config_file import Section, to_yaml
from data_prep.errors import InputError
from data_prep.shards.manifest import (
    ManifestRow,
    parse_info,
    parse_manifest,
)
from data_prep.storage.remote_file import join, local_path, open_binary, read_bytes, size_of
from data_prep.versions import package_version
from pretrain.run.attempts import machine_name
from pretrain.settings.preflight import Preflight

LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "timm", "open_clip_torch", "numpy")
READ_BYTES = 1 << 20  # bytes per read
LISTING_TIMEOUT_SECONDS = 10.0  # network file systems cache directory listings


@dataclass
class MachineFacts:
    """Facts about the machine of one rank."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    config_checksum: str = ""
    gpu_free_fraction: float | None = None  # None without a GPU
    shard_megabytes_per_second: float | None = None  # None if another rank of the node reads shards
    free_bytes: dict[str, int] = field(default_factory=dict)  # folder -> free bytes on its disk
    problems: list[str] = field(default_factory=list)


def versions_here(device: torch.device) -> dict[str, str]:
    """Returns the versions of all computing libraries, and a checksum of this project's code."""
    found = {name: package_version(name) or "not found" for name in LIBRARIES}
    found |= {"python": platform.python_version(), "processor": platform.machine()}
    found["isopair's sources"] = checksum_of_sources()
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def checksum_of_sources() -> str:
    """Computes a checksum of this project's code."""
    root = Path(__file__).parents[2]
    total = hashlib.sha256()
    for package in ("data_prep", "pretrain"):
        for path in sorted((root / package).rglob("*.py")):
            total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def checksum_of_config(config: Section) -> str:
    """Computes a checksum of all settings, including those that may differ between attempts."""
    return hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]


def gpu_free_fraction(device: torch.device) -> float | None:
    """Returns the free fraction of a GPU's memory; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free / total


# ----------------------------------------------------------------------------------------- data


def read_shards(
    datasets: Sequence[str], *, first: int, num_shards: int, max_bytes: int
) -> tuple[float, list[str]]:
    """Reads the beginning of some shards of every dataset.

    Args:
        datasets: folders or URLs.
        first: index of the first shard to read, modulo the number of shards. Each node passes a
            different index, to read different shards.
        num_shards: number of shards to read from each dataset.
        max_bytes: total limit over all shards.

    Returns:
        Megabytes per second, and messages for shards that are unreadable or have a wrong size.
    """
    num_bytes, problems = 0, []
    start = time.perf_counter()
    for dataset in datasets:
        try:
            tars = _tars_of(dataset)
            chosen = [tars[(first + n) % len(tars)] for n in range(min(num_shards, len(tars)))]
            for tar, expected in chosen:
                limit = max_bytes // (len(datasets) * len(chosen))
                num_bytes += _read_tar(tar, expected_bytes=expected, max_bytes=limit)
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
        while num_bytes < max_bytes and (piece := stream.read(READ_BYTES)):
            num_bytes += len(piece)
    return num_bytes


# ----------------------------------------------------------------------------------------- disks


def free_bytes_of(folders: Sequence[Path | str]) -> dict[str, int]:
    """Returns the free bytes on each folder's disk; skips URLs, and folders need not exist."""
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


def wait_for_file(path: Path, content: str) -> bool:
    """Waits for a file written by another machine; returns whether it appeared in time."""
    end = time.monotonic() + LISTING_TIMEOUT_SECONDS
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
    settings: Preflight,
    *,
    rank: int,
    local_rank: int,
    node: int,
    device: torch.device,
    config_checksum: str,
    datasets: Sequence[str],
    folders: Sequence[Path | str],
    report: Callable[[str], None],
) -> MachineFacts:
    """Gathers the facts about this rank's machine.

    Args:
        settings: config section `preflight`.
        rank: this process's rank.
        local_rank: rank within its machine; local rank 0 reads shards and checks disks.
        node: index of this machine.
        device: training device.
        config_checksum: checksum of the whole config.
        datasets: folders or URLs of the training data.
        folders: folders or URLs that the run writes to.
        report: called with a description of each activity, which is logged if the rank is late.
    """
    facts = MachineFacts(rank, machine_name())
    report("reading versions")
    facts.versions = versions_here(device)
    facts.config_checksum = config_checksum
    facts.gpu_free_fraction = gpu_free_fraction(device)
    if local_rank == 0:
        report("reading shards")
        facts.shard_megabytes_per_second, facts.problems = read_shards(
            datasets,
            first=node * settings.shards_read,
            num_shards=settings.shards_read,
            max_bytes=round(1e6 * settings.megabytes_read),
        )
        report("checking disks")
        facts.free_bytes = free_bytes_of(folders)
    return facts
