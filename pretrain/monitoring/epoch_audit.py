"""Audit of epochs: samples read + substituted + left over = samples in the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_prep.errors import RunError
from pretrain.data.batch import StepBatch
from pretrain.distributed.collectives import sum_over_ranks
from pretrain.monitoring.bad_samples import BadSampleLedger
from pretrain.sampling.schedule import RunSchedule


@dataclass(frozen=True)
class EpochReport:
    """Counts of one epoch of one source; the other counts add up to in_manifest."""

    source: str  # "<stream>/<source>"
    epoch: int
    read: int  # by this attempt, unchanged
    substituted: int  # by this attempt
    read_before: int  # by earlier attempts, in the steps before this attempt's first
    left_over: int  # fewer than one per lane; chosen at random in every epoch
    in_manifest: int


class EpochAudit:
    """Compares the samples that loaders delivered with the manifest; every rank must call it.

    Args:
        schedule: samples of every step.
        ledger: ledger of substitutions.
        first_step: number of steps done before this attempt.
    """

    def __init__(self, schedule: RunSchedule, ledger: BadSampleLedger, *, first_step: int) -> None:
        self.schedule = schedule
        self.ledger = ledger
        self.first_step = first_step
        self._num_read: Counter[tuple[str, str, int]] = Counter()
        # (stream, number of the source) -> (current epoch, step that ends it)
        self._current: dict[tuple[str, int], tuple[int, float]] = {}
        for name, order in schedule.orders.items():
            for number in range(len(order.sources)):
                epoch = schedule.whole_epochs(name, first_step, source=number)
                last_step = schedule.steps_to_end_of(name, source=number, epoch=epoch)
                self._current[name, number] = (epoch, last_step)

    def record(self, batch: StepBatch, *, device: torch.device) -> list[dict[str, Any]]:
        """Adds a step and returns reports on the epochs that it ends.

        Raises:
            RunError: if an epoch was not read completely.
        """
        for name, stream in batch.streams.items():
            for (source, epoch), count in stream.num_read.items():
                self._num_read[name, source, epoch] += count
        reports = []
        for (name, number), (epoch, last_step) in self._current.items():
            while batch.step + 1 >= last_step:
                reports.append(self._report(name, number, epoch, device))
                epoch += 1
                last_step = self.schedule.steps_to_end_of(name, source=number, epoch=epoch)
            self._current[name, number] = (epoch, last_step)
        return [asdict(report) for report in reports]

    def _report(self, name: str, number: int, epoch: int, device: torch.device) -> EpochReport:
        source = self.schedule.orders[name].sources[number]
        key = (name, source.name, epoch)
        own = torch.tensor([self._num_read.pop(key, 0)], device=device)
        delivered = int(sum_over_ranks(own).item())
        substituted = self.ledger.num_substituted.pop(key, 0)
        report = EpochReport(
            source=f"{name}/{source.name}",
            epoch=epoch,
            read=delivered - substituted,
            substituted=substituted,
            read_before=self.schedule.samples_drawn_of_epoch(
                name, self.first_step, source=number, epoch=epoch
            ),
            left_over=source.num_samples - source.lane_length * source.lanes,
            in_manifest=source.num_samples,
        )
        found = report.read + report.substituted + report.read_before + report.left_over
        if found != report.in_manifest:
            raise RunError(
                f"epoch {epoch} of {report.source} ended with {found} samples accounted for, "
                f"expected {report.in_manifest} (manifest.jsonl): {report}; this is a bug in the "
                "loader: keep the run folder and report it"
            )
        return report
