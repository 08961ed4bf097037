"""Each damage to each file of a dataset, and the best outcome that is possible.

A sample can be saved if each of its members still stands in some file. A repair must save exactly
these samples, and name the others. Otherwise it must leave every file as it is, and say so.
"""

import contextlib
import random
import re
import shutil

import pytest
from pyarrow.parquet import read_table

from data_prep.config import VerifyShards
from data_prep.errors import InputError
from data_prep.verify.unsealed_parquet import footer_problem
from data_prep.verify_shards import print_plan, verify_shards
from tests.data_prep.shards.test_parquet import as_written_before
from tests.data_prep.verify.test_shard_repair import samples_of, toy_samples
from tests.support.toy_shards import jpeg, write_toy_dataset

NUM_SAMPLES = 8
FILES = ("00000001.tar", "00000001.idx", "00000001.parquet", "manifest.jsonl", "dataset.json")


def replaced(change):
    """Returns a damage that replaces the content of a file."""

    def damage(dataset, name, rng):
        path = dataset / name
        path.write_bytes(change(path.read_bytes(), rng))

    return damage


def flip(content, rng):
    place = rng.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    )


def insert(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.choice([1, 3, 512])) + content[place:]


def remove(content, rng):
    place = rng.randrange(len(content))
    return content[:place] + content[place + rng.choice([1, 3, 512]) :]


def swap(dataset, name, rng):
    other = dataset / name.replace("00000001", "00000000")
    if other == dataset / name:  # manifest.jsonl and dataset.json
        other = dataset / ("dataset.json" if name == "manifest.jsonl" else "manifest.jsonl")
    content = other.read_bytes()
    other.write_bytes((dataset / name).read_bytes())
    (dataset / name).write_bytes(content)


DAMAGES = {
    "flip": replaced(flip),
    "truncate": replaced(lambda content, rng: content[: rng.randrange(len(content))]),
    "insert": replaced(insert),
    "remove": replaced(remove),
    "zero length": replaced(lambda content, rng: b""),
    "delete": lambda dataset, name, rng: (dataset / name).unlink(),
    "swap": swap,
    "rename": lambda dataset, name, rng: (dataset / name).rename(dataset / f"x{name[-9:]}"),
    "duplicate": lambda dataset, name, rng: shutil.copy(dataset / name, dataset / f"9{name[8:]}"),
    "foreign": lambda dataset, name, rng: shutil.copy(dataset.parent / "other" / name, dataset),
}
SEEDED = ("flip", "truncate", "insert", "remove")
CASES = [(name, damage, 0) for name in FILES for damage in DAMAGES]
MORE_CASES = [(n, d, seed) for n in FILES for d in SEEDED for seed in range(1, 5)]
WHOLE_SHARD = ("delete", "swap", "rename", "duplicate", "foreign")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Writes a dataset and a stranger of the same shape."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_dataset(folder / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.toy_shards.jpeg", lambda number: jpeg(number + 100))
        write_toy_dataset(folder / "other")
    return folder


@pytest.fixture
def dataset(folders, tmp_path):
    shutil.copytree(folders / "other", tmp_path / "other")
    return shutil.copytree(folders / "dataset", tmp_path / "dataset")


@pytest.fixture
def earlier_dataset(dataset):
    """Returns a dataset of an earlier version, and makes the stranger one too."""
    for folder in (dataset, dataset.parent / "other"):
        as_written_before(folder)
    return dataset


