import shutil

import pytest

from tests.support.toy_shards import write_toy_dataset


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Returns a dataset of 8 images in 3 shards, which no test changes."""
    return write_toy_dataset(tmp_path_factory.mktemp("toy") / "dataset")


@pytest.fixture
def dataset(intact, tmp_path):
    """Returns a copy of `intact` to change."""
    return shutil.copytree(intact, tmp_path / "dataset")
