import json
from datetime import date

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources.formats import input_state, read_pairs
from tests.support.toy_sources import contents_of, pairs_of, source_of

IMAGE = Columns(media="image")
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def write(path, columns, **options):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path, **options)
    return path


def media_column(values):
    return pyarrow.array(values, STRUCT)


# -------------------------------------------------------------------------------------- paths


def test_paths_and_urls_stand_in_a_column_of_text(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"A")
    fsspec.filesystem("memory").pipe({"/p/b.jpg": b"B"})
    paths = ["a.jpg", "memory://p/b.jpg", None, "../x.jpg"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        columns = {"path": pyarrow.array(paths, kind), "caption": ["x", ["y"][0], "z", "w"]}
        path = write(tmp_path / "pairs.parquet", columns)
        pairs = pairs_of(path)
        assert [pair.media for pair in pairs] == ["a.jpg", "memory://p/b.jpg", "", "../x.jpg"]
        assert [p.reason for p in pairs] == [None, None, "missing_media_path", "path_outside_root"]
        assert contents_of(path, pairs[:2]) == [b"A", b"B"]
    columns["path"] = pyarrow.array(paths).dictionary_encode()
    assert pairs_of(write(path, columns)) == pairs


def test_captions_may_be_lists_and_kept_values_keep_their_types(tmp_path):
    columns = {
        "path": ["a.jpg", "b.jpg", "c.jpg"],
        "caption": [["one", "two"], [], None],
        "id": [7, 8, 9],
        "score": [0.5, float("nan"), None],
        "day": [date(2026, 1, 2), None, None],
        "tags": [["x"], [], None],
    }
    path = write(tmp_path / "pairs.parquet", columns)
    pairs = pairs_of(path, columns=Columns(uid="id"), keep_columns=("score", "day", "tags"))
    assert [(p.row, p.caption, p.uid) for p in pairs] == [
        (1, "one", "7"),
        (1, "two", "7"),
        (2, "", "8"),
        (3, "", "9"),
    ]
    assert json.loads(pairs[0].kept) == {"score": 0.5, "day": "2026-01-02", "tags": ["x"]}
    assert [pair.kept for pair in pairs[2:]] == ['{"tags": []}', None]


def test_texts_that_are_not_utf8_lose_only_their_row(tmp_path):
    captions = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    path = write(tmp_path / "pairs.parquet", {"path": ["a.jpg", "b.jpg"], "caption": captions})
    assert [pair.reason for pair in pairs_of(path)] == [None, "not_utf8"]


# ------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()])
def test_bytes_stand_inline(tmp_path, kind):
    contents = [b"A", None, b"", b"BBBB", b"C"]
    columns = {"image": pyarrow.array(contents, kind), "caption": list("abcde")}
    path = write(tmp_path / "pairs.parquet", columns)
    found = contents_of(path, columns=IMAGE, max_media_bytes=3)
    assert found == [b"A", "missing_media_path", "empty_file", "too_large", b"C"]
    assert contents_of(path, columns=IMAGE, max_media_bytes=4)[3] == b"BBBB"


@pytest.mark.parametrize("with_statistics", [True, False])
@pytest.mark.parametrize("rows_per_group", [1, 2, 3, 100])
def test_structs_hold_bytes_or_else_a_path(tmp_path, rows_per_group, with_statistics):
    (tmp_path / "b.jpg").write_bytes(b"outer")
    values = [
        {"bytes": b"A", "path": "a.jpg"},
        {"bytes": None, "path": "b.jpg"},
        {"bytes": b"C", "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "b.jpg"},
    ]
    columns = {"image": media_column(values), "caption": list("abcdef")}
    path = tmp_path / "pairs.parquet"
    write(path, columns, row_group_size=rows_per_group, write_statistics=with_statistics)
    pairs = pairs_of(path, columns=IMAGE)
    media = ["pairs.parquet", "b.jpg", "pairs.parquet", "", "", "pairs.parquet"]
    assert [pair.media for pair in pairs] == media
    assert [pair.place for pair in pairs] == ["0", None, "2", None, None, "5"]
    good = [pair for pair in pairs if pair.reason is None]
    assert contents_of(path, good, columns=IMAGE) == [b"A", b"outer", b"C", "empty_file"]


def test_any_choice_of_rows_is_read_from_many_files(tmp_path):
    generator = np.random.default_rng(0)
    contents = [generator.bytes(n % 700) + b"x" for n in range(5000)]
    for number, part in enumerate((contents[:3000], contents[3000:])):
        rows = {"image": media_column([{"bytes": c, "path": None} for c in part])}
        rows["caption"] = [f"caption {n}" for n in range(len(part))]
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        write(folder / "data.parquet", rows, row_group_size=1300)
    pairs = pairs_of(tmp_path, columns=IMAGE)
    assert [pair.row for pair in pairs] == list(range(1, 5001))
    assert contents_of(tmp_path, pairs, columns=IMAGE) == contents
    for _ in range(5):
        chosen = generator.integers(0, 5000, 40).tolist()  # in no order
        found = contents_of(tmp_path, [pairs[n] for n in chosen], columns=IMAGE)
        assert found == [contents[n] for n in chosen]


def test_a_scan_does_not_hold_or_read_inline_bytes(tmp_path):
    rows = {"image": media_column([{"bytes": bytes(1 << 18), "path": None}] * 64)}
    path = tmp_path / "pairs.parquet"
    write(path, rows | {"caption": ["x"] * 64}, compression="none", use_dictionary=False)
    before = pyarrow.total_allocated_bytes()
    peak = 0
    for _ in read_pairs(source_of(path, columns=IMAGE)):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 4e6


# ------------------------------------------------------------------------------- Hugging Face


def test_what_datasets_writes_is_read_as_datasets_reads_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 9, 8, 3)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    values = {"image": list(pixels), "caption": list("abcd"), "label": [0, 1, -1, None]}
    expected = datasets.Dataset.from_dict(values, features=features)
    expected.to_parquet(tmp_path / "pairs.parquet")
    columns = Columns(media="image", class_name="label")
    pairs = pairs_of(tmp_path / "pairs.parquet", columns=columns, keep_columns=("label",))
    undecoded = expected.cast_column("image", datasets.Image(decode=False))
    assert [pair.caption for pair in pairs] == expected["caption"][:]
    assert [pair.class_name for pair in pairs] == ["cat", "dog", None, None]
    assert pairs[0].kept == '{"label": "cat"}'
    found = contents_of(tmp_path / "pairs.parquet", columns=columns)
    assert found == [row["image"]["bytes"] for row in undecoded]


# -------------------------------------------------------------------------------------- errors


def test_columns_that_cannot_be_used_are_refused(tmp_path):
    columns = {"path": [1], "caption": ["x"], "raw": [b"x"]}
    path = write(tmp_path / "pairs.parquet", columns)
    with pytest.raises(
        InputError, match=r"column 'path' \(columns.media\): expected text .* int64"
    ):
        pairs_of(path)
    with pytest.raises(InputError, match="keep_columns: 'raw' contains bytes"):
        pairs_of(path, columns=Columns(media="raw"), keep_columns=("raw",))
    with pytest.raises(InputError, match=r"'captions' \(columns.caption\).* mean 'caption'"):
        pairs_of(path, columns=Columns(media="raw", caption="captions"))


def test_a_damaged_file_is_refused(tmp_path):
    path = write(tmp_path / "pairs.parquet", {"path": ["a"] * 999, "caption": ["x"] * 999})
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InputError, match="expected a readable Parquet file"):
        pairs_of(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="expected a readable Parquet file"):
        pairs_of(path)
    path.unlink()
    with pytest.raises(InputError, match="expected a manifest or a folder"):
        pairs_of(path)


def test_a_file_behind_a_url_reads_the_same(tmp_path):
    values = [{"bytes": b"A", "path": None}, {"bytes": b"B", "path": None}]
    columns = {"image": media_column(values), "caption": ["x", "y"]}
    path = write(tmp_path / "pairs.parquet", columns)
    fsspec.filesystem("memory").pipe({"/hf/data/pairs.parquet": path.read_bytes()})
    url = "memory://hf/data/*.parquet"
    assert pairs_of(url, columns=IMAGE) == pairs_of(path, columns=IMAGE)
    assert contents_of(url, columns=IMAGE) == [b"A", b"B"]
    state = input_state(source_of(url, columns=IMAGE))
    assert state == input_state(source_of(path, columns=IMAGE))


def test_captions_stored_as_bytes_are_text(tmp_path):
    captions = [[b"a dog", "\u00e9".encode()], [b"\xff"]]
    table = pyarrow.table({"path": ["a.jpg", "b.jpg"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    source = source_of(tmp_path / "pairs.parquet")
    pairs = list(read_pairs(source))
    assert [pair.caption for pair in pairs[:2]] == ["a dog", "\u00e9"]
    assert pairs[2].reason == "not_utf8"
