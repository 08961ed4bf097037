"""The inside of the loader process: threads that fill the steps of a ring of shared buffers.

A step is cut into chunks of rows. Each thread takes a chunk, reads and decodes its media in place,
tokenises its texts, and takes the next chunk, also of a later step. The main thread begins
steps, and tokenises with a slow tokenizer: its Python code would only block the threads.

When the last chunk of a step is done, a message tells the training process. That process sends back
the number of the step's slot as soon as it may be filled again.
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
from pretrain.data.batch import BadSample, StreamBuffers, step_buffers, step_bytes
from pretrain.data.step_loader import StepLoader
from pretrain.data.stream_reader import FilledRows
from pretrain.sampling.order import StepSamples
from pretrain.settings.data import StreamName
from pretrain.settings.segments import value_at

LARGEST_CHUNK = 32  # rows that a thread fills, and texts that are tokenised together
PR_SET_PDEATHSIG = 1  # option of Linux's prctl
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


# Number of steps done -> buffers from then on, in the same memory
SlotBuffers = dict[int, dict[StreamName, StreamBuffers]]


@dataclass
class StreamRows:
    """Everything about the rows of one stream except the rows themselves."""

    digest: np.ndarray
    bad_samples: list[BadSample] = field(default_factory=list)
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)


@dataclass(frozen=True)
class StepMessage:
    """Announces that a slot holds a step, or the error that prevents it."""

    step: int
    slot: int
    num_rows: dict[StreamName, int]
    rows: dict[StreamName, StreamRows]
    error: Exception | None = None


@dataclass(frozen=True)
class LoadRequest:
    """Steps that the training process asks for."""

    loader: StepLoader
    first_step: int
    last_step: int
    num_threads: int
    num_slots: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one step's buffers."""
        return max(1, step_bytes(self.loader.layouts))

    def map_slots(self, descriptor: int) -> tuple[Tensor, list[SlotBuffers]]:
        """Returns (uint8 [bytes] of shared memory, [slots] its buffers); closes the descriptor."""
        num_bytes = self.slot_bytes * self.num_slots
        memory = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        os.close(descriptor)
        parts = memory.view(self.num_slots, self.slot_bytes)
        layouts = {start: self.loader.layouts_at(start) for start in self.loader.changes}
        return memory, [
            {start: step_buffers(part, each) for start, each in layouts.items()} for part in parts
        ]


def serve(pipe: Connection, parent: int) -> None:
    """Runs the loader process: waits for a request, and loads its steps."""
    _live_and_die_with(parent)
    torch.set_num_threads(1)  # before threads are made, which inherit it
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
        pass  # the training process has ended


