"""Checks that every epoch was read whole: read + substituted = what the manifest holds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_prep.errors import RunError
from pretrain.data.batch import StepBatch
from pretrain.data.pairing_reader import PairingReader
from pretrain.data.step_dataset import StepDataset
from pretrain.distributed.collectives import sum_over_ranks
from pretrain.monitoring.bad_samples import BadSampleLedger


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
        dataset: what the run reads.
        ledger: of substitutions.
        first_step: steps done before this attempt.
    """

    def __init__(self, dataset: StepDataset, ledger: BadSampleLedger, *, first_step: int) -> None:
        self.dataset = dataset
        self.ledger = ledger
        self.first_step = first_step
        self._num_read: Counter[tuple[str, str, int]] = Counter()
        # (pairing, number of the source) -> (current epoch, step that ends it)
        self._current: dict[tuple[str, int], tuple[int, float]] = {}
        for name, pairing in dataset.pairings.items():
            for number in range(len(pairing.readers)):
                epoch = _whole_epochs(pairing, number, first_step)
                self._current[name, number] = (epoch, self._last_step(pairing, number, epoch))

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
                last_step = self._last_step(self.dataset.pairings[name], number, epoch)
            self._current[name, number] = (epoch, last_step)
        return [asdict(report) for report in reports]

    def _report(self, name: str, number: int, epoch: int, device: torch.device) -> EpochReport:
        pairing = self.dataset.pairings[name]
        order, source = pairing.order, pairing.order.sources[number]
        key = (name, source.name, epoch)
        own = torch.tensor([self._num_read.pop(key, 0)], device=device)
        delivered = int(sum_over_ranks(own).item())
        substituted = self.ledger.num_substituted.pop(key, 0)
        report = EpochReport(
            source=f"{name}/{source.name}",
            epoch=epoch,
            read=delivered - substituted,
            substituted=substituted,
            read_before=order.samples_drawn_of_epoch(
                pairing.num_steps_taken(self.first_step), source=number, epoch=epoch
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

    @staticmethod
    def _last_step(pairing: PairingReader, number: int, epoch: int) -> float:
        """Steps of the run after which every lane has left an epoch of a source."""
        own_steps = pairing.order.steps_to_end_of(source=number, epoch=epoch)
        if own_steps is None:  # no segment uses the source any more
            return math.inf
        return pairing.choice.steps_until(pairing.name, own_steps)


def _whole_epochs(pairing: PairingReader, number: int, num_steps: int) -> int:
    """Epochs of a source that every lane has left after the run's first steps."""
    positions = pairing.order.lane_positions(pairing.num_steps_taken(num_steps))[:, number]
    return int(positions.min()) // pairing.order.sources[number].lane_length
