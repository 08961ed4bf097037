"""What a step reports, to the run folder, the trackers and the progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.checkpoint_writer import SaveReport
from pretrain.engine import Engine
from pretrain.gather import sum_over_ranks
from pretrain.pair_batch import StepBatch
from pretrain.pair_loader import StepDataset
from pretrain.run_folder import RunFolder
from pretrain.sample_order import format_digest
from pretrain.step_loss import StepLosses

logger = logging.getLogger(__name__)


class PhaseTimer:
    """Seconds of host time spent in each phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its block to a phase."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self._seconds[name] = self._seconds.get(name, 0.0) + elapsed

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last call, of which by phase), and begins anew."""
        now = time.perf_counter()
        taken = (now - self._since, self._seconds)
        self._since, self._seconds = now, {}
        return taken


def digest_of_step(batch: StepBatch, *, device: torch.device) -> dict[str, str]:
    """Per pairing the digest of the step's sample ids; every rank must call it."""
    halves = np.stack([pairing.digest for pairing in batch.pairings.values()])
    summed = sum_over_ranks(torch.from_numpy(halves).to(device)).tolist()
    return {name: format_digest(pair) for name, pair in zip(batch.pairings, summed, strict=True)}


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    losses: StepLosses
    learning_rate: float
    grad_norm: float  # over all parameters, before clipping


class StepReporter:
    """Writes metrics and keeps the progress bar; on other than the main process it does nothing.

    Args:
        run: the run folder.
        engine: for its trackers.
        dataset: what the run reads.
        timer: of the training loop.
    """

    def __init__(
        self, run: RunFolder, engine: Engine, dataset: StepDataset, *, timer: PhaseTimer
    ) -> None:
        self.run = run
        self.engine = engine
        self.timer = timer
        self.num_steps = dataset.num_steps
        self.dataset = dataset
        self.last_logged_step = run.num_steps_done
        self._ended_epochs: list[dict[str, Any]] = []
        self._saves: list[dict[str, Any]] = []
        self.bar = None
        if run.is_writer and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.num_steps, initial=run.num_steps_done, unit="step", desc="pretrain"
            )

    def advance(self) -> None:
        """Moves the progress bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def report_epochs(self, ended: list[dict[str, Any]]) -> None:
        """Says which epochs of which sources ended; the next row of metrics has them."""
        self._ended_epochs += ended
        for report in ended if self.run.is_writer else []:
            self._say(
                f"{report['source']}: epoch {report['epoch']} was read whole: "
                f"{report['in_manifest']:,} samples, {report['substituted']:,} substituted, "
                f"{report['left_over']:,} left over"
            )

    def report_saves(self, saves: list[SaveReport]) -> None:
        """Says which checkpoints have come to count; the next row of metrics has them."""
        for save in saves if self.run.is_writer else []:
            self._saves.append(asdict(save))
            self.run.last_checkpoint = save.step
            self._say(
                f"step {save.step}: checkpoint of {save.num_bytes / 1e6:,.1f} MB written in "
                f"{save.written_seconds:.2f} s, for which training waited "
                f"{save.waited_seconds:.2f} s"
            )

    def report_step(self, outcome: StepOutcome, *, digest: dict[str, str]) -> None:
        """Writes one row of metrics of the step just done."""
        seconds, phases = self.timer.take()
        step = self.run.num_steps_done
        steps = step - self.last_logged_step
        samples_seen = self.dataset.samples_seen(step)
        samples = samples_seen - self.dataset.samples_seen(self.last_logged_step)
        self.last_logged_step = step
        if not self.run.is_writer:
            return
        losses = outcome.losses.by_pairing
        row = {
            "step": step,
            "samples_seen": samples_seen,
            "total_loss": outcome.losses.total,
            "loss": {name: loss.value for name, loss in losses.items()},
            "media_to_text_recall@1": {
                name: loss.media_to_text_recall_at_1 for name, loss in losses.items()
            },
            "text_to_media_recall@1": {
                name: loss.text_to_media_recall_at_1 for name, loss in losses.items()
            },
            "logit_scale": outcome.losses.scales,
            "logit_bias": outcome.losses.biases,
            "learning_rate": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "data_digest": digest,
            "epochs_seen": self.dataset.epochs_seen(step),
            "ended_epochs": self._ended_epochs,
            "saves": self._saves,
            "samples_per_second": samples / seconds,
            "data_wait_share": phases.get("data", 0.0) / seconds,
            "seconds": {name: value / steps for name, value in phases.items()},
        }
        if self.run.marks:
            row["marks"] = self.run.marks
        self._ended_epochs, self._saves = [], []
        self.run.write_metrics(row)
        self.run.write_status("running")
        self.engine.log(flatten_numbers(row), step=step)
        self._show(row)

    def report_validation(self, figures: dict[str, dict[str, float]]) -> None:
        """Writes one row of validation figures, by pairing."""
        if not self.run.is_writer:
            return
        step = self.run.num_steps_done
        row = {"step": step, "validation": figures}
        self.run.write_metrics(row)
        self.engine.log(flatten_numbers({"validation": figures}), step=step)
        shown = "; ".join(
            f"{name} loss {values['loss']:.3f}, "
            f"R@1 {values['media_to_text_recall@1']:.2f} / {values['text_to_media_recall@1']:.2f}"
            for name, values in figures.items()
        )
        self._say(f"step {step}: validation: {shown}")

    def close(self) -> None:
        """Ends the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _show(self, row: dict[str, Any]) -> None:
        scales = "/".join(f"{scale:.1f}" for scale in row["logit_scale"].values())
        shown = {
            "loss": f"{row['total_loss']:.3f}",
            "samples/s": f"{row['samples_per_second']:.0f}",
            "wait": f"{row['data_wait_share']:.0%}",
            "lr": f"{row['learning_rate']:.1e}",
            "scale": scales,
            "norm": f"{row['grad_norm']:.2f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown)
        else:
            figures = " ".join(f"{name} {value}" for name, value in shown.items())
            logger.info("step %d/%d: %s", row["step"], self.num_steps, figures)

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            logger.info("%s", line)


def flatten_numbers(values: dict[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Nested numbers under names joined by "/"; whatever is not a number is left out."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten_numbers(value, prefix=f"{name}/")
        elif isinstance(value, int | float):
            flat[name] = value
    return flat
