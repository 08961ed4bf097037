"""Datasets of samples with any subset of four modalities, from every source."""

import csv
import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import MakeShards
from data_prep.errors import ConfigError, InputError
from data_prep.make_shards import make_shards
from data_prep.shards.dataset import Dataset
from tests.support.toy_modalities import SUBSETS, WIDTH, image, members_of, sound, vector

NAMED = {
    "scan": {"kind": "image", "column": "scan"},
    "title": {"kind": "text", "column": "title"},
    "values": {"kind": "vector", "column": "values"},
}
COLUMNS = {"audio": "audio", "named": NAMED, "labels": {"side": "side"}}
SETTINGS = {"min_modalities": 1, "samples_per_shard": 4}


def made(tmp_path, source, **settings):
    """Makes a dataset and returns it."""
    settings = {"columns": COLUMNS} | SETTINGS | settings
    config = MakeShards(input=str(source), output=tmp_path / "out", **settings)
    make_shards(config)
    return Dataset(config.output)


def value_of(name, number, subset):
    """Returns a modality of a sample in memory; None if the sample lacks it."""
    values = {
        "scan": lambda: image(number),
        "audio": lambda: sound(number),
        "title": lambda: f"title {number}",
        "values": lambda: vector(number).tolist(),
    }
    return values[name]() if name in subset else None


def rows(media):
    """Returns rows with cells by modality; `media` converts (name, number, bytes) to a cell."""
    found = []
    for number, subset in enumerate(SUBSETS):
        row = {name: value_of(name, number, subset) for name in ("title", "values")}
        for name in ("scan", "audio"):
            content = value_of(name, number, subset)
            row[name] = None if content is None else media(name, number, content)
        found.append(row | {"side": "left" if number % 2 else "right"})
    return found


def file_rows(folder):
    """Returns rows whose images and sounds are files next to the table."""

    def write(name, number, content):
        path = folder / f"{name}_{number}"
        path.write_bytes(content)
        return path.name

    return rows(write)


def write_csv(folder):
    table = file_rows(folder)
    for row in table:
        row["values"] = "" if row["values"] is None else json.dumps(row["values"])
    with (folder / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return folder / "x.csv"


def write_jsonl(folder):
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in file_rows(folder)))
    return path


def write_parquet_paths(folder):
    table = pyarrow.Table.from_pylist(file_rows(folder))
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=4)
    return folder / "x.parquet"


def write_parquet_bytes(folder):
    table = pyarrow.Table.from_pylist(rows(lambda name, number, content: content))
    pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=4)
    return folder / "x.parquet"


def write_huggingface(folder):
    """Writes what save_to_disk writes for an Image, an Audio and a Sequence feature."""
    structs = rows(lambda name, number, content: {"bytes": content, "path": None})
    media = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("title", pyarrow.string()),
            ("values", pyarrow.list_(pyarrow.float32())),
            ("scan", media),
            ("audio", media),
            ("side", pyarrow.string()),
        ]
    )
    table = pyarrow.Table.from_pylist(structs, schema=schema)
    with pyarrow.ipc.new_stream(folder / "data.arrow", schema) as stream:
        stream.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def members_with_label(number, subset):
    members = members_of(number, subset)
    values = json.loads(members.get("json", b"{}"))
    values["side"] = "left" if number % 2 else "right"
    return members | {"json": json.dumps(values).encode()}


def write_folder(folder):
    for number, subset in enumerate(SUBSETS):
        for extension, content in members_with_label(number, subset).items():
            (folder / f"{number:03d}.{extension}").write_bytes(content)
    return folder


def write_tars(folder):
    for start in (0, 8):
        with tarfile.open(folder / f"{start:02d}.tar", "w") as tar:
            for number, subset in list(enumerate(SUBSETS))[start : start + 8]:
                for extension, content in members_with_label(number, subset).items():
                    info = tarfile.TarInfo(f"{number:03d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


SOURCES = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet of paths": write_parquet_paths,
    "parquet of bytes": write_parquet_bytes,
    "huggingface": write_huggingface,
    "folder": write_folder,
    "tars": write_tars,
}


