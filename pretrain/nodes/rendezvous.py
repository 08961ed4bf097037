"""Exchange of values among ranks through a key-value store hosted by rank 0.

Unlike a collective, it reveals which ranks are missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from data_prep.errors import RunError
from pretrain.run.attempts import machine_name


class Rendezvous:
    """A key-value store through which ranks send values to rank 0 and receive its answers.

    Args:
        environment: environment variables as set by torchrun.
        timeout_seconds: time limit of each wait for other ranks.

    Raises:
        RunError: if rank 0 cannot be reached.
    """

    def __init__(self, environment: Mapping[str, str], *, timeout_seconds: float) -> None:
        self.rank, self.world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.timeout_seconds = timeout_seconds
        has_server = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            server = dist.TCPStore(
                environment["MASTER_ADDR"],
                int(environment["MASTER_PORT"]),
                self.world_size,
                is_master=self.rank == 0 and not has_server,
                timeout=timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise RunError(
                f"rank {self.rank} on {machine_name()} cannot reach rank 0 at "
                f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}: {error}"
            ) from None
        self.store = dist.PrefixStore("preflight", server)

    def send(self, key: str, value: Any) -> None:
        """Sends a value to rank 0."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))

    def collect(self, key: str, *, seconds: float | None = None) -> list[Any]:
        """Returns on rank 0 the value that each rank sent: [ranks], None for late ranks.

        Args:
            seconds: time limit of the wait; None: `timeout_seconds`.
        """
        end = time.monotonic() + (self.timeout_seconds if seconds is None else seconds)
        return [
            self.receive(key, rank=rank, seconds=end - time.monotonic())
            for rank in range(self.world_size)
        ]

    def receive(self, key: str, *, rank: int, seconds: float = 0.0) -> Any:
        """Returns on rank 0 the value that one rank sent, or None after a time limit."""
        sent = self._wait(f"{key}/{rank}", seconds=seconds)
        return None if sent is None else json.loads(sent)

    def broadcast(self, key: str, value: Any) -> Any:
        """Returns rank 0's value on every rank.

        Raises:
            RunError: if rank 0 does not send it in time.
        """
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        # Rank 0 may itself wait up to timeout_seconds for other ranks first.
        received = self._wait(key, seconds=2 * self.timeout_seconds)
        if received is None:
            raise RunError(f"rank {self.rank}: rank 0 did not send {key!r} in time")
        return json.loads(received)

    def _wait(self, key: str, *, seconds: float) -> bytes | None:
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
        except dist.DistStoreError:
            return None
        return self.store.get(key)
