"""Checksums of Parquet files and of the manifest that holds them."""

import json
import random

import pytest

from data_prep.config import MakeShards, MakeSubset, VerifyShards
from data_prep.dedup.joined_datasets import JoinedDatasets
from data_prep.errors import InputError
from data_prep.make_subset import choose_samples
from data_prep.shards.manifest import parse_manifest, read_dataset_files
from data_prep.shards.parquet import (
    check_parquet_sum,
    read_shard_parquet,
    write_shard_parquet,
)
from data_prep.sources.input_files import PairSource
from data_prep.sources.tars import read_webdataset
from data_prep.verify_shards import verify_shards
from tests.support.damage import single_bit_flips, truncations

PARQUET = "00000001.parquet"


def test_every_damage_to_a_parquet_file_is_found(dataset):
    row = read_dataset_files(dataset)[1][1]
    path = dataset / PARQUET
    content = path.read_bytes()
    check_parquet_sum(path, row)
    flips = random.Random(0).sample(list(single_bit_flips(content)), 200)
    for damaged in [*flips, *list(truncations(content))[::97], content + b"x"]:
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{PARQUET}: damaged or rewritten: expected sha256"):
            check_parquet_sum(path, row)


READERS = {
    "subset": lambda d: choose_samples(
        MakeSubset(dataset=d, output=d / "x.subset", where="height >= 22")
    ),
    "duplicates": lambda d: list(JoinedDatasets([d], against=[]).tables(["height"])),
    "pairs": lambda d: list(
        read_webdataset(
            PairSource.from_config(
                MakeShards(input=str(d), output=d, media="image", keep_columns=("licence",))
            )
        )
    ),
    "verification": lambda d: verify_shards(VerifyShards(dataset=d)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_minimum_in_a_footer_stops_every_reader(dataset, reader):
    """Raises the maximum of the heights of a shard, so that a condition would skip its rows."""
    READERS[reader](dataset)
    path = dataset / PARQUET
    content = path.read_bytes()
    highest = (24).to_bytes(4, "little")
    start = content.rindex(highest)
    path.write_bytes(content[:start] + (8).to_bytes(4, "little") + content[start + 4 :])
    with pytest.raises(InputError, match=f"{PARQUET}: .*sha256"):
        READERS[reader](dataset)


def as_written_before(dataset):
    """Removes the seals and the checksums that earlier versions did not write."""
    path = dataset / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    later = ("crc32", "parquet_bytes", "parquet_sha256")
    rows = [{key: row[key] for key in row if key not in later} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((dataset / "dataset.json").read_text())
    del info["sha256"]
    (dataset / "dataset.json").write_text(json.dumps(info, indent=2) + "\n")


def test_a_dataset_of_an_earlier_version_is_read_and_repair_adds_its_checksums(intact, dataset):
    as_written_before(dataset)
    for reader in READERS.values():
        reader(dataset)
    verify_shards(VerifyShards(dataset=dataset, repair=True))
    for name in ("dataset.json", "manifest.jsonl"):
        assert (dataset / name).read_bytes() == (intact / name).read_bytes()


def test_every_flipped_bit_of_a_manifest_row_is_found(intact):
    line = (intact / "manifest.jsonl").read_bytes().splitlines()[0]
    parse_manifest(line, "manifest.jsonl")
    for damaged in single_bit_flips(line):
        with pytest.raises(InputError, match=r"manifest.jsonl: line \d: damaged"):
            parse_manifest(damaged, "manifest.jsonl")


@pytest.mark.parametrize("change", ["more columns", "fewer rows"])
def test_a_foreign_parquet_is_moved_away_and_never_deleted(dataset, change):
    as_written_before(dataset)
    path = dataset / PARQUET
    table = read_shard_parquet(path)
    changed = table.append_column("score", [[1, 2, 3]]) if change == "more columns" else table[:2]
    write_shard_parquet(path, changed)
    with pytest.raises(InputError, match="move the file out of the folder") as caught:
        READERS["subset"](dataset)
    assert "kept columns are lost" in str(caught.value)
    assert "delete" not in str(caught.value)
    path.rename(dataset.parent / PARQUET)
    verify_shards(VerifyShards(dataset=dataset, repair=True))
    found = read_shard_parquet(path)
    assert found.schema.names == table.schema.names
    assert found.select(["key", "sha256"]).equals(table.select(["key", "sha256"]))
    READERS["subset"](dataset)
