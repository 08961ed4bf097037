"""Tables as programs write them, with any separator, quoting and compression."""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import zipfile

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from tests.support.toy_sources import pairs_of

CAPTIONS = ['he said "hi" twice', "plain", "a, b; c | d", 'one\ttab and "quotes"', "two\nlines"]


def captions(path, **fields):
    return [(pair.media, pair.caption) for pair in pairs_of(path, **fields)]


def table(texts, separator, quoting=csv.QUOTE_MINIMAL, line_end="\n", header=("path", "caption")):
    """Writes a table as Python and pandas do."""
    sink = io.StringIO(newline="")
    rows = [header, *((f"{number}.jpg", text) for number, text in enumerate(texts))]
    csv.writer(sink, delimiter=separator, quoting=quoting, lineterminator=line_end).writerows(rows)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_what_a_program_writes_is_read_whatever_separates_and_quotes_it(
    tmp_path, caplog, suffix, separator
):
    path = tmp_path / f"pairs.{suffix}"
    quotings = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
    for quoting, line_end in itertools.product(quotings, ("\n", "\r\n")):
        path.write_text(table(CAPTIONS, separator, quoting, line_end), newline="")
        expected = [(f"{number}.jpg", text) for number, text in enumerate(CAPTIONS)]
        caplog.clear()
        assert captions(path) == expected
        assert ("separated by" in caplog.text) == (separator != {"csv": ",", "tsv": "\t"}[suffix])
        assert ("set quotes=false" in caplog.text) == (suffix == "tsv")
        assert captions(path, separator=separator, quotes=True) == expected


TEXTS = st.text(
    st.characters(exclude_categories=["C", "Z"]) | st.sampled_from('" \t,;'), min_size=1
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS.map(str.strip).filter(bool), min_size=1))
def test_a_tsv_of_pandas_is_read_back(tmp_path, texts):
    path = tmp_path / "pairs.tsv"
    path.write_text(table(texts, "\t"), newline="")
    assert [text for _, text in captions(path)] == texts


@pytest.mark.parametrize(
    "texts",
    [
        ['"Hello" on a sign', 'a 5" pipe', '"open', 'closed"'],
        ['"To be or not to be"'],  # no program would have quoted it
        ['"Yes, we can"', "a dog, running"],
        ['"a ""doubled"" one"', 'a 5" pipe'],
        ['""', "x"],
    ],
)
def test_plain_quotation_marks_of_a_tsv_stay(tmp_path, caplog, texts):
    path = tmp_path / "pairs.tsv"
    for order in itertools.permutations(texts):
        path.write_text("path\tcaption\n" + "".join(f"x.jpg\t{text}\n" for text in order))
        assert [text for _, text in captions(path)] == list(order)
    assert caplog.text == ""


def test_excel_quotes_fields_with_commas_in_text_with_tabs(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('path\tcaption\na.jpg\t"a dog, running"\nb.jpg\ta cat\n')
    assert [text for _, text in captions(path)] == ["a dog, running", "a cat"]
    assert [text for _, text in captions(path, quotes=False)] == ['"a dog, running"', "a cat"]


def test_a_separator_that_no_column_shows_is_named_in_the_config(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("path~caption\na.jpg~x\n")
    with pytest.raises(InputError, match=r"expected a column .* set separator"):
        pairs_of(path)
    assert captions(path, separator="~") == [("a.jpg", "x")]
    path.write_text("file;text\na.jpg;x\n")
    with pytest.raises(InputError, match="found file, text"):
        pairs_of(path)


COMPRESSED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", sorted(COMPRESSED))
def test_compressed_tables_are_read_and_damaged_ones_named(tmp_path, compression):
    tables = {
        "csv": b"path,caption\na.jpg,x\n",
        "tsv": b"path\tcaption\na.jpg\tx\n",
        "jsonl": b'{"path": "a.jpg", "caption": "x"}\n',
    }
    for suffix, content in tables.items():
        packed = COMPRESSED[compression](content)
        path = tmp_path / suffix / f"pairs.{suffix}.{compression}"
        path.parent.mkdir()
        path.write_bytes(packed)
        assert captions(path) == captions(path.parent, format=suffix) == [("a.jpg", "x")]
        misnamed = tmp_path / f"pairs.{suffix}"
        misnamed.write_bytes(packed)
        assert captions(misnamed) == [("a.jpg", "x")]
        path.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(InputError, match=rf"pairs\.{suffix}\.{compression}: "):
            pairs_of(path)


def test_an_archive_is_refused_with_advice_and_text_may_begin_as_one(tmp_path):
    path = tmp_path / "pairs.csv"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pairs.csv", "path,caption\n")
    with pytest.raises(InputError, match="found a zip archive; unpack it"):
        pairs_of(path)
    path.write_text("BZh9,path,caption\n1,a.jpg,x\n")
    assert captions(path) == [("a.jpg", "x")]
