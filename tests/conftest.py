import os

import pytest

# Before torch is imported: tests run on the CPU, one thread per process, and report to nobody.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}

from toy_run import write_toy_data


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Folder with the datasets colors, more_colors and tones."""
    return write_toy_data(tmp_path_factory.mktemp("toy") / "data")
