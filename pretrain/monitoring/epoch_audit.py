"""Checks that every epoch was read whole: read + substituted = what the manifest holds."""

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
    """What became of one epoch of one source. All but the last three add up to the last but one."""

    source: str  # "<pairing>/<source>"
    epoch: int
    read: int  # by this attempt, as they are
    substituted: int  # by this attempt
    read_before: int  # by earlier attempts, whose steps this one goes on from
    left_over: int  # fewer than one per lane; others in every epoch
    in_manifest: int


class EpochAudit:
    """Counts what the loaders delivered, against what the manifest says; every rank must call it.

    Args:
        schedule: samples of every step.
        ledger: of substitutions.
        first_step: steps done before this attempt.
    """

    def __init__(self, schedule: RunSchedule, ledger: BadSampleLedger, *, first_step: int) -> None:
        self.schedule = schedule
        self.ledger = ledger
        self.first_step = first_step
        self._num_read: Counter[tuple[str, str, int]] = Counter()
        # (pairing, number of the source) -> (current epoch, step that ends it)
        self._current: dict[tuple[str, int], tuple[int, float]] = {}
        for name, order in schedule.orders.items():
            for number in range(len(order.sources)):
                epoch = schedule.whole_epochs(name, first_step, source=number)
                last_step = schedule.steps_to_end_of(name, source=number, epoch=epoch)
                self._current[name, number] = (epoch, last_step)

    def enter(self, batch: StepBatch, *, device: torch.device) -> list[dict[str, Any]]:
        """Adds a step; returns the reports of the epochs that it ends.

        Raises:
            RunError: an epoch was not read whole.
        """
        for name, pairing in batch.pairings.items():
            for (source, epoch), count in pairing.num_read.items():
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
                f"expected {report.in_manifest} (manifest.jsonl): {report}; this is a fault of the "
                "loader: keep the run folder and report it"
            )
        return report
