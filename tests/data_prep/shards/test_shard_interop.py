"""Other people's readers find in our shards what we wrote, sample for sample."""

import functools
import io
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_prep.shards.dataset import Dataset
from tests.support.toy_shards import toy_sample, write_toy_dataset

NUM_SAMPLES = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_toy_dataset(tmp_path_factory.mktemp("toy") / "d", num_samples=NUM_SAMPLES)


@pytest.fixture
def open_clip_data(monkeypatch):
    """open_clip's own loader, which was written for webdataset before 1.0.

    Since 1.0 an empty dictionary stands at the end of each tar, on which open_clip's grouping ends
    with KeyError: 'fname'. Here it is not asked for; everything else is as installed.
    """
    data = pytest.importorskip("open_clip_train.data")
    without_marks = functools.partial(data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(data, "tar_file_expander", without_marks)
    return data


def tars_of(dataset):
    return [str(path) for path in sorted(dataset.glob("*.tar"))]


def braces_of(dataset):
    return str(dataset / f"{{00000000..{len(tars_of(dataset)) - 1:08d}}}.tar")


def check_samples(samples):
    """Checks that samples have the written keys and bytes, in order."""
    found = [
        (sample["__key__"], {name: sample[name] for name in sample if name[0] != "_"})
        for sample in samples
    ]
    assert found == [toy_sample(number) for number in range(NUM_SAMPLES)]


def decoded(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_webdataset_reads_every_member(dataset):
    webdataset = pytest.importorskip("webdataset")
    check_samples(webdataset.WebDataset(tars_of(dataset), shardshuffle=False))


def test_our_own_reader_reads_every_member(dataset):
    read = Dataset(dataset)
    samples = [read.read_sample(number) for number in range(len(read))]
    check_samples({"__key__": sample.key, **sample.members} for sample in samples)


def test_stages_of_open_clip_read_every_member(dataset, open_clip_data):
    urls = [{"url": url} for url in tars_of(dataset)]
    check_samples(open_clip_data.tarfile_to_samples_nothrow(urls))


@pytest.mark.parametrize("is_train", [True, False])
def test_the_loader_of_open_clip_yields_every_picture_with_its_caption(
    dataset, open_clip_data, is_train
):
    args = SimpleNamespace(
        train_data=braces_of(dataset),
        val_data=braces_of(dataset),
        train_num_samples=NUM_SAMPLES,
        val_num_samples=NUM_SAMPLES,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=1,
        workers=0,
        world_size=1,
    )
    info = open_clip_data.get_wds_dataset(
        args, np.asarray, is_train=is_train, tokenizer=lambda text: [text]
    )
    found = {texts[0]: np.asarray(images[0]) for images, texts in info.dataloader}
    samples = [toy_sample(number)[1] for number in range(NUM_SAMPLES)]
    assert found.keys() == {members["txt"].decode() for members in samples}
    for members in samples:
        assert np.array_equal(found[members["txt"].decode()], decoded(members["jpg"]))


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command here")
def test_the_tar_command_unpacks_every_member(dataset, tmp_path):
    for path in tars_of(dataset):
        subprocess.run(["tar", "-xf", path, "-C", str(tmp_path)], check=True)
    expected = {
        f"{key}.{name}": content
        for number in range(NUM_SAMPLES)
        for key, members in [toy_sample(number)]
        for name, content in members.items()
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
