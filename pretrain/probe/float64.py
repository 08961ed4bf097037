"""Computation in float64, which separates mixed samples from rounding.

In float64, features of samples encoded together and apart differ by rounding of about 1e-15. Any
larger difference has another cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
