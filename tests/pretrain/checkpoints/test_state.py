import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoints.state import slices_to_write
from pretrain.distributed.tensor_slice import HeldSlice, TensorSlice


@given(
    sizes=st.lists(st.integers(0, 30), max_size=6),
    world_size=st.integers(1, 5),
    replicated=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_every_element_is_written_by_exactly_one_rank(sizes, world_size, replicated):
    tensors = [torch.arange(size, dtype=torch.float32) for size in sizes]
    written = [torch.zeros(size) for size in sizes]
    shares = []
    for rank in range(world_size):
        held = []
        for number, whole in enumerate(tensors):
            first, stop = 0, len(whole)
            if not replicated[number]:
                first, stop = (len(whole) * each // world_size for each in (rank, rank + 1))
            values = whole[first:stop]
            part = TensorSlice(f"m/{number}", first, len(values))
            held.append(HeldSlice(part, values, is_replicated=replicated[number]))
        share = list(slices_to_write(held, rank=rank, world_size=world_size))
        shares.append(sum(len(each.values) for each in share if each.is_replicated))
        for each in share:
            number = int(each.slice.parameter)
            place = slice(each.slice.offset, each.slice.stop)
            assert torch.equal(tensors[number][place], each.values)
            written[number][place] += 1
    assert all((count == 1).all() for count in written)
    assert max(shares) - min(shares) <= 1


ENDS_WHILE_MEMORY_IS_TOUCHED = """
from types import SimpleNamespace

import torch

from pretrain.checkpoints.state import StateCopy
from pretrain.distributed.tensor_slice import HeldSlice, TensorSlice

length = 1 << 28
held = HeldSlice(TensorSlice("parameter/w", 0, length), torch.empty(length), is_replicated=True)
StateCopy(SimpleNamespace(slices=lambda: [held], device=torch.device("cpu")))
"""


def test_a_process_that_ends_early_keeps_its_exit_status():
    finished = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_MEMORY_IS_TOUCHED], capture_output=True, text=True
    )
    assert (finished.returncode, finished.stderr) == (0, "")
