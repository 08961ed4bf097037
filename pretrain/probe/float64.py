"""Computation in float64, which separates mixed samples from rounding.

In float64, features of samples encoded together and apart differ by rounding of about 1e-15. Any
larger difference has another cause.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ComputeInFloat64(TorchFunctionMode):
    """Replaces requests for float32 in library code, such as `.float()`, by float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args = [torch.float64 if each is torch.float32 else each for each in args]
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


class FindLowerPrecision(TorchDispatchMode):
    """Notes in `is_found` whether float64 values are converted to a floating type below it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_found = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        from_float64 = any(each.dtype == torch.float64 and each.numel() > 1 for each in inputs)
        if from_float64 and isinstance(output, Tensor) and output.is_floating_point():
            self.is_found |= output.dtype != torch.float64
        return output


def clear_function_caches(backbone: nn.Module) -> None:
    """Clears the caches of the functions in the modules that define a backbone's layers.

    A cached table that was computed in float64 would otherwise reach the run, as its key names
    float32.

    Args:
        backbone: backbone, or a copy of it, that computed in float64.
    """
    for name in {type(layer).__module__ for layer in backbone.modules()}:
        for value in list(vars(sys.modules[name]).values()):
            members = list(vars(value).values()) if isinstance(value, type) else [value]
            for function in members:
                for each in _with_closure(getattr(function, "__func__", function)):
                    if isinstance(each, functools._lru_cache_wrapper):
                        each.cache_clear()


def _with_closure(function: Any) -> Iterator[Any]:
    """A function and the values that it closes over, such as the function that it wraps."""
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
