"""Names become file names that differ whenever the names differ."""

from itertools import combinations
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.storage.file_names import MAX_NAME_BYTES, file_name_of, readable_part

LOOK_ALIKE = ["a b", "a_b", "a.b", "a/b", "a%20b", "e\u0301", "\u00e9", "A\n", ".", "..", "-"]
NAMES = [*LOOK_ALIKE, "\u56fe\u50cf", "\u58f0\u97f3"]


def test_names_that_look_alike_stay_apart():
    for first, second in combinations(NAMES, 2):
        assert file_name_of(first) != file_name_of(second)
    assert file_name_of("\u56fe\u50cf-2_b") == "\u56fe\u50cf-2_b"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_every_name_is_one_path_component_and_can_be_read_back(name):
    try:
        encoded = file_name_of(name)
    except ValueError:
        assert len(name.encode()) * 3 > MAX_NAME_BYTES
        return
    assert unquote(encoded) == name
    assert not set(encoded) & set("/\\.\0 \n:")


@pytest.mark.parametrize("name", ["", "x" * 181, "\u58f0" * 61, " " * 61, "\ud800"])
def test_a_name_that_cannot_be_a_file_name_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        file_name_of(name)


@given(st.text(max_size=300))
def test_the_readable_part_of_any_name_fits_into_a_file_name(name):
    readable = readable_part(name)
    assert len(readable.encode()) <= MAX_NAME_BYTES
    assert not set(readable) & set("/\\\0 \n:")
    assert readable_part("\U00020000" * 300) == "\U00020000" * 45
