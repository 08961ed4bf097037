"""The loader process from the inside: threads that fill the steps of a ring of shared buffers.

A step is cut into chunks of rows; each thread takes a chunk, reads, decodes and tokenises it into
its place, and takes the next one, also of a later step. When the last chunk of a step is done, a
message tells the training process, which says when the step's slot may be filled again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import queue
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import (
    InputError,
    RunError,
)
from pretrain.cache.node import Progress, fetching_ahead
from pretrain.config import PairingName
from pretrain.data.batch import PairBuffers, step_buffers, step_bytes
from pretrain.data.pair_reader import BadSample
from pretrain.data.step_loader import StepLoader
from pretrain.sampling.order import StepSamples

LARGEST_CHUNK = 32  # rows that a thread fills, and captions that are tokenised together
PR_SET_PDEATHSIG = 1  # of Linux's prctl
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class PairingRows:
    """What filling the rows of one pairing brought besides the rows."""

    digest: np.ndarray
    bad_samples: list[BadSample] = field(default_factory=list)
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class StepMessage:
    """Says that a slot holds a step, or why it does not."""

    step: int
    slot: int
    num_rows: dict[PairingName, int]
    rows: dict[PairingName, PairingRows]
    error: Exception | None = None


@dataclass(frozen=True)
class LoadRequest:
    """What the training process asks for."""

    loader: StepLoader
    first_step: int
    last_step: int
    num_threads: int
    num_slots: int

    @property
    def slot_bytes(self) -> int:
        return max(1, step_bytes(self.loader.layouts))

    def map_slots(self, descriptor: int) -> tuple[Tensor, list[dict[PairingName, PairBuffers]]]:
        """(uint8 [bytes] of shared memory, [slots] its buffers); closes the descriptor."""
        num_bytes = self.slot_bytes * self.num_slots
        memory = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        os.close(descriptor)
        parts = memory.view(self.num_slots, self.slot_bytes)
        return memory, [step_buffers(part, self.loader.layouts) for part in parts]


def serve(pipe: Connection, parent: int) -> None:
    """The process's life: waits for what to load, and loads it."""
    _live_and_die_with(parent)
    torch.set_num_threads(1)  # before threads are made, which take it over
    try:
        request: LoadRequest = pipe.recv()
        _, slots = request.map_slots(recv_handle(pipe))
        try:
            with fetching_ahead(request.loader.node, first_step=request.first_step) as progress:
                _LoaderThreads(request, pipe, slots, progress).run()
        except (InputError, OSError) as error:
            message = _for_another_process(error)
            pipe.send(StepMessage(request.first_step, 0, {}, {}, message))
    except (EOFError, ConnectionError):
        pass  # the training process has gone


def ignore_signals() -> None:
    """Leaves what a scheduler or keyboard says to the training process."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _live_and_die_with(parent: int) -> None:
    """When the training process ends, in whatever way, so does this one."""
    ignore_signals()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


@dataclass
class _StepTask:
    """A step whose rows are being filled."""

    step: int
    slot: int
    samples: dict[PairingName, StepSamples]
    buffers: dict[PairingName, PairBuffers]
    rows: dict[PairingName, PairingRows]
    num_chunks_left: int = 0
    error: Exception | None = None

    def message(self) -> StepMessage:
        """To be called when all rows are filled."""
        num_rows = {name: len(samples) for name, samples in self.samples.items()}
        for rows in self.rows.values():  # which threads brought in any order
            rows.bad_samples.sort(key=attrgetter("source", "epoch", "ordinal"))
        return StepMessage(self.step, self.slot, num_rows, self.rows, self.error)


class _LoaderThreads:
    """The threads, and the row of chunks that they take their work from."""

    def __init__(
        self,
        request: LoadRequest,
        pipe: Connection,
        slots: list[dict[PairingName, PairBuffers]],
        progress: Progress,
    ) -> None:
        self.request = request
        self.loader = request.loader
        self.num_threads = request.num_threads
        self.pipe = pipe
        self.slots = slots
        self.progress = progress
        self._under_way: set[int] = set()  # steps
        self._chunks: queue.SimpleQueue[tuple[_StepTask, PairingName, range]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the pipe's sending end and the tasks' fields

    def run(self) -> None:
        """Fills the steps, and stays until the training process ends this one."""
        for number in range(self.num_threads):
            threading.Thread(target=self._work, name=f"loader-{number}", daemon=True).start()
        free_slots = list(range(len(self.slots)))
        for step in range(self.request.first_step, self.request.last_step):
            slot = free_slots.pop(0) if free_slots else self.pipe.recv()
            try:
                with self._lock:
                    self._under_way.add(step)
                    oldest = min(self._under_way)
                self.progress.publish(oldest)
                self._begin(step, slot)
            except Exception as error:
                self._send(StepMessage(step, slot, {}, {}, _for_another_process(error)))
        while True:
            self.pipe.recv()

    def _begin(self, step: int, slot: int) -> None:
        samples, rows = {}, {}
        schedule = self.loader.schedule
        for name in self.loader.readers:
            samples[name] = schedule.samples_of_step(name, step, lanes=self.loader.lanes)
            rows[name] = PairingRows(schedule.digest(name, samples[name]))
        task = _StepTask(step, slot, samples, self.slots[slot], rows)
        chunks = [
            (task, name, chunk)
            for name in samples
            for chunk in _row_chunks(len(samples[name]), num_threads=self.num_threads)
        ]
        task.num_chunks_left = len(chunks)
        for chunk in chunks:
            self._chunks.put(chunk)
        if not chunks:
            self._send(task.message())

    def _work(self) -> None:
        while True:
            task, name, chunk = self._chunks.get()
            bad_samples: list[BadSample] = []
            num_read: Counter[tuple[str, int]] = Counter()
            error = None
            if task.error is None:
                try:
                    reader = self.loader.readers[name]
                    filled = reader.fill(task.buffers[name], task.samples[name], chunk)
                    bad_samples, num_read = filled
                except Exception as raised:
                    error = _for_another_process(raised)
            with self._lock:
                task.rows[name].bad_samples.extend(bad_samples)
                task.rows[name].num_read.update(num_read)
                task.error = task.error or error
                task.num_chunks_left -= 1
                is_filled = task.num_chunks_left == 0
            if is_filled:
                self._send(task.message())

    def _send(self, message: StepMessage) -> None:
        with self._lock:
            self._under_way.discard(message.step)
            self.pipe.send(message)


def _row_chunks(num_rows: int, *, num_threads: int) -> Iterator[range]:
    """Neighbouring rows for one thread at a time, small enough that all threads have some."""
    size = max(1, min(LARGEST_CHUNK, -(-num_rows // (2 * num_threads))))
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))


def _for_another_process(error: Exception) -> Exception:
    """An error as it is where another process can build it; else its traceback in a RunError."""
    if isinstance(error, InputError | OSError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return type(error)(str(error)) if isinstance(error, InputError) else OSError(str(error))
        return error
    return RunError(f"the loader failed:\n{''.join(traceback.format_exception(error))}")
