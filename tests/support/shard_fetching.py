"""Targets of other processes in tests of the shard cache; the module imports nothing."""


def read_all(dataset):
    """Returns the members of all samples."""
    return [dataset.read_sample(ordinal).members for ordinal in range(len(dataset))]


def open_and_read_all(cache, url, barrier):
    dataset = cache.open_dataset(url)
    barrier.wait()
    assert read_all(dataset) == read_all(cache.open_dataset(url))


def open_and_read_one(cache, url):
    cache.open_dataset(url).read_sample(0)
