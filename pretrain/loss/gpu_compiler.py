"""Functions that Inductor fuses into few kernels on a GPU and that run eagerly elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # first compute capability that multiplies bfloat16


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Returns whether Triton is installed and a GPU can run its bfloat16 kernels.

    Args:
        device: of type "cuda".
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def compiled_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call whose first argument is a tensor on a GPU.

    One compilation serves all sizes. Numbers that change from step to step must be passed as
    tensors, because Python numbers are compiled in as constants.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def dispatch(first: Tensor, *rest: Any, **settings: Any) -> Any:
        on_gpu = first.is_cuda and runs_triton(first.device)
        return (compiled() if on_gpu else function)(first, *rest, **settings)

    dispatch.compiled = compiled
    return dispatch