def files_of(folder):
    """Returns path -> bytes of all files outside the folder `damaged/`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {n: path.read_bytes() for n, path in names.items() if not n.startswith("damaged/")}


def savable_samples(folder):
    """Returns the samples whose members all stand in some file, found by searching for bytes."""
    everything = b"|".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {
        key: members
        for key, members in toy_samples(range(NUM_SAMPLES)).items()
        if all(content in everything for content in members.values())
    }


def repair(dataset):
    """Returns (whether the repair was complete, what it said)."""
    try:
        verify_shards(VerifyShards(dataset=dataset, repair=True))
    except InputError as error:
        return False, str(error)
    return True, ""


def assert_is_restored(intact, dataset, *, has_sums):
    """Compares all files; without recorded sums, unused bits of a Parquet file may stay flipped."""
    expected, found = files_of(intact), files_of(dataset)
    for name in [] if has_sums else [name for name in expected if name.endswith(".parquet")]:
        if found[name] != expected[name]:
            assert read_table(dataset / name).equals(read_table(intact / name))
            assert footer_problem(dataset / name, read_table(intact / name)) is None
            del expected[name], expected["manifest.jsonl"]
    assert found.items() >= expected.items()


def check_outcome(folders, dataset, capsys, *, has_sums=True):
    savable = savable_samples(dataset)
    lost = toy_samples(range(NUM_SAMPLES)).keys() - savable.keys()
    before = files_of(dataset)
    capsys.readouterr()
    is_complete, message = repair(dataset)
    said = capsys.readouterr().out + message
    assert savable_samples(dataset) == savable  # also those that were not taken in again
    if is_complete:
        found = samples_of(dataset)
        assert {key: found[key] for key in found if key in savable} == savable
        assert not lost & found.keys()
        changes = ("measured", "added to", "was recorded as")
        if not lost and not any(change in said for change in changes):
            assert_is_restored(folders / "dataset", dataset, has_sums=has_sums)
    else:
        assert "could not be repaired completely" in message
        assert re.search("delete (it|its files)", message) is None
        assert (
            files_of(dataset).items()
            >= {name: content for name, content in before.items() if name.endswith(".tar")}.items()
        )
    intact = (folders / "dataset/00000001.parquet").read_bytes()
    for key in lost:  # no file but this one tells the keys of lost samples
        expected = key if intact in before.values() else rf"00000001.*\b{len(lost)}\b"
        assert re.search(expected, said), f"{key} is lost and not named: {said}"
    assert said.startswith("repaired: ") or not is_complete
    again = files_of(dataset), sorted(dataset.rglob("*"))
    repair(dataset)
    assert (files_of(dataset), sorted(dataset.rglob("*"))) == again
    return is_complete


@pytest.mark.parametrize(("name", "damage", "seed"), CASES)
def test_the_best_outcome_of_each_damage(folders, dataset, capsys, name, damage, seed):
    DAMAGES[damage](dataset, name, random.Random(seed))
    check_outcome(folders, dataset, capsys)


@pytest.mark.parametrize(("name", "damage"), [(n, d) for n in FILES for d in DAMAGES])
def test_the_best_outcome_for_a_dataset_of_an_earlier_version(
    folders, earlier_dataset, capsys, name, damage
):
    DAMAGES[damage](earlier_dataset, name, random.Random(0))
    check_outcome(folders, earlier_dataset, capsys, has_sums=False)
    if damage in ("swap", "rename"):
        assert files_of(earlier_dataset).items() >= files_of(folders / "dataset").items()


@pytest.mark.parametrize("has_parquet", [True, False])
@pytest.mark.parametrize("damage", WHOLE_SHARD)
def test_the_best_outcome_for_all_files_of_a_shard_of_an_earlier_version(
    folders, earlier_dataset, capsys, damage, has_parquet
):
    for name in FILES[: 3 if has_parquet else 2]:
        DAMAGES[damage](earlier_dataset, name, random.Random(0))
    is_complete = check_outcome(folders, earlier_dataset, capsys, has_sums=False)
    assert is_complete == (damage in ("delete", "swap", "rename"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage", "seed"), MORE_CASES)
def test_the_best_outcome_at_many_places_of_a_dataset_of_an_earlier_version(
    folders, earlier_dataset, capsys, name, damage, seed
):
    DAMAGES[damage](earlier_dataset, name, random.Random(seed))
    check_outcome(folders, earlier_dataset, capsys, has_sums=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage", "seed"), MORE_CASES)
def test_the_best_outcome_at_many_places(folders, dataset, capsys, name, damage, seed):
    DAMAGES[damage](dataset, name, random.Random(seed))
    check_outcome(folders, dataset, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_of_two_damages_at_once_nothing_vanishes(dataset, capsys, seed):
    rng = random.Random(seed)
    for _ in range(2):
        name, damage = rng.choice([*FILES, "00000000.tar", "00000002.idx"]), rng.choice([*DAMAGES])
        if (dataset / name).is_file() and (dataset / name).stat().st_size:
            with contextlib.suppress(FileNotFoundError):  # the other file of a swap
                DAMAGES[damage](dataset, name, rng)
    savable = savable_samples(dataset)
    is_complete, _ = repair(dataset)
    assert savable_samples(dataset) == savable
    if is_complete:
        found = samples_of(dataset)
        assert all(found[key] == savable[key] for key in found if key in savable)
    again = files_of(dataset), sorted(dataset.rglob("*"))
    repair(dataset)
    assert (files_of(dataset), sorted(dataset.rglob("*"))) == again


@pytest.mark.parametrize("damage", WHOLE_SHARD)
def test_the_best_outcome_for_all_files_of_a_shard(folders, dataset, capsys, damage):
    for name in FILES[:3]:
        DAMAGES[damage](dataset, name, random.Random(0))
    is_complete = check_outcome(folders, dataset, capsys)
    assert is_complete == (damage in ("delete", "swap", "rename"))


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_says_what_a_repair_does_and_changes_nothing(dataset, capsys, name):
    DAMAGES["zero length"](dataset, name, random.Random(0))
    config = VerifyShards(dataset=dataset, repair=True)
    before = files_of(dataset), sorted(dataset.rglob("*"))
    try:
        print_plan(config)
        planned = capsys.readouterr().out
    except InputError as error:
        planned = capsys.readouterr().out + str(error)
    assert (files_of(dataset), sorted(dataset.rglob("*"))) == before
    is_complete, message = repair(dataset)
    said = capsys.readouterr().out + message
    lines = [
        line.removeprefix("would repair: ") for line in planned.splitlines() if "would" in line
    ]
    assert all(line in said or "would not" in line for line in lines)
    assert ("would not be repaired completely" in planned) == (not is_complete)
    assert lines
