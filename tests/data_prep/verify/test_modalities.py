"""Verification and repair of samples with any subset of four modalities."""

import json
import shutil

import pytest

from data_prep.config import IndexShards, VerifyShards
from data_prep.errors import InputError
from data_prep.index_shards import index_shards
from data_prep.shards.dataset import Dataset
from data_prep.shards.folder import finish_dataset
from data_prep.shards.sample import Sample
from data_prep.shards.sample_contents import contents_of
from data_prep.shards.writer import ShardWriter
from data_prep.verify_shards import verify_shards
from tests.support.toy_modalities import FOUR, SUBSETS, make_from_folder, members_of, vector


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Makes a dataset from a folder."""
    return make_from_folder(tmp_path_factory.mktemp("modalities"))


@pytest.fixture
def dataset(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def verify(folder, **settings):
    verify_shards(VerifyShards(dataset=folder, **settings))


def contents(folder):
    """Reads every file of a dataset, without the plan."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return {path.name: path.read_bytes() for path in paths}


def test_an_intact_dataset_is_verified_and_decoded(dataset):
    verify(dataset, decode=True)


REBUILT = ["00000001.idx", "00000003.idx", "dataset.json", "manifest.jsonl"]


@pytest.mark.parametrize("name", REBUILT)
@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_indexes_and_totals_are_rebuilt_byte_for_byte(dataset, whole, name, damage):
    path = dataset / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else b"")
    with pytest.raises(InputError):
        verify(dataset)
    verify(dataset, repair=True, decode=True)
    assert contents(dataset) == contents(whole)


def test_all_indexes_and_totals_are_rebuilt_together(dataset, whole):
    for path in [*dataset.glob("*.idx"), dataset / "manifest.jsonl"]:
        path.unlink()
    verify(dataset, repair=True, decode=True)
    assert contents(dataset) == contents(whole)


def test_a_lost_parquet_file_is_measured_again(dataset, whole):
    import pyarrow.parquet

    path = dataset / "00000003.parquet"
    expected = pyarrow.parquet.read_table(path).to_pylist()
    path.unlink()
    verify(dataset, repair=True)
    assert pyarrow.parquet.read_schema(path) == pyarrow.parquet.read_schema(whole / path.name)
    lost = ("source_row", "scan_source", "audio_source", "values_source")
    for found, row in zip(pyarrow.parquet.read_table(path).to_pylist(), expected, strict=True):
        assert found == row | dict.fromkeys(lost)


@pytest.mark.parametrize("is_indexed", [True, False])
def test_samples_next_to_damage_survive_with_all_their_modalities(dataset, is_indexed):
    path = dataset / "00000003.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b"000000000013.")
    content[start + 600] ^= 255  # in the first member of the second sample
    path.write_bytes(content)
    if not is_indexed:
        (dataset / "00000003.idx").unlink()
    verify(dataset, repair=True, decode=True)
    read = Dataset(dataset)
    assert len(read) == 14 and read.info.rejected == {"damaged": 1}
    found = [read.read_modalities(ordinal).present for ordinal in range(14)]
    assert found == [set(SUBSETS[n]) for n in range(15) if n != 13]
    assert read.modalities["values"].num_samples == 7


def test_rows_that_differ_from_the_index_in_presence_are_found(dataset):
    import pyarrow
    import pyarrow.parquet

    path = dataset / "00000000.parquet"
    table = pyarrow.parquet.read_table(path)
    number = table.column_names.index("has_title")
    wrong = [not value for value in table["has_title"].to_pylist()]
    pyarrow.parquet.write_table(table.set_column(number, "has_title", [wrong]), path)
    with pytest.raises(InputError, match="row 0: has_title differs from the index"):
        verify(dataset)


# --------------------------------------------------------------------------------- foreign tars

KINDS = {name: modality.kind for name, modality in FOUR.items()}


@pytest.fixture
def tars(whole, tmp_path):
    (tmp_path / "tars").mkdir()
    for path in whole.glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    return tmp_path / "tars"


