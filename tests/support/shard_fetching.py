"""Targets of other processes in tests of the shard cache; the module imports nothing."""


def read_all(dataset):
    """Returns the members of all samples."""
    return [dataset.read_sample(ordinal).members for ordinal in range(len(dataset))]


def announce_fetches(dataset, asked):
    """Makes a dataset release a semaphore each time that it asks for a shard."""
    fetch = dataset.fetch_shard

    def fetch_shard(*arguments):
        asked.release()
        return fetch(*arguments)

    dataset.fetch_shard = fetch_shard


def open_and_read_all(cache, url, barrier, asked):
    dataset = cache.open_dataset(url)
    announce_fetches(dataset, asked)
    barrier.wait()
    assert read_all(dataset) == read_all(cache.open_dataset(url))


def open_and_read_one(cache, url):
    cache.open_dataset(url).read_sample(0)
