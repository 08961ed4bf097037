import csv
import json
import tracemalloc
from itertools import islice

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources import text_lines
from data_prep.sources.formats import read_pairs
from tests.support.toy_sources import contents_of, pairs_of, reasons_of, source_of

# Texts that a manifest can hold, without what strips away or is rejected.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: text.strip() == text
)


def captions(pairs):
    return [(pair.media, pair.caption) for pair in pairs]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1))
def test_what_the_csv_module_writes_is_read_back(tmp_path, rows):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    assert captions(pairs_of(path)) == rows


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1)), min_size=1))
def test_what_the_json_module_writes_is_read_back(tmp_path, rows):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"path": media, "caption": texts}) + "\n" for media, texts in rows]
    path.write_text("".join(lines))
    expected = [(media, text) for media, texts in rows for text in texts]
    assert captions(pairs_of(path)) == expected


def test_quotation_marks_in_a_tsv_are_plain_text_and_in_a_csv_enclose_fields(tmp_path):
    plain = tmp_path / "pairs.tsv"
    plain.write_text('path\tcaption\na.jpg\t"Hello" on a sign\nb.jpg\t"open\n')
    assert captions(pairs_of(plain)) == [("a.jpg", '"Hello" on a sign'), ("b.jpg", '"open')]
    with pytest.raises(InputError, match=r"line 2: .*quotes=false"):
        pairs_of(plain, quotes=True)
    quoted = tmp_path / "pairs.csv"
    quoted.write_text('path,caption\na.jpg,"one, ""two""\nthree"\nb.jpg,four\n')
    assert captions(pairs_of(quoted)) == [("a.jpg", 'one, "two"\nthree'), ("b.jpg", "four")]
    assert [pair.row for pair in pairs_of(quoted)] == [3, 4]  # the line where the row ends
    assert len(pairs_of(quoted, quotes=False)) == 3


