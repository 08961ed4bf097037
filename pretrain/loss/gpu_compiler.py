"""Functions that Inductor fuses into few kernels on a GPU, and that run as they are elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)  # multiplies bfloat16


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed, which compiles for this NVIDIA GPU, and the GPU knows bfloat16.

    Args:
        device: of type "cuda".
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def compiled_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a tensor and more, compiled at its first call with a tensor on a GPU.

    One compilation serves all sizes. Numbers that change from step to step must be given as
    tensors: others are compiled in.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def fitting(first: Tensor, *rest: Any, **settings: Any) -> Any:
        on_gpu = first.is_cuda and runs_triton(first.device)
        return (compiled() if on_gpu else function)(first, *rest, **settings)

    fitting.compiled = compiled
    return fitting
