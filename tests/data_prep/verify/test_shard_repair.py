import errno
import os
import random
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from data_prep.config import IndexShards
from data_prep.errors import InputError
from data_prep.index_shards import index_shards
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.writer import ShardWriter
from tests.data_prep.test_verify_shards import (
    DAMAGES,
    IDX,
    PARQUET,
    TAR,
    cut,
    find,
    flip,
    members_of,
    rewrite_tar,
    verify,
)
from tests.support.toy_shards import jpeg, record_sidecars, toy_sample, write_toy_dataset

KEPT_FILES = ("dataset.json", "manifest.jsonl", TAR, IDX)


def contents(folder):
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: path.read_bytes() for path in files}


def samples_of(folder):
    dataset = Dataset(folder)
    found = (dataset.read_sample(number) for number in range(len(dataset)))
    return {sample.key: sample.members for sample in found}


def toy_samples(numbers):
    return dict(toy_sample(number) for number in numbers)


def keys_of_parquet(path):
    return pyarrow.parquet.read_table(path)["key"].to_pylist()


# damage -> numbers of the samples that are lost with it
LOST = {
    "payload bit": [3],
    "cut inside a payload": [5],
    "cut at a member": [5],
    "missing member": [5],
    "missing shard": [3, 4, 5],
}
REFUSED = {"empty tar", "tar of another shard", "missing tar", "extra tar", "extra shard"}


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in REFUSED])
def test_a_repaired_dataset_passes_and_lost_only_what_is_damaged(dataset, damage, capsys):
    DAMAGES[damage][0](dataset)
    verify(dataset, repair=True)
    lost = LOST.get(damage, [])
    assert samples_of(dataset) == toy_samples(set(range(8)) - set(lost))
    assert not list(dataset.glob(".*.tmp"))
    said = capsys.readouterr().out
    assert said.startswith("repaired: ")
    assert ("lost: 1: 00000000000" in said) == (len(lost) == 1)
    before = contents(dataset)
    verify(dataset, repair=True)
    assert contents(dataset) == before
    assert "repaired: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["header bit", "zeroed header", "bit in the padding", "wrong order", "duplicate key"]
)
def test_what_loses_no_sample_is_restored_byte_for_byte(intact, dataset, damage):
    DAMAGES[damage][0](dataset)
    verify(dataset, repair=True)
    for name in KEPT_FILES:
        assert (dataset / name).read_bytes() == (intact / name).read_bytes()


SIDECARS = ["damaged index", "bit in the index", "missing index", "index of another shard"]


@pytest.mark.parametrize("damage", [*SIDECARS, "other totals", "manifest without a row"])
def test_sidecars_are_restored_byte_for_byte(intact, dataset, damage):
    DAMAGES[damage][0](dataset)
    verify(dataset, repair=True)
    assert contents(dataset) == contents(intact)


@pytest.mark.parametrize("files", [["dataset.json"], ["manifest.jsonl"], list(KEPT_FILES[:2])])
def test_closing_files_are_made_again_from_the_indexes(intact, dataset, files):
    for name in files:
        (dataset / name).unlink()
    verify(dataset, repair=True)
    assert contents(dataset) == contents(intact)


def test_lost_samples_are_counted_and_leave_the_parquet(dataset, capsys):
    flip(dataset / TAR, 600)
    verify(dataset, repair=True)
    assert ShardIndex.read(dataset / IDX).rejected == {"empty_caption": 2, "damaged": 1}
    assert read_dataset_files(dataset)[0].rejected == {"damaged": 1, "empty_caption": 6}
    table = pyarrow.parquet.read_table(dataset / PARQUET)
    assert table["key"].to_pylist() == ["000000000004", "000000000005"]
    assert table["licence"].to_pylist() == ["cc0", "cc0"]
    said = capsys.readouterr().out
    assert "2 samples (all match the CRC32 of the old index); lost: 1: 000000000003" in said
    assert "contains different samples than before (7)" in said
    assert "measured " not in said


@pytest.mark.parametrize("refused", sorted(REFUSED))
def test_what_cannot_be_rebuilt_is_left_to_a_person(dataset, refused):
    DAMAGES[refused][0](dataset)
    before = contents(dataset)
    with pytest.raises(InputError, match="could not be repaired completely"):
        verify(dataset, repair=True)
    assert contents(dataset) == before


