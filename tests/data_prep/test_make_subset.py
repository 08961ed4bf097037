"""make_subset compared with filters written by hand in numpy over the same columns."""

import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from data_prep.command import run_command
from data_prep.config import MakeSubset
from data_prep.dedup.duplicate_table import DATASETS_KEY
from data_prep.make_subset import choose_samples, dry_run, make_subset
from data_prep.shards.columns import shard_schema
from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.subset import Subset
from data_prep.shards.writer import ShardWriter
from tests.support.toy_shards import record_sidecars

SIZES = (30, 1, 50, 40)
NUM_SAMPLES = sum(SIZES)


def write_table(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture(scope="module")
def columns():
    """Returns {name: one value per sample} for the Parquet files."""
    rng = np.random.default_rng(0)
    languages = [(None, "en", "de")[n] for n in rng.integers(0, 3, NUM_SAMPLES)]
    return {
        "key": [f"{n:06d}" for n in range(NUM_SAMPLES)],
        "uid": [f"u{n}" for n in rng.permutation(NUM_SAMPLES)],
        "captions": [[f"caption {n % 7}", 'it\'s "two"'] for n in range(NUM_SAMPLES)],
        "language": languages,
        "height": rng.integers(100, 400, NUM_SAMPLES).tolist(),
        "width": rng.integers(100, 400, NUM_SAMPLES).tolist(),
        "similarity": [None if n % 11 == 0 else float(n % 13) for n in range(NUM_SAMPLES)],
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, columns):
    folder = tmp_path_factory.mktemp("it's") / "pictures"
    folder.mkdir()
    schema = shard_schema("image", kept={"similarity": "double"})
    start, rows = 0, []
    for shard, size in enumerate(SIZES):
        name = f"{shard:08d}"
        writer = ShardWriter(folder, name)
        for key in columns["key"][start : start + size]:
            writer.add(key, members={"jpg": key.encode(), "txt": b"a"})
        values = {
            column: column_values[start : start + size] for column, column_values in columns.items()
        }
        absent = {column: [None] * size for column in schema.names if column not in values}
        table = pyarrow.Table.from_pydict(values | absent, schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=17)
        writer.finish()
        rows.append(manifest_row(folder, name))
        start += size
    info = DatasetInfo(
        media="image",
        fields=["jpg", "txt"],
        num_samples=NUM_SAMPLES,
        num_shards=len(rows),
        tar_bytes=sum(row.tar_bytes for row in rows),
        fingerprint=fingerprint_of(rows),
    )
    write_dataset_files(folder, info, manifest=rows)
    return folder


@pytest.fixture
def run(dataset, tmp_path, capsys):
    """Runs the command with some settings: (exit status, what was printed, bitmap or None)."""

    def run(*arguments, **settings):
        output = tmp_path / "out" / "chosen.subset"
        path = tmp_path / "config.yaml"
        values = {"dataset": str(dataset), "output": str(output)} | settings
        path.write_text(yaml.safe_dump(values))
        status = run_command(
            MakeSubset,
            run=make_subset,
            dry_run=dry_run,
            description="",
            arguments=[str(path), *arguments],
        )
        printed = capsys.readouterr()
        bitmap = Subset.read(output).bitmap if output.exists() else None
        return status, printed.out + printed.err, bitmap

    return run


def array(values):
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def test_a_condition_keeps_what_a_hand_written_filter_keeps(run, columns, dataset):
    status, printed, bitmap = run(where="height >= 256 and language = 'en' -- only these")
    assert status == 0
    is_english = np.array([language == "en" for language in columns["language"]])
    assert np.array_equal(bitmap, (np.array(columns["height"]) >= 256) & is_english)
    assert f"dataset {dataset}" in printed
    assert str(bitmap.sum()) in printed


def test_null_is_not_kept_and_is_counted(run, columns):
    _, printed, bitmap = run(where="similarity < 5")
    similarity = array(columns["similarity"])
    assert np.array_equal(bitmap, similarity < 5)
    row = next(line for line in printed.splitlines() if line.startswith("where"))
    expected = [bitmap.sum(), NUM_SAMPLES - bitmap.sum(), np.isnan(similarity).sum()]
    assert row.split()[-3:] == [str(number) for number in expected]


def test_lists_and_ordinals_can_be_asked_for(run, columns):
    where = (
        "list_max(list_transform(captions, lambda c: len(c))) > 2 "
        "and captions[1] = 'caption 3' and samples.isopair_ordinal > 20"
    )
    expected = np.array([text[0] == "caption 3" for text in columns["captions"]])
    assert np.array_equal(run(where=where)[2], expected & (np.arange(NUM_SAMPLES) > 20))


def test_scores_are_joined_by_uid_and_the_best_are_kept_with_ties_by_ordinal(
    run, columns, tmp_path
):
    rng = np.random.default_rng(1)
    scored = [uid for uid in columns["uid"] if rng.random() < 0.8]
    aesthetic = {uid: float(rng.integers(0, 5)) for uid in scored}
    aesthetic[scored[0]] = float("nan")
    rows = [*aesthetic.items(), ("stranger", 99.0), (None, 98.0)]
    rows = [rows[n] for n in rng.permutation(len(rows))]
    for part in range(2):
        uids, values = zip(*rows[part::2], strict=True)
        write_table(tmp_path / f"part_{part}.parquet", {"uid": uids, "Aesthetic": values})
    noise = {uid: n for n, uid in enumerate(columns["uid"])}
    second = write_table(
        tmp_path / "noise.parquet", {"uid": list(noise), "noise": list(noise.values())}
    )
    status, printed, bitmap = run(
        scores=[str(tmp_path / "part_*.parquet"), second],
        where="width > 150",
        top={"column": "aesthetic", "fraction": 0.3},
    )
    assert status == 0, printed
    value = np.array([aesthetic.get(uid, np.nan) for uid in columns["uid"]])
    pool = np.flatnonzero(np.array(columns["width"]) > 150)
    ranked = sorted(pool[~np.isnan(value[pool])], key=lambda n: (-value[n], n))
    expected = sorted(ranked[: int(len(pool) * 3 // 10)])
    assert np.flatnonzero(bitmap).tolist() == expected
    without = NUM_SAMPLES - len(scored)
    matched = f"{len(scored)} of {len(scored) + 2} rows match a sample, 2 match none"
    assert f"{matched}; {without} samples have no score" in printed


def write_embeddings(folder, dataset, columns, *, left_out=()):
    rng = np.random.default_rng(2)
    folder.mkdir()
    media = rng.normal(size=(NUM_SAMPLES, 4)).astype(np.float32)
    media /= np.linalg.norm(media, axis=1, keepdims=True)
    best = np.full(NUM_SAMPLES, np.nan)
    start = 0
    vector = pyarrow.list_(pyarrow.float32(), 4)
    for shard, size in enumerate(SIZES):
        here = [n for n in range(start, start + size) if n not in left_out]
        captions = []
        for n in here:
            of_sample = rng.normal(size=(1 + n % 3, 4)).astype(np.float32)
            of_sample /= np.linalg.norm(of_sample, axis=1, keepdims=True)
            best[n] = (of_sample @ media[n]).max()
            captions.append(list(of_sample))
        write_table(
            folder / f"{shard:08d}.parquet",
            {
                "uid": [columns["uid"][n] for n in here],
                "key": [columns["key"][n] for n in here],
                "media_embedding": pyarrow.array([media[n] for n in here], vector),
                "caption_embeddings": pyarrow.array(captions, pyarrow.list_(vector)),
            },
        )
        start += size
    fingerprint = json.loads((dataset / "dataset.json").read_text())["fingerprint"]
    (folder / "embeddings.json").write_text(json.dumps({"dataset_fingerprint": fingerprint}))
    return best


def test_the_clip_score_is_the_cosine_with_the_best_caption(run, dataset, columns, tmp_path):
    folder = tmp_path / "embeddings"
    best = write_embeddings(folder, dataset, columns, left_out=(3, 70))
    _, printed, bitmap = run(embeddings=str(folder), where="clip_score > 0.2")
    assert np.array_equal(bitmap, best > 0.2)
    assert "119 samples have embeddings, 2 have none" in printed
    _, _, bitmap = run(embeddings=str(folder), top={"column": "clip_score", "fraction": 0.3})
    expected = np.argsort(-best, kind="stable")[: NUM_SAMPLES * 3 // 10]
    assert np.flatnonzero(bitmap).tolist() == sorted(expected.tolist())


def write_duplicates(path, kept_of, *, fingerprint):
    names = ["once/was/here", "elsewhere"]
    rows = [(name, n, is_kept) for n, is_kept in kept_of.items() for name in names]
    columns = {
        "dataset": [name for name, _, _ in rows],
        "ordinal": [n for _, n, _ in rows],
        "kept": [is_kept and name != "elsewhere" for name, _, is_kept in rows],
    }
    fingerprints = {"elsewhere": "0", "once/was/here": fingerprint}
    table = pyarrow.table(columns, metadata={DATASETS_KEY: json.dumps(fingerprints)})
    pyarrow.parquet.write_table(table, path)
    return str(path)


def test_duplicates_of_this_dataset_that_are_not_kept_are_dropped(run, dataset, tmp_path):
    fingerprint = Dataset(dataset).info.fingerprint
    kept_of = {0: True, 5: False, 9: False}
    first = write_duplicates(tmp_path / "a.parquet", kept_of, fingerprint=fingerprint)
    kept_of = {9: False, 119: False}
    second = write_duplicates(tmp_path / "b.parquet", kept_of, fingerprint=fingerprint)
    _, printed, bitmap = run(drop=[first, second], where="isopair_ordinal >= 5")
    assert np.flatnonzero(~bitmap).tolist() == [0, 1, 2, 3, 4, 5, 9, 119]
    kept = [line.split()[-3] for line in printed.splitlines() if line.startswith(("where", "drop"))]
    assert kept == ["116", "114", "113"]
    nothing = write_duplicates(tmp_path / "c.parquet", {}, fingerprint=fingerprint)
    assert run(drop=[nothing])[2].all()


def test_duplicates_of_other_datasets_or_another_state_of_it_are_refused(run, tmp_path):
    path = write_duplicates(tmp_path / "a.parquet", {5: False}, fingerprint="1")
    status, printed, _ = run(drop=[path])
    assert status == 1
    assert "was created from elsewhere, once/was/here, and not from" in printed
    write_table(tmp_path / "b.parquet", {"dataset": ["x"], "ordinal": [0], "kept": [False]})
    assert "expected a duplicates.parquet" in run(drop=[str(tmp_path / "b.parquet")])[1]


def test_the_file_does_not_depend_on_workers_or_memory(dataset, tmp_path):
    contents = set()
    for workers, memory_gb in ((1, 2.0), (3, 0.5)):
        output = tmp_path / f"{workers}.subset"
        top = {"column": "similarity", "fraction": 0.5}
        values = {"dataset": dataset, "output": output, "where": "height > 200", "top": top}
        make_subset(
            MakeSubset.model_validate(values | {"workers": workers, "memory_gb": memory_gb})
        )
        contents.add(output.read_bytes())
    assert len(contents) == 1
    header = Subset.read(output).preparation
    assert header["config"]["where"] == "height > 200"


def test_a_dry_run_counts_and_writes_nothing(run, columns, tmp_path):
    status, printed, bitmap = run("--dry-run", where="width <= 200")
    assert (status, bitmap) == (0, None)
    assert str((np.array(columns["width"]) <= 200).sum()) in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("heigth > 3", r"there is no column 'heigth'; did you mean 'height'"),
        ("height", "expected a condition, which is true or false; found INTEGER"),
        ("height > 3; DROP TABLE shards", "expected one SQL condition"),
        ("height > 3) OR (true", "expected one SQL condition"),
        ("height >", "expected one SQL condition"),
        ("height > 1, true", "expected one SQL condition"),
        ("height > 1 FROM samples", "expected one SQL condition"),
        ("", "expected one SQL condition"),
        ("uid IN (SELECT uid FROM samples)", "found a subquery"),
        ("EXISTS (FROM read_text('/etc/hostname'))", "found a subquery"),
        ("row_number() OVER () < 5", "found a window function"),
        ("count(*) > 1", "aggregate"),
        ("unnest([true, false])", r"found unnest\(\), which returns several"),
        ("random() < 0.5", r"random\(\) returns a different value in every run"),
        ("now() > TIMESTAMP '2020-01-01'", r"now\(\) returns a different value in every run"),
        ("current_date > DATE '2020-01-01'", "there is no column 'current_date'"),
        ("list_max(list_transform(captions, lambda c: len(c) + len(d))) > 1", "no column 'd'"),
        ("height > $1", "expected one SQL condition|parameter"),
        ("COLUMNS(*) IS NOT NULL", "expected a condition|did you mean|COLUMNS"),
        ("CAST(uid AS INTEGER) > 3", "where: 'CAST.*Could not convert string"),
    ],
)
def test_what_is_no_condition_is_refused(run, where, message):
    status, printed, bitmap = run(where=where)
    assert (status, bitmap) == (1, None)
    assert re.search(message, printed), printed
    assert "Traceback" not in printed


def test_scores_that_cannot_be_joined_are_refused(run, columns, tmp_path):
    uids = columns["uid"][:5]
    for table, message in [
        ({"uid": [*uids, uids[2]], "a": range(6)}, f"duplicate uid {uids[2]!r} in 2 rows"),
        ({"id": uids, "a": range(5)}, "expected a column uid, found id, a"),
        ({"uid": uids, "Height": range(5)}, "duplicate column 'Height'"),
        ({"uid": ["x1", "x2"], "a": [1, 2]}, "none of 2 uids is in"),
    ]:
        path = write_table(tmp_path / "s.parquet", {k: list(v) for k, v in table.items()})
        status, printed, _ = run(scores=[path])
        assert status == 1
        assert message in printed
    (tmp_path / "s.parquet").write_bytes(b"not a table")
    assert "s.parquet: " in run(scores=[str(tmp_path / "s.parquet")])[1]
    assert "absent.parquet: cannot be read: No such file" in run(scores=["absent.parquet"])[1]
    assert "expected a Parquet file or a glob, found none" in run(scores=["absent*.parquet"])[1]


def test_scores_may_come_from_elsewhere(run, columns):
    import fsspec

    elsewhere = fsspec.filesystem("memory")
    for part in range(2):
        uids = columns["uid"][part::2]
        table = pyarrow.table({"uid": uids, "score": [int(uid[1:]) for uid in uids]})
        with elsewhere.open(f"/scores/part_{part}.parquet", "wb") as file:
            pyarrow.parquet.write_table(table, file)
    _, printed, bitmap = run(scores=["memory://scores/part_*.parquet"], where="score < 50")
    assert np.array_equal(bitmap, [int(uid[1:]) < 50 for uid in columns["uid"]]), printed
    _, printed, bitmap = run(scores=["memory://scores/part_1.parquet"], where="score < 50")
    half = [n % 2 == 1 and int(uid[1:]) < 50 for n, uid in enumerate(columns["uid"])]
    assert np.array_equal(bitmap, half), printed


def test_a_repeated_uid_of_the_dataset_is_refused_only_when_scores_need_it(
    dataset, columns, tmp_path, run
):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    table = pyarrow.parquet.read_table(copy / "00000003.parquet")
    uids = pyarrow.array([columns["uid"][0], *columns["uid"][82:]])
    table = table.set_column(table.schema.get_field_index("uid"), "uid", uids)
    pyarrow.parquet.write_table(table, copy / "00000003.parquet")
    record_sidecars(copy)
    assert run(dataset=str(copy), where="height > 200")[0] == 0
    scores = write_table(tmp_path / "s.parquet", {"uid": columns["uid"][:3], "a": [1, 2, 3]})
    status, printed, _ = run(dataset=str(copy), scores=[scores])
    assert status == 1
    assert f"duplicate uid {columns['uid'][0]!r} in 2 rows" in printed
    (copy / "00000001.parquet").unlink()
    assert "00000001.parquet: expected the columns of a shard" in run(dataset=str(copy))[1]
    shutil.copy(copy / "00000000.parquet", copy / "00000001.parquet")
    assert "00000001.parquet: expected 1 rows" in run(dataset=str(copy))[1]


def test_other_wrong_settings_are_named(run, dataset, columns, tmp_path):
    assert "did you mean 'height'" in run(top={"column": "hight", "fraction": 0.5})[1]
    assert "expected numbers, found VARCHAR" in run(top={"column": "uid", "fraction": 0.5})[1]
    assert "no sample remains" in run(where="height < 0")[1]
    assert "find_duplicates" in run(drop=["absent/duplicates.parquet"])[1]
    assert "embeddings.json: expected finished embeddings" in run(embeddings=str(tmp_path))[1]
    write_embeddings(tmp_path / "e", dataset, columns)
    (tmp_path / "e/embeddings.json").write_text('{"dataset_fingerprint": "0"}')
    assert "embeddings of a different dataset" in run(embeddings=str(tmp_path / "e"))[1]


def test_choosing_needs_no_more_memory_than_it_is_given(dataset, tmp_path):
    values = {
        "dataset": dataset,
        "output": tmp_path / "x",
        "where": "height > 0",
        "memory_gb": 0.05,
    }
    assert choose_samples(MakeSubset.model_validate(values)).bitmap.all()
