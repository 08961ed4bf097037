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
