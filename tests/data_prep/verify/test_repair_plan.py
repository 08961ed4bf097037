"""Files that stand elsewhere, interrupted moves, and damaged metadata, with the right values."""

import json
import random
import shutil
from itertools import permutations
from pathlib import Path

import pytest

from data_prep.config import VerifyShards
from data_prep.errors import InputError
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.parquet import read_shard_parquet, write_shard_parquet
from data_prep.shards.writer import ShardWriter
from data_prep.verify.bit_flips import undo_flip_by_sum
from data_prep.verify.damaged_files import set_aside
from data_prep.verify.dataset_repair import print_repairs
from data_prep.verify.metadata_repair import read_metadata
from data_prep.verify_shards import verify_shards
from tests.data_prep.shards.test_parquet import as_written_before
from tests.data_prep.verify.test_damage_table import files_of
from tests.support.damage import single_bit_flips
from tests.support.toy_pairs import shard, write_pictures
from tests.support.toy_shards import jpeg, write_toy_dataset

NAMES = ("00000000", "00000001", "00000002")
SUFFIXES = ("tar", "idx", "parquet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a dataset with a plan, by make_shards."""
    folder = tmp_path_factory.mktemp("made")
    return shard(write_pictures(folder, 5), folder / "dataset")


def repair(dataset):
    verify_shards(VerifyShards(dataset=dataset, repair=True))


def permute(dataset, suffix, order):
    contents = [(dataset / f"{name}.{suffix}").read_bytes() for name in NAMES]
    for name, number in zip(NAMES, order, strict=True):
        (dataset / f"{name}.{suffix}").write_bytes(contents[number])


@pytest.mark.parametrize("seed", range(4))
def test_files_in_any_places_move_back(intact, dataset, seed):
    rng = random.Random(seed)
    for suffix in SUFFIXES:
        permute(dataset, suffix, rng.choice(list(permutations(range(3)))))
    (dataset / "other").mkdir()
    stray = dataset / f"{rng.choice(NAMES)}.{rng.choice(SUFFIXES)}"
    stray.rename(dataset / "other" / f"renamed.{stray.suffix[1:]}")
    repair(dataset)
    (dataset / "other").rmdir()
    assert files_of(dataset) == files_of(intact)
    assert not (dataset / "damaged").exists()


def test_without_a_manifest_indexes_move_to_the_tars_that_they_record(intact, dataset):
    permute(dataset, "idx", (1, 2, 0))
    (dataset / "manifest.jsonl").unlink()
    repair(dataset)
    assert files_of(dataset) == files_of(intact)


def test_nothing_is_concluded_from_a_tar_and_an_index_that_do_not_fit(dataset):
    permute(dataset, "idx", (1, 0, 2))
    for name in ("00000000.tar", "00000001.tar"):  # no checksum tells which is which
        (dataset / name).write_bytes((dataset / name).read_bytes()[:600])
    (dataset / "manifest.jsonl").write_bytes(b"?")
    before = files_of(dataset)
    for _ in range(2):
        with pytest.raises(InputError, match="holds none of the samples of its index"):
            repair(dataset)
        assert files_of(dataset) == before


def test_unreadable_metadata_is_kept(intact, dataset):
    (dataset / "manifest.jsonl").write_bytes(b"?" * 99)
    repair(dataset)
    assert files_of(dataset) == files_of(intact)
    assert (dataset / "damaged/manifest.jsonl").read_bytes() == b"?" * 99


class Killed(BaseException):
    """Stands for kill -9."""


def test_killed_anywhere_moves_lose_no_file(intact, tmp_path, monkeypatch):
    for moment in range(40):
        dataset = shutil.copytree(intact, tmp_path / f"killed {moment}")
        permute(dataset, "tar", (1, 2, 0))
        if not killed(moment, dataset, monkeypatch):
            break
        repair(dataset)
        assert files_of(dataset) == files_of(intact)
    assert moment > 8


def killed(moment, dataset, monkeypatch):
    """Repairs until a number of files was renamed or removed."""
    count = [0]

    def dying(method):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] > moment:
                raise Killed
            return method(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            repair(dataset)
        except Killed:
            return True
    return False


def test_a_stranger_in_the_place_of_a_shard_is_not_taken_in(dataset, tmp_path):
    other = write_toy_dataset(tmp_path / "other", num_samples=3, samples_per_shard=1)
    for suffix in ("tar", "idx"):
        shutil.copy(other / f"00000002.{suffix}", dataset / f"00000001.{suffix}")
    (dataset / "00000001.parquet").write_bytes(b"")
    before = files_of(dataset)
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"its 1 samples are not those that manifest\.jsonl re"
        ):
            repair(dataset)
        assert files_of(dataset) == before


