"""State of one attempt that the training loop uses: folder, requests, checkpoints, hang watch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch

from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.writer import CheckpointWriter, SaveReport
from pretrain.distributed.collectives import on_main_process
from pretrain.monitoring.hang_watch import HangWatch
from pretrain.run.attempts import LostPeerError
from pretrain.run.folder import RunFolder
from pretrain.run.requests import Request, RunRequests


class RunSession:
    """An attempt; its `with` block records the end and is watched for hangs.

    Every rank must make every call, except `heartbeat`.

    Args:
        run: run folder.
        requests: signals and files that request a checkpoint or a stop.
        hang_watch: watchdog of this rank, not yet entered.
        hosts: [ranks] machine names.
    """

    def __init__(
        self,
        run: RunFolder,
        requests: RunRequests,
        hang_watch: HangWatch,
        *,
        hosts: Sequence[str],
    ) -> None:
        self.run = run
        self.requests = requests
        self.hang_watch = hang_watch
        self.hosts = hosts
        self.writer: CheckpointWriter | None = None  # set once the engine is built
        self._block = ExitStack()
        requests.is_superseded = run.is_superseded

    def __enter__(self) -> RunSession:
        with ExitStack() as entered:
            entered.enter_context(self.run.recorded())
            entered.enter_context(self.hang_watch)
            self._block = entered.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._block.__exit__(kind, error, traceback)

    def heartbeat(self, *, is_slow: bool = False) -> None:
        """Restarts the hang watch's clock at the end of a step or similarly long work.

        Args:
            is_slow: whether the next work may take as long as a start-up.
        """
        self.hang_watch.heartbeat(is_slow=is_slow)

    def poll_requests(self, *, device: torch.device) -> Request:
        """Returns the requests that any rank received.

        Args:
            device: device of the exchange among ranks.

        Raises:
            SupersededError: if a newer attempt has begun.
        """
        request = self.requests.all_reduce(device=device)
        if request.is_superseded:
            raise self.run.superseded_error()
        return request

    def lost_peer_error(self, error: RuntimeError) -> LostPeerError:
        """Returns the error to raise when a collective failed because a process was lost."""
        return LostPeerError(
            f"step {self.run.num_steps_done + 1}: another process died, or did not respond within "
            f"{self.hang_watch.timeout_key}: {error}; python -m pretrain.status shows the cause, "
            f"if it is known, and {self.hang_watch.path.parent} the stacks of hanging processes; "
            "run the same command again to resume from the newest checkpoint"
        )

    # --------------------------------------------------------------------------- checkpoints

    def save(self, request: Request, *, num_updates: int) -> None:
        """Starts a checkpoint of the run's current state.

        Args:
            request: request that this checkpoint satisfies.
            num_updates: number of updates that the optimizer has applied.

        Raises:
            RunError: if too many consecutive checkpoints could not be written.
        """
        on_main_process(self.run.flush)
        self.writer.save(
            RunState(
                self.run.num_steps_done,
                num_updates=num_updates,
                skipped_steps=tuple(self.run.skipped_steps),
                tags=tuple(self.run.tags),
            )
        )
        self.requests.acknowledge(request)

    def advance_save(self) -> list[SaveReport]:
        """Advances a checkpoint as far as possible without waiting.

        Returns:
            Reports on the checkpoints committed since the last call.
        """
        self.writer.advance()
        return self.writer.take_reports()

    def finish_save(self) -> list[SaveReport]:
        """Waits until the pending checkpoint is committed or has failed.

        Returns:
            Reports on the checkpoints committed since the last call.
        """
        self.writer.finish()
        return self.writer.take_reports()

    def refuse_failed_save(self) -> None:
        """Checks that the last checkpoint was written.

        Raises:
            RunError: if the last checkpoint could not be written.
        """
        self.writer.refuse_failure()

    def stop(self, request: Request, *, is_finished: bool) -> None:
        """Deletes a request to stop and records it as the cause unless the run is finished."""
        self.requests.acknowledge(request)
        if not is_finished:
            self.run.stop_cause = request.stop_cause