def ignore_signals() -> None:
    """Leaves the signals of a scheduler or keyboard to the training process."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _live_and_die_with(parent: int) -> None:
    """Ends this process when the training process ends, however that ends."""
    ignore_signals()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


@dataclass
class _StepTask:
    """A step whose rows are being filled."""

    step: int
    slot: int
    samples: dict[StreamName, StepSamples]
    buffers: dict[StreamName, StreamBuffers]
    rows: dict[StreamName, StreamRows]
    num_chunks_left: int = 0
    error: Exception | None = None

    def message(self) -> StepMessage:
        """Returns the step's message, once all rows are filled."""
        num_rows = {name: len(samples) for name, samples in self.samples.items()}
        for rows in self.rows.values():  # threads add them in any order
            rows.bad_samples.sort(key=attrgetter("source", "epoch", "ordinal"))
        return StepMessage(self.step, self.slot, num_rows, self.rows, self.error)


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring rows of one stream of a step."""

    task: _StepTask
    stream: StreamName
    rows: range


class _LoaderThreads:
    """The threads, and the queue of chunks that they fill."""

    def __init__(
        self,
        request: LoadRequest,
        pipe: Connection,
        slots: list[SlotBuffers],
        progress: Progress,
    ) -> None:
        self.loader = request.loader
        self.num_threads = request.num_threads
        self.pipe = pipe
        self.slots = slots
        self.progress = progress
        self._steps = iter(range(request.first_step, request.last_step))
        self._unfinished: set[int] = set()  # steps
        self._chunks: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        # Work of the main thread: a free slot, texts to tokenise, or the error that ends it.
        self._events: queue.SimpleQueue[int | tuple[_Chunk, FilledRows] | BaseException] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()  # for the pipe's sending end and the tasks' fields

    def run(self) -> None:
        """Fills the steps until the training process ends this one."""
        for number in range(self.num_threads):
            threading.Thread(target=self._work, name=f"loader-{number}", daemon=True).start()
        threading.Thread(target=self._receive, name="loader-slots", daemon=True).start()
        for slot in range(len(self.slots)):
            self._begin_next(slot)
        while True:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, int):
                self._begin_next(event)
            else:
                self._tokenise(*event)

    def _receive(self) -> None:
        """Passes free slots on to the main thread."""
        try:
            while True:
                self._events.put(self.pipe.recv())
        except BaseException as error:
            self._events.put(error)

    def _begin_next(self, slot: int) -> None:
        step = next(self._steps, None)
        if step is None:
            return
        try:
            with self._lock:
                self._unfinished.add(step)
                oldest = min(self._unfinished)
            self.progress.publish(oldest)
            self._begin(step, slot)
        except Exception as error:
            self._send(StepMessage(step, slot, {}, {}, _for_another_process(error)))

    def _begin(self, step: int, slot: int) -> None:
        samples, rows = {}, {}
        schedule = self.loader.schedule
        for name in self.loader.readers:
            samples[name] = schedule.samples_of_step(name, step, lanes=self.loader.lanes)
            rows[name] = StreamRows(schedule.digest(name, samples[name]))
        task = _StepTask(step, slot, samples, value_at(self.slots[slot], step), rows)
        chunks = [
            _Chunk(task, name, part)
            for name in samples
            for part in _row_chunks(len(samples[name]), num_threads=self.num_threads)
        ]
        task.num_chunks_left = len(chunks)
        for chunk in chunks:
            self._chunks.put(chunk)
        if not chunks:
            self._send(task.message())

    def _work(self) -> None:
        while True:
            chunk = self._chunks.get()
            filled = FilledRows()
            if chunk.task.error is None:
                reader = self.loader.readers_at(chunk.task.step)[chunk.stream]
                buffers = chunk.task.buffers[chunk.stream]
                try:
                    samples = chunk.task.samples[chunk.stream]
                    filled = reader.fill_rows(buffers, samples, chunk.rows)
                    if reader.is_slow:
                        self._events.put((chunk, filled))
                        continue
                    reader.fill_texts(buffers, filled, chunk.rows)
                except Exception as error:
                    self._fail(chunk.task, error)
            self._finish(chunk, filled)

    def _tokenise(self, chunk: _Chunk, filled: FilledRows) -> None:
        try:
            reader = self.loader.readers_at(chunk.task.step)[chunk.stream]
            reader.fill_texts(chunk.task.buffers[chunk.stream], filled, chunk.rows)
        except Exception as error:
            self._fail(chunk.task, error)
        self._finish(chunk, filled)

    def _fail(self, task: _StepTask, error: Exception) -> None:
        with self._lock:
            task.error = task.error or _for_another_process(error)

    def _finish(self, chunk: _Chunk, filled: FilledRows) -> None:
        task = chunk.task
        with self._lock:
            task.rows[chunk.stream].bad_samples.extend(filled.bad_samples)
            task.rows[chunk.stream].num_read.update(filled.num_read)
            task.num_chunks_left -= 1
            is_filled = task.num_chunks_left == 0
        if is_filled:
            self._send(task.message())

    def _send(self, message: StepMessage) -> None:
        with self._lock:
            self._unfinished.discard(message.step)
            self.pipe.send(message)


def _row_chunks(num_rows: int, *, num_threads: int) -> Iterator[range]:
    """Neighbouring rows for one thread at a time, small enough that all threads get some."""
    size = max(1, min(LARGEST_CHUNK, -(-num_rows // (2 * num_threads))))
    for start in range(0, num_rows, size):
        yield range(start, min(start + size, num_rows))


def _for_another_process(error: Exception) -> Exception:
    """The error where another process can unpickle it, else a RunError with its traceback."""
    if isinstance(error, InputError | OSError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return type(error)(str(error)) if isinstance(error, InputError) else OSError(str(error))
        return error
    return RunError(f"the loader failed:\n{''.join(traceback.format_exception(error))}")
