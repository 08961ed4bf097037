"""Damage to cached embeddings is found, and the damaged part is encoded again."""

import hashlib
import io

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from eval.embeddings.parts import Parts

EMBEDDINGS = torch.arange(12, dtype=torch.float32).reshape(4, 3)


@pytest.fixture
def parts(tmp_path):
    """Two parts of 4 and 2 items, D = 3."""
    found = Parts(tmp_path, num_items=6, part_size=4, embed_dim=3)
    found.write(0, EMBEDDINGS)
    found.write(1, EMBEDDINGS[:2] + 100)
    return found


def test_parts_are_read_in_order_and_by_numpy_too(parts):
    expected = torch.cat([EMBEDDINGS, EMBEDDINGS[:2] + 100])
    assert torch.equal(parts.read(), expected)
    assert np.array_equal(np.load(parts.path(0)), EMBEDDINGS.numpy())
    assert parts.own_missing() == []


def test_every_flipped_bit_and_every_truncation_is_found(parts):
    path = parts.path(0)
    content = path.read_bytes()
    damaged = [content[:length] for length in range(len(content))]
    damaged += [content + b"\0"]
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 1 << index % 8
        damaged.append(bytes(flipped))
    for each in damaged:
        path.write_bytes(each)
        assert not parts.is_finished(0)
    with pytest.raises(InputError, match="run the command again, which encodes it again"):
        parts.read()
    path.write_bytes(content)
    assert parts.is_finished(0)


def sealed(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue() + hashlib.sha256(content.getvalue()).digest()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.full((4, 3), np.nan, np.float32), "not all numbers are finite"),
        (np.where(np.eye(4, 3) > 0, np.inf, 0).astype(np.float32), "not all numbers are finite"),
        (np.zeros((2, 3), np.float32), r"expected float32 \[4, 3\], found float32 \[2, 3\]"),
        (np.zeros((4, 2), np.float32), r"found float32 \[4, 2\]"),
        (np.zeros((4, 3), np.float64), "found float64"),
    ],
)
def test_a_part_with_other_content_is_damaged_despite_its_checksum(parts, caplog, array, reason):
    parts.path(0).write_bytes(sealed(array))
    with pytest.raises(ValueError, match=reason):
        parts.read_part(0)
    assert parts.own_missing() == [0]
    assert "damaged" in caplog.text


def test_a_swapped_part_is_found_by_its_size_and_a_missing_one_is_made(parts):
    parts.path(0).write_bytes(parts.path(1).read_bytes())
    parts.path(1).unlink()
    assert parts.own_missing() == [0, 1]
