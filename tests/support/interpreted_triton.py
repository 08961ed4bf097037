"""Triton's interpreter for tests on the CPU: kernels run in numpy, one program after the other.

Importing this module enables the interpreter for the whole process. It must be imported before
Triton, and only in processes that a test starts (run_in_processes with without_imports).
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
    """Converts bfloat16, which the interpreter stores and would multiply as uint16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def create_dot(self, left, right, total, *rest):
    """Multiplies as a tensor core does: exact products, summed in the type of the total."""
    return _dot(self, _in_float32(left), _in_float32(right), total, *rest)


interpreter.InterpreterBuilder.create_dot = create_dot
