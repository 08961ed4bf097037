"""Asynchronous checkpoint writing.

    1. save       every rank copies its slices of the state out of the engine; training continues
    2. write      a thread of each rank writes its files, flushes them and reads them back
    3. commit     at the end of a later step, when all ranks have written: a thread of the main
                  process writes the record, which commits the checkpoint, and deletes old ones

Ranks exchange their progress at the end of steps, in the main thread, so that no collective runs
concurrently with those of training.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import RunError
from pretrain.checkpoints.record import CheckpointRecord, RunState
from pretrain.checkpoints.state import (
    CopiedFile,
    StateCopy,
    buffer_file,
    scalar_file,
    shapes_of,
)
from pretrain.checkpoints.store import RECORD, CheckpointStore, StoredFile, write_file
from pretrain.config import Run
from pretrain.distributed.collectives import (
    gather_objects,
    on_main_process,
    rank,
    sum_over_ranks,
    world_size,
)
from pretrain.fail_points import fail_point

if TYPE_CHECKING:
    from pretrain.distributed.engine import Engine

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_EXCHANGES = 5.0  # between ranks that wait for a checkpoint
SECONDS_TO_REPORT = 0.1  # a shorter wait for the previous checkpoint is not logged


@dataclass(frozen=True)
class SaveReport:
    """Size and durations of a committed checkpoint."""

    step: int
    num_bytes: int
    waited_seconds: float  # training waited for the copy and for an unfinished earlier checkpoint
    written_seconds: float  # from the copy to the commit


class _Task:
    """A function that runs in its own thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # raised, or logged, by the main thread
            self.error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, *, seconds: float) -> None:
        """Waits until the task is done, but at most `seconds`."""
        self._thread.join(seconds)


@dataclass
class _Save:
    """A checkpoint that is not committed yet."""

    state: RunState
    partial: str
    waited_seconds: float
    began: float
    task: _Task
    is_committing: bool = False
    num_bytes: int = 0