def check_samples(dataset):
    assert len(dataset) == len(SUBSETS)
    for number, subset in enumerate(SUBSETS):
        contents = dataset.read_modalities(number)
        assert contents.present == set(subset)
        assert contents.media.get("scan") == value_of("scan", number, subset)
        assert contents.media.get("audio") == value_of("audio", number, subset)
        assert contents.texts == ({"title": [f"title {number}"]} if "title" in subset else {})
        assert contents.labels == {"side": "left" if number % 2 else "right"}
        if "values" in subset:
            assert contents.vectors["values"].tobytes() == vector(number).tobytes()


@pytest.mark.parametrize("source", SOURCES)
def test_every_subset_of_modalities_is_kept_and_counted_from_every_source(tmp_path, source):
    folder = tmp_path / "in"
    folder.mkdir()
    dataset = made(tmp_path, SOURCES[source](folder))
    check_samples(dataset)
    modalities = dataset.modalities
    assert {name: each.num_samples for name, each in modalities.items()} == dict.fromkeys(
        ("audio", "scan", "title", "values"), 8
    )
    assert dataset.info.labels == ["side"] and modalities["values"].width == WIDTH
    assert dataset.info.rejected == {}
    table = pyarrow.parquet.read_table(tmp_path / "out/00000000.parquet").to_pylist()
    assert [row["has_scan"] for row in table] == ["scan" in subset for subset in SUBSETS[:4]]
    assert [row["title"] for row in table] == [None, None, ["title 2"], None]
    assert table[3]["values_length"] == 1 and table[0]["scan_width"] == 16


