import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from pretrain.checkpoints.slice_file import (
    SliceIndex,
    StoredSlice,
    file_chunks,
    read_slices,
    read_values,
)
from pretrain.distributed.tensor_slice import TensorSlice


def content_of(slices, values):
    return b"".join(bytes(chunk) for chunk in file_chunks(slices, values))


def test_the_safetensors_library_reads_the_files():
    slices = [TensorSlice("parameter/a.weight", 4, 3), TensorSlice("exp_avg/b", 0, 5)]
    values = torch.arange(8, dtype=torch.float32)
    read = load(content_of(slices, values))
    assert set(read) == {"parameter/a.weight@4", "exp_avg/b@0"}
    assert torch.equal(read["parameter/a.weight@4"], values[:3])
    assert torch.equal(read["exp_avg/b@0"], values[3:])


def test_a_file_describes_its_slices():
    slices = [TensorSlice("parameter/a@b", 4, 3), TensorSlice("parameter/c", 0, 5)]
    file = io.BytesIO(content_of(slices, torch.zeros(8)))
    assert [stored.slice for stored in read_slices(file, "x")] == slices


def test_a_file_of_other_values_is_refused():
    from safetensors.torch import save

    file = io.BytesIO(save({"parameter/a@0": torch.zeros(3, dtype=torch.float16)}))
    with pytest.raises(
        ValueError, match="x: parameter/a@0: expected values of type F32, found F16"
    ):
        read_slices(file, "x")


@given(
    cuts=st.lists(st.integers(0, 40), max_size=6),
    num_files=st.integers(1, 3),
    bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_any_part_of_a_tensor_is_read_from_the_slices_that_hold_it(cuts, num_files, bounds):
    whole = torch.randn(40)
    edges = sorted({0, 40, *cuts})
    files = {str(number): [] for number in range(num_files)}
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        files[str(number % num_files)].append(TensorSlice("parameter/w", start, stop - start))
    contents = {
        name: content_of(slices, torch.cat([whole[p.offset : p.stop] for p in slices]))
        for name, slices in files.items()
        if slices
    }
    index = SliceIndex(
        stored
        for name, content in contents.items()
        for stored in read_slices(io.BytesIO(content), name)
    )
    start, stop = sorted(bounds)
    found = torch.full((stop - start,), torch.nan)
    for stored, part in index.parts_of(TensorSlice("parameter/w", start, stop - start)):
        target = found[part.offset - start : part.stop - start]
        read_values(io.BytesIO(contents[stored.file]), stored, part, target)
    assert torch.equal(found, whole[start:stop])


@pytest.mark.parametrize(
    "wanted", [TensorSlice("w", 2, 4), TensorSlice("w", 7, 5), TensorSlice("v", 0, 1)]
)
def test_elements_that_no_file_holds_are_named(wanted):
    stored = [
        StoredSlice(TensorSlice("w", 0, 4), "x", 0),
        StoredSlice(TensorSlice("w", 5, 5), "x", 0),
    ]
    with pytest.raises(ValueError, match=rf"of {wanted.tensor} is in no file"):
        list(SliceIndex(stored).parts_of(wanted))


def test_a_truncated_file_is_detected():
    content = content_of([TensorSlice("w", 0, 4)], torch.zeros(4))[:-1]
    [stored] = read_slices(io.BytesIO(content), "x")
    with pytest.raises(EOFError, match="x: truncated"):
        read_values(io.BytesIO(content), stored, stored.slice, torch.empty(4))
