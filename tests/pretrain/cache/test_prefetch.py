import threading
import time

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import BadShardError
from data_prep.storage import retry
from pretrain.cache import prefetch, remote_shards
from pretrain.cache.eviction import CachedShards
from pretrain.cache.prefetch import ShardPrefetcher, check_cache
from pretrain.cache.schedule import bytes_of_two_windows, shard_uses
from pretrain.cache.shard_cache import ShardCache
from pretrain.data.datasets import open_samples
from pretrain.sampling.order import SourceOrder
from pretrain.settings.data import Cache
from tests.support.toy_object_store import toy_object_store
from tests.support.toy_shards import write_toy_dataset

LANES, WINDOW = 4, 3
NUM_SAMPLES, NUM_SHARDS = 98, 25


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
def store(running_store):
    running_store.forget()
    return running_store


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote_shards, "flush_to_disk", lambda path: None)
    monkeypatch.setattr(prefetch, "SECONDS_BETWEEN_LOOKS", 0.002)
    monkeypatch.setattr(retry, "pause", lambda seconds: None)


class Node:
    """The lanes of one node, which read one source, a sample per lane and step."""

    def __init__(self, url, tmp_path, *, lanes=range(LANES), max_bytes=None, ranks=(0,)):
        gigabytes = None if max_bytes is None else max_bytes / 1e9
        settings = Cache(folder=tmp_path / "cache", max_gigabytes=gigabytes)
        self.cache = ShardCache(settings, retries=1, host="node")
        self.samples = open_samples(url, subset=None, cache=self.cache)
        self.order = SourceOrder(
            "a", shard_sizes=self.samples.shard_sizes, lanes=LANES, window=WINDOW, seed=5
        )
        self.lanes = lanes
        self.prefetcher = ShardPrefetcher(
            self.cache,
            sources=[(self.order, self.samples)],
            lanes=lanes,
            ranks=ranks,
            positions_at=lambda step: [np.full(len(lanes), step)],
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.prefetcher.close()

    def read_step(self, step):
        """Returns [(ordinal, members)] of a step's samples."""
        lanes = np.array(self.lanes)
        _, ordinals = self.order.samples_at(lanes, np.full(len(lanes), step))
        return [(o, self.samples.dataset.read_sample(o).members) for o in ordinals.tolist()]

    def come_to(self, step):
        """Publishes a step, and waits until the prefetcher has done all that follows from it."""
        self.cache.publish_progress(0, step)
        windows = prefetch._windows_at(self.order, np.full(len(self.lanes), step))
        p, deadline = self.prefetcher, time.monotonic() + 600
        while True:
            with p._changed:
                is_planned = bool(p._windows) and np.array_equal(p._windows[0], windows)
                if is_planned and not p._wanted and not p._downloading:
                    return
            p.check()
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def held(self):
        """Returns the numbers of the shards in the cache."""
        return {int(name.rpartition("/")[2]) for name in self.cache.shards.held_names()}


def two_windows(folder, num_epochs=3):
    dataset = Dataset(folder)
    shard_bytes = np.array([row.tar_bytes + row.index_bytes for row in dataset.manifest])
    order = SourceOrder("a", shard_sizes=dataset.shard_sizes, lanes=LANES, window=WINDOW, seed=5)
    return max(
        bytes_of_two_windows(order, epoch, lanes=range(LANES), shard_bytes=shard_bytes)
        for epoch in range(num_epochs)
    )


@pytest.fixture
def local(folder):
    dataset = Dataset(folder)
    return [dataset.read_sample(ordinal).members for ordinal in range(NUM_SAMPLES)]


def test_an_ample_cache_fetches_each_shard_once_and_before_it_is_read(store, local, tmp_path):
    with Node("s3://shards/pictures", tmp_path) as node:
        node.prefetcher.start()
        read = set()
        for step in range(2 * node.order.lane_length):
            node.come_to(step)
            before = dict(store.gets)
            for ordinal, members in node.read_step(step):
                assert members == local[ordinal]
                read.add(ordinal)
            assert store.gets == before
    assert len(read) >= LANES * node.order.lane_length
    assert {store.gets[f"{row.name}.tar"] for row in node.samples.dataset.manifest} == {1}
    sent = sum(store.sent_bytes[f"{row.name}.tar"] for row in node.samples.dataset.manifest)
    assert sent == node.samples.info.tar_bytes


def test_nothing_beyond_the_next_window_is_fetched(folder, tmp_path):
    with Node(f"file://{folder}", tmp_path, lanes=range(1, 3)) as node:
        node.prefetcher.start()
        for step in (0, 5, node.order.lane_length - 1):
            held = node.held()
            node.come_to(step)
            uses = shard_uses(node.order, np.full(2, step), lanes=range(1, 3))
            wanted = set(np.flatnonzero(uses.is_current | uses.is_next).tolist())
            assert node.held() == held | wanted


def test_in_room_for_two_windows_all_comes_in_time_and_the_order_says_what_goes(
    folder, local, tmp_path, monkeypatch
):
    budget, taken, num_taken = two_windows(folder), [], 0
    remove = CachedShards.remove

    def note(shards, name):
        taken.append((int(name.rpartition("/")[2]), node.held()))
        remove(shards, name)

    monkeypatch.setattr(CachedShards, "remove", note)
    with Node(f"file://{folder}", tmp_path, max_bytes=budget) as node, MostUsed(node) as peaks:
        node.prefetcher.start()
        for step in range(2 * node.order.lane_length):
            taken.clear()
            node.come_to(step)
            uses = shard_uses(node.order, np.full(LANES, step), lanes=node.lanes)
            num_taken += len(taken)
            for number, held in taken:
                assert not uses.is_current[number]
                assert not uses.is_next[number]
                assert uses.next_uses[number] == max(uses.next_uses[list(held)])
            taken.clear()
            for ordinal, members in node.read_step(step):
                assert members == local[ordinal]
            assert taken == []
    assert num_taken > NUM_SHARDS
    assert budget / 2 < max(peaks) <= budget


class MostUsed:
    """Samples the bytes of a node's shards all the time."""

    def __init__(self, node):
        self.shards, self.peaks, self.stopped = node.cache.shards, [0], threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self):
        while not self.stopped.wait(0.001):
            files = [
                p for p in self.shards.folder.rglob("*.*") if ".idx" in p.name or ".tar" in p.name
            ]
            sizes = []
            for path in files:
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    break  # the folder changed meanwhile, so the sum would mean nothing
            else:
                self.peaks.append(sum(sizes))

    def __enter__(self):
        self.thread.start()
        return self.peaks

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