def test_a_dataset_of_samples_is_an_input_and_gives_the_same_shards(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    first = made(tmp_path, write_tars(folder))
    columns = COLUMNS | {"uid": None}
    again = tmp_path / "again"
    again.mkdir()
    second = made(again, tmp_path / "out", columns=columns)
    check_samples(second)
    for name in ("00000000.tar", "00000003.tar", "00000000.idx"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_uids_and_class_names_of_files_are_kept_when_shards_are_made_again(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        values = {"title": f"t {number}", "uid": f"u {number}", "class_name": "c", "ocr": "o"}
        (tmp_path / f"in/{number}.json").write_text(json.dumps(values))
    names = ("title", "ocr")
    columns = {"named": {name: {"kind": "text", "column": name} for name in names}}
    first = made(tmp_path, tmp_path / "in", columns=columns)
    (tmp_path / "again").mkdir()
    second = made(tmp_path / "again", first.folder, columns=columns)
    for dataset in (first, second):
        table = pyarrow.parquet.read_table(dataset.folder / "00000000.parquet").to_pylist()
        assert [(row["uid"], row["class_name"]) for row in table] == [("u 0", "c"), ("u 1", "c")]
    assert first.info.fingerprint == second.info.fingerprint


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_do_not_depend_on_workers_or_parts(tmp_path, workers):
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_parquet_bytes(folder)
    first = made(tmp_path, source).folder
    second = tmp_path / "second"
    settings = {"columns": COLUMNS, "input": str(source), "output": second / "out"} | SETTINGS
    make_shards(MakeShards(**settings, part="1/2", workers=workers))
    make_shards(MakeShards(**settings))
    for path in first.iterdir():
        if path.is_file() and path.suffix in (".tar", ".idx", ".parquet", ".json", ".jsonl"):
            assert path.read_bytes() == (second / "out" / path.name).read_bytes(), path.name


def test_rows_with_too_few_modalities_are_rejected_with_the_count(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_jsonl(folder)
    for least in (1, 2, 3, 4):
        out = tmp_path / str(least)
        out.mkdir()
        dataset = made(out, source, min_modalities=least, max_rejected_fraction=1)
        kept = [subset for subset in SUBSETS if len(subset) >= least]
        masks = np.concatenate([dataset.presence(n) for n in range(dataset.info.num_shards)])
        assert [set(dataset.modalities.names_in(int(mask))) for mask in masks] == [
            set(subset) for subset in kept
        ]
        num_rejected = len(SUBSETS) - len(kept)
        expected = {"too_few_modalities": num_rejected} if num_rejected else {}
        assert dataset.info.rejected == expected


BAD = {
    "scan": ("scan_14", b"no image", "unknown_format"),
    "audio": ("audio_14", b"", "empty_file"),
}


@pytest.mark.parametrize("name", ["scan", "audio", "values", "title"])
@pytest.mark.parametrize("bad_modality", ["reject", "absent"])
def test_one_bad_modality_rejects_the_sample_or_becomes_absent(tmp_path, name, bad_modality):
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_jsonl(folder)
    reason = {"values": "not_numbers", "title": "not_text"}.get(name)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    if name in BAD:
        file, content, reason = BAD[name]
        (folder / file).write_bytes(content)
    else:
        lines[14][name] = ["a", "b"] if name == "values" else {"a": 1}
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"bad_modality": bad_modality, "max_rejected_fraction": 1}
    dataset = made(tmp_path, source, **settings)
    if bad_modality == "reject":
        assert len(dataset) == 14
        (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
        rejected = json.loads(line)
        assert (rejected["row"], rejected["modality"], rejected["reason"]) == (15, name, reason)
    else:
        contents = dataset.read_modalities(14)
        assert contents.present == {"scan", "audio", "title", "values"} - {name}
        assert dataset.info.marked == {f"bad_{name}": 1} and dataset.info.rejected == {}


def test_filters_drop_whole_samples_or_mark_them(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = write_jsonl(folder)
    settings = {"image": {"min_side": 17}, "max_rejected_fraction": 1}
    dataset = made(tmp_path, source, **settings)
    assert dataset.info.rejected == {"image_too_small": 8} and len(dataset) == 7
    assert not any((dataset.presence(n) & 2).any() for n in range(dataset.info.num_shards))
    again = tmp_path / "again"
    again.mkdir()
    dataset = made(again, source, mark_only=["image_too_small"], **settings)
    assert dataset.info.marked == {"image_too_small": 8} and len(dataset) == 15


def test_texts_are_cleaned_filtered_and_kept_by_name(tmp_path):
    source = tmp_path / "x.jsonl"
    lines = [
        {"caption": ["a  b", "x"], "title": " one two ", "ocr": []},
        {"caption": "a b", "title": "x"},
        {"caption": None, "title": "c d", "ocr": ["e f", "g h"]},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("title", "ocr")
    columns = {
        "text": "caption",
        "named": {name: {"kind": "text", "column": name} for name in names},
    }
    settings = {"captions": {"min_words": 2}, "max_rejected_fraction": 1}
    (tmp_path / "caption").mkdir()
    for line in lines[1:]:
        line.setdefault("ocr", None)
    dataset = made(tmp_path, source, columns=columns, **settings)
    assert [dataset.read_modalities(n).texts for n in range(2)] == [
        {"text": ["a b"], "title": ["one two"]},
        {"title": ["c d"], "ocr": ["e f", "g h"]},
    ]
    assert sorted(dataset.read_sample(0).members) == ["json", "txt"]
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["modality"] == "title"
    assert json.loads(line)["reason"] == "caption_too_short"


@pytest.mark.parametrize("form", ["columns", "list", "sequence", "npy", "number"])
def test_vectors_come_from_columns_lists_and_npy_files(tmp_path, form):
    rng = np.random.default_rng(0)
    width = 1 if form == "number" else 3
    shape = (4, 2, width) if form == "sequence" else (4, width)
    arrays = rng.normal(size=shape).astype(np.float32)
    lines, column = [], "v"
    for number, array in enumerate(arrays):
        line = {"caption": f"c {number}"}
        if form == "columns":
            column = ("p", "q", "r")
            line |= dict(zip(column, array.tolist(), strict=True))
        elif form == "npy":
            np.save(tmp_path / f"{number}.npy", array)
            line["v"] = f"{number}.npy"
        else:
            line["v"] = array.tolist()[0] if form == "number" else array.tolist()
        lines.append(json.dumps(line))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    columns = {"vector": column, "text": "caption"}
    dataset = made(tmp_path, tmp_path / "x.jsonl", columns=columns, min_modalities=2)
    found = np.stack([dataset.read_modalities(n).vectors["vector"] for n in range(4)])
    assert found.tobytes() == arrays.tobytes()
    modality = dataset.modalities["vector"]
    assert (modality.width, modality.is_sequence) == (width, form == "sequence")
    rows = arrays.reshape(-1, width).astype(np.float64)
    np.testing.assert_allclose(modality.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(modality.std, rows.std(axis=0), rtol=1e-9)
    assert sorted(dataset.read_sample(0).members) == ["npy", "txt"]


def test_vectors_of_another_width_and_incomplete_ones_are_rejected(tmp_path):
    lines = [
        {"t": "a", "p": "x", "q": 1},
        {"t": "a", "p": 1, "q": 2},
        {"t": "a", "p": None, "q": 2},
        {"t": "a", "p": None, "q": None},
        {"t": "a", "p": 1e39, "q": 2},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {"vector": ("p", "q"), "text": "t"}
    settings = {"columns": columns, "max_rejected_fraction": 1, "min_modalities": 2}
    dataset = made(tmp_path, tmp_path / "x.jsonl", **settings)
    assert dataset.info.rejected == {
        "not_finite": 1,
        "not_numbers": 1,
        "too_few_modalities": 1,
        "vector_incomplete": 1,
    }
    lists = [{"t": "a", "v": [1, 2]}, {"t": "b", "v": [1]}, {"t": "c", "v": [[1, 2]]}]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lists))
    shutil.rmtree(tmp_path / "out")
    settings["columns"] = {"vector": "v", "text": "t"}
    dataset = made(tmp_path, tmp_path / "y.jsonl", **settings)
    assert dataset.info.rejected == {"vector_shape": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {}}, "expected media=image or media=audio"),
        ({"media": "image", "columns": {"image": "x"}}, "media=image belongs to pairs"),
        ({"columns": {"image": "x", "caption": "y"}}, r"columns\.caption=y belongs to pairs"),
        ({"media": "image", "columns": {"labels": {"a": "b"}}}, "columns.labels belongs"),
        ({"columns": {"image": "x"}}, "min_modalities=2: expected at most the 1"),
        (
            {
                "columns": {"audio": "x", "text": "y"},
                "audio": {"clip_seconds": 1},
            },
            "long_clips=cut",
        ),
        ({"columns": {"named": {"image": {"kind": "image", "column": "x"}}}}, "columns.image"),
        ({"columns": {"named": {"A": {"kind": "image", "column": "x"}}}}, "expected a name of"),
        ({"columns": {"named": {"a": {"kind": "video", "column": "x"}}}}, "image"),
        ({"columns": {"named": {"a": {"kind": "text", "column": ["x", "y"]}}}}, "one column"),
    ],
)
def test_configs_that_mix_pairs_and_modalities_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MakeShards(input="x.csv", output=tmp_path, **settings)


def test_inputs_without_a_usable_column_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("t,v,u\na,b.npy,c\n")
    columns = {"text": "t", "vector": "v"}
    with pytest.raises(InputError, match="vector: no row has a usable vector"):
        made(tmp_path, tmp_path / "x.csv", columns=columns, min_modalities=2)
    with pytest.raises(InputError, match=r"'w' \(columns.vector\)"):
        made(tmp_path, tmp_path / "x.csv", columns={"text": "t", "vector": "w"}, min_modalities=2)
    named = {"key": {"kind": "text", "column": "t"}, "other": {"kind": "text", "column": "u"}}
    with pytest.raises(InputError, match="key: two Parquet columns"):
        made(tmp_path, tmp_path / "x.csv", columns={"named": named}, min_modalities=2)
    columns = {"text": "t", "image": "u"}
    with pytest.raises((InputError, ConfigError), match="format=coco holds pairs"):
        made(tmp_path, tmp_path / "x.csv", columns=columns, format="coco", min_modalities=2)
