"""One process beside each rank, in which threads fill a ring of buffers that both can see.

    training process                        loader process
    load(dataset, steps)  -- dataset, memory -->   cuts each step into chunks of rows
                          <-- step, slot ----      threads read, decode and tokenise a chunk each
    uses the slot         ---- slot is free -->    which is then filled with a later step

Decoders, resizing and file reads let go of Python's lock, so that threads use as many cores as
processes would, and no batch is ever copied between processes.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
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
from multiprocessing.reduction import recv_handle, send_handle
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.config_file import InputError, RunError
from pretrain.config import Loading, PairingName
from pretrain.fetching_ahead import Progress, fetching_ahead
from pretrain.pair_batch import PairBuffers, StepBatch, row_chunks, step_buffers, step_bytes
from pretrain.pair_loader import StepDataset
from pretrain.sample_order import StepSamples
from pretrain.shard_reader import BadSample

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


# ---------------------------------------------------------------------------- training process


class LoaderProcess:
    """Starts the process at once, so that it holds no thread, connection or GPU of this one.

    Args:
        loading: settings.
    """

    def __init__(self, loading: Loading) -> None:
        self.num_threads = loading.num_workers
        self.num_slots = loading.batches_ahead + 1  # one is in use
        context = multiprocessing.get_context("fork")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other_end, os.getpid()), name="isopair-loader"
        )
        self._process.start()
        other_end.close()

    def load(
        self, dataset: StepDataset, *, first_step: int, last_step: int, is_pinned: bool
    ) -> Iterator[StepBatch]:
        """The steps in order; each one's tensors hold until the next is asked for.

        To be called once.

        Args:
            dataset: of this rank.
            first_step: the first that is wanted.
            last_step: the first that is not.
            is_pinned: let a GPU copy from the buffers by itself.

        Raises:
            InputError, OSError: as StepDataset.load.
            RunError: the process died.
        """
        layouts = dataset.layouts
        slot_bytes = max(1, step_bytes(layouts))
        descriptor = os.memfd_create("isopair-batches")
        os.ftruncate(descriptor, slot_bytes * self.num_slots)
        self._send((dataset, first_step, last_step, self.num_threads, self.num_slots))
        send_handle(self._pipe, descriptor, self._process.pid)
        memory = _map(descriptor, slot_bytes * self.num_slots)
        if is_pinned:
            _pin(memory)
        slots = [step_buffers(part, layouts) for part in memory.view(self.num_slots, slot_bytes)]
        arrived: dict[int, StepMessage] = {}
        for step in range(first_step, last_step):
            while step not in arrived:
                message = self._receive()
                arrived[message.step] = message
            message = arrived.pop(step)
            if message.error is not None:
                raise message.error
            yield _batch(dataset, message, slots[message.slot])
            self._send(message.slot)

    def _send(self, value: Any) -> None:
        try:
            self._pipe.send(value)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def _receive(self) -> StepMessage:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None

    def _death(self) -> RunError:
        self._process.join()
        code = self._process.exitcode
        cause = signal.Signals(-code).name if code and code < 0 else f"status {code}"
        return RunError(
            f"the loader process of this rank ended with {cause}; SIGKILL mostly means that "
            "memory ran out: lower loading.batches_ahead; nothing is lost, start again"
        )

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _batch(
    dataset: StepDataset, message: StepMessage, buffers: dict[PairingName, PairBuffers]
) -> StepBatch:
    return StepBatch(
        message.step,
        {
            name: buffers[name].first(message.num_rows[name]).to_batch(**vars(rows))
            for name, rows in message.rows.items()
        },
        dataset.choice.pairings_of_step(message.step),
    )


def _map(descriptor: int, num_bytes: int) -> Tensor:
    """uint8 [bytes] of shared memory, whose descriptor is closed."""
    memory = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pin(memory: Tensor) -> None:
    """Lets the GPU copy from memory that torch has not allocated."""
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        raise RunError(
            f"cannot pin {memory.numel() / 1e9:.2f} GB of loader memory (CUDA error {status}); "
            "lower loading.batches_ahead, or raise the limit of locked memory (ulimit -l)"
        )


# ------------------------------------------------------------------------------ loader process


def _serve(pipe: Connection, parent: int) -> None:
    """The process's life: waits for what to load, and loads it."""
    _live_and_die_with(parent)
    torch.set_num_threads(1)  # before threads are made, which take it over
    try:
        dataset, first_step, last_step, num_threads, num_slots = pipe.recv()
        slot_bytes = max(1, step_bytes(dataset.layouts))
        memory = _map(recv_handle(pipe), slot_bytes * num_slots)
        slots = [step_buffers(part, dataset.layouts) for part in memory.view(num_slots, slot_bytes)]
        try:
            with fetching_ahead(dataset, first_step=first_step) as progress:
                threads = _LoaderThreads(dataset, pipe, slots, num_threads, progress)
                threads.run(first_step, last_step)
        except (InputError, OSError) as error:
            pipe.send(StepMessage(first_step, 0, {}, {}, _for_another_process(error)))
    except (EOFError, ConnectionError):
        pass  # the training process has gone


def _live_and_die_with(parent: int) -> None:
    """Signals of a scheduler or keyboard are for the training process to act on; when that ends, in
    whatever way, so does this one."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
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
        dataset: StepDataset,
        pipe: Connection,
        slots: list[dict[PairingName, PairBuffers]],
        num_threads: int,
        progress: Progress,
    ) -> None:
        self.dataset = dataset
        self.pipe = pipe
        self.slots = slots
        self.num_threads = num_threads
        self.progress = progress
        self._under_way: set[int] = set()  # steps
        self._chunks: queue.SimpleQueue[tuple[_StepTask, PairingName, range]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the pipe's sending end and the tasks' fields

    def run(self, first_step: int, last_step: int) -> None:
        """Fills the steps, and stays until the training process ends this one."""
        for number in range(self.num_threads):
            threading.Thread(target=self._work, name=f"loader-{number}", daemon=True).start()
        free_slots = list(range(len(self.slots)))
        for step in range(first_step, last_step):
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
        for name, reader in self.dataset.pairings.items():
            samples[name] = reader.samples_of_step(step, lanes=self.dataset.lanes)
            rows[name] = PairingRows(reader.digest(samples[name]))
        task = _StepTask(step, slot, samples, self.slots[slot], rows)
        chunks = [
            (task, name, chunk)
            for name in samples
            for chunk in row_chunks(
                len(samples[name]), num_workers=self.num_threads, largest=LARGEST_CHUNK
            )
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
                    reader = self.dataset.pairings[name]
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


def _for_another_process(error: Exception) -> Exception:
    """An error as it is where another process can build it; else its traceback in a RunError."""
    if isinstance(error, InputError | OSError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return type(error)(str(error)) if isinstance(error, InputError) else OSError(str(error))
        return error
    return RunError(f"the loader failed:\n{''.join(traceback.format_exception(error))}")
