import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pretrain.loss.feature_tiles import BLOCKS
from pretrain.loss.kernels import compute_sigmoid, observe_softmax, write_coefficients
from pretrain.loss.logit_kernels import fold

# Kernels are compiled for an H100 or H200 without one and inspected, but not run.
HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LARGEST_SHARED_BYTES = 99 * 1024  # limit of a program on compute capability 8.6 and above
INTEGERS = ("num_rows", "num_columns", "own_shift", "num_row_blocks", "num_column_blocks")
NUMBERS = ("scale", "bias", "tolerance")
FLOAT64 = ("own_gradient", "row_totals", "column_totals", "shift")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def type_of(name, features):
    """Returns Triton's name of the type that fused.py passes for an argument."""
    if name in ("media", "text", "gradient"):
        return features
    if name in INTEGERS:
        return "i32"
    if name in NUMBERS:
        return "fp32"
    if name.endswith(("codes", "ties")):
        return "*i32"
    if name.endswith("beaten"):
        return "*u8"
    return "*fp64" if name in FLOAT64 else "*fp32"


def compiled(kernel, constants, *, features="*bf16", is_aligned=True, **options):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(constants, "constexpr")
    signature |= {name: type_of(name, features) for name in names}
    aligned = [kernel.arg_names.index(name) for name in names if signature[name] != "fp32"]
    hints = {(place,): [["tt.divisibility", 16]] for place in aligned} if is_aligned else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=HOPPER, options=options)


def spilled_bytes(kernel, tmp_path):
    """Returns the stack and local memory that a kernel uses per thread."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", path]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(size) for size in re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage).groups()]


def block_kernels(width, dtype=torch.bfloat16):
    """Yields (kernel, constants, options) of each kernel with all of its outputs enabled."""
    options = BLOCKS[dtype].launch_options()
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    for kernel, settings in (
        (observe_softmax, {"IS_PLAIN": False}),
        (write_coefficients, {"IS_PLAIN": False, "COUNTS": True}),
        (compute_sigmoid, {"WRITES": True, "COUNTS": True}),
    ):
        yield kernel, {"WIDTH": width, **options, **settings}, launch


@pytest.mark.parametrize("width", [512, 768, 1024])
def test_kernels_compile_for_tensor_cores_without_spilling_registers(width, tmp_path):
    for kernel, constants, options in block_kernels(width):
        made = compiled(kernel, constants, **options)
        assert spilled_bytes(made, tmp_path) == [0, 0], kernel.__name__
        assert made.metadata.shared <= LARGEST_SHARED_BYTES
        assert "wgmma.mma_async" in made.asm["ptx"]
        assert "mma.sync" not in made.asm["ptx"]


def test_float32_is_not_multiplied_by_tensor_cores():
    kernel, constants, options = next(block_kernels(512, torch.float32))
    made = compiled(kernel, constants, features="*fp32", **options)
    assert "tf32" not in made.asm["ptx"]
    assert "mma" not in made.asm["ptx"]


# Outputs that are not written are passed as None.
NOT_WRITTEN = {
    "observe_softmax": {"IS_PLAIN": True},
    "write_coefficients": {"COUNTS": False, "totals": None},
    "compute_sigmoid": {"WRITES": False, "gradient": None},
}


def test_kernels_compile_for_a_single_pair_of_odd_width():
    for kernel, constants, options in block_kernels(101):
        constants = constants | {
            "num_rows": 1,
            "num_columns": 1,
        }  # a launch makes the number 1 a constant
        constants |= NOT_WRITTEN[kernel.__name__]
        compiled(kernel, constants, is_aligned=False, **options)


def test_the_sigmoid_kernel_compiles_for_rows_of_other_ranks():
    *_, (kernel, constants, options) = block_kernels(512)
    none = dict.fromkeys(("totals", "row_codes", "column_codes"))
    compiled(kernel, constants | none | {"COUNTS": False}, **options)


def test_partial_figures_are_folded_in_float64(tmp_path):
    sums = {"HAS_SUMS": True, "IS_PLAIN": False, "BLOCK": 128}
    made = compiled(fold, sums | {"num_row_blocks": 1}, num_warps=4)
    assert spilled_bytes(made, tmp_path) == [0, 0]
    assert "add.f64" in made.asm["ptx"] or "add.rn.f64" in made.asm["ptx"]
    names = ("row_sums", "column_sums", "row_totals", "column_totals", "shift")
    none = dict.fromkeys(names)
    compiled(fold, none | {"HAS_SUMS": False, "IS_PLAIN": True, "BLOCK": 128}, num_warps=4)
