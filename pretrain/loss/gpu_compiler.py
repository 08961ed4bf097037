"""Compilation on GPUs: Inductor fuses a function into few kernels; CPUs run it eagerly."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # lowest compute capability with bfloat16 products


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Returns whether Triton is installed and the GPU can run bfloat16 kernels.

    Args:
        device: device of type "cuda".
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def compiled_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function when it is first called with a tensor on a GPU as first argument.

    One compilation is used for all sizes. Numbers that change from step to step must be passed as
    tensors, because Python numbers are compiled in as constants.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def dispatch(first: Tensor, *rest: Any, **settings: Any) -> Any:
        on_gpu = first.is_cuda and runs_triton(first.device)
        return (compiled() if on_gpu else function)(first, *rest, **settings)

    dispatch.compiled = compiled
    return dispatch