def test_a_lost_tar_is_given_up_when_its_index_is_deleted(dataset, capsys):
    (dataset / TAR).unlink()
    with pytest.raises(InputError, match=f"to continue without its samples, delete {IDX}"):
        verify(dataset, repair=True)
    (dataset / IDX).unlink()
    verify(dataset, repair=True)
    assert samples_of(dataset) == toy_samples([0, 1, 2, 6, 7])
    assert "removed its 3 samples from the dataset" in capsys.readouterr().out


def test_an_extra_shard_is_taken_in(dataset, capsys):
    writer = ShardWriter(dataset, "00000009")
    writer.add("extra", members={"jpg": jpeg(9), "txt": b"x"})
    writer.finish()
    verify(dataset, repair=True)
    assert len(samples_of(dataset)) == 9
    said = capsys.readouterr().out
    assert "00000009: added to manifest.jsonl" in said
    assert keys_of_parquet(dataset / "00000009.parquet") == ["extra"]


def test_without_an_index_complete_samples_are_kept_and_this_is_said(dataset, capsys):
    (dataset / IDX).unlink()
    flip(dataset / TAR, find(dataset / TAR, b"000000000004.jpg") + 3)
    verify(dataset, repair=True)
    assert samples_of(dataset) == toy_samples([0, 1, 2, 3, 5, 6, 7])
    said = capsys.readouterr().out
    assert "checked against headers and Parquet); lost: 1: 000000000004" in said


def test_without_an_index_the_parquet_tells_which_samples_are_damaged(dataset):
    (dataset / IDX).unlink()
    flip(dataset / TAR, 600)
    flip(dataset / TAR, find(dataset / TAR, b"caption 4"))
    verify(dataset, repair=True)
    assert samples_of(dataset) == toy_samples([0, 1, 2, 5, 6, 7])


def test_a_torn_sample_is_not_taken_for_whole(tmp_path, capsys):
    """Removes the .json between .jpg and .txt, whose loss only an index could reveal."""
    dataset = write_toy_dataset(tmp_path / "d", has_parquet=False)
    (dataset / IDX).unlink()
    flip(dataset / TAR, find(dataset / TAR, b"000000000003.json") + 3)
    verify(dataset, repair=True)
    assert samples_of(dataset) == toy_samples([0, 1, 2, 4, 5, 6, 7])
    assert "checked against headers only" in capsys.readouterr().out


def test_all_headers_of_a_sample_lost_its_key_comes_from_the_parquet(intact, dataset):
    for name in (b"000000000004.jpg", b"000000000004.txt"):
        flip(dataset / TAR, find(dataset / TAR, name) + 3)
    verify(dataset, repair=True)
    assert (dataset / TAR).read_bytes() == (intact / TAR).read_bytes()


def test_a_key_that_was_written_twice_is_kept_once(tmp_path):
    dataset = write_toy_dataset(tmp_path / "d", has_parquet=False)
    writer = ShardWriter(dataset, "00000001")
    for number in (3, 4, 3):
        writer.add("same" if number == 3 else "other", members=toy_sample(number)[1])
    writer.finish()
    record_sidecars(dataset)
    with pytest.raises(
        InputError, match="sample same: duplicate key, or its members are not adjacent"
    ):
        verify(dataset)
    verify(dataset, repair=True)
    assert list(samples_of(dataset))[3:5] == ["same", "other"]
    assert ShardIndex.read(dataset / IDX).rejected == {"damaged": 1}


def test_rows_of_a_lost_parquet_are_measured_anew(dataset, capsys):
    (dataset / PARQUET).unlink()
    verify(dataset, repair=True, decode=True)
    table = pyarrow.parquet.read_table(dataset / PARQUET)
    assert table.schema == pyarrow.parquet.read_table(dataset / "00000000.parquet").schema
    assert table["height"].to_pylist() == [23, 24, 20]
    assert table["captions"].to_pylist()[0] == ["caption 3", "other 3"]
    assert "measured 3 rows again" in capsys.readouterr().out


def test_make_shards_is_named_as_the_way_to_get_lost_samples_back(tmp_path, capsys):
    made = write_toy_dataset(tmp_path / "d", preparation={"command": "make_shards", "config": {}})
    flip(made / TAR, 600)
    verify(made, repair=True)
    assert (
        "move the files of the affected shard away and run make_shards" in capsys.readouterr().out
    )
    assert read_dataset_files(made)[0].preparation["command"] == "make_shards"