@pytest.mark.parametrize("measure", [True, False])
def test_foreign_tars_are_indexed_and_verified_by_modality(tars, tmp_path, measure):
    config = {"input": str(tars), "output": tmp_path / "index", "modalities": KINDS}
    index_shards(IndexShards(**config, min_modalities=1, measure=measure))
    verify(tmp_path / "index", decode=True)
    read = Dataset(tmp_path / "index")
    for ordinal, subset in enumerate(SUBSETS):
        sample = read.read_modalities(ordinal)
        assert sample.present == set(subset)
        if "values" in subset:
            assert sample.vectors["values"].tobytes() == vector(ordinal).tobytes()
    before = contents(tmp_path / "index")
    (tmp_path / "index/00000002.idx").unlink()
    verify(tmp_path / "index", repair=True)
    assert contents(tmp_path / "index") == before
    assert list(read.modalities) == list(FOUR)


def test_incomplete_and_bad_samples_of_foreign_tars_are_named_or_left_out(tars, tmp_path):
    config = {"input": str(tars), "output": tmp_path / "index", "modalities": KINDS}
    with pytest.raises(InputError, match=r"too_few_modalities: expected at least 2 of scan, audio"):
        index_shards(IndexShards(**config))
    settings = {"min_modalities": 2, "skip_incomplete": True}
    config["output"] = tmp_path / "other"
    index_shards(IndexShards(**config, **settings))
    read = Dataset(tmp_path / "other")
    assert read.info.rejected == {"too_few_modalities": 4} and len(read) == 11
    verify(tmp_path / "other")
    config |= {"modalities": {"scan": "image", "values": "vector", "other": "vector"}}
    with pytest.raises(InputError, match=r"other: no tar has a usable member \.other\.npy"):
        index_shards(IndexShards(**config | {"output": tmp_path / "third"}))


def test_labels_of_foreign_tars_are_columns(tmp_path):
    import pyarrow.parquet

    (tmp_path / "tars").mkdir()
    writer = ShardWriter(tmp_path / "tars", "00000000")
    for number in range(3):
        values = {"title": f"t {number}", "ocr": "o", "labels": {"side": number}}
        writer.add(f"{number}", members={"json": json.dumps(values).encode()})
    writer.finish()
    config = {"input": str(tmp_path / "tars"), "output": tmp_path / "index", "labels": ["side"]}
    index_shards(IndexShards(**config, modalities={"title": "text", "ocr": "text"}))
    read = Dataset(tmp_path / "index")
    assert read.info.labels == ["side"] and read.read_modalities(2).labels == {"side": 2}
    table = pyarrow.parquet.read_table(tmp_path / "index/00000000.parquet")
    assert table["side"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"media": "image", "modalities": {"image": "image"}},
        {"media": "image", "labels": ["a"]},
        {"modalities": {"text": "image"}},
        {"modalities": {"image": "image"}, "min_modalities": 2},
        {"modalities": {"image": "video"}},
    ],
)
def test_settings_of_pairs_and_modalities_are_not_mixed(tmp_path, settings):
    with pytest.raises(ValueError, match=r"modalit|image"):
        IndexShards(input="x", output=tmp_path, **settings)


def test_an_index_that_records_other_modalities_is_found_by_decoding(tmp_path):
    writer = ShardWriter(tmp_path, "00000000", modalities=FOUR)
    recorded = members_of(0, SUBSETS[0]) | members_of(0, SUBSETS[2])
    members = recorded | {"json": b"{}"}
    contents_of_both = contents_of(Sample("", "0", recorded), FOUR)
    writer.add("0", members=members, contents=contents_of_both)
    writer.finish()
    finish_dataset(tmp_path, ["00000000"], modalities=FOUR, preparation={})
    verify(tmp_path)
    with pytest.raises(InputError, match="has scan, which differs from its index"):
        verify(tmp_path, decode=True)