class CheckpointWriter:
    """Writes the state of an engine to a store; every rank must reach every call.

    Args:
        run: config section `run`.
        engine: the engine whose state is written.
        store: destination.
        attempt: id of this attempt.
        origin: further entries of the record's `written_by`.
        model_files: {name: content} of the files that rebuild the model, in addition to its
            tensors; needed on the main process only.
        refuse_if_superseded: raises if another attempt has taken over the run. The main process
            calls it, in a thread, before it commits or deletes anything.
        clock: returns seconds.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        *,
        store: CheckpointStore,
        attempt: str,
        origin: Mapping[str, Any],
        model_files: Mapping[str, bytes],
        refuse_if_superseded: Callable[[], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.run = run
        self.engine = engine
        self.store = store
        self.attempt = attempt
        self._reports: list[SaveReport] = []
        self._written_by = {"attempt": attempt, "world_size": world_size(), **origin}
        self._model_files = model_files
        self._refuse_if_superseded = refuse_if_superseded
        self._clock = clock
        self._copy = StateCopy(engine)
        self._save: _Save | None = None
        self._num_failures = 0  # consecutive ones
        on_main_process(lambda: store.delete_leftovers(attempt))

    # ------------------------------------------------------------------------ the main thread

    def save(self, state: RunState) -> None:
        """Starts a checkpoint of the current state.

        Raises:
            RunError: if too many consecutive checkpoints could not be written.
        """
        start = self._clock()
        if self._save is not None:
            previous_step = self._save.state.step
            self.finish()
            waited = self._clock() - start
            if rank() == 0 and waited >= SECONDS_TO_REPORT:
                logger.warning(
                    "step %d: training waited %.1f s because the checkpoint of step %d was still "
                    "being written; raise run.checkpoint_every_steps or use a faster store",
                    state.step,
                    waited,
                    previous_step,
                )
        files = self._copy.take()
        others = {}
        if rank() == 0:
            others = buffer_file(self.engine.model) | scalar_file(self.engine) | self._model_files
        now = self._clock()
        partial = self.store.partial(state.step, self.attempt)
        task = _Task(lambda: self._write(partial, files, others))
        self._save = _Save(state, partial, now - start, now, task)

    def advance(self) -> None:
        """Advances a pending checkpoint without waiting; called at the end of each step.

        Raises:
            RunError: like `save`.
        """
        save = self._save
        if save is None:
            return
        is_failed = save.task.is_done and save.task.error is not None
        status = torch.tensor([save.task.is_done, is_failed], dtype=torch.int32)
        num_done, num_failed = sum_over_ranks(status.to(self.engine.device)).tolist()
        if num_done < world_size():
            return
        if num_failed:
            self._fail(save)
        elif not save.is_committing:
            self._commit(save)
        else:
            self._save, self._num_failures = None, 0
            seconds = self._clock() - save.began
            report = SaveReport(save.state.step, save.num_bytes, save.waited_seconds, seconds)
            self._reports.append(report)

    def finish(self) -> None:
        """Waits until the pending checkpoint is committed or has failed.

        Raises:
            RunError: like `save`.
        """
        while self._save is not None:
            # A short wait: collectives in `advance` time out if a rank arrives much later.
            self._save.task.wait(seconds=SECONDS_BETWEEN_EXCHANGES)
            self.advance()

    def take_reports(self) -> list[SaveReport]:
        """Returns reports on the checkpoints committed since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def refuse_failure(self) -> None:
        """Raises an error if the last checkpoint could not be written.

        Raises:
            RunError: if the last checkpoint could not be written.
        """
        if self._num_failures:
            raise RunError(
                f"{self.store.folder}: the last checkpoint could not be written, for the reason "
                "logged above; earlier checkpoints are complete: run the same command again"
            )

    def _fail(self, save: _Save) -> None:
        self._save = None
        self._num_failures += 1
        error = save.task.error
        if error is not None and not isinstance(error, RunError):
            error = f"rank {rank()}: {error}"  # text: other ranks may fail to unpickle the error
        errors = [each for each in gather_objects(error) if each is not None]
        for each in errors:
            if isinstance(each, RunError):
                raise each
        if rank() == 0:
            self.store.abandon(save.partial)
            logger.error(
                "step %d: the checkpoint could not be written: %s; training continues, and earlier "
                "checkpoints are complete",
                save.state.step,
                "; ".join(errors),
            )
        if self._num_failures >= self.run.max_failed_saves:
            raise RunError(
                f"{self.store.folder}: {self._num_failures} checkpoints in a row could not be "
                "written, which reaches run.max_failed_saves; the last one because of "
                f"{errors[0]}; free disk space or repair the store, and run the same command again"
            )

    def _commit(self, save: _Save) -> None:
        files: dict[str, StoredFile] = {}
        for written in gather_objects(save.task.result):
            files |= written
        record = CheckpointRecord(save.state, self._written_by, shapes_of(self.engine.model), files)
        save.is_committing = True
        save.num_bytes = sum(file.num_bytes for file in files.values())
        is_writer = rank() == 0
        save.task = _Task(lambda: self._publish(save, record) if is_writer else None)

    # ---------------------------------------------------------------------------- the threads

    def _write(
        self, partial: str, files: list[CopiedFile], others: Mapping[str, bytes]
    ) -> dict[str, StoredFile]:
        self.store.begin(partial)
        written = {file.name: write_file(partial, file.name, file.chunks) for file in files}
        for name, content in others.items():
            written[name] = write_file(partial, name, lambda content=content: [content])
        return written

    def _publish(self, save: _Save, record: CheckpointRecord) -> None:
        self._refuse_if_superseded()
        write_file(save.partial, RECORD, lambda: [record.to_json()])
        fail_point("commit")
        self.store.commit(save.partial, save.state.step)
        self._refuse_if_superseded()
        fail_point("committed")
        delete_other_checkpoints(
            self.store,
            save.state.step,
            keep=self.run.keep_checkpoints,
            keep_every_steps=self.run.keep_every_steps,
        )


def delete_other_checkpoints(
    store: CheckpointStore, step: int, *, keep: int, keep_every_steps: int | None = None
) -> None:
    """Deletes outdated checkpoints after the checkpoint of `step` was committed.

    Keeps the newest `keep` checkpoints and those at multiples of `keep_every_steps`. Checkpoints of
    later steps are deleted too: they were damaged, and the run resumed from an earlier one.
    """
    found = store.checkpoints()
    earlier = [each for each in found if each.step < step]
    for each in found:
        is_later = each.step > step
        is_old = each in earlier[keep - 1 :]
        is_permanent = keep_every_steps is not None and each.step % keep_every_steps == 0
        if is_later or (is_old and not is_permanent):
            store.delete(each.location)
