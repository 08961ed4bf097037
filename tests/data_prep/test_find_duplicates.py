"""find_duplicates on sounds with known copies; other files test each method alone."""

import json
import sys

import numpy as np
import pyarrow.parquet
import pytest

from data_prep import find_duplicates as verb
from data_prep.config import FindDuplicates, MakeSubset
from data_prep.demo.sounds import SOUNDS, synthesise
from data_prep.errors import (
    ConfigError,
    InputError,
)
from data_prep.find_duplicates import find_duplicates, limits_of
from data_prep.make_subset import make_subset
from data_prep.report.duplicate_statistics import measure_duplicates
from data_prep.shards.subset import KeptSamples, Subset
from tests.support.toy_duplicates import wav, write_dataset, write_embeddings
from tests.support.toy_shards import record_sidecars

RATE_HZ = 16_000
KINDS = sorted(SOUNDS)


def clip_of(number):
    return synthesise(KINDS[number % len(KINDS)], np.random.default_rng(number))


def sound(number, *, gain=1.0, caption=None, start=0, **options):
    """Returns a clip that is unique to a number: (extension, bytes, captions)."""
    content = wav(gain * clip_of(number)[start:], RATE_HZ, **options)
    extension = options.get("format", "wav").lower()
    captions = caption if isinstance(caption, list) else [caption or f"caption of {number} alone"]
    return extension, content, captions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes three datasets.

    train: 0 1 2 3, 1 again, 2 as OGG, 3 quieter, 20; more: 4, 0 again, 5, 1 cut; test: 5, 3
    """
    folder = tmp_path_factory.mktemp("duplicates")
    vorbis = {"format": "OGG", "subtype": "VORBIS"}
    same = "a very long caption that both of these samples have in common"
    train = [sound(0), sound(1), sound(2), sound(3, caption=[same, "x"]), sound(1)]
    train += [sound(2, **vorbis), sound(3, gain=0.5), sound(20, caption=["y", same + "!"])]
    more = [sound(4), sound(0), sound(5), sound(1, start=2000)]
    test = [sound(5, gain=0.5), sound(3)]
    for name, samples in (("train", train), ("more", more), ("test", test)):
        write_dataset(folder / name, samples, media="audio")
    return folder


def search(folder, output, *, datasets=("train", "more"), against=("test",), **options):
    config = FindDuplicates(
        datasets=[folder / name for name in datasets],
        against=[folder / name for name in against],
        output=output,
        **options,
    )
    find_duplicates(config)
    return output


def rows_of(output):
    rows = pyarrow.parquet.read_table(output / "duplicates.parquet").to_pylist()
    return {(row["method"], row["dataset"].split("/")[-1], row["ordinal"]): row for row in rows}


def kept_of(output, name):
    return np.flatnonzero(Subset.read(output / f"{name}.subset").bitmap).tolist()


def matches_of(output):
    """Returns {(method, dataset, ordinal): (dataset, ordinal) of the match, None if kept}."""
    return {
        place: None if row["kept"] else (row["match_dataset"].split("/")[-1], row["match_ordinal"])
        for place, row in rows_of(output).items()
    }


def test_copies_are_found_within_and_between_datasets_and_against_tests(folder, tmp_path):
    output = search(folder, tmp_path)
    assert matches_of(output) == {
        ("exact", "train", 0): None,
        ("exact", "more", 1): ("train", 0),
        ("exact", "train", 1): None,
        ("exact", "train", 4): ("train", 1),
        ("exact", "train", 3): ("test", 1),
        ("exact", "test", 1): None,
        ("near_media", "train", 1): None,
        ("near_media", "more", 3): ("train", 1),
        ("near_media", "train", 2): None,
        ("near_media", "train", 5): ("train", 2),
        ("near_media", "train", 6): ("test", 1),
        ("near_media", "test", 1): None,
        ("near_media", "more", 2): ("test", 0),
        ("near_media", "test", 0): None,
    }
    assert kept_of(output, "train") == [0, 1, 2, 7]
    assert kept_of(output, "more") == [0]
    assert not (output / "test.subset").exists()


def test_rows_name_samples_by_key_and_uid(folder, tmp_path):
    row = rows_of(search(folder, tmp_path))["near_media", "more", 3]
    assert (row["key"], row["uid"], row["match_key"]) == ("000003", "more-3", "000001")
    assert 0.7 < row["similarity"] < 1
    kept = rows_of(tmp_path)["near_media", "train", 1]
    assert kept["group"] == row["group"]
    assert kept["match_dataset"] is kept["match_key"] is kept["similarity"] is None


def test_the_largest_of_a_group_can_be_kept(folder, tmp_path):
    matches = matches_of(search(folder, tmp_path, datasets=["more", "train"], keep="largest"))
    assert matches["near_media", "more", 3] == ("train", 1)
    first = matches_of(search(folder, tmp_path, datasets=["more", "train"]))
    assert first["near_media", "train", 1] == ("more", 3)


def test_near_captions_drop_samples_whatever_their_media(folder, tmp_path):
    options = {"exact": False, "near_media": None, "near_captions": {"min_jaccard": 0.9}}
    output = search(folder, tmp_path, datasets=["train"], against=[], **options)
    matches = matches_of(output)
    assert matches["near_captions", "train", 7] == ("train", 3)
    assert matches["near_captions", "train", 4] == ("train", 1)  # the same sound and caption
    assert kept_of(output, "train") == [0, 1, 2, 3, 6]


def test_semantic_duplicates_are_found_by_embeddings(folder, tmp_path):
    vectors = np.eye(8)
    vectors[7] = vectors[0] + 0.05 * vectors[1]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    train = write_embeddings(tmp_path / "a", folder / "train", vectors, left_out=[5])
    test = write_embeddings(tmp_path / "b", folder / "test", vectors[[2, 2]])
    semantic = {"embeddings": [train], "against_embeddings": [test]}
    options = {"near_media": None, "exact": False, "semantic": semantic}
    output = search(folder, tmp_path / "out", datasets=["train"], **options)
    matches = matches_of(output)
    assert matches["semantic", "train", 2][0] == "test"
    assert len({("semantic", "train", n) for n in (0, 7)} & set(matches)) == 2
    assert len(kept_of(output, "train")) == 6
    assert "<h2>Limits</h2>" not in (tmp_path / "out/report.html").read_text()


def test_the_report_names_what_was_not_searched():
    def limits(**fields):
        return limits_of(FindDuplicates(datasets=["a"], output="b", **fields))

    semantic = {"embeddings": ["e"]}
    assert limits(semantic=semantic) == []
    (borders,) = limits(semantic=semantic | {"across_clusters": False})
    assert "Pairs across the borders of clusters were not searched" in borders
    assert limits(near_media={"mirrored": False})[0].startswith("Mirrored images were not")


def test_a_method_looks_at_what_those_before_it_left(folder, tmp_path):
    rows = rows_of(search(folder, tmp_path, near_captions={}))
    dropped = [place[1:] for place, row in rows.items() if not row["kept"]]
    assert len(dropped) == len(set(dropped))


def test_memory_and_threads_do_not_change_the_result(folder, tmp_path):
    first = search(folder, tmp_path / "a", memory_gb=1e-5, workers=1)
    second = search(folder, tmp_path / "b", memory_gb=2, workers=3)
    for name in ("duplicates.parquet", "train.subset", "more.subset"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_report_shows_groups_and_counts(folder, tmp_path):
    page = (search(folder, tmp_path) / "report.html").read_text()
    assert page.count("<audio") >= 6
    assert "7 of 12 samples are duplicates" in page
    assert str(folder / "test") in page and "caption of 5 alone" in page


def test_the_report_does_without_tars(folder, tmp_path):
    write_dataset(tmp_path / "lost", [sound(0), sound(0)], media="audio")
    (tmp_path / "lost/00000000.tar").unlink()
    page = (
        search(tmp_path, tmp_path / "out", datasets=["lost"], against=[]) / "report.html"
    ).read_text()
    assert "not available" in page


def test_make_subset_and_describe_take_the_table(folder, tmp_path):
    output = search(folder, tmp_path / "out")
    table = output / "duplicates.parquet"
    target = tmp_path / "train.subset"
    make_subset(MakeSubset(dataset=folder / "train", output=target, drop=[table]))
    assert np.flatnonzero(Subset.read(target).bitmap).tolist() == [0, 1, 2, 7]
    kept = KeptSamples(folder / "train", subset=None)
    statistics = measure_duplicates(output, kept, memory_gb=1, workers=1)
    assert sum(matches.num_samples for matches in statistics.matches) == 4


def test_datasets_without_duplicates_or_samples_in_groups(folder, tmp_path):
    output = search(folder, tmp_path, datasets=["test"], against=[])
    assert pyarrow.parquet.read_table(output / "duplicates.parquet").num_rows == 0
    assert kept_of(output, "test") == [0, 1]
    assert "Nothing was found" in (output / "report.html").read_text()


@pytest.mark.parametrize("media", ["image", "audio"])
def test_an_empty_dataset_has_no_duplicates(media, tmp_path):
    write_dataset(tmp_path / "empty", [], media=media)
    options = {"near_captions": {}, "keep": "largest"}
    output = search(tmp_path, tmp_path / "out", datasets=["empty"], against=[], **options)
    assert pyarrow.parquet.read_table(output / "duplicates.parquet").num_rows == 0
    assert kept_of(output, "empty") == []


def test_clips_too_short_for_a_fingerprint_are_compared_by_their_bytes(tmp_path):
    clips = [("wav", wav(np.full(100, level), RATE_HZ), ["click"]) for level in (0.1, 0.2, 0.1)]
    write_dataset(tmp_path / "clicks", clips, media="audio")
    output = search(tmp_path, tmp_path / "out", datasets=["clicks"], against=[])
    assert kept_of(output, "clicks") == [0, 1]


def test_samples_without_a_fingerprint_are_told(folder, tmp_path, caplog):
    write_dataset(tmp_path / "part", [sound(n) for n in range(8)], media="audio")
    path = tmp_path / "part/00000001.parquet"
    table = pyarrow.parquet.read_table(path)
    place = table.schema.get_field_index("fingerprint")
    nothing = pyarrow.nulls(table.num_rows, pyarrow.binary())
    table = table.set_column(place, table.schema.field(place), nothing)
    pyarrow.parquet.write_table(table, path)
    record_sidecars(tmp_path / "part")
    search(tmp_path, tmp_path / "out", datasets=["part"], against=[])
    assert "part: 4 of 8 samples have no fingerprint and are skipped" in caplog.text


# --------------------------------------------------------------------------------- wrong input


@pytest.fixture
def bad(folder, tmp_path):
    write_dataset(tmp_path / "plain", [sound(0), sound(1)], media="audio", is_measured=False)
    return tmp_path


def test_hashes_must_be_there(bad):
    with pytest.raises(InputError, match=r"column fingerprint.*index_shards and measure=true"):
        search(bad, bad / "out", datasets=["plain"], against=[])
    (bad / "plain/00000000.parquet").unlink()
    with pytest.raises(InputError, match=r"00000000.parquet.*no such file.*index_shards"):
        search(bad, bad / "out", datasets=["plain"], against=[])


def test_hashes_of_evaluation_sets_must_be_there(folder, tmp_path):
    write_dataset(tmp_path / "test", [sound(5), sound(3)], media="audio", is_measured=False)
    with pytest.raises(InputError, match=r"test: expected .* column fingerprint.*measure=true"):
        search(tmp_path, tmp_path / "out", datasets=[folder / "train"])


def test_a_dataset_cannot_stand_twice(folder, tmp_path):
    with pytest.raises(InputError, match=r"duplicate of the dataset.*remove one of them"):
        search(folder, tmp_path, datasets=["train"], against=["train"])
    with pytest.raises(ConfigError, match=r"two of them would write train\.subset"):
        search(folder, tmp_path, datasets=["train", "train"])


def test_embeddings_must_belong_to_the_datasets(folder, tmp_path):
    vectors = np.eye(8)
    embeddings = write_embeddings(tmp_path / "a", folder / "train", vectors)
    other = write_embeddings(tmp_path / "b", folder / "more", vectors, checkpoint="c1")
    long = write_embeddings(tmp_path / "long", folder / "more", 2 * vectors)

    def run(*folders, datasets):
        semantic = {"embeddings": folders}
        options = {"datasets": datasets, "against": [], "semantic": semantic}
        return search(folder, tmp_path / "out", **options)

    with pytest.raises(InputError, match="embeddings of a different dataset"):
        run(embeddings, datasets=["more"])
    with pytest.raises(InputError, match="embed all datasets with one checkpoint"):
        run(embeddings, other, datasets=["train", "more"])
    with pytest.raises(ConfigError, match="one folder for each of 2 datasets"):
        run(embeddings, datasets=["train", "more"])
    with pytest.raises(InputError, match="expected L2-normalised embeddings, found norms from 2"):
        run(long, datasets=["more"])
    (embeddings / "embeddings.json").unlink()
    with pytest.raises(InputError, match="expected finished embeddings"):
        run(embeddings, datasets=["train"])


def test_some_method_must_be_asked_for(folder, tmp_path):
    with pytest.raises(ConfigError, match="expected at least one of exact, near_media"):
        search(folder, tmp_path, exact=False, near_media=None)


def test_the_command_and_its_dry_run(folder, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    values = {"datasets": [str(folder / "train")], "output": str(tmp_path / "out")}
    config.write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["find_duplicates", str(config), "--dry-run"])
    assert verb.main() == 0
    assert "would compare 8 audio samples of 1 datasets" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["find_duplicates", str(config)])
    assert verb.main() == 0
    assert "5 of 8 samples are kept" in capsys.readouterr().out
