"""Every damage to a node's cache, with the source whole: the samples are those without damage."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.dataset import MAX_DAMAGED_COPIES, Dataset
from data_prep.shards.folder import finish_dataset
from data_prep.shards.index import ShardIndex
from data_prep.shards.sample import BadShardError, CorruptSampleError
from data_prep.shards.subset import Subset
from data_prep.storage import atomic, retry
from data_prep.storage.sealed import DamagedFileError
from pretrain.cache import remote_shards
from pretrain.cache.eviction import SCHEDULE_FILE, parse_schedule
from pretrain.cache.files import bytes_of_part, new_part_name, remove, shard_of_part
from pretrain.cache.remote_shards import RemoteShards
from pretrain.cache.shard_cache import ShardCache
from pretrain.data.datasets import open_samples
from pretrain.settings.data import Cache
from tests.support.damage import edits, outcomes_of, single_bit_flips, truncations
from tests.support.shard_fetching import read_all
from tests.support.toy_modalities import SUBSETS, write_subsets
from tests.support.toy_shards import write_toy_dataset

PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "pictures"
    return write_toy_dataset(path, num_samples=8, samples_per_shard=4, has_parquet=False)


def test_a_selection_by_the_indexes_reports_no_damage(tmp_path, caplog):
    data = write_subsets(tmp_path / "data")
    cache = ShardCache(Cache(folder=tmp_path / "cache"), retries=0)
    samples = open_samples(f"file://{data}", subset=None, required=["scan", "audio"], cache=cache)
    assert len(samples) == sum({"scan", "audio"} <= set(subset) for subset in SUBSETS)
    assert caplog.messages == []


@pytest.fixture(scope="module")
def whole(folder):
    return read_all(Dataset(folder))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    monkeypatch.setattr(remote_shards, "flush_to_disk", lambda path: None)


def make_cache(tmp_path):
    return ShardCache(Cache(folder=tmp_path / "cache"), retries=1, host="node")


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path)


@pytest.fixture
def dataset(cache, folder):
    return cache.open_dataset(f"file://{folder}")


@pytest.fixture
def num_fetches(monkeypatch):
    """Returns a list that grows with each fetched shard."""
    fetched, fetch = [], RemoteShards._fetch

    def counting(shards, row, needed_in):
        fetched.append(row.name)
        fetch(shards, row, needed_in)

    monkeypatch.setattr(RemoteShards, "_fetch", counting)
    return fetched


def copy_of(dataset, suffix):
    """Returns the path of a file of shard 0 in the cache."""
    return dataset.tar_path(0).with_suffix(suffix)


# ------------------------------------------------------------------------------- every single place


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_flipped_bit_anywhere_in_a_copy_changes_no_sample(
    suffix, cache, dataset, folder, whole, num_fetches
):
    read_all(dataset)
    path, stored = copy_of(dataset, suffix), (folder / f"00000000{suffix}").read_bytes()
    index = ShardIndex.read(folder / "00000000.idx")
    is_data = bytearray(len(stored))
    for block, size, _ in index.table.reshape(-1, 3).tolist():
        is_data[block * 512 : block * 512 + size] = b"\1" * size
    num_damaged = 0
    # Headers, data, padding, the end of the archive, and each part of the index.
    for place in range(0, len(stored), 89 if suffix == ".tar" else 7):
        flipped = bytearray(stored)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        del num_fetches[:]
        reader = Dataset(dataset.folder, fetch_shard=dataset.fetch_shard)
        assert read_all(reader)[:4] == whole[:4], place
        # Bytes that no sample is read from do no harm, and cost no download.
        is_used = suffix == ".idx" or is_data[place]
        assert (len(num_fetches), path.read_bytes() == stored) == (is_used, is_used), place
        num_damaged += is_used
        assert reader.bad_shards == {}
    assert num_damaged >= 30


# --------------------------------------------------------------------------------- kinds of damage


def truncated(path):
    os.truncate(path, 600)


def emptied(path):
    os.truncate(path, 0)


def lengthened(path):
    path.write_bytes(path.read_bytes() + b"\0" * 512)


def with_a_zero_page(path):
    content = path.read_bytes()
    path.write_bytes(bytes(min(PAGE_BYTES, len(content))) + content[PAGE_BYTES:])


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def changed_in_place(path):
    with path.open("r+b") as file:  # the file that readers hold open
        file.seek(path.stat().st_size // 4)
        file.write(b"\xff" * (path.stat().st_size // 2))


def of_another_shard(path):
    size = path.stat().st_size
    path.write_bytes(path.with_stem("00000001").read_bytes()[:size].ljust(size, b"\0"))


def a_folder(path):
    path.unlink()
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "file.tar").write_bytes(b"1")


def missing(path):
    path.unlink()


DAMAGES = [truncated, emptied, lengthened, with_a_zero_page, zeroed, changed_in_place]
DAMAGES += [of_another_shard, a_folder, missing]


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damage_to_a_copy_changes_a_sample(
    damage, suffix, is_open, cache, dataset, whole, folder
):
    read_all(dataset)
    damage(copy_of(dataset, suffix))
    reader = dataset if is_open else cache.open_dataset(f"file://{folder}")
    for _ in range(2):
        assert read_all(reader) == whole
    assert reader.bad_shards == {}
    assert not list(dataset.folder.glob(".*.part"))


@pytest.mark.parametrize("errno_of_disk", [errno.EIO, errno.ESTALE])
def test_a_copy_that_cannot_be_read_is_fetched_again(
    errno_of_disk, dataset, whole, num_fetches, monkeypatch
):
    assert read_all(dataset) == whole
    unreadable = dataset.tar_path(0).stat().st_ino
    pread, sha256_of = os.pread, atomic.sha256_of

    def fail(status):
        if status.st_ino == unreadable:
            raise OSError(errno_of_disk, os.strerror(errno_of_disk))

    monkeypatch.setattr(os, "pread", lambda fd, *at: fail(os.fstat(fd)) or pread(fd, *at))
    monkeypatch.setattr(
        remote_shards, "sha256_of", lambda path: fail(path.stat()) or sha256_of(path)
    )
    del num_fetches[:]
    kept = dataset.tar_path(0).open("rb")  # so that its inode is not used again
    assert read_all(dataset) == whole
    kept.close()
    assert num_fetches == ["00000000"]


# ------------------------------------------------------------------------ a disk that damages all


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_disk_that_damages_every_copy_changes_no_sample_and_costs_few_downloads(
    suffix, dataset, whole, num_fetches, monkeypatch
):
    fetch = RemoteShards._fetch

    def fetch_and_damage(shards, row, needed_in):
        fetch(shards, row, needed_in)
        changed_in_place(shards.folder / f"{row.name}{suffix}")

    monkeypatch.setattr(RemoteShards, "_fetch", fetch_and_damage)
    for _ in range(3):
        assert read_all(dataset) == whole
    assert dataset.bad_shards == {}
    assert len(num_fetches) == 2 * (1 + MAX_DAMAGED_COPIES)  # two shards


def test_a_source_that_fails_meanwhile_stops_the_run_and_names_the_disk(
    dataset, folder, monkeypatch
):
    read_all(dataset)
    dataset._num_damaged[0] = MAX_DAMAGED_COPIES
    changed_in_place(copy_of(dataset, ".tar"))

    def fail(path):
        raise OSError(f"{path}: connection refused")

    monkeypatch.setattr(remote_shards, "open_binary", fail)
    expected = r"several copies of file://.*00000000\.tar .* refused.*set loading\.cache\.folder"
    with pytest.raises(OSError, match=expected):
        dataset.read_sample(1)
    assert dataset.bad_shards == {}


# ------------------------------------------------------------------------- a source that is bad


@pytest.fixture
def wrongly_indexed(folder, tmp_path):
    """Returns a dataset whose index holds a wrong CRC32, as its manifest records."""
    path = shutil.copytree(folder, tmp_path / "wrong")
    index = ShardIndex.read(path / "00000000.idx")
    table = index.table.copy()
    table[2, 0, 2] ^= 1
    (path / "00000000.idx").write_bytes(ShardIndex(**(vars(index) | {"table": table})).to_bytes())
    finish_dataset(path, ["00000000", "00000001"], media="image", preparation={})
    return path


def test_a_sample_that_is_bad_in_the_dataset_is_bad_and_costs_no_download(
    cache, wrongly_indexed, num_fetches, monkeypatch
):
    dataset = cache.open_dataset(f"file://{wrongly_indexed}")
    dataset.read_sample(0)
    hashed, sha256_of = [], atomic.sha256_of
    monkeypatch.setattr(
        remote_shards, "sha256_of", lambda path: hashed.append(path) or sha256_of(path)
    )
    for _ in range(3):
        with pytest.raises(CorruptSampleError, match="CRC32 mismatch"):
            dataset.read_sample(2)
    assert (len(num_fetches), len(hashed)) == (1, 2)  # its tar and index, once
    assert dataset.bad_shards == {}


@pytest.mark.parametrize("change", ["changed", "removed"])
def test_a_source_that_went_bad_is_named_when_a_copy_is_damaged(cache, folder, tmp_path, change):
    source = shutil.copytree(folder, tmp_path / "source")
    dataset = cache.open_dataset(f"file://{source}")
    read_all(dataset)
    changed_in_place(copy_of(dataset, ".tar"))
    if change == "changed":
        changed_in_place(source / "00000000.tar")
    else:
        (source / "00000000.tar").unlink()
    for _ in range(2):
        with pytest.raises(BadShardError, match=r"source/00000000\.tar: expected"):
            dataset.read_sample(1)
    assert list(dataset.bad_shards) == [0]


def test_a_cache_folder_that_is_removed_does_not_make_a_shard_bad(dataset, monkeypatch):
    fetch_file = remote_shards.fetch_file

    def fetch_into_nothing(url, part, **expected):
        shutil.rmtree(part.parent)
        fetch_file(url, part, **expected)

    monkeypatch.setattr(remote_shards, "fetch_file", fetch_into_nothing)
    with pytest.raises(OSError, match="this folder of the cache was removed"):
        dataset.read_sample(1)
    assert dataset.bad_shards == {}


# ------------------------------------------------------------------------------ the other files


def test_damaged_progress_is_left_out(cache):
    cache.publish_progress(0, 5)
    cache.publish_progress(1, 70_000)
    path = cache.folder / "progress" / "1"
    content = path.read_bytes()
    for damaged in (*single_bit_flips(content), *truncations(content), content + b"\0"):
        path.write_bytes(damaged)
        assert cache.least_progress([0, 1]) == 5
        assert cache.least_progress([1]) == 0
    cache.publish_progress(1, 3)  # over the damaged file, which is longer
    a_folder(path)
    assert cache.least_progress([0, 1]) == 5
    cache.publish_progress(1, 3)
    assert cache.least_progress([0, 1]) == 3


def test_a_damaged_schedule_counts_as_none(cache):
    schedule = {"a/0": 3.0, "a/1": float("inf"), "a/2": 0.25}
    cache.shards.write_schedule(schedule)
    assert cache.shards._read_schedule() == schedule
    path = cache.shards.folder / SCHEDULE_FILE
    content = path.read_bytes()
    damaged = [*single_bit_flips(content), *truncations(content[:-1])]
    found = list(outcomes_of(parse_schedule, damaged, error=DamagedFileError))
    assert [result for _, result in found if result != schedule] == []
    plain = [*edits(b'{"needed_in": {"a/0": 3.0}}'), b"\xff", b"{}"]
    for _, result in outcomes_of(parse_schedule, plain, error=DamagedFileError):
        assert all(type(value) in (int, float) for value in result.values())
    for damage in (emptied, a_folder):
        damage(path)
        assert cache.shards._read_schedule() == {}
    cache.shards.write_schedule(schedule)
    assert cache.shards._read_schedule() == schedule


def test_a_folder_in_the_place_of_a_file_is_replaced_and_the_reverse(tmp_path, folder, whole):
    subset = tmp_path / "all.subset"
    Subset.from_bitmap(Dataset(folder).info, np.ones(8, bool), preparation={}).write(subset)

    def read():
        cache = make_cache(tmp_path)
        samples = open_samples(f"file://{folder}", subset=f"file://{subset}", cache=cache)
        cache.shards.write_schedule({})
        cache.publish_progress(0, 1)
        return [samples.read_sample(rank).members for rank in range(8)]

    assert read() == whole
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    [manifest] = [path for path in files if path.name == "manifest.jsonl"]
    assert len(files) == 12  # two shards of three files, and room.lock, among them
    for path in files:
        a_folder(path)
        for name in ("00000000.tar", "00000001.tar"):  # so that they are fetched
            remove(manifest.parent / name)
        assert read() == whole, path
        assert path.is_file()
    shutil.rmtree(manifest.parent)
    manifest.parent.write_bytes(b"a file")
    assert read() == whole


def test_copies_are_flushed_before_they_get_their_names(dataset, monkeypatch):
    done, replace = [], Path.replace

    def record_replace(path, target):
        done.append(("named", target.name))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(
        remote_shards, "flush_to_disk", lambda path: done.append(("flushed", path.name))
    )
    dataset.read_sample(0)
    parts = [name for kind, name in done if kind == "flushed"]
    assert [kind for kind, _ in done] == ["flushed", "named"] * 2
    for part, (_, name) in zip(parts, done[1::2], strict=True):
        assert re.fullmatch(rf"\.{name}\.\d+\.[0-9a-f]{{16}}\.part", part)


def test_two_downloads_of_a_file_never_share_a_part():
    names = {new_part_name("a.b.tar", 7) for _ in range(100)}
    assert len(names) == 100
    assert {(shard_of_part(name), bytes_of_part(name)) for name in names} == {("a.b", 7)}
    for name in (".a.b.tar.7.part", ".a.b.idx.7.part"):  # of earlier versions
        assert (shard_of_part(name), bytes_of_part(name)) == ("a.b", 7)
    for name in (".a.lock", "a.tar", ".a.tar.x.part", ".a.tar.part", ".part", "a.tar.7.part"):
        assert (shard_of_part(name), bytes_of_part(name)) == (None, 0)
