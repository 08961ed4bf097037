"""The training loop of one attempt: batches in, steps, metrics, validations and checkpoints out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import PretrainConfig
from pretrain.data.batch import StepBatch
from pretrain.data.step_loader import StepLoader
from pretrain.distributed.collectives import is_of_lost_peer, on_main_process, set_timeout
from pretrain.distributed.engine import Engine
from pretrain.moments import moment
from pretrain.monitoring.anomalies import StepWatch, reason_to_stop
from pretrain.monitoring.bad_samples import BadSampleLedger
from pretrain.monitoring.epoch_audit import EpochAudit
from pretrain.monitoring.hang_watch import HangWatch
from pretrain.monitoring.non_finite import dump_step
from pretrain.monitoring.timing import PhaseTimer
from pretrain.run.attempts import DivergedError, LostPeerError, read_metrics
from pretrain.run.folder import RunFolder
from pretrain.run.requests import Request, RunRequests
from pretrain.training.gradient_cache import micro_batches_of_step
from pretrain.training.metrics import SkippedStep, StepOutcome, StepReporter, digest_of_step
from pretrain.training.optimizer import learning_rate_at
from pretrain.training.step_loss import NonFiniteLossError, StepLosses
from pretrain.training.validation import ValidationSet, validate


def last_step_of(config: PretrainConfig) -> int:
    """Steps done when an attempt ends."""
    return min(config.schedule.num_steps, config.run.stop_after_step or sys.maxsize)


class Trainer:
    """Takes the steps that are left of a run; every rank must make every call.

    Args:
        config: the whole config.
        engine: holds the model, as the run's newest checkpoint left it.
        loader: reader of this rank's rows.
        run: the run folder, which knows how many steps are done.
        requests: what the run is asked to do meanwhile.
        writer: of checkpoints.
        hang_watch: is told of every step's end.
        take_gradient: adds the gradient of a step's loss.
        num_micro_batches: micro-batches of a step.
        validation_sets: held-out pairs.
        hosts: [ranks] names of their machines.
    """

    def __init__(
        self,
        config: PretrainConfig,
        engine: Engine,
        loader: StepLoader,
        run: RunFolder,
        requests: RunRequests,
        writer: CheckpointWriter,
        hang_watch: HangWatch,
        *,
        take_gradient: Callable[..., StepLosses],
        num_micro_batches: int,
        validation_sets: Sequence[ValidationSet],
        hosts: Sequence[str],
    ) -> None:
        self.config = config
        self.engine = engine
        self.loader = loader
        self.run = run
        self.requests = requests
        self.writer = writer
        self.hang_watch = hang_watch
        self.take_gradient = take_gradient
        self.num_micro_batches = num_micro_batches
        self.validation_sets = validation_sets
        self.timer = PhaseTimer(engine.device)
        rows = read_metrics(run.folder) if run.is_writer else []
        self.reporter = StepReporter(
            run,
            config.run,
            engine,
            loader.schedule,
            timer=self.timer,
            watch=StepWatch(config.watch, rows=rows[-config.watch.window_steps :]),
            hosts=hosts,
        )
        self.ledger = BadSampleLedger(run, loader, loading=config.loading)
        self.epoch_audit = EpochAudit(loader.schedule, self.ledger, first_step=run.num_steps_done)
        self.lacks_validation = False  # one was due, and given up

    def train(self, batches: Iterator[StepBatch]) -> None:
        """Takes the steps; returns after the last one, or when asked to stop.

        Args:
            batches: this rank's share of each, on the device.

        Raises:
            RunError: the run cannot go on; among others SupersededError.
        """
        try:
            self._train(batches)
        except RuntimeError as error:
            if not is_of_lost_peer(error):
                raise
            raise LostPeerError(
                f"step {self.run.num_steps_done + 1}: another process died, or did not come within "
                f"{self.hang_watch.timeout_key}: {error}; python -m pretrain.status says why, as "
                f"far as it is known, and {self.hang_watch.path.parent} where it hung; run the "
                "same command again to go on from the newest checkpoint"
            ) from error

    def _train(self, batches: Iterator[StepBatch]) -> None:
        first_step, last_step = self.run.num_steps_done, last_step_of(self.config)
        self.engine.train_mode(True)
        request = self._poll_requests()  # on what was asked for during the start
        if self._is_validation_missing(first_step):
            request = self._validate(request)
        for step in range(first_step + 1, last_step + 1):
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
            self.hang_watch.heartbeat()
            if step == first_step + 1:
                set_timeout(self.config.engine.timeout_seconds)
        self._finish(request)

    def save_first(self) -> None:
        """Saves what was loaded from another run, before anything is done with it."""
        self._save(Request())
        self._finish_save()

    def _warm_up_ddp(self, batch: StepBatch) -> None:
        """Takes a gradient for nothing, so that the first step of every attempt sums like the steps
        that follow on it, and a resumed run is the undisturbed one bit by bit."""
        with suppress(FloatingPointError):  # the step itself will raise it again
            self.take_gradient(batch)
        self.engine.drop_gradients()

    def _take_step(self, batch: StepBatch) -> StepOutcome | SkippedStep:
        try:
            outcome = train_step(self.config, self.engine, batch, self.timer, self.take_gradient)
        except FloatingPointError as error:  # on every rank alike
            outcome = self._skip(batch, error)
        self.run.num_steps_done = batch.step + 1
        self.ledger.enter(batch, device=self.engine.device)
        self.reporter.report_epochs(self.epoch_audit.enter(batch, device=self.engine.device))
        self.reporter.advance()
        return outcome

    def _poll_requests(self) -> Request:
        """
        Raises:
            SupersededError: a newer attempt has begun.
        """
        request = self.requests.all_reduce(device=self.engine.device)
        if request.is_superseded:
            raise self.run.superseded_error()
        return request

    # --------------------------------------------------------------------- what is not finite

    def _skip(self, batch: StepBatch, error: FloatingPointError) -> SkippedStep:
        """Writes down what is known of a step that was not applied.

        Raises:
            DivergedError: the run is to stop at such a step, or there were too many; all up to it
                is saved.
        """
        step, cause = batch.step + 1, str(error)
        has_gradient = not isinstance(error, NonFiniteLossError)
        dump = dump_step(
            self.run.folder,
            batch,
            cause=cause,
            engine=self.engine,
            loader=self.loader,
            micro_batches=micro_batches_of_step(
                self.engine, batch, num_micro_batches=self.num_micro_batches
            ),
            take_gradient=(lambda: self.take_gradient(batch)) if has_gradient else None,
        )
        skipped = [*self.run.skipped_steps, step]
        reason = reason_to_stop(self.config.watch, skipped_steps=skipped)
        if reason is None:
            self.run.skipped_steps = skipped
            return SkippedStep(cause, str(dump))
        self._save_before_failure()
        raise DivergedError(
            f"step {step}: {cause}; the step was not applied, and the run stops because {reason}. "
            f"{dump} says which samples and layers it came from. All before it is saved: run the "
            "same command with other settings of watch, or begin a run of its own from there with "
            "run.fork=true and a lower "
            f"optimizer.learning_rate={self.config.optimizer.learning_rate:g}"
        )

    def _save_before_failure(self) -> None:
        """Saves the steps before one that all ranks fail at."""
        self._finish_save()
        if self.run.num_steps_done not in (0, self.run.last_checkpoint):
            self._save(Request())
            self._finish_save()

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
            self.hang_watch.heartbeat()
            if not request.stops:
                request = self._poll_requests()
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
        self.hang_watch.heartbeat(is_slow=True)
        with self.timer.phase("save"):
            on_main_process(self.run.flush)
            self.writer.save(self._state())
        self.requests.acknowledge(request)
        self.reporter.log.saved()

    def _state(self) -> RunState:
        """Where the run stands."""
        return RunState(
            self.run.num_steps_done,
            num_updates=self.engine.num_updates,
            skipped_steps=tuple(self.run.skipped_steps),
            tags=tuple(self.run.tags),
        )

    def _advance_save(self) -> None:
        with self.timer.phase("save"):
            self.writer.advance()
        self.reporter.report_saves(self.writer.take_reports())

    def _finish_save(self) -> None:
        self.hang_watch.heartbeat(is_slow=True)
        self.writer.finish()
        self.reporter.report_saves(self.writer.take_reports())
        self.writer.refuse_failure()

    def _finish(self, request: Request) -> None:
        self._finish_save()
        if request.stops:
            self.requests.acknowledge(request)
            is_whole = self.run.num_steps_done >= self.config.schedule.num_steps
            if self.lacks_validation or not is_whole:
                self.run.stop_cause = request.stop_cause
        self.reporter.close()


def train_step(
    config: PretrainConfig,
    engine: Engine,
    batch: StepBatch,
    timer: PhaseTimer,
    take_gradient: Callable[..., StepLosses],
) -> StepOutcome:
    """One optimizer step.

    Raises:
        FloatingPointError: loss or gradient is not finite; the step was not applied.
    """
    moment("step")
    learning_rate = learning_rate_at(
        batch.step, peak=config.optimizer.learning_rate, schedule=config.schedule
    )
    losses = take_gradient(batch, timer=timer)
    moment("update")
    with timer.phase("optimizer"):
        grad_norm = engine.step(learning_rate=learning_rate)
    return StepOutcome(losses, learning_rate, grad_norm)
