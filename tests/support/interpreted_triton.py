"""Triton's interpreter, for tests on the CPU: kernels run in numpy, one program after the other.

Importing this module turns it on for the whole process: only processes that a test starts may do so
(see in_processes of their tests), before Triton is imported.
"""

import os
import sys

assert "triton.language" not in sys.modules, "Triton was imported before its interpreter was chosen"
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_dot = interpreter.InterpreterBuilder.create_dot


def _in_float32(handle):
    """bfloat16, which the interpreter keeps as uint16 and would multiply as such; others as is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def create_dot(self, left, right, total, *rest):
    """As a tensor core does it: exact products, summed in the total's type."""
    return _dot(self, _in_float32(left), _in_float32(right), total, *rest)


interpreter.InterpreterBuilder.create_dot = create_dot
