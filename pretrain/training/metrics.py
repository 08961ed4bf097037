"""Reporting of steps to the run folder, the trackers and the progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.checkpoints.writer import SaveReport
from pretrain.config import Run
from pretrain.data.batch import StepBatch
from pretrain.distributed.collectives import sum_over_ranks
from pretrain.distributed.engine import Engine
from pretrain.monitoring.anomalies import StepWatch
from pretrain.monitoring.progress_log import Progress, ProgressLog
from pretrain.monitoring.timing import (
    PhaseTimer,
    SlowestRank,
    exchange_seconds,
    mean_seconds,
    slowest_rank,
)
from pretrain.run.folder import RunFolder
from pretrain.sampling.order import format_digest
from pretrain.sampling.schedule import RunSchedule
from pretrain.training.step import StepLosses

logger = logging.getLogger(__name__)


def digest_of_step(batch: StepBatch, *, device: torch.device) -> dict[str, str]:
    """Returns {stream: digest of the step's sample ids}; every rank must call it."""
    halves = np.stack([stream.digest for stream in batch.streams.values()])
    summed = sum_over_ranks(torch.from_numpy(halves).to(device)).tolist()
    return {name: format_digest(pair) for name, pair in zip(batch.streams, summed, strict=True)}


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of one optimizer step."""

    losses: StepLosses
    learning_rate: float
    grad_norm: float  # over all trained parameters, before clipping
    learning_rates: dict[str, float]  # by part of the model, if they differ

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""
        return {
            **self.losses.row(),
            "learning_rate": self.learning_rate,
            **({"learning_rates": self.learning_rates} if self.learning_rates else {}),
            "grad_norm": self.grad_norm,
        }

    def progress_text(self) -> str:
        """Returns the text for a progress line."""
        return (
            f"loss {self.losses.total:.3f} lr {self.learning_rate:.1e} "
            f"{self.losses.progress_text()} norm {self.grad_norm:.2f}"
        )


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not applied."""

    cause: str
    dump: str  # file with the details

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""
        return {"skipped": asdict(self)}

    def progress_text(self) -> str:
        """Returns the text for a progress line."""
        return f"skipped: {self.cause}"


class StepReporter:
    """Writes metrics and updates the progress bar, on the main process.

    Args:
        run: run folder.
        config: config section `run`.
        engine: engine with the trackers.
        schedule: samples of every step.
        timer: timer of the training loop.
        watch: detector of spikes and slow steps.
        hosts: [ranks] machine names.
    """

    def __init__(
        self,
        run: RunFolder,
        config: Run,
        engine: Engine,
        schedule: RunSchedule,
        *,
        timer: PhaseTimer,
        watch: StepWatch,
        hosts: Sequence[str],
    ) -> None:
        self.run = run
        self.engine = engine
        self.timer = timer
        self.watch = watch
        self.hosts = hosts
        self.num_steps = schedule.num_steps
        self.schedule = schedule
        self.last_logged_step = run.num_steps_done
        self._ended_epochs: list[dict[str, Any]] = []
        self._saves: list[dict[str, Any]] = []
        self.log = ProgressLog(config, self._progress(), num_steps=self.num_steps)
        self.bar = None
        if run.is_writer and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.num_steps, initial=run.num_steps_done, unit="step", desc="pretrain"
            )

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def watch_step(self, outcome: StepOutcome | SkippedStep, *, seconds: float) -> None:
        """Logs the progress of the run and anomalies of the last step.

        Args:
            outcome: outcome of the step.
            seconds: duration of the step, without validation and saving.
        """
        if not self.run.is_writer:
            return
        step, values = self.run.num_steps_done, {}
        if isinstance(outcome, StepOutcome):
            values = {"total_loss": outcome.losses.total, "grad_norm": outcome.grad_norm}
        for line in self.watch.record(step, values=values, seconds=seconds):
            self._say(f"step {step}: {line}")
        if self.bar is None and (line := self.log.line(self._progress(), outcome.progress_text())):
            logger.info("%s", line)

    def _progress(self) -> Progress:
        step = self.run.num_steps_done
        return Progress(step, self.schedule.samples_seen(step), self.timer.data_seconds)

    def report_epochs(self, ended: list[dict[str, Any]]) -> None:
        """Logs the epochs that have ended and keeps them for the next metrics row."""
        self._ended_epochs += ended
        for report in ended if self.run.is_writer else []:
            self._say(
                f"{report['source']}: epoch {report['epoch']} was read completely: "
                f"{report['in_manifest']:,} samples, {report['substituted']:,} substituted, "
                f"{report['left_over']:,} left over"
            )

    def report_saves(self, saves: list[SaveReport]) -> None:
        """Logs committed checkpoints and keeps them for the next metrics row."""
        for save in saves if self.run.is_writer else []:
            self._saves.append(asdict(save))
            self.run.last_checkpoint = save.step
            self._say(
                f"step {save.step}: checkpoint of {save.num_bytes / 1e6:,.1f} MB written in "
                f"{save.written_seconds:.2f} s; training waited {save.waited_seconds:.2f} s"
            )

    def report_step(self, outcome: StepOutcome | SkippedStep, *, digest: dict[str, str]) -> None:
        """Writes one metrics row for the last step; every rank must call it."""
        seconds, own = self.timer.take()
        step = self.run.num_steps_done
        num_steps = step - self.last_logged_step
        per_step = {name: value / num_steps for name, value in own.items()}
        seconds_by_rank = exchange_seconds(per_step, device=self.engine.device)
        samples_seen = self.schedule.samples_seen(step)
        samples = samples_seen - self.schedule.samples_seen(self.last_logged_step)
        self.last_logged_step = step
        if not self.run.is_writer:
            return
        mean = mean_seconds(seconds_by_rank)
        slowest = self._describe(slowest_rank(seconds_by_rank))
        row = {
            "step": step,
            "samples_seen": samples_seen,
            **outcome.row(),
            "data_digest": digest,
            "epochs_seen": self.schedule.epochs_seen(step),
            "ended_epochs": self._ended_epochs,
            "saves": self._saves,
            "samples_per_second": samples / seconds,
            "data_wait_share": mean["data"] * num_steps / seconds,
            "seconds": mean,
            **slowest,
            **self.watch.take_row(),
        }
        if self.run.tags:
            row["marks"] = self.run.tags
        self._ended_epochs, self._saves = [], []
        self.run.write_metrics(row)
        self.run.write_status("running")
        self.engine.log(flatten_numbers(row), step=step)
        if self.bar is not None:
            pace = f"samples/s {row['samples_per_second']:.0f} wait {row['data_wait_share']:.0%}"
            self.bar.set_postfix_str(f"{outcome.progress_text()} {pace}")
        for line in self.watch.lines_on_pace(mean, slowest.get("slowest_rank")):
            self._say(f"step {step}: {line}")

    def _describe(self, slowest: SlowestRank | None) -> dict[str, Any]:
        if slowest is None:
            return {}
        return {"slowest_rank": asdict(slowest) | {"host": self.hosts[slowest.rank]}}

    def report_validation(self, metrics: Mapping[str, dict[str, dict[str, float]]]) -> None:
        """Writes one metrics row with the validation metrics of each "<stream>/<objective>".

        Args:
            metrics: "validation": with the weights; "validation_ema": with their averages.
        """
        if not self.run.is_writer:
            return
        step = self.run.num_steps_done
        self.run.write_metrics({"step": step, **metrics})
        self.engine.log(flatten_numbers(metrics), step=step)
        for kind, of_kind in metrics.items():
            shown = "; ".join(
                f"{name} " + ", ".join(f"{metric} {value:.3f}" for metric, value in values.items())
                for name, values in of_kind.items()
            )
            self._say(f"step {step}: {kind}: {shown}")

    def close(self) -> None:
        """Closes the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            logger.info("%s", line)


def flatten_numbers(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Returns nested numbers under names joined by "/", without values that are not numbers."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_numbers(value, prefix=f"{name}/")
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