def test_columns_are_found_by_name_and_kept_ones_stay_text(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("licence,file,text,label,id,score\nCC0,a.jpg,one,cat,u1,0.5\n,b.jpg,two,,,\n")
    columns = Columns(media="file", caption="text", class_name="label", uid="id")
    first, second = pairs_of(path, columns=columns, keep_columns=("licence", "score"))
    assert (first.media, first.caption, first.class_name, first.uid) == (
        "a.jpg",
        "one",
        "cat",
        "u1",
    )
    assert json.loads(first.kept) == {"licence": "CC0", "score": "0.5"}
    assert (second.class_name, second.uid, second.kept) == (None, None, None)


def test_kept_values_of_jsonl_keep_their_types(tmp_path):
    path = tmp_path / "pairs.jsonl"
    values = {"path": "a.jpg", "caption": "x", "n": 3, "s": 0.5, "b": True, "l": [1], "z": None}
    path.write_text(json.dumps(values) + "\n")
    (pair,) = pairs_of(path, keep_columns=("n", "s", "b", "l", "z", "absent"))
    assert json.loads(pair.kept) == {"n": 3, "s": 0.5, "b": True, "l": [1]}


def test_every_bad_row_of_a_tsv_has_its_reason(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(
        b"\xef\xbb\xbfpath\tcaption\r\n"  # a byte order mark, and line ends of Windows
        b"good.jpg\tfine\r\n"
        b"\tno media\n"
        b"a.jpg\t  \n"
        b"a.jpg\ttoo\tmany\n"
        b"a.jpg\n"
        b"a.jpg\tcaf\xe9\n"
        b"a.jpg\tnul\0\n"
        b"../a.jpg\tx\n"
        b"b/../../a.jpg\tx\n"
        b"b/../a.jpg\tinside\n"
        b"\n"
        b"/absolute/../a.jpg\tchosen by the user"
    )
    assert reasons_of(path) == {
        2: None,
        3: "missing_media_path",
        4: "empty_caption",
        5: "wrong_column_count",
        6: "wrong_column_count",
        7: "not_utf8",
        8: "nul_character",
        9: "path_outside_root",
        10: "path_outside_root",
        11: None,
        13: None,
    }


def test_every_bad_line_of_a_jsonl_has_its_reason(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b'{"path": "a.jpg", "caption": "fine"}\n'
        b'{"path": "a.jpg", "caption"\n'
        b'["a.jpg", "x"]\n'
        b'{"path": "a.jpg", "caption": []}\n'
        b'{"path": null, "caption": "x"}\n'
        b'{"path": "a.jpg", "caption": "caf\xe9"}\n'
        b'{"path": "a.jpg", "caption": "\\ud800"}\n'
        b'{"path": "a.jpg", "caption": "x", "kept": "\\ud800"}\n' + b"[" * 100_000
    )
    assert reasons_of(path, keep_columns=("kept",)) == {
        1: None,
        2: "not_json",
        3: "not_json",
        4: "empty_caption",
        5: "missing_media_path",
        6: "not_utf8",
        7: "not_utf8",
        8: "not_utf8",
        9: "not_json",
    }


def test_a_kept_column_that_is_not_utf8_is_named_at_any_depth(tmp_path):
    path = tmp_path / "pairs.jsonl"
    values = ('"\\ud800"', '["\\ud800"]', '{"a": [{"\\ud800": 1}]}')
    path.write_text(
        "".join(f'{{"path": "a.jpg", "caption": "x", "fine": 1, "kept": {v}}}\n' for v in values)
    )
    pairs = pairs_of(path, keep_columns=("fine", "kept"))
    assert [pair.reason for pair in pairs] == ["not_utf8"] * len(values)
    assert {pair.detail for pair in pairs} == {"keep_columns: 'kept': surrogates not allowed"}


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_a_wrong_column_lists_those_found_and_suggests_the_nearest(tmp_path, suffix):
    path = tmp_path / f"pairs.{suffix}"
    path.write_text(
        '{"path": "a.jpg", "captoin": "x"}\n' if suffix == "jsonl" else "path\tcaptoin\na.jpg\tx\n"
    )
    with pytest.raises(InputError, match="found path, captoin; did you mean 'captoin'"):
        pairs_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no columns"),
        (b"path,caption,path\n", "duplicate columns: path"),
        ("path,caption\n".encode("utf-16"), "found UTF-16"),
        (b"path,caption\n" + b"x" * 1000, "line 2 has 1,000 characters or more"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(text_lines, "MAX_LINE_CHARACTERS", 1000)
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        pairs_of(path)


def test_a_setting_that_the_format_cannot_honour_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"path": "a.jpg", "caption": "x"}\n')
    for fields in ({"quotes": True}, {"caption_template": "a {}"}, {"subset": tmp_path / "x"}):
        with pytest.raises(
            InputError, match=f"{next(iter(fields))}=.* is not supported for format=jsonl"
        ):
            pairs_of(path, **fields)


def test_several_manifests_are_one_input_and_paths_start_beside_each(tmp_path):
    for number, folder in enumerate(["b", "a/c"]):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.jpg").write_bytes(b"%d" % number)
        (tmp_path / folder / "pairs.csv").write_text(f"path,caption\nx.jpg,{folder}\n")
    pattern = tmp_path / "**" / "*.csv"
    pairs = pairs_of(pattern)
    assert captions(pairs) == [("a/c/x.jpg", "a/c"), ("b/x.jpg", "b")]
    assert [pair.row for pair in pairs] == [2, 4]  # lines, of both files together
    assert contents_of(pattern) == [b"1", b"0"]
    assert captions(pairs_of(tmp_path, format="csv")) == captions(pairs)
    (tmp_path / "other.tsv").touch()
    with pytest.raises(InputError, match=r"found \.csv \.jpg \.tsv"):
        pairs_of(tmp_path / "**" / "*.*")


def test_a_manifest_and_its_media_may_lie_behind_a_url(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/box/pairs.csv": b"path,caption\nx.jpg,one\nmemory://other.jpg,two\nno.jpg,y\n"})
    memory.pipe({"/box/x.jpg": b"inner", "/other.jpg": b"outer"})
    (tmp_path / "x.jpg").write_bytes(b"local")
    source = "memory://box/pairs.csv"
    assert contents_of(source) == [b"inner", b"outer", "missing_file"]
    assert contents_of("memory://box/*.csv") == [b"inner", b"outer", "missing_file"]
    local = contents_of(source, media_root=str(tmp_path))
    assert local == [b"local", b"outer", "missing_file"]
    copy = tmp_path / "my pairs.csv"
    copy.write_text("path,caption\nx.jpg,one\n")
    assert contents_of(f"file://{tmp_path}/my%20pairs.csv") == [b"local"]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    path = tmp_path / "pairs.tsv"
    with path.open("w") as file:
        file.write("path\tcaption\n")
        file.writelines(f"folder/{n:09}.jpg\tcaption number {n}\n" for n in range(200_000))
    rows = read_pairs(source_of(path))
    for _ in islice(rows, 180_000):
        pass
    tracemalloc.start()  # slow, and so not for all rows: 20,000 kept pairs would have 5 MB
    assert sum(1 for _ in rows) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_a_caption_that_is_no_text_is_rejected_and_nan_is_none(tmp_path):
    captions = ["good", {"en": "a dog"}, ["also good", ["nested"]], float("nan")]
    lines = [json.dumps({"path": "a.jpg", "caption": caption}) for caption in captions]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = source_of(tmp_path / "pairs.jsonl")
    found = [(pair.caption, pair.reason) for pair in read_pairs(source) if pair.reason is None]
    reasons = [pair.reason for pair in read_pairs(source)]
    assert found == [("good", None), ("also good", None)]
    assert reasons == [None, "not_text", None, "not_text", "empty_caption"]
