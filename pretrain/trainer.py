"""The training loop of one attempt: batches in, steps, metrics, validations and checkpoints out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from data_prep.config_file import RunError
from pretrain.bad_sample_ledger import BadSampleLedger
from pretrain.checkpoint_record import RunState
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.config import PretrainConfig
from pretrain.engine import Engine
from pretrain.epoch_account import EpochAccount
from pretrain.gather import on_main_process
from pretrain.optimizer import learning_rate_at
from pretrain.pair_batch import StepBatch
from pretrain.pair_loader import StepDataset
from pretrain.run_folder import RunFolder
from pretrain.run_requests import Request, RunRequests
from pretrain.step_loss import StepLosses
from pretrain.step_metrics import PhaseTimer, StepOutcome, StepReporter, digest_of_step
from pretrain.validation import ValidationSet, validate


def last_step_of(config: PretrainConfig) -> int:
    """Steps done when an attempt ends."""
    return min(config.schedule.num_steps, config.run.stop_after_step or sys.maxsize)


class Trainer:
    """Takes the steps that are left of a run; every rank must make every call.

    Args:
        config: the whole config.
        engine: holds the model, as the run's newest checkpoint left it.
        dataset: what the run reads.
        run: the run folder, which knows how many steps are done.
        requests: what the run is asked to do meanwhile.
        writer: of checkpoints.
        take_gradient: adds the gradient of a step's loss.
        validation_sets: held-out pairs.
    """

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        dataset: StepDataset,
        run: RunFolder,
        requests: RunRequests,
        writer: CheckpointWriter,
        *,
        take_gradient: Callable[[StepBatch], StepLosses],
        validation_sets: Sequence[ValidationSet],
    ) -> None:
        self.config = config
        self.engine = engine
        self.run = run
        self.requests = requests
        self.writer = writer
        self.take_gradient = take_gradient
        self.validation_sets = validation_sets
        self.timer = PhaseTimer()
        self.reporter = StepReporter(run, engine, dataset, timer=self.timer)
        self.ledger = BadSampleLedger(run, dataset, loading=config.loading)
        self.account = EpochAccount(dataset, self.ledger, first_step=run.num_steps_done)
        self.lacks_validation = False  # one was due, and given up

    def train(self, batches: Iterator[StepBatch]) -> None:
        """Takes the steps; returns after the last one, or when asked to stop.

        Args:
            batches: this rank's share of each, on the device.

        Raises:
            RunError: the run cannot go on; among others SupersededError.
        """
        first_step, last_step = self.run.num_steps_done, last_step_of(self.config)
        self.engine.train_mode(True)
        request = self._agree()  # on what was asked for during the start
        if self._is_validation_missing(first_step):
            request = self._validate(request)
        for step in range(first_step + 1, last_step + 1):
            if request.stops:
                break
            with self.timer.phase("data"):
                batch = next(batches)
            outcome = self._take_step(batch)
            request = self._agree()
            if self._is_row_due(step, request):
                digest = digest_of_step(batch, device=self.engine.device)
                self.reporter.report_step(outcome, digest=digest)
            if self._is_validation_due(step):
                request = self._validate(request)
            if self._is_save_due(step, request):
                self._save(request)
            self._advance_save()
        self._finish(request)

    def save_first(self) -> None:
        """Saves what was loaded from another run, before anything is done with it."""
        self._save(Request())
        self._finish_save()

    def _take_step(self, batch: StepBatch) -> StepOutcome:
        outcome = train_step(self.config, self.engine, batch, self.timer, self.take_gradient)
        self.run.num_steps_done = batch.step + 1
        self.ledger.enter(batch, device=self.engine.device)
        self.reporter.report_epochs(self.account.enter(batch, device=self.engine.device))
        self.reporter.advance()
        return outcome

    def _agree(self) -> Request:
        """
        Raises:
            SupersededError: a newer attempt has begun.
        """
        request = self.requests.agreed(device=self.engine.device)
        if request.is_superseded:
            raise self.run.superseded_error()
        return request

    # ---------------------------------------------------------------------------- validation

    def _is_validation_due(self, step: int) -> bool:
        is_due = step == last_step_of(self.config) or step % self.config.validation.every_steps == 0
        return is_due and bool(self.validation_sets)

    def _is_validation_missing(self, step: int) -> bool:
        """Whether the attempt before was stopped within the validation after a step."""
        if step == 0 or not self._is_validation_due(step):
            return False
        return not on_main_process(lambda: self.run.has_validation(step))

    def _validate(self, request: Request) -> Request:
        """Validates, unless asked to stop before it is over: then it is left to the next attempt.
        Returns what is asked for by then."""

        def is_given_up() -> bool:
            nonlocal request
            if not request.stops:
                request = self._agree()
            return request.stops

        figures = {}
        with self.timer.phase("validation"):
            for each in self.validation_sets:
                found = None if request.stops else validate(self.engine, each, is_given_up)
                if found is None:
                    self.lacks_validation = True
                    return request
                figures[each.pairing] = found
        self.reporter.report_validation(figures)
        return request

    def _is_row_due(self, step: int, request: Request) -> bool:
        """Also before what may end the attempt, so that no later one need tell of this step."""
        is_planned = step % self.config.run.log_every_steps == 0
        return is_planned or self._is_validation_due(step) or self._is_save_due(step, request)

    # --------------------------------------------------------------------------- checkpoints

    def _is_save_due(self, step: int, request: Request) -> bool:
        is_planned = step % self.config.run.checkpoint_every_steps == 0
        is_last = step == last_step_of(self.config)
        return is_planned or is_last or request.saves or request.stops

    def _save(self, request: Request) -> None:
        with self.timer.phase("save"):
            on_main_process(self.run.flush)
            self.writer.save(self._state())
        self.requests.heeded(request)

    def _state(self) -> RunState:
        """Where the run stands."""
        return RunState(
            self.run.num_steps_done,
            num_updates=self.engine.num_updates,
            marks=tuple(self.run.marks),
        )

    def _advance_save(self) -> None:
        with self.timer.phase("save"):
            self.writer.advance()
        self.reporter.report_saves(self.writer.take_reports())

    def _finish_save(self) -> None:
        self.writer.finish()
        self.reporter.report_saves(self.writer.take_reports())
        self.writer.refuse_failure()

    def _finish(self, request: Request) -> None:
        self._finish_save()
        if request.stops:
            self.requests.heeded(request)
            is_whole = self.run.num_steps_done >= self.config.schedule.num_steps
            if self.lacks_validation or not is_whole:
                self.run.stop_cause = request.stop_cause
        self.reporter.close()


def train_step(
    config: PretrainConfig,
    engine: Engine,
    batch: StepBatch,
    timer: PhaseTimer,
    take_gradient: Callable[[StepBatch], StepLosses],
) -> StepOutcome:
    """One optimizer step.

    Raises:
        RunError: loss or gradient is not finite; the step was not applied.
    """
    learning_rate = learning_rate_at(
        batch.step, peak=config.optimizer.learning_rate, schedule=config.schedule
    )
    try:
        with timer.phase("forward and backward"):
            losses = take_gradient(batch)
        with timer.phase("optimizer"):
            grad_norm = engine.step(learning_rate=learning_rate)
    except FloatingPointError as error:
        raise RunError(
            f"step {batch.step + 1}: {error}; the step was not applied. Lower "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} or raise "
            f"schedule.warmup_steps={config.schedule.warmup_steps} in a new run folder"
        ) from None
    return StepOutcome(losses, learning_rate, grad_norm)
