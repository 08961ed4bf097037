import io

import numpy as np
import pytest

from data_prep.modalities.modality import VectorShape
from data_prep.modalities.vectors import VectorError, VectorSums, from_npy, to_npy, to_vector


def npy(array, **settings):
    file = io.BytesIO()
    np.save(file, array, **settings)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (5, 3), (4096,)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i2", "u1", "?", "<f2"])
def test_arrays_of_any_number_type_and_order_are_read_as_numpy_reads_them(shape, dtype):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
        found = from_npy(npy(stored))
        assert found.dtype == np.dtype("<f4") and found.flags.c_contiguous
        assert (found == np.load(io.BytesIO(npy(stored)))).all()
    assert to_npy(array) == npy(array.astype("<f4"))
    assert (np.load(io.BytesIO(to_npy(array)), allow_pickle=False) == array).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_npy"),
        (b"\x93NUMPY", "not_npy"),
        (npy(np.zeros(3))[:-1], "not_npy"),
        (npy(np.zeros(3)) + b"x", "not_npy"),
        (npy(np.array([{}, 1], dtype=object), allow_pickle=True), "not_npy"),
        (npy(np.zeros(3)).replace(b"(3,)", b"(9" + b"9" * 9 + b",)")[:138], "not_npy"),
        (npy(np.array(["a"])), "not_numbers"),
        (npy(np.zeros(2, dtype="c8")), "not_numbers"),
        (npy(np.zeros(0)), "vector_shape"),
        (npy(np.zeros((0, 3))), "vector_shape"),
        (npy(np.float32(1)), "vector_shape"),
        (npy(np.zeros((2, 2, 2))), "vector_shape"),
        (npy(np.array([1.0, np.nan])), "not_finite"),
        (npy(np.array([[1.0], [-np.inf]])), "not_finite"),
        (npy(np.array([1e39])), "not_finite"),
    ],
)
def test_other_content_is_rejected_with_its_reason(content, reason):
    with pytest.raises(VectorError) as error:
        from_npy(content)
    assert error.value.reason == reason


def test_every_flipped_byte_gives_an_array_or_a_reason():
    content = bytearray(npy(np.ones((2, 2), dtype="<f4")))
    for place in range(len(content)):
        for value in (0, 40, 255, content[place] ^ 1):
            damaged = bytes(content[:place]) + bytes([value]) + bytes(content[place + 1 :])
            try:
                assert np.isfinite(from_npy(damaged)).all()
            except VectorError as error:
                assert error.reason


def test_vectors_of_another_shape_are_rejected():
    assert to_vector([1, 2, 3], shape=VectorShape(3)).tolist() == [1.0, 2.0, 3.0]
    assert to_vector([[1], [2]], shape=VectorShape(1, is_sequence=True)).shape == (2, 1)
    for values, shape in (
        ([1, 2], VectorShape(3)),
        ([[1, 2, 3]], VectorShape(3)),
        ([1, 2, 3], VectorShape(3, is_sequence=True)),
    ):
        with pytest.raises(VectorError, match=r"expected \["):
            to_vector(values, shape=shape)
    for values in ([[1, 2], [3]], [1, "a"], [1, None], "abc", None, 3, []):
        with pytest.raises(VectorError):
            to_vector(values)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("num_shards", [1, 2, 7])
def test_merged_sums_are_those_of_numpy_over_all_rows(offset, num_shards):
    rng = np.random.default_rng(num_shards)
    samples = [
        (rng.normal(offset, 1.0, (rng.integers(1, 9), 4))).astype(np.float32) for _ in range(100)
    ]
    total = VectorSums.empty(4)
    for shard in np.array_split(np.arange(100), num_shards):
        sums = VectorSums.empty(4)
        for number in shard:
            sums.merge(VectorSums.of(samples[number]))
        total.merge(sums)
    rows = np.concatenate(samples).astype(np.float64)
    assert total.num_rows == len(rows)
    np.testing.assert_allclose(total.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(total.std, rows.std(axis=0), rtol=1e-9)
    total.merge(VectorSums.empty(4))
    assert total.num_rows == len(rows)
