import errno
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import BadShardError
from data_prep.shards.subset import KeptSamples, Subset
from data_prep.storage import file_transfer, retry
from data_prep.storage.failures import WrongContentError
from data_prep.storage.file_transfer import fetch_file
from pretrain.cache import remote_shards
from pretrain.cache.eviction import NoRoomError
from pretrain.cache.files import lock_path, locked
from pretrain.cache.remote_shards import RemoteShards
from pretrain.cache.shard_cache import ShardCache
from pretrain.data.datasets import open_samples
from pretrain.settings.data import Cache
from tests.support.shard_fetching import (
    announce_fetches,
    open_and_read_all,
    open_and_read_one,
    read_all,
)
from tests.support.toy_object_store import toy_object_store
from tests.support.toy_shards import write_toy_dataset
from tests.support.waiting import wait_until

SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")
NUM_SAMPLES, NUM_SHARDS = 24, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "pictures"
    return write_toy_dataset(path, num_samples=NUM_SAMPLES, samples_per_shard=4)


@pytest.fixture(scope="module")
def running_store(folder):
    with toy_object_store() as store:
        store.upload(folder, "pictures")
        yield store


@pytest.fixture
def store(running_store, monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    running_store.forget()
    return running_store


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(remote_shards, "flush_to_disk", lambda path: None)


URL = "s3://shards/pictures"


def make_cache(tmp_path, *, retries=3, max_bytes=None, host="node"):
    gigabytes = None if max_bytes is None else max_bytes / 1e9
    settings = Cache(folder=tmp_path / "cache", max_gigabytes=gigabytes)
    return ShardCache(settings, retries=retries, host=host)


def bytes_of_shards(dataset):
    return [row.tar_bytes + row.index_bytes for row in dataset.manifest]


def files_of(cache, pattern="*"):
    return sorted(p.name for p in cache.shards.folder.rglob(pattern) if p.is_file())


# -------------------------------------------------------------------------------------- reading


def test_samples_of_an_object_store_are_those_of_the_local_folder_and_come_once(
    store, folder, tmp_path
):
    dataset = make_cache(tmp_path).open_dataset(URL)
    assert read_all(dataset) == read_all(Dataset(folder))
    assert read_all(dataset) == read_all(Dataset(folder))
    for row in dataset.manifest:
        assert store.gets[f"{row.name}.tar"] == store.gets[f"{row.name}.idx"] == 1
        assert store.sent_bytes[f"{row.name}.tar"] == row.tar_bytes


@pytest.mark.parametrize("scheme", ["http", "file", "memory"])
def test_samples_come_through_any_kind_of_url(scheme, store, folder, tmp_path):
    url = {"http": f"{store.url}/shards/pictures", "file": f"file://{folder}"}.get(scheme)
    if url is None:
        url = "memory://pictures"
        fsspec.filesystem("memory").put(str(folder), "/pictures", recursive=True)
    dataset = make_cache(tmp_path).open_dataset(url)
    assert dataset.folder != folder
    assert read_all(dataset) == read_all(Dataset(folder))


def test_shards_that_an_earlier_run_fetched_are_used_again(store, tmp_path):
    read_all(make_cache(tmp_path).open_dataset(URL))
    store.forget()
    read_all(make_cache(tmp_path).open_dataset(URL))
    assert set(store.gets) == {"dataset.json", "manifest.jsonl"}


def test_a_file_of_the_wrong_size_in_the_cache_is_fetched_anew(store, folder, tmp_path):
    dataset = make_cache(tmp_path).open_dataset(URL)
    read_all(dataset)
    os.truncate(dataset.tar_path(2), 512)
    again = make_cache(tmp_path).open_dataset(URL)
    assert read_all(again) == read_all(Dataset(folder))


def test_a_changed_dataset_is_seen_and_gets_a_folder_of_its_own(store, folder, tmp_path):
    cache = make_cache(tmp_path)
    url = store.upload(folder, "changing")
    first = cache.open_dataset(url)
    other = write_toy_dataset(tmp_path / "other", num_samples=5)
    store.upload(other, "changing")
    second = cache.open_dataset(url)
    assert second.info.fingerprint == Dataset(other).info.fingerprint
    assert second.folder != first.folder
    assert read_all(second) == read_all(Dataset(other))


def test_tars_in_another_folder_than_their_indexes_are_found(store, folder, tmp_path):
    indexes = tmp_path / "a" / "indexes"
    indexes.mkdir(parents=True)
    tars = tmp_path / "a" / "tars"
    tars.mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.name == "dataset.json":
            content = content.replace(b'"tar_folder": "."', b'"tar_folder": "../tars"')
        ((tars if path.suffix == ".tar" else indexes) / path.name).write_bytes(content)
    store.upload(tmp_path / "a", "apart")
    dataset = make_cache(tmp_path).open_dataset("s3://shards/apart/indexes")
    assert read_all(dataset) == read_all(Dataset(folder))


def test_a_subset_behind_a_url_keeps_what_the_local_one_keeps(store, folder, tmp_path):
    bitmap = np.arange(NUM_SAMPLES) % 3 == 0
    (tmp_path / "subsets").mkdir()
    path = tmp_path / "subsets" / "third.subset"
    Subset.from_bitmap(Dataset(folder).info, bitmap, preparation={}).write(path)
    url = f"{store.upload(path.parent, 'subsets')}/third.subset"
    kept = open_samples(URL, subset=url, cache=make_cache(tmp_path))
    local = KeptSamples(folder, subset=path)
    assert kept.fingerprint == local.fingerprint
    assert [kept.read_sample(r).members for r in range(len(kept))] == [
        local.read_sample(r).members for r in range(len(local))
    ]


def test_a_plain_path_is_read_in_place_and_a_url_needs_a_cache(folder, tmp_path):
    cache = make_cache(tmp_path)
    assert open_samples(str(folder), subset=None, cache=cache).folder == folder
    with pytest.raises(InputError, match=r"file:///.*set loading\.cache\.folder"):
        open_samples(f"file://{folder}", subset=None)
    with pytest.raises(InputError, match=r"loading\.cache\.folder: expected a folder"):
        ShardCache(Cache(), retries=1)


def test_the_cache_and_its_datasets_can_be_pickled(store, folder, tmp_path):
    cache, dataset = pickle.loads(pickle.dumps((c := make_cache(tmp_path), c.open_dataset(URL))))
    assert read_all(dataset) == read_all(Dataset(folder))
    assert cache.shards.max_bytes > 0


def test_nodes_that_share_a_disk_keep_their_shards_apart(store, tmp_path):
    one, two = (make_cache(tmp_path, host=host).open_dataset(URL) for host in ("one", "two"))
    assert one.folder != two.folder


# --------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", [503, 429, "cut", "reset", "drip", "flip"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_faults_that_pass_leave_the_same_bytes_as_from_disk(fault, scheme, store, folder, tmp_path):
    url = URL if scheme == "s3" else f"{store.url}/shards/pictures"
    for name in ("dataset.json", "00000002.idx", "00000003.tar"):
        store.faults[name] = [fault]
    if fault == "flip":  # only what the manifest records is protected
        store.faults["dataset.json"] = []
    dataset = make_cache(tmp_path).open_dataset(url)
    assert read_all(dataset) == read_all(Dataset(folder))
    assert not any(store.faults.values())
    assert files_of(make_cache(tmp_path), "*.part") == []


def test_a_fault_that_stays_ends_as_an_error_that_may_pass_and_names_the_file(store, tmp_path):
    dataset = make_cache(tmp_path, retries=2).open_dataset(f"{store.url}/shards/pictures")
    store.faults["00000001.tar"] = [503] * 10
    with pytest.raises(OSError, match=r"00000001\.tar: .*503 \(tried 3 times\)"):
        dataset.read_sample(4)
    assert len(store.faults["00000001.tar"]) == 7
    assert dataset.bad_shards == {}
    store.forget()
    assert dataset.read_sample(4).members


@pytest.mark.parametrize("scheme", ["s3", "http", "file", "memory"])
def test_a_missing_shard_is_bad_at_once_and_named(scheme, store, folder, tmp_path):
    local = write_toy_dataset(tmp_path / "gone", num_samples=8, samples_per_shard=4)
    url = store.upload(local, "gone")
    store.delete(f"{url}/00000001.tar")
    (local / "00000001.tar").unlink()
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/gone/{path.name}": path.read_bytes() for path in local.iterdir()})
    urls = {"s3": url, "http": f"{store.url}/shards/gone", "memory": "memory://gone"}
    dataset = make_cache(tmp_path).open_dataset(urls.get(scheme, f"file://{local}"))
    assert dataset.read_sample(0).members
    with pytest.raises(BadShardError, match=r"gone/00000001\.tar: expected .* bytes .*not found"):
        dataset.read_sample(4)
    assert list(dataset.bad_shards) == [1]


@pytest.mark.parametrize("fault", [403, 401])
def test_a_refused_shard_is_bad_at_once(fault, store, tmp_path):
    dataset = make_cache(tmp_path).open_dataset(f"{store.url}/shards/pictures")
    store.faults["00000001.tar"] = [fault] * 9
    with pytest.raises(BadShardError, match=rf"00000001\.tar: .*access denied \(.*{fault}"):
        dataset.read_sample(4)
    assert len(store.faults["00000001.tar"]) == 8


@pytest.mark.parametrize("change", ["flipped", "cut"])
def test_a_shard_that_is_not_what_the_manifest_records_is_named(change, store, folder, tmp_path):
    local = write_toy_dataset(tmp_path / "changed", num_samples=8, samples_per_shard=4)
    content = bytearray((local / "00000001.tar").read_bytes())
    content[700] ^= 1
    (local / "00000001.tar").write_bytes(content if change == "flipped" else content[:-512])
    dataset = make_cache(tmp_path, retries=1).open_dataset(store.upload(local, "changed"))
    found = "expected sha256 .*, found" if change == "flipped" else "expected .* bytes, found"
    with pytest.raises(BadShardError, match=rf"changed/00000001\.tar: {found}"):
        dataset.read_sample(4)
    assert store.gets["00000001.tar"] == 2
    assert files_of(make_cache(tmp_path), "00000001.*") == []


@pytest.mark.parametrize("scheme", ["s3", "http", "memory"])
def test_on_a_disk_that_damages_every_copy_samples_are_read_at_the_url(
    scheme, store, folder, tmp_path, monkeypatch
):
    fsspec.filesystem("memory").put(str(folder), "/pictures", recursive=True)
    urls = {"http": f"{store.url}/shards/pictures", "memory": "memory://pictures"}
    dataset = make_cache(tmp_path).open_dataset(urls.get(scheme, URL))
    fetch = RemoteShards._fetch

    def fetch_and_damage(shards, row, needed_in):
        fetch(shards, row, needed_in)
        for suffix in (".tar", ".idx"):
            path = shards.folder / f"{row.name}{suffix}"
            path.write_bytes(bytes(path.stat().st_size))

    monkeypatch.setattr(RemoteShards, "_fetch", fetch_and_damage)
    local = Dataset(folder)
    for ordinal in (0, 3, 1):
        assert dataset.read_sample(ordinal).members == local.read_sample(ordinal).members
    assert dataset.bad_shards == {}
    store.sent_bytes.clear()
    caption = dataset.read_sample(2, fields=["txt"])
    assert caption == replace(local.read_sample(2, fields=["txt"]), shard=caption.shard)
    if scheme == "s3":
        assert 0 < store.sent_bytes["00000000.tar"] < local.manifest[0].tar_bytes


def test_a_dataset_or_bucket_that_is_not_there_is_an_input_error(store, tmp_path):
    for url in ("s3://nothing/here", "s3://shards/nothing", f"{store.url}/shards/nothing"):
        with pytest.raises(InputError, match=rf"{url}/dataset.json: expected a dataset"):
            make_cache(tmp_path).open_dataset(url)
    with pytest.raises(InputError, match="nosuch"):
        make_cache(tmp_path).open_dataset("nosuch://here")


def test_wrong_credentials_are_not_tried_again(store, tmp_path, monkeypatch):
    fsspec.filesystem("s3").clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    try:
        with pytest.raises(PermissionError, match=r"access denied.*credentials"):
            fetch_file(f"{URL}/dataset.json", tmp_path / "file", retries=5)
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_a_server_that_is_not_there_may_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9/x: .*tried 3 times") as caught:
        fetch_file("http://127.0.0.1:9/x", tmp_path / "file", retries=2)
    assert type(caught.value) is OSError


def test_content_is_checked_and_the_error_tells_both(folder, tmp_path):
    with pytest.raises(WrongContentError, match="expected 5 bytes, found"):
        fetch_file(f"file://{folder}/dataset.json", tmp_path / "f", retries=0, num_bytes=5)


def test_a_full_disk_is_named_with_what_to_set(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dataset = make_cache(tmp_path).open_dataset(f"file://{folder}")
    monkeypatch.setattr(file_transfer, "_transfer", fail)
    with pytest.raises(OSError, match=r"no room for .*max_gigabytes.*cache/node") as caught:
        dataset.read_sample(0)
    assert caught.value.errno == errno.ENOSPC


# ----------------------------------------------------------------------------------- at one time


def test_processes_and_threads_that_fetch_at_once_fetch_once(store, folder, tmp_path):
    cache = make_cache(tmp_path)
    barrier, asked = SPAWN.Barrier(3), SPAWN.Semaphore(0)
    processes = [
        SPAWN.Process(target=open_and_read_all, args=(cache, URL, barrier, asked), daemon=True)
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    store.is_slow.set()  # so that all of them meet at the first shard
    dataset = cache.open_dataset(URL)
    announce_fetches(dataset, asked)
    barrier.wait(600)
    with ThreadPoolExecutor(4) as threads:
        readings = [threads.submit(read_all, dataset) for _ in range(4)]
        for _ in range(6):  # two processes and four threads
            assert asked.acquire(timeout=600)
        store.is_slow.clear()
        assert all(r.result() == read_all(Dataset(folder)) for r in readings)
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert {n: c for n, c in store.gets.items() if n.endswith((".tar", ".idx"))} == {
        f"{row.name}.{suffix}": 1 for row in dataset.manifest for suffix in ("tar", "idx")
    }


def test_a_forked_process_fetches_although_its_parent_has_fetched(store, tmp_path):
    cache = make_cache(tmp_path)
    dataset = cache.open_dataset(URL)
    dataset.read_sample(0)
    process = FORK.Process(target=read_all, args=(dataset,), daemon=True)
    process.start()
    process.join(600)
    assert process.exitcode == 0
    assert store.gets["00000005.tar"] == 1


def test_what_a_killed_process_left_does_not_count_and_the_next_goes_on(store, folder, tmp_path):
    cache = make_cache(tmp_path)
    store.is_slow.set()
    process = SPAWN.Process(target=open_and_read_one, args=(cache, URL), daemon=True)
    process.start()
    wait_until(lambda: store.sent_bytes["00000000.tar"])
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    store.is_slow.clear()
    assert len(files_of(cache, "*.tar.*.part")) == 1
    assert files_of(cache, "*.tar") == []
    dataset = make_cache(tmp_path).open_dataset(URL)
    assert files_of(cache, "*.part") == []
    assert read_all(dataset) == read_all(Dataset(folder))


def test_the_parts_of_a_live_process_stay(folder, tmp_path):
    cache = make_cache(tmp_path)
    dataset = cache.open_dataset(f"file://{folder}")
    part = dataset.folder / ".00000000.tar.1000.part"
    with locked(lock_path(dataset.folder / "00000000")):
        part.touch()
        assert make_cache(tmp_path).shards.used_bytes() == 1000
        assert part.exists()
    assert make_cache(tmp_path).shards.used_bytes() == 0
    assert not part.exists()


def test_a_lock_excludes_threads_and_ends_with_its_holder(tmp_path):
    with locked(tmp_path / "lock") as is_locked:
        assert is_locked
        with locked(tmp_path / "lock", waits=False) as is_locked_twice:
            assert not is_locked_twice
    with locked(tmp_path / "lock", waits=False) as is_locked:
        assert is_locked


# ----------------------------------------------------------------------------------------- room


def test_shards_never_take_more_than_they_may_and_all_samples_come(folder, tmp_path):
    local = Dataset(folder)
    budget = sum(sorted(bytes_of_shards(local))[-2:])
    cache = make_cache(tmp_path, max_bytes=budget)
    dataset = cache.open_dataset(f"file://{folder}")
    for ordinal in range(len(local)):
        assert dataset.read_sample(ordinal).members == local.read_sample(ordinal).members
        assert 0 < cache.shards.used_bytes() <= budget


def test_the_shard_that_is_needed_last_is_evicted_and_unknown_ones_before_it(folder, tmp_path):
    sizes = bytes_of_shards(Dataset(folder))
    cache = make_cache(tmp_path, max_bytes=sum(sizes[:4]) + max(sizes))
    dataset = cache.open_dataset(f"file://{folder}")
    fetch, rows = dataset.fetch_shard, dataset.manifest
    for row in rows[:4]:
        fetch(row)
    names = [fetch.name_of(row) for row in rows]
    cache.shards.write_schedule({names[0]: 3.0, names[1]: 9.0, names[3]: 1.0})
    fetch(rows[4])
    assert cache.shards.held_names() == {names[0], names[1], names[2], names[3], names[4]}
    cache.shards.write_schedule({names[0]: 3.0, names[1]: 9.0, names[3]: 1.0, names[4]: 0.0})
    fetch(rows[5], needed_in=4.0)  # shard 2, which nobody has scheduled
    assert cache.shards.held_names() == {names[0], names[1], names[3], names[4], names[5]}
    cache.shards.write_schedule(dict(zip(names, [3.0, 9.0, 0.0, 1.0, 0.0, 4.0], strict=True)))
    fetch(rows[2], needed_in=4.0)  # shard 1, in 9
    assert cache.shards.held_names() == {names[0], names[2], names[3], names[4], names[5]}
    with pytest.raises(NoRoomError, match=r"no room for a shard of .*max_gigabytes"):
        fetch(rows[1], needed_in=5.0)
    fetch(rows[1])  # a reader waits for it: the shard needed last is evicted
    assert cache.shards.held_names() == {names[0], names[1], names[2], names[3], names[4]}


def test_a_shard_larger_than_the_cache_is_refused_with_the_numbers(folder, tmp_path):
    dataset = make_cache(tmp_path, max_bytes=2000).open_dataset(f"file://{folder}")
    with pytest.raises(NoRoomError, match=r"no room for a shard of .* may take 2e-06 GB"):
        dataset.read_sample(0)


def test_a_shard_that_is_taken_away_before_or_after_it_is_opened_comes_again(folder, tmp_path):
    cache = make_cache(tmp_path)
    dataset = cache.open_dataset(f"file://{folder}")
    local, fetch, num_fetches = read_all(Dataset(folder)), dataset.fetch_shard, 0

    def fetch_and_remove(row):
        nonlocal num_fetches
        fetch(row)
        num_fetches += 1
        if num_fetches % 4 > 0:
            cache.shards.remove(fetch.name_of(row))

    dataset.fetch_shard = fetch_and_remove
    for ordinal in range(NUM_SAMPLES):
        assert dataset.read_sample(ordinal).members == local[ordinal]
        shard, _ = dataset.locate(ordinal)
        cache.shards.remove(fetch.name_of(dataset.manifest[shard]))
    assert dataset.bad_shards == {}
    assert num_fetches >= 4 * NUM_SAMPLES


def test_readers_of_a_shard_that_is_always_taken_away_stop_with_an_error(folder, tmp_path):
    cache = make_cache(tmp_path)
    dataset = cache.open_dataset(f"file://{folder}")
    fetch, read_checked = dataset.fetch_shard, dataset._read_checked

    def take_away_and_read(*arguments):
        cache.shards.remove(fetch.name_of(dataset.manifest[0]))
        return read_checked(*arguments)

    dataset.read_sample(0)
    dataset._read_checked = take_away_and_read
    with pytest.raises(OSError, match=r"00000000\.tar: .* evicted \d times"):
        dataset.read_sample(0)


def test_readers_of_a_shard_that_is_taken_away_read_on(folder, tmp_path):
    cache = make_cache(tmp_path)
    dataset = cache.open_dataset(f"file://{folder}")
    local = read_all(Dataset(folder))
    stop = threading.Event()

    def take_away():
        while not stop.wait(0.002):
            for name in cache.shards.held_names():
                cache.shards.remove(name)

    thread = threading.Thread(target=take_away)
    thread.start()
    try:
        for nth in range(60):
            ordinal = nth * 7 % NUM_SAMPLES
            assert dataset.read_sample(ordinal).members == local[ordinal]
    finally:
        stop.set()
        thread.join()
    assert dataset.bad_shards == {}


def test_progress_is_the_least_of_the_ranks(tmp_path):
    cache = make_cache(tmp_path)
    assert cache.least_progress([0, 1]) == 0
    cache.publish_progress(0, 70_000)
    cache.publish_progress(1, 3)
    assert make_cache(tmp_path).least_progress([0, 1]) == 3
    cache.publish_progress(1, 1 << 40)
    assert cache.least_progress([0, 1]) == 70_000