# ------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("name", ["manifest.jsonl", "dataset.json"])
def test_every_flipped_bit_of_the_metadata_is_undone(intact, dataset, name):
    """Flips 12 bits; every bit counts, also those of values without a copy."""
    content = (intact / name).read_bytes()
    expected = read_metadata(intact)
    for damaged in random.Random(1).sample(list(single_bit_flips(content)), 12):
        (dataset / name).write_bytes(damaged)
        found = read_metadata(dataset)
        assert (found.info, found.rows) == (expected.info, expected.rows)
        assert found.is_info_sealed and not found.unsealed
    repair(dataset)
    assert (dataset / name).read_bytes() == content


def test_a_flipped_name_in_a_manifest_without_seals_costs_no_shard(intact, dataset):
    as_written_before(dataset)
    path = dataset / "manifest.jsonl"
    text = path.read_text()
    for name in ("00000003", "0000000q", "x", "00000000/1"):
        path.write_text(text.replace("00000001", name))
        repair(dataset)
        assert files_of(dataset) == files_of(intact)


@pytest.mark.parametrize("key", ["num_pairs", "preparation"])
def test_values_that_no_other_file_holds_are_restored_or_named(made, tmp_path, key, capsys):
    dataset = shutil.copytree(made, tmp_path / "dataset")
    content = (made / "dataset.json").read_text()
    info = json.loads(content)
    changed = {"num_pairs": 99, "isopair_version": "9", "preparation": {"command": "x"}}
    changed["media"] = "audio"
    (dataset / "dataset.json").write_text(json.dumps(info | {key: changed[key]}, indent=2) + "\n")
    with pytest.raises(InputError, match=r"dataset.json: edited or damaged: expected the recorded"):
        verify_shards(VerifyShards(dataset=dataset))
    repair(dataset)
    said = capsys.readouterr().out
    if key in ("num_pairs", "isopair_version"):
        assert "kept as found are num_pairs" in said
        assert json.loads((dataset / "dataset.json").read_text())[key] == changed[key]
    else:
        assert (dataset / "dataset.json").read_text() == content
    before = files_of(dataset)
    repair(dataset)
    assert files_of(dataset) == before
    assert "repaired: nothing" in capsys.readouterr().out


def test_a_lost_dataset_json_is_made_from_the_plan(made, tmp_path):
    dataset = shutil.copytree(made, tmp_path / "dataset")
    for damage in (b"", b"{}", None):
        if damage is None:
            (dataset / "dataset.json").unlink()
        else:
            (dataset / "dataset.json").write_bytes(damage)
        repair(dataset)
        assert files_of(dataset) == files_of(made)
    assert read_dataset_files(dataset)[0].num_pairs == 7


def test_an_unfinished_dataset_is_not_closed_without_its_missing_shards(made, tmp_path):
    dataset = shutil.copytree(made, tmp_path / "dataset")
    for name in ("dataset.json", "manifest.jsonl", *(f"00000001.{each}" for each in SUFFIXES)):
        (dataset / name).unlink()
    before = files_of(dataset)
    with pytest.raises(InputError, match=r"expected 2 shards \(its plan\), found 1"):
        repair(dataset)
    assert files_of(dataset) == before


