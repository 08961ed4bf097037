import math

import pytest

from data_prep.report.numbers import (
    bytes_text,
    duration_text,
    number_text,
    percent_text,
    value_text,
)


def test_numbers_read_well():
    numbers = (0, 1234, 0.5, 1234.5, 123.456, 1e-7, 2**70)
    expected = ["0", "1,234", "0.5", "1,234", "123.5", "1e-07", f"{2**70:,}"]
    assert [number_text(number) for number in numbers] == expected
    assert [percent_text(part, 1000) for part in (0, 0.1, 1, 500, 999.9, 1000)] == [
        *("0 %", "< 0.1 %", "0.1 %", "50 %", "> 99.9 %", "100 %")
    ]
    assert [bytes_text(size) for size in (1, 1500, 2e9, 5e15)] == [
        *("1 bytes", "1.5 kB", "2 GB", "5,000.0 TB")
    ]
    assert [duration_text(each) for each in (1.5, 600, 36000)] == [
        *("1.5 seconds", "10 minutes", "10.0 hours")
    ]
    assert value_text("x" * 400) == "x" * 300 + " ..."
    assert value_text(True) == "True"


@pytest.mark.parametrize("power", range(1, 14))
def test_sizes_at_the_edge_of_rounding_have_the_larger_unit(power):
    """Formats numbers around each power of ten; none may read as 1e+03."""
    for offset in (-1, -0.6, -0.5, -0.4, 0, 1):
        size = 10.0**power * (1 + offset / 1000)
        text = bytes_text(size)
        number, unit = text.replace(",", "").split()
        factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
        assert "e" not in number
        assert 1 <= float(number) < 1000 or unit == "TB"
        assert math.isclose(float(number) * factor, size, rel_tol=0.006 if factor < 1e12 else 0.05)
    assert bytes_text(999_999) == "1 MB"
    assert bytes_text(999.4e3) == "999 kB"


def test_fractions_at_the_edge_of_rounding_are_not_whole():
    for whole in (3, 7, 1000, 1999, 2000, 2001, 10_000, 123_457):
        for part in {0, 1, 2, whole // 2000, whole - whole // 2000, whole - 2, whole - 1, whole}:
            text = percent_text(part, whole)
            assert (text == "0 %") == (part == 0), (part, whole)
            assert (text == "100 %") == (part == whole), (part, whole)
    assert percent_text(1999, 2000) == "> 99.9 %"
    assert percent_text(1998, 2000) == "99.9 %"


def test_numbers_and_durations_at_the_edge_of_rounding():
    assert [number_text(value) for value in (999.94, 999.96, 1000.4)] == ["999.9", "1,000", "1,000"]
    assert [duration_text(each) for each in (119.4, 119.96, 7199.9, 7000)] == [
        *("119 seconds", "2 minutes", "2.0 hours", "117 minutes")
    ]
