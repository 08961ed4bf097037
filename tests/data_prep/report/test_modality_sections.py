"""Data sheets, duplicates and subsets of samples with any subset of four modalities."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

from data_prep.config import Describe, FindDuplicates, MakeShards, MakeSubset
from data_prep.describe import describe, measure
from data_prep.errors import InputError
from data_prep.find_duplicates import find_duplicates
from data_prep.make_shards import make_shards
from data_prep.make_subset import make_subset
from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import Subset
from tests.support.toy_modalities import NAMED, SUBSETS, image, make_from_folder, members_of, sound

NAMES = ("audio", "scan", "title", "values")
COPY = 12  # this sample has the picture and title of sample 14, and the vector of sample 13


def members(number, subset):
    """Returns the members of a sample, with copies of modalities of other samples."""
    found = members_of(number, subset)
    if number == COPY:
        found |= {"scan.png": image(14)}
        found["json"] = json.dumps({"title": "title 14 "}).encode()
        found |= {"values.npy": members_of(13, SUBSETS[13])["values.npy"]}
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Makes a dataset from a folder."""
    return make_from_folder(tmp_path_factory.mktemp("modalities"), members)


def test_the_sheet_counts_subsets_and_measures_each_modality(dataset, tmp_path):
    content = measure(Describe(dataset=dataset, output=tmp_path / "x.html"))
    expected = {tuple(name for name in NAMES if name in subset): 1 for subset in SUBSETS}
    assert content.subsets == expected
    having = Counter(name for subset in SUBSETS for name in subset)
    measures = {
        name: {each.title: counts.num_filled for each, counts in statistics.measures.items()}
        for name, statistics in content.by_modality.items()
    }
    assert measures["scan"]["Width"] == having["scan"] == 8
    assert measures["audio"]["Duration"] == measures["title"]["Words in a caption"] == 8
    assert measures["values"] == {"Length in time": 8}
    assert content.by_modality["scan"].hashes.num_distinct == 7  # one picture occurs twice
    seconds = content.by_modality["audio"].total_seconds
    numbers = [n for n, subset in enumerate(SUBSETS) if "audio" in subset]
    assert seconds == pytest.approx(sum(4000 + n for n in numbers) / 16_000, abs=1e-2)


def test_the_sheet_of_a_subset_describes_only_its_samples(dataset, tmp_path):
    info = Dataset(dataset).info
    bitmap = np.array(["scan" in subset for subset in SUBSETS])
    subset = Subset.from_bitmap(info, bitmap, preparation={})
    subset.write(tmp_path / "x.subset")
    config = Describe(dataset=dataset, subset=tmp_path / "x.subset", output=tmp_path / "x.html")
    assert sum(measure(config).subsets.values()) == 8
    describe(config)
    text = re.sub("<[^>]*>", " ", (tmp_path / "x.html").read_text())
    for expected in ("Pictures: scan", "Sounds: audio", "Texts: title", "Vectors: values"):
        assert expected in text
    assert re.search(r"with scan\s+8\s", text) and re.search(r"with title\s+4\s", text)


def dropped_by(tmp_path, dataset, **settings):
    """Runs find_duplicates, and returns the ordinals that it drops."""
    config = FindDuplicates(datasets=(dataset,), output=tmp_path / "dups", **settings)
    find_duplicates(config)
    subset = Subset.read(tmp_path / "dups" / f"{dataset.name}.subset")
    return np.flatnonzero(~subset.bitmap).tolist()


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"modality": "scan"}, [14]),
        ({"modality": "audio"}, []),
        ({"modality": "values", "near_media": None}, [13]),
        ({"modality": "audio", "near_captions": {"min_jaccard": 1.0}}, [14]),
        ({"modality": "scan", "exact": False, "keep": "largest"}, [14]),
    ],
)
def test_duplicates_are_found_by_the_chosen_modality(tmp_path, dataset, settings, dropped):
    assert dropped_by(tmp_path, dataset, **settings) == dropped


def test_modalities_that_do_not_exist_or_cannot_be_compared_are_refused(tmp_path, dataset):
    for settings, message in (
        ({}, "modality=None: expected one of audio, scan, values"),
        ({"modality": "title"}, "modality=title: expected one of audio, scan, values"),
        ({"modality": "values"}, "kind vector, which near_media cannot compare"),
        ({"modality": "values", "near_media": None, "keep": "largest"}, "set keep=first"),
        ({"modality": "scan", "text": "x", "near_captions": {}}, "text=x: expected one of title"),
    ):
        with pytest.raises(InputError, match=message):
            dropped_by(tmp_path, dataset, **settings)


def test_samples_are_compared_with_an_evaluation_set_of_pairs(tmp_path, dataset):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(image(14))
    (tmp_path / "in/a.txt").write_text("a caption")
    config = {"input": str(tmp_path / "in"), "output": tmp_path / "pairs", "media": "image"}
    make_shards(MakeShards(**config))
    settings = {"modality": "scan", "against": (tmp_path / "pairs",), "near_media": None}
    assert dropped_by(tmp_path, dataset, **settings) == [COPY, 14]
    with pytest.raises(InputError, match="expected audio as in"):
        dropped_by(tmp_path, dataset, **settings | {"modality": "audio"})


@pytest.mark.parametrize("wanted", [("scan",), ("scan", "audio"), ("title", "values", "scan")])
def test_conditions_select_by_presence(tmp_path, dataset, wanted):
    where = " AND ".join(f"has_{name}" for name in wanted)
    make_subset(MakeSubset(dataset=dataset, output=tmp_path / "x.subset", where=where))
    bitmap = Subset.read(tmp_path / "x.subset").bitmap
    assert bitmap.tolist() == [set(wanted) <= set(subset) for subset in SUBSETS]
    read = Dataset(dataset)
    masks = [read.has_all(shard, wanted) for shard in range(read.info.num_shards)]
    assert np.concatenate(masks).tolist() == bitmap.tolist()


def test_a_subset_is_made_to_shards_whole_samples_at_a_time(tmp_path, dataset):
    config = {"dataset": dataset, "where": "len(title) > 0 AND scan_width = 16"}
    make_subset(MakeSubset(**config, output=tmp_path / "x.subset"))
    columns = {"audio": "audio", "named": NAMED}
    settings = {"input": str(dataset), "subset": tmp_path / "x.subset", "min_modalities": 1}
    make_shards(MakeShards(**settings, output=tmp_path / "again", columns=columns))
    again, first = Dataset(tmp_path / "again"), Dataset(dataset)
    chosen = [n for n, subset in enumerate(SUBSETS) if {"title", "scan"} <= set(subset)]
    assert len(again) == len(chosen)
    for ordinal, number in enumerate(chosen):
        found, expected = again.read_modalities(ordinal), first.read_modalities(number)
        assert (found.media, found.texts) == (expected.media, expected.texts)
        assert found.media.get("audio") == (sound(number) if "audio" in SUBSETS[number] else None)
    names = pyarrow.parquet.read_schema(tmp_path / "again/00000000.parquet").names
    assert [name for name in names if name.startswith("has_")] == [f"has_{name}" for name in NAMES]
