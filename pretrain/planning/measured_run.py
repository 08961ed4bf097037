"""Measurements of a run that replace assumptions of a plan: utilization, speed of checkpoints."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from pretrain.config import PretrainConfig
from pretrain.planning.config import Gpu
from pretrain.planning.model_sizes import measure_model
from pretrain.planning.planned_model import plan_model
from pretrain.planning.step_time import step_flops
from pretrain.run.attempts import Attempt, read_attempts, read_metrics
from pretrain.stored_config import CONFIG_FILE

NUM_ROWS = 20  # newest rows of metrics that are used
COMPUTING = ("forward", "backward", "optimizer")  # phases; in `gather`, a process also waits


@dataclass(frozen=True)
class MeasuredRun:
    """Measurements of a run.

    Attributes:
        utilization: fraction of the GPU's FLOPs that forward, backward and update reached.
        write_bytes_per_second: speed of its checkpoints; None if it has none.
    """

    utilization: float
    write_bytes_per_second: float | None


def measure_run(folder: Path, gpu: Gpu) -> MeasuredRun:
    """Reads the measurements of a run's newest attempt with metrics.

    Args:
        folder: run folder.
        gpu: kind of GPU that the run used.

    Raises:
        InputError: if the folder is not a run folder, or has no metrics.
    """
    if not (folder / CONFIG_FILE).exists():
        raise InputError(f"measured_run={folder}: expected a run folder, found no {CONFIG_FILE}")
    config = read_stored_config(PretrainConfig, folder / CONFIG_FILE)
    attempt, rows = _newest_rows(folder)
    # The first row holds the start of the attempt, in which kernels are chosen.
    seconds = statistics.median(
        sum(row["seconds"].get(phase, 0.0) for phase in COMPUTING) for row in rows[1:] or rows
    )
    sizes = measure_model(config, plan_model(config), is_gpu=gpu.device == "cuda")
    flops = sum(step_flops(config, sizes, attempt.world_size, attempt.num_micro_batches))
    saves = [save for row in rows for save in row.get("saves", ())]
    speeds = [save["num_bytes"] / save["written_seconds"] for save in saves]
    return MeasuredRun(
        flops / seconds / gpu.flops_per_second(config.engine.precision),
        statistics.median(speeds) if speeds else None,
    )


def _newest_rows(folder: Path) -> tuple[Attempt, list[dict[str, Any]]]:
    rows = [row for row in read_metrics(folder) if "seconds" in row]
    for attempt in reversed(read_attempts(folder)):
        own = [row for row in rows if row["step"] > (attempt.from_step or 0)][-NUM_ROWS:]
        if own:
            return attempt, own
    raise InputError(
        f"measured_run={folder}: expected a run with metrics, found none; use it after "
        "run.log_every_steps steps"
    )
