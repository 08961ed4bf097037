"""The training loop of one attempt: batches in, steps, metrics, validations and checkpoints out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pretrain.config import Run, Validation, Watch
from pretrain.data.batch import StepBatch
from pretrain.data.step_loader import StepLoader
from pretrain.distributed.collectives import is_lost_peer_error, on_main_process, set_timeout
from pretrain.distributed.engine import Engine
from pretrain.fail_points import fail_point
from pretrain.monitoring.anomalies import StepWatch, reason_to_stop
from pretrain.monitoring.bad_samples import BadSampleLedger
from pretrain.monitoring.epoch_audit import EpochAudit
from pretrain.monitoring.non_finite import dump_step
from pretrain.monitoring.timing import PhaseTimer
from pretrain.optimization.learning_rate import learning_rate_at
from pretrain.run.attempts import DivergedError, read_metrics
from pretrain.run.requests import Request
from pretrain.settings.data import Loading
from pretrain.settings.optimizer import Optimizer, Schedule
from pretrain.training.metrics import SkippedStep, StepOutcome, StepReporter, digest_of_step
from pretrain.training.session import RunSession
from pretrain.training.step import NonFiniteLossError, TrainingStep
from pretrain.training.validation import ValidationSet, validate


@dataclass(frozen=True)
class TrainerSettings:
    """The config sections that the training loop reads."""

    run: Run
    schedule: Schedule
    optimizer: Optimizer
    watch: Watch
    loading: Loading
    validation: Validation
    timeout_seconds: float  # of collectives, from the second step of an attempt on

    @property
    def last_step(self) -> int:
        """Number of the step after which an attempt ends."""
        return min(self.schedule.num_steps, self.run.stop_after_step or sys.maxsize)


class Trainer:
    """Takes the remaining steps of a run; every rank must make every call.

    Args:
        engine: engine that holds the model, in the state of the run's newest checkpoint.
        step: gradient of a step's objective.
        loader: reader of this rank's rows of each step.
        session: this attempt at the run, entered, with its writer.
        settings: config sections.
    """

    def __init__(
        self,
        engine: Engine,
        step: TrainingStep,
        loader: StepLoader,
        session: RunSession,
        settings: TrainerSettings,
    ) -> None:
        self.engine = engine
        self.step = step
        self.loader = loader
        self.session = session
        self.settings = settings
        self.run = session.run
        self.timer = PhaseTimer(engine.device)
        rows = read_metrics(self.run.folder) if self.run.is_writer else []
        self.reporter = StepReporter(
            self.run,
            settings.run,
            engine,
            loader.schedule,
            timer=self.timer,
            watch=StepWatch(settings.watch, rows=rows[-settings.watch.window_steps :]),
            hosts=session.hosts,
        )
        self.ledger = BadSampleLedger(self.run, loader, loading=settings.loading)
        self.epoch_audit = EpochAudit(
            loader.schedule, self.ledger, first_step=self.run.num_steps_done
        )
        self.validation_sets: Sequence[ValidationSet] = ()
        self.lacks_validation = False  # whether a request to stop interrupted a validation

    def train(
        self, batches: Iterator[StepBatch], validation_sets: Sequence[ValidationSet] = ()
    ) -> None:
        """Takes the steps; returns after the last one, or when asked to stop.

        Args:
            batches: this rank's part of each remaining step, on the device.
            validation_sets: held-out pairs.

        Raises:
            RunError: if the run cannot continue; for example SupersededError.
        """
        self.validation_sets = validation_sets
        try:
            self._train(batches)
        except RuntimeError as error:
            if not is_lost_peer_error(error):
                raise
            raise self.session.lost_peer_error(error) from error

    def _train(self, batches: Iterator[StepBatch]) -> None:
        first_step = self.run.num_steps_done
        self.engine.train_mode(True)
        request = self._poll_requests()  # requests made during start-up
        if self._is_validation_missing(first_step):
            request = self._validate(request)
        for step in range(first_step + 1, self.settings.last_step + 1):
            if request.stops:
                break
            start = time.perf_counter()
            with self.timer.phase("data"):
                batch = next(batches)
            if step == first_step + 1 and self.engine.changes_sums_after_backward:
                self._warm_up_ddp(batch)
            outcome = self._take_step(batch)
            request = self._poll_requests()
            self.reporter.watch_step(outcome, seconds=time.perf_counter() - start)
            if self._is_row_due(step, request) or isinstance(outcome, SkippedStep):
                digest = digest_of_step(batch, device=self.engine.device)
                self.reporter.report_step(outcome, digest=digest)
            if self._is_validation_due(step):
                request = self._validate(request)
            if self._is_save_due(step, request):
                self._save(request)
            self._advance_save()
            self.session.heartbeat()
            if step == first_step + 1:
                set_timeout(self.settings.timeout_seconds)
        self._finish(request)

    def save_first(self) -> None:
        """Saves the state loaded from another run, before the first step."""
        self._save(Request())
        self._finish_save()

    def _warm_up_ddp(self, batch: StepBatch) -> None:
        """Runs one throwaway backward, so that DDP's bucket order, and thus the summation order, is
        final before the first step of an attempt. A resumed run then equals an uninterrupted one
        bit for bit."""
        with suppress(FloatingPointError):  # the step itself will raise it again
            self.step.backward(batch, PhaseTimer(self.engine.device))
        self.engine.drop_gradients()

    def _take_step(self, batch: StepBatch) -> StepOutcome | SkippedStep:
        learning_rate = learning_rate_at(
            batch.step,
            peak=self.settings.optimizer.learning_rate,
            schedule=self.settings.schedule,
        )
        try:
            outcome = train_step(
                self.engine, self.step, batch, learning_rate=learning_rate, timer=self.timer
            )
        except FloatingPointError as error:  # raised on every rank
            outcome = self._skip(batch, error)
        self.run.num_steps_done = batch.step + 1
        self.ledger.record(batch, device=self.engine.device)
        self.reporter.report_epochs(self.epoch_audit.record(batch, device=self.engine.device))
        self.reporter.advance()
        return outcome

    def _poll_requests(self) -> Request:
        return self.session.poll_requests(device=self.engine.device)

    # ------------------------------------------------------------------------ non-finite steps

    def _skip(self, batch: StepBatch, error: FloatingPointError) -> SkippedStep:
        """Reports a step that was not applied.

        Raises:
            DivergedError: if the settings do not allow skipping it; all steps before it are saved.
        """
        step, cause = batch.step + 1, str(error)
        dump = dump_step(
            self.run.folder,
            batch,
            cause=cause,
            engine=self.engine,
            loader=self.loader,
            step=self.step,
            has_gradient=not isinstance(error, NonFiniteLossError),
        )
        skipped = [*self.run.skipped_steps, step]
        reason = reason_to_stop(self.settings.watch, skipped_steps=skipped)
        if reason is None:
            self.run.skipped_steps = skipped
            return SkippedStep(cause, str(dump))
        self._save_before_failure()
        raise DivergedError(
            f"step {step}: {cause}; the step was not applied, and the run stops because {reason}. "
            f"{dump} lists the samples and layers that caused it. The steps before it are saved: "
            "run the same command with other settings in `watch`, or fork the run with "
            "run.fork=true, or run.fork.step=<step of an earlier checkpoint>, and a lower "
            f"optimizer.learning_rate={self.settings.optimizer.learning_rate:g}"
        )

    def _save_before_failure(self) -> None:
        """Saves a checkpoint of the steps completed before an error that every rank raises."""
        self._finish_save()
        if self.run.num_steps_done not in (0, self.run.last_checkpoint):
            self._save(Request())
            self._finish_save()

    # ---------------------------------------------------------------------------- validation

    def _is_validation_due(self, step: int) -> bool:
        is_last = step == self.settings.last_step
        is_due = is_last or step % self.settings.validation.every_steps == 0
        return is_due and bool(self.validation_sets)

    def _is_validation_missing(self, step: int) -> bool:
        """Whether the previous attempt stopped during the validation after `step`."""
        if step == 0 or not self._is_validation_due(step):
            return False
        return not on_main_process(lambda: self.run.has_validation(step))

    def _validate(self, request: Request) -> Request:
        """Validates. If a request to stop interrupts it, the next attempt validates instead.

        Returns:
            The newest request.
        """

        def should_abort() -> bool:
            nonlocal request
            self.session.heartbeat()
            if not request.stops:
                request = self._poll_requests()
            return request.stops

        if request.stops:
            self.lacks_validation = True
            return request
        with self.timer.phase("validation"):
            metrics = {"validation": self._validation_metrics(should_abort)}
            if self.settings.validation.ema and metrics["validation"] is not None:
                with self.engine.averaged_weights():
                    metrics["validation_ema"] = self._validation_metrics(should_abort)
        if None in metrics.values():
            self.lacks_validation = True
            return request
        self.reporter.report_validation(metrics)
        return request

    def _validation_metrics(
        self, should_abort: Callable[[], bool]
    ) -> dict[str, dict[str, float]] | None:
        """Metrics of all sets with the engine's current weights; None if a request aborts them."""
        metrics = {}
        for each in self.validation_sets:
            current = each.after(self.run.num_steps_done)
            found = validate(self.engine, current, should_abort)
            if found is None:
                return None
            metrics |= found
        return metrics

    def _is_row_due(self, step: int, request: Request) -> bool:
        """Whether to write metrics: on schedule, and before anything that may end the attempt, so
        that no later attempt has to report this step."""
        is_planned = step % self.settings.run.log_every_steps == 0
        return is_planned or self._is_validation_due(step) or self._is_save_due(step, request)

    # --------------------------------------------------------------------------- checkpoints

    def _is_save_due(self, step: int, request: Request) -> bool:
        is_planned = step % self.settings.run.checkpoint_every_steps == 0
        is_last = step == self.settings.last_step
        return is_planned or is_last or request.saves or request.stops

    def _save(self, request: Request) -> None:
        self.session.heartbeat(is_slow=True)
        with self.timer.phase("save"):
            self.session.save(request, num_updates=self.engine.num_updates)
        self.reporter.log.saved()

    def _advance_save(self) -> None:
        with self.timer.phase("save"):
            reports = self.session.advance_save()
        self.reporter.report_saves(reports)

    def _finish_save(self) -> None:
        self.session.heartbeat(is_slow=True)
        self.reporter.report_saves(self.session.finish_save())
        self.session.refuse_failed_save()

    def _finish(self, request: Request) -> None:
        self._finish_save()
        if request.stops:
            is_done = self.run.num_steps_done >= self.settings.schedule.num_steps
            self.session.stop(request, is_finished=is_done and not self.lacks_validation)
        self.reporter.close()


def train_step(
    engine: Engine,
    step: TrainingStep,
    batch: StepBatch,
    *,
    learning_rate: float,
    timer: PhaseTimer,
) -> StepOutcome:
    """Takes one optimizer step.

    Raises:
        FloatingPointError: if loss or gradient is not finite; the step was not applied.
    """
    fail_point("step")
    engine.begin_step(batch.step)
    losses = step.backward(batch, timer)
    fail_point("update")
    with timer.phase("optimizer"):
        grad_norm = engine.step(learning_rate=learning_rate)
    return StepOutcome(losses, learning_rate, grad_norm, engine.learning_rates)