def test_a_full_disk_leaves_everything_as_it_was(dataset, monkeypatch):
    def no_room(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    flip(dataset / TAR, 600)
    before = contents(dataset)
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{TAR}'"):
        verify(dataset, repair=True)
    assert contents(dataset) == before


@pytest.mark.parametrize("seed", range(30))
def test_of_random_damage_nothing_wrong_is_ever_kept(dataset, seed):
    """Flips up to six bits and cuts a file; the Parquet stays intact."""
    generator = random.Random(seed)
    for _ in range(generator.randint(1, 6)):
        path = dataset / generator.choice([TAR, TAR, IDX, "manifest.jsonl", "dataset.json"])
        content = bytearray(path.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    if generator.random() < 0.3:
        cut(dataset / TAR, generator.randrange(1, 5000))
    try:
        verify(dataset, repair=True)
    except InputError as error:
        assert "could not be repaired completely" in str(error)
        return
    found = samples_of(dataset)
    assert found == {key: toy_samples(range(8))[key] for key in found}
    assert len(found) >= 5


class Killed(BaseException):
    """Stands for kill -9: nothing tidies up behind it."""


@pytest.mark.parametrize(
    "damage", ["payload bit", "wrong order", "cut at a member", "other totals"]
)
@pytest.mark.parametrize("has_index", [True, False], ids=["index", "no index"])
def test_killed_anywhere_a_repair_can_be_run_again(tmp_path, intact, damage, has_index):
    def damaged(name):
        folder = shutil.copytree(intact, tmp_path / name)
        DAMAGES[damage][0](folder)
        if not has_index:
            (folder / IDX).unlink()
        return folder

    whole = damaged("whole")
    verify(whole, repair=True)
    for moment in range(20):
        folder = damaged(f"killed {moment}")
        if not kill_at(moment, folder):
            break
        verify(folder, repair=True)
        assert samples_of(folder) == samples_of(whole)
        assert keys_of_parquet(folder / PARQUET) == keys_of_parquet(whole / PARQUET)
        assert not list(folder.glob(".*.tmp"))
        if has_index:
            found = {name: read for name, read in contents(folder).items() if name in KEPT_FILES}
            assert found == {name: contents(whole)[name] for name in KEPT_FILES}
    assert moment >= 2


def kill_at(moment: int, folder: Path) -> bool:
    """Repairs up to the renaming of a file, before it (even moments) or after it."""
    replace, count = Path.replace, [0]

    def replace_or_die(path, target):
        count[0] += 1
        if count[0] > moment // 2:
            if moment % 2:
                replace(path, target)
            raise Killed
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        patch.setattr(ShardWriter, "discard", lambda writer: None)
        try:
            verify(folder, repair=True)
        except Killed:
            return True
    return False


# ------------------------------------------------------------------------------ foreign tars


@pytest.fixture(params=["next to tars", "elsewhere"])
def foreign(request, intact, tmp_path):
    """Returns (folder of the sidecars, folder of the tars) of tars that were only indexed."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in intact.glob("*.tar"):
        rewrite_tar(tars / path.name, members_of(path))
    output = tars if request.param == "next to tars" else tmp_path / "index"
    index_shards(IndexShards(input=str(tars), output=output, media="image", workers=1))
    return output, tars


def test_sidecars_of_foreign_tars_are_made_again(foreign):
    sidecars, tars = foreign
    before = contents(sidecars)
    (sidecars / IDX).unlink()
    cut(sidecars / "00000000.parquet", 9)
    verify(sidecars, repair=True)
    assert contents(sidecars) == before
    assert tarfile.is_tarfile(tars / TAR)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_damaged_foreign_tar_is_never_rewritten(foreign, has_index):
    sidecars, tars = foreign
    flip(tars / TAR, 600)
    if not has_index:
        (sidecars / IDX).unlink()
    before = contents(tars), contents(sidecars)
    with pytest.raises(
        InputError, match="these tars were not written by make_shards and are never rewritten"
    ):
        verify(sidecars)
    with pytest.raises(InputError, match="not written by make_shards and therefore never rewrit"):
        verify(sidecars, repair=True)
    assert (contents(tars), contents(sidecars)) == before


def test_where_foreign_tars_are_is_not_guessed(foreign):
    sidecars, _ = foreign
    (sidecars / "dataset.json").unlink()
    with pytest.raises(InputError, match="the tar folder is unknown; run"):
        verify(sidecars, repair=True)