def test_a_damaged_plan_does_not_change_what_dataset_json_records(made, tmp_path):
    dataset = shutil.copytree(made, tmp_path / "dataset")
    path = dataset / "plan/plan.json"
    plan = json.loads(path.read_text())
    plan["made_from"]["config"]["samples_per_shard"] = 4
    path.write_text(json.dumps(plan))
    with pytest.raises(
        InputError, match=r"the plan .* differs from the preparation in dataset\.json"
    ):
        verify_shards(VerifyShards(dataset=dataset))
    repair(dataset)
    assert (dataset / "dataset.json").read_bytes() == (made / "dataset.json").read_bytes()
    assert json.loads(path.read_text())["made_from"] == read_dataset_files(made)[0].preparation


# ---------------------------------------------------------------------------------- Parquet files


def test_every_flip_in_a_footer_is_undone(intact):
    row = read_dataset_files(intact)[1][1]
    content = (intact / "00000001.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    rng = random.Random(0)
    for _ in range(5):
        place = rng.randrange(footer, len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        found = undo_flip_by_sum(bytes(damaged), row.parquet_sha256, start=footer)
        assert found == content


def test_a_damaged_parquet_is_kept_when_its_columns_are_measured_again(dataset, capsys):
    path = dataset / "00000001.parquet"
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    repair(dataset)
    assert "measured 3 rows again; they lack the columns" in capsys.readouterr().out
    assert (dataset / "damaged/00000001.parquet").read_bytes() == damaged


# ------------------------------------------------------------------- what must not be lost


def test_a_dry_run_of_the_working_folder_or_its_parent_changes_nothing(
    dataset, tmp_path, monkeypatch
):
    (dataset / "inner").mkdir()
    permute(dataset, "tar", (1, 0, 2))
    (tmp_path / "temporary").mkdir()
    stranger = tmp_path / "temporary" / "stranger.tar"
    shutil.copy(dataset / "00000002.tar", stranger)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = files_of(tmp_path)
    for place, name in ((dataset, "."), (dataset / "inner", "..")):
        monkeypatch.chdir(place)
        print_repairs(Path(name), workers=1)
        assert files_of(tmp_path) == before


def test_a_replaced_tar_is_kept_if_the_repair_fails_after_it(dataset, monkeypatch):
    content = bytearray((dataset / "00000001.tar").read_bytes())
    content[600] ^= 255  # in the first member's data
    (dataset / "00000001.tar").write_bytes(content)

    finish = ShardWriter.finish

    def finish_and_fail(writer, **options):
        finish(writer, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "finish", finish_and_fail)
    with pytest.raises(OSError, match="No space left"):
        verify_shards(VerifyShards(dataset=dataset, repair=True))
    assert (dataset / "damaged/00000001.tar").read_bytes() == bytes(content)


def test_a_second_file_of_one_name_in_damaged_keeps_its_suffix(dataset):
    for content in (b"first", b"second", b"third"):
        (dataset / "00000001.tar").write_bytes(content)
        kept = set_aside(dataset / "00000001.tar", folder=dataset)
        (dataset / "00000001.tar").unlink()
        assert kept.suffix == ".tar"
        assert kept.read_bytes() == content


def test_the_metadata_of_a_shard_that_was_moved_away_is_kept(dataset):
    names = ("manifest.jsonl", "dataset.json")
    before = [(dataset / name).read_bytes() for name in names]
    for suffix in SUFFIXES:
        (dataset / f"00000001.{suffix}").unlink()
    repair(dataset)
    assert read_dataset_files(dataset)[0].num_samples == 5
    assert [(dataset / "damaged" / name).read_bytes() for name in names] == before


def test_each_unreadable_manifest_is_kept_beside_earlier_ones(intact, dataset):
    for content in (b"?" * 99, b"!" * 99):
        (dataset / "manifest.jsonl").write_bytes(content)
        repair(dataset)
    assert files_of(dataset) == files_of(intact)
    assert (dataset / "damaged/manifest.jsonl").read_bytes() == b"?" * 99
    assert (dataset / "damaged/manifest.1.jsonl").read_bytes() == b"!" * 99


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0)])
@pytest.mark.parametrize("lost", [None, "tar"])
def test_swapped_parquet_files_of_an_earlier_version_move_back(intact, dataset, order, lost):
    """Finds the place of each file by the rows of the tar, or else by the sizes in the index."""
    as_written_before(dataset)
    permute(dataset, "parquet", order)
    with pytest.raises(InputError, match=r"00000000.parquet: row 0: expected 000000000000"):
        verify_shards(VerifyShards(dataset=dataset))
    expected = files_of(intact)
    if lost is not None:
        (dataset / f"00000001.{lost}").unlink()
        with pytest.raises(InputError, match="lost: 3: 000000000003, 000000000004"):
            repair(dataset)
        expected = {name: each for name, each in expected.items() if name.endswith(".parquet")}
        assert files_of(dataset).items() >= expected.items()
        return
    repair(dataset)
    assert files_of(dataset) == expected
    assert not (dataset / "damaged").exists()


