"""Activation memory per pair, measured in a forward and backward pass.

All allocations are traced, once with two pairs and once with four. At each allocation of the pass,
the live bytes are a linear function of the number of pairs. Comparing only the peaks would not
suffice, because the peak may occur at another allocation for another number of pairs.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_prep.errors import InputError
from pretrain.data.batch import StepBatch, StreamBuffers, StreamLayout
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs
from pretrain.settings.data import StreamName
from pretrain.training.gradient_cache import split_into_micro_batches

# Numbers of pairs that are measured. Not 1, because kernels may treat a single row differently.
MEASURED_ROWS = (2, 4)


@dataclass(frozen=True)
class ActivationBytes:
    """Upper bound on activations: fixed + pairs * per_pair, without parameter gradients."""

    fixed: int  # for example bf16 copies of parameters
    per_pair: int


class AllocationTrace(TorchDispatchMode):
    """Traces the memory of every tensor that operators return, in all threads of autograd.

    Memory that an operator allocates and frees before it returns is not traced.

    Args:
        device: device whose tensors are counted.
        known: tensors that were allocated earlier and are not counted.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.device_type = device.type
        # References, so that ids stay unique.
        self._known = [tensor.untyped_storage() for tensor in known]
        # id of a live storage -> number of its allocation; -1 if it is not counted
        self._numbers = {id(storage): -1 for storage in self._known}
        self._changes: list[tuple[int, int]] = []  # (number of a storage, change in bytes)

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operator and records the storages of its results; called by torch."""
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._is_counted(leaf):
                self._record(leaf.untyped_storage())
        return result

    def _is_counted(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _record(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._numbers:
            return
        number, num_bytes = len(self._changes), storage.nbytes()
        self._numbers[id(storage)] = number
        self._changes.append((number, num_bytes))
        weakref.finalize(storage, self._record_freed, id(storage), number, num_bytes)

    def _record_freed(self, storage_id: int, number: int, num_bytes: int) -> None:
        del self._numbers[storage_id]
        self._changes.append((number, -num_bytes))

    def live_now(self) -> int:
        """Returns the bytes that are live at the moment."""
        return sum(change for _, change in self._changes)

    def live_bytes(self, *, without: Iterable[Tensor] = ()) -> np.ndarray:
        """Returns the live bytes after each allocation, int64 [allocations].

        Args:
            without: live tensors whose memory is not counted.
        """
        excluded = {self._numbers.get(id(tensor.untyped_storage())) for tensor in without}
        changes = np.array(self._changes, dtype=np.int64).reshape(-1, 2)
        sizes = np.where(np.isin(changes[:, 0], list(excluded)), 0, changes[:, 1])
        return np.cumsum(sizes)[changes[:, 1] >= 0]


def measure_activations(
    model: ContrastiveModel,
    layouts: Mapping[StreamName, StreamLayout],
    *,
    device: torch.device,
    is_bf16: bool,
) -> dict[StreamName, ActivationBytes]:
    """Measures the activations of every stream, with captions of full length.

    Parameters and the state of random number generators do not change, and gradients are cleared.
    No collective is called.

    Args:
        model: model, not yet wrapped by an engine; moved to the device, in training mode.
        layouts: shapes of the pairs.
        device: device to train on.
        is_bf16: whether to encode under bf16 autocast.

    Raises:
        InputError: if the number of allocations of a tower depends on the number of pairs.
    """
    model.to(device).train()
    few, more = MEASURED_ROWS
    measured = {}
    for name, layout in layouts.items():
        bytes_of_few, bytes_of_more = (
            _live_bytes(model, _inputs_of(name, layout, rows, device), is_bf16=is_bf16)
            for rows in MEASURED_ROWS
        )
        if len(bytes_of_few) != len(bytes_of_more):
            raise InputError(
                f"micro_batch_size auto: expected as many allocations for {more} as for {few} "
                f"pairs of {name}, found {len(bytes_of_more)} and {len(bytes_of_few)}: the memory "
                "of its towers cannot be estimated; set micro_batch_size to a number"
            )
        per_pair = (bytes_of_more - bytes_of_few) / (more - few)
        fixed = bytes_of_few - few * per_pair
        measured[name] = ActivationBytes(math.ceil(fixed.max()), math.ceil(per_pair.max()))
    return measured


def _inputs_of(
    name: StreamName, layout: StreamLayout, num_rows: int, device: torch.device
) -> EncoderInputs:
    """Pairs of ones, in the format of a step's inputs to the model."""
    buffers = StreamBuffers.new(layout, num_rows=num_rows)
    for view in buffers.views.values():
        for values in view.tensors.values():
            values.fill_(1)
    pairs = buffers.to_batch(
        first_slot=0, digest=np.zeros(2, np.int64), bad_samples=[], num_read=Counter()
    )
    batch = StepBatch(0, {name: pairs}, [name]).to(device)
    [micro_batch] = split_into_micro_batches(batch, num_micro_batches=1, trims_captions=False)
    return micro_batch


def _live_bytes(model: ContrastiveModel, inputs: EncoderInputs, *, is_bf16: bool) -> np.ndarray:
    """Live bytes of a pass, without parameter gradients, int64 [allocations]."""
    device = next(model.parameters()).device
    parts = [part for each in inputs.values() for view in each.views.values() for part in view]
    trace = AllocationTrace(device, [*model.parameters(), *model.buffers(), *parts])
    with untouched(model, device):
        with trace:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                features = model([inputs])
            views = [view for each in features.views.values() for view in each.values()]
            parts = [*views, *features.scales.values(), *features.biases.values()]
            sum(part.float().sum() for part in parts).backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        return trace.live_bytes(without=gradients)


@contextmanager
def untouched(model: ContrastiveModel, device: torch.device) -> Iterator[None]:
    """Returns a context that clears gradients and restores random number generators at its end.

    Garbage is not collected in it, so that all passes free their tensors in the same order.

    Args:
        model: model whose gradients are cleared.
        device: device of the model.
    """
    devices = [device] if device.type == "cuda" else []
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        if was_collecting:
            gc.enable()
