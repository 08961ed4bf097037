"""FLOPs and live memory of a forward and backward pass over fake tensors, per sample.

A multiply-add counts as two FLOPs, as in torch.utils.flop_counter, whose formulas are used. Two of
them are replaced. That of the backward of grouped convolutions ignores the groups, and that of the
backward of attention includes recomputation inside its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from data_prep.errors import InputError
from pretrain.fakes.fake_tensors import CPU
from pretrain.model.contrastive_model import EncoderInputs
from pretrain.planning.planned_model import Layouts, PlannedModel
from pretrain.settings.data import StreamName
from pretrain.training.activation_memory import MEASURED_ROWS, AllocationTrace, untouched

aten = torch.ops.aten


def _convolution_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, *args: Any, out_val: Any = None, **_: Any
) -> int:
    """FLOPs of the forward pass for each of the gradients of inputs and weights."""
    is_transposed, output_mask = args[4], args[-1]
    positions = inputs if is_transposed else gradient
    forward = 2 * positions.numel() * math.prod(weight.shape[1:])
    return forward * sum(output_mask[:2])


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **_: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **_: Any
) -> int:
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


_FORMULAS: Mapping[Any, Callable[..., int]] = dict(flop_registry) | {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class PassTrace(AllocationTrace):
    """Traces memory and counts FLOPs of operators on fakes, in all threads of autograd."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__(CPU, known)
        self.flops = 0

    def __torch_dispatch__(
        self,
        operator: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operator, records its results and counts its FLOPs; called by torch."""
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        formula = _FORMULAS.get(getattr(operator, "overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _is_counted(self, tensor: Tensor) -> bool:
        return True  # all fakes are on one device; asking one for it is slow


# Functions that a GPU's autocast computes in float32, and a CPU's in the type of their input.
_IN_FLOAT32_ON_GPUS = ("layer_norm", "group_norm", "softmax", "log_softmax")


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch.nn.functional as a GPU's autocast runs it"""

    def converted(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_autocast = torch.is_autocast_enabled("cpu")
        return function(values.float() if is_autocast else values, *args, **kwargs)

    return converted


@dataclass(frozen=True)
class LiveBytes:
    """Live bytes after each allocation of a pass, linear in the number of rows."""

    fixed: np.ndarray  # [allocations]
    per_row: np.ndarray  # [allocations]

    def peak(self, num_rows: int) -> int:
        """Returns the largest number of live bytes."""
        return math.ceil((self.fixed + self.per_row * num_rows).max())


@dataclass(frozen=True)
class StreamPass:
    """A pass over the samples of one stream; FLOPs are per sample.

    Attributes:
        forward_flops: FLOPs of the towers and projections.
        backward_flops: FLOPs of the gradients, and of recomputed activations.
        graph: live bytes without gradients of parameters.
        whole: live bytes with the gradients of parameters, which begin as none.
        kept: live bytes between forward and backward.
    """

    forward_flops: float
    backward_flops: float
    graph: LiveBytes
    whole: LiveBytes
    kept: LiveBytes

    def peak(self, num_rows: int) -> tuple[int, int]:
        """Returns (activations, gradients) at the peak of a backward whose gradients are new."""
        number = int((self.whole.fixed + self.whole.per_row * num_rows).argmax())
        graph, whole = (
            math.ceil(each.fixed[number] + each.per_row[number] * num_rows)
            for each in (self.graph, self.whole)
        )
        return graph, whole - graph


@dataclass(frozen=True)
class _Trace:
    graph: np.ndarray
    whole: np.ndarray
    kept: np.ndarray  # [1]
    forward_flops: int
    backward_flops: int
    used: set[str]  # names of parameters with a gradient


def measure_passes(
    planned: PlannedModel, layouts: Layouts, *, is_bf16: bool, is_gpu: bool
) -> tuple[dict[StreamName, StreamPass], set[str]]:
    """Measures a pass over each stream.

    Args:
        planned: model of fake tensors.
        layouts: layout of the rows of each stream.
        is_bf16: whether towers run under bf16 autocast.
        is_gpu: whether the autocast is that of GPUs.

    Returns:
        (passes, names of the parameters that got a gradient)

    Raises:
        InputError: if the number of allocations depends on the number of samples.
    """
    passes, used = {}, set()
    with running(planned, is_bf16=is_bf16, is_gpu=is_gpu):
        for stream in layouts:
            few, more = (
                _trace(planned, planned.inputs(layouts, stream, num_rows=rows), is_bf16=is_bf16)
                for rows in MEASURED_ROWS
            )
            passes[stream] = _per_row(stream, few, more)
            used |= more.used
    return passes, used


def _per_row(stream: StreamName, few: _Trace, more: _Trace) -> StreamPass:
    if len(few.graph) != len(more.graph):
        raise InputError(
            f"streams.{stream}: expected as many allocations for {MEASURED_ROWS[0]} as for "
            f"{MEASURED_ROWS[1]} samples, found {len(few.graph)} and {len(more.graph)}: the memory "
            "of its towers cannot be planned"
        )
    num_few, num_more = MEASURED_ROWS
    more_rows = num_more - num_few

    def linear(of_few: np.ndarray, of_more: np.ndarray) -> LiveBytes:
        per_row = (of_more - of_few) / more_rows
        return LiveBytes(of_few - num_few * per_row, per_row)

    return StreamPass(
        (more.forward_flops - few.forward_flops) / more_rows,
        (more.backward_flops - few.backward_flops) / more_rows,
        linear(few.graph, more.graph),
        linear(few.whole, more.whole),
        linear(few.kept, more.kept),
    )


def _trace(planned: PlannedModel, inputs: EncoderInputs, *, is_bf16: bool) -> _Trace:
    model = planned.model
    known = [part for each in inputs.values() for view in each.views.values() for part in view]
    trace = PassTrace([*model.parameters(), *model.buffers(), *known])
    with untouched(model, CPU):
        with trace:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                features = model([inputs])
            kept, forward_flops = trace.live_now(), trace.flops
            views = [view for each in features.views.values() for view in each.values()]
            parts = [*views, *features.scales.values(), *features.biases.values()]
            sum(part.float().sum() for part in parts).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return _Trace(
            trace.live_bytes(without=gradients.values()),
            trace.live_bytes(),
            np.array([kept]),
            forward_flops,
            trace.flops - forward_flops,
            set(gradients),
        )


@contextmanager
def running(planned: PlannedModel, *, is_bf16: bool, is_gpu: bool) -> Iterator[None]:
    """Returns a context in which the model runs on fakes.

    Args:
        planned: model of fake tensors.
        is_bf16: whether towers run under bf16 autocast.
        is_gpu: whether the autocast is that of GPUs.
    """
    with ExitStack() as contexts:
        contexts.enter_context(planned.fakes)
        for name in _IN_FLOAT32_ON_GPUS if is_bf16 and is_gpu else ():
            # Not a TorchFunctionMode: autograd leaves it where it recomputes activations.
            own = _in_float32(getattr(functional, name))
            contexts.enter_context(patch.object(functional, name, own))
        yield
