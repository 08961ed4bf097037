"""Process groups for tests: a function runs in several processes joined by gloo on 127.0.0.1.

A fork server that has preloaded the slow imports starts a group in well under a second.
"""

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 600  # a busy machine with a slow disk takes minutes to start the fork server

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pretrain.train",
        "pretrain.distributed.zero",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "timm",
        "open_clip",
        "torch._dynamo",
    ]
)


class WorkerFailedError(AssertionError):
    """A process raised an error; the message contains its traceback."""


def run_in_processes(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
    without_imports: bool = False,
) -> list[Any]:
    """Runs `function(*arguments)` on each rank of a new process group.

    Args:
        without_imports: whether to spawn processes without preloaded imports, which is slow; used
            where Triton must not be imported before.

    Returns:
        [ranks] results.
    """
    group = ProcessGroup(world_size, function, *arguments, without_imports=without_imports)
    return group.results(timeout_seconds=timeout_seconds)


class ProcessGroup:
    """Running processes joined by gloo; see `run_in_processes`."""

    def __init__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *arguments: Any,
        without_imports: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn") if without_imports else _context
        os.environ["OMP_NUM_THREADS"] = "1"
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, world_size, port, sender, function, arguments)
            )
            process.start()
            sender.close()
            self.pipes.append(receiver)
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        """[ranks] process ids."""
        return [process.pid for process in self.processes]

    def outcomes(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[tuple[bool, Any]]:
        """Waits for all processes to end.

        Returns:
            [ranks] (whether the function returned, its result or the reason for the failure).
        """
        try:
            return [_receive(pipe, n, timeout_seconds) for n, pipe in enumerate(self.pipes)]
        finally:
            for process in self.processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()

    def results(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Any]:
        """Waits for the results.

        Returns:
            [ranks] results.

        Raises:
            WorkerFailedError: if the function raised an error on any rank.
        """
        outcomes = self.outcomes(timeout_seconds=timeout_seconds)
        failures = [result for is_done, result in outcomes if not is_done]
        if failures:
            raise WorkerFailedError(_cause(failures))
        return [result for _, result in outcomes]


def _receive(pipe: Any, rank: int, timeout_seconds: float) -> tuple[bool, Any]:
    """(whether the function returned, its result or the reason for the failure)"""
    if not pipe.poll(timeout_seconds):
        return False, f"rank {rank} gave no result within {timeout_seconds} s"
    try:
        is_done, result = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, f"rank {rank} exited without a traceback"
    return is_done, result if is_done else f"rank {rank}:\n{result}"


def _cause(failures: list[str]) -> str:
    """The first failure that is not a consequence of another process's end."""
    echoes = ("closed by peer", "gave no result", "Connection reset")
    first_hand = [text for text in failures if not any(echo in text for echo in echoes)]
    return (first_hand or failures)[0]


def _work(
    rank: int, world_size: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # Accelerate collects garbage, which would traverse all imported modules
    try:
        result = (True, function(*arguments))
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
