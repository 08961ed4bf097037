import os

import pytest

# Before torch is imported: tests run on the CPU, one thread per process, and report to nobody.
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
}

# Its plugin imports it when tests end; Python 3.11.7's parser can fail that late (gh-106905).
import hypothesis

from tests.support.toy_run import write_toy_data

# How long an example takes says more of the machine than of the code, unless a test says otherwise.
hypothesis.settings.register_profile("isopair", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("isopair")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Folder with the datasets colors, more_colors and tones."""
    return write_toy_data(tmp_path_factory.mktemp("toy") / "data")


def pytest_collection_modifyitems(items):
    """Keeps the tests of a file on one worker, unless they name a group of their own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