def test_a_parquet_of_other_media_with_equal_keys_and_sizes_is_noticed(dataset):
    """Clips of one length have equal sizes, so that only their checksums differ."""
    as_written_before(dataset)
    path = dataset / "00000001.parquet"
    table = read_shard_parquet(path)
    sums = [*table["sha256"].to_pylist()[:-1], "0" * 64]
    place = table.column_names.index("sha256")
    write_shard_parquet(path, table.set_column(place, "sha256", [sums]))
    with pytest.raises(InputError, match="parquet: the row of 000000000005 describes other media"):
        verify_shards(VerifyShards(dataset=dataset))
    repair(dataset)
    assert read_shard_parquet(path)["sha256"].equals(table["sha256"])
    verify_shards(VerifyShards(dataset=dataset))


def test_flipped_minima_in_a_parquet_of_an_earlier_version_are_found(intact, dataset):
    """Flips each bit of the recorded maximum of a column, by which a reader would skip rows."""
    as_written_before(dataset)
    path = dataset / "00000001.parquet"
    content = path.read_bytes()
    start = content.rindex((24).to_bytes(4, "little"))  # the greatest height
    for bit in range(4):
        damaged = bytearray(content)
        damaged[start] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"footer: it contradicts the rows of column height"):
            verify_shards(VerifyShards(dataset=dataset))
    repair(dataset)
    assert files_of(dataset) == files_of(intact)


@pytest.mark.parametrize("is_sealed", [True, False])
@pytest.mark.parametrize("has_parquet", [True, False])
def test_a_repaired_shard_of_another_dataset_is_not_taken_in(
    dataset, tmp_path, is_sealed, has_parquet
):
    """Counts of damaged samples do not show that a shard is the work of an interrupted repair."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.toy_shards.jpeg", lambda number: jpeg(number + 100))
        other = write_toy_dataset(tmp_path / "other")
    tar = other / "00000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    repair(other)
    if not is_sealed:
        as_written_before(dataset)
    for suffix in SUFFIXES[: 3 if has_parquet else 2]:
        shutil.copy(other / f"00000001.{suffix}", dataset)
    before = {name: each for name, each in files_of(dataset).items() if name[:8] == "00000001"}
    expected = "lost: 3" if has_parquet else "lost: 3: 000000000003, 000000000004"
    with pytest.raises(InputError, match=expected):
        repair(dataset)
    assert files_of(dataset).items() >= before.items()


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("lost", range(3))
def test_swapped_tars_move_back_if_a_row_of_the_manifest_is_lost(intact, dataset, order, lost):
    permute(dataset, "tar", order)
    path = dataset / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[lost] = lines[lost][:200] + b"\n"
    path.write_bytes(b"".join(lines))
    repair(dataset)
    assert files_of(dataset) == files_of(intact)