def test_readers_that_run_ahead_of_the_prefetcher_lose_nothing(folder, local, tmp_path):
    with Node(f"file://{folder}", tmp_path, max_bytes=two_windows(folder)) as node:
        node.prefetcher.start()
        for step in range(2 * node.order.lane_length):
            node.cache.publish_progress(0, step)
            for ordinal, members in node.read_step(step):
                assert members == local[ordinal]
        node.prefetcher.check()
        assert node.cache.shards.used_bytes() <= node.cache.shards.max_bytes


def test_the_slowest_rank_of_the_node_counts(folder, tmp_path):
    with Node(f"file://{folder}", tmp_path, ranks=(0, 1)) as node:
        node.cache.publish_progress(1, 1000)  # by an earlier run
        node.prefetcher.start(first_step=2)
        node.cache.publish_progress(1, 20)
        node.come_to(2)
        uses = shard_uses(node.order, np.full(LANES, 2), lanes=node.lanes)
        assert node.held() == set(np.flatnonzero(uses.is_current | uses.is_next).tolist())


def test_a_bad_shard_is_left_to_its_reader_and_not_fetched_again(store, folder, tmp_path):
    url = store.upload(folder, "holed")
    store.delete(f"{url}/00000007.tar")
    with Node(f"{store.url}/shards/holed", tmp_path) as node:
        node.prefetcher.start()
        for step in range(node.order.lane_length):
            node.come_to(step)
        node.prefetcher.check()
        assert node.held() >= set(range(NUM_SHARDS)) - {7}
        assert store.gets["00000007.tar"] == 1
        with pytest.raises(BadShardError, match=r"holed/00000007\.tar"):
            node.samples.dataset.read_sample(7 * 4)


def test_a_fault_that_stays_is_raised_by_check(store, tmp_path):
    with Node(f"{store.url}/shards/pictures", tmp_path) as node:
        store.faults[".tar"] = [503] * 1000
        node.prefetcher.start()
        deadline = time.monotonic() + 600
        with pytest.raises(OSError, match=r"\.tar: .*503 \(tried 2 times\)"):
            while time.monotonic() < deadline:
                node.prefetcher.check()
                time.sleep(0.01)


def test_sources_that_are_read_in_place_are_left_alone(folder, tmp_path):
    with Node(str(folder), tmp_path, max_bytes=1) as node:
        check_cache(node.cache, [(node.order, node.samples)], lanes=node.lanes)
        node.prefetcher.start()
        assert node.prefetcher._threads == []
        assert node.held() == set()


def test_a_cache_without_room_for_two_windows_is_refused_with_the_numbers(folder, tmp_path):
    budget = two_windows(folder, num_epochs=2)
    fits = Node(f"file://{folder}", tmp_path / "a", max_bytes=budget)
    check_cache(fits.cache, [(fits.order, fits.samples)], lanes=fits.lanes)
    tight = Node(f"file://{folder}", tmp_path / "b", max_bytes=budget - 1)
    with pytest.raises(InputError) as caught:
        check_cache(tight.cache, [(tight.order, tight.samples)], lanes=tight.lanes)
    message = str(caught.value)
    assert f"loading.window={WINDOW} samples in each of the {LANES} lanes of this node" in message
    assert f"{budget / 1e9:.6g} GB (a {budget / 1e9:.6g} GB)" in message
    assert "loading.cache.max_gigabytes" in message
    check_cache(tight.cache, [(tight.order, tight.samples)], lanes=range(1))  # on more nodes


def test_two_sources_of_one_dataset_share_its_shards(store, tmp_path):
    node = Node("s3://shards/pictures", tmp_path)
    other = SourceOrder("b", shard_sizes=node.samples.shard_sizes, lanes=LANES, window=50, seed=5)
    prefetcher = ShardPrefetcher(
        node.cache,
        sources=[(node.order, node.samples), (other, node.samples)],
        lanes=node.lanes,
        ranks=[0],
        positions_at=lambda step: [np.full(LANES, step), np.full(LANES, 3 * step)],
    )
    node.prefetcher = prefetcher
    with node:
        prefetcher.start()
        node.come_to(0)
        assert node.held() == set(range(NUM_SHARDS))
        assert {store.gets[f"{row.name}.tar"] for row in node.samples.dataset.manifest} == {1}
