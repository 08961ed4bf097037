"""The order law on real files: what a step holds depends on the config alone."""

import copy
import itertools
import os
import pickle
import shutil
import signal
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.media.decode import decode_image
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import captions_of
from data_prep.storage import retry
from pretrain.data.loader_process import LoaderProcess
from pretrain.data.loaders import start_loader
from pretrain.model.clip_tokenizer import ClipTokenizer
from pretrain.model.tokenizer import build_tokenizer
from pretrain.sampling.order import format_digest
from pretrain.settings.data import Loading
from pretrain.training.assembly import open_step_loader
from tests.support.toy_run import COLORS, toy_config

WORLDS = (1, 2, 3, 4, 7, 8)
# The training process itself, and a loader process with 1 and 3 threads.
LOADINGS = (Loading(num_workers=0), Loading(num_workers=1), Loading(num_workers=3))


@pytest.fixture(scope="module")
def config(toy_data, tmp_path_factory):
    return toy_config(toy_data, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tokenizer(config):
    return build_tokenizer(config.model.text)


@pytest.fixture
def loader(config, tokenizer):
    return open_step_loader(config, tokenizer, rank=0, world_size=1)


def load_steps(config, tokenizer, loading, *, world_size, first_step, last_step):
    """Returns [steps] {stream: {tensor: of the global batch}}, as some ranks load them."""
    of_ranks = []
    for rank in range(world_size):
        loader = open_step_loader(config, tokenizer, rank=rank, world_size=world_size)
        with start_loader(loading) as load:
            steps = load(loader, first_step=first_step, last_step=last_step)
            of_ranks.append([copy.deepcopy(batch) for batch in steps])
    return [joined([steps[number] for steps in of_ranks]) for number in range(len(of_ranks[0]))]


def joined(batches):
    """Joins the batches of all ranks into the global batch of a step."""
    assert len({batch.step for batch in batches}) == 1
    step = {}
    for name in batches[0].streams:
        parts = [batch.streams[name] for batch in batches]
        num_rows = [len(part) for part in parts]
        if sum(num_rows):
            slots = [sum(num_rows[:rank]) for rank in range(len(parts))]
            assert [part.first_slot for part in parts] == slots
        step[name] = {
            f"{view}.{key}": torch.cat([part.views[view].tensors[key] for part in parts])
            for view, each in parts[0].views.items()
            for key in each.tensors
        }
        step[name]["digest"] = format_digest(sum(part.digest for part in parts))
        step[name]["num_read"] = sum((part.num_read for part in parts), start=Counter())
    return step


def assert_same_steps(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name, values in other.items():
            for key, value in values.items():
                is_same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
                assert is_same(one[name][key], value), (name, key)


@pytest.fixture(scope="module")
def expected_steps(config, tokenizer):
    """Returns steps 0 to 12 as one process reads them; colors and tones end epochs in them."""
    steps = load_steps(config, tokenizer, LOADINGS[0], world_size=1, first_step=0, last_step=12)
    epochs = {key for step in steps for stream in step.values() for key in stream["num_read"]}
    assert {("colors", 0), ("colors", 1), ("tones", 0), ("tones", 1)} <= epochs
    return steps


@pytest.mark.parametrize("loading", LOADINGS, ids=lambda each: f"{each.num_workers} threads")
@pytest.mark.parametrize("world_size", WORLDS)
def test_order_pixels_sounds_and_tokens_do_not_depend_on_ranks_and_workers(
    config, tokenizer, expected_steps, loading, world_size
):
    """Compares steps across an epoch's end, some of them after a stop with other settings."""
    first_step = 0 if world_size % 2 else 5
    steps = load_steps(
        config, tokenizer, loading, world_size=world_size, first_step=first_step, last_step=12
    )
    assert_same_steps(steps, expected_steps[first_step:])


class PythonTokenizer(ClipTokenizer):
    """A slow tokenizer, which fails where it is called in another than the main thread."""

    is_fast = False

    def __call__(self, texts, context_length=None):
        assert threading.current_thread() is threading.main_thread()
        return super().__call__(texts, context_length)


class FailingTokenizer(PythonTokenizer):
    def __call__(self, texts, context_length=None):
        raise KeyError("no such word")


@pytest.mark.parametrize("loading", LOADINGS[1:], ids=lambda each: f"{each.num_workers} threads")
def test_a_slow_tokenizer_runs_in_the_main_thread_and_gives_the_same_steps(
    config, expected_steps, loading
):
    slow = build_tokenizer(config.model.text)
    slow.backend = PythonTokenizer(context_length=slow.context_length)
    steps = load_steps(config, slow, loading, world_size=2, first_step=0, last_step=12)
    assert_same_steps(steps, expected_steps)


def test_an_error_of_a_slow_tokenizer_ends_loading(config):
    slow = build_tokenizer(config.model.text)
    slow.backend = FailingTokenizer(context_length=slow.context_length)
    loader = open_step_loader(config, slow, rank=0, world_size=1)
    with start_loader(LOADINGS[1]) as load, pytest.raises(RunError, match="no such word"):
        list(load(loader, first_step=0, last_step=6))


def test_a_step_far_ahead_is_found_without_those_before_it(config, tokenizer, monkeypatch):
    """Reads step ten million alone: resuming is calling a function."""
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
    reads = []
    for stream in loader.readers.values():
        for reader in stream.sources:
            read = reader.dataset.read_sample
            monkeypatch.setattr(
                reader.dataset,
                "read_sample",
                lambda n, read=read, **own: (reads.append(n), read(n, **own))[1],
            )
    batch = loader.load(10_000_000)
    assert len(reads) == sum(map(len, batch.streams.values())) == 24


def test_rows_do_not_depend_on_how_many_are_read_and_decoded_together(loader, monkeypatch):
    expected = joined([loader.load(5)])
    for pairs, num_bytes in ((1, 1 << 20), (3, 1 << 20), (16, 1)):
        monkeypatch.setattr("pretrain.data.stream_reader.GROUP_SAMPLES", pairs)
        monkeypatch.setattr("pretrain.data.stream_reader.GROUP_BYTES", num_bytes)
        assert_same_steps([joined([loader.load(5)])], [expected])


def test_a_batch_knows_which_of_its_captions_and_media_are_equal(config, loader):
    more = loader.readers["image-text"].sources[1]
    assert len(more.samples) == 25
    rows = [loader.load(step).streams["image-text"] for step in range(30)]
    tokens = torch.cat([each.views["text"].values for each in rows])
    caption_keys = torch.cat([each.views["text"].keys for each in rows])
    media_keys = torch.cat([each.views["image"].keys for each in rows])
    assert len(set(caption_keys.tolist())) == len({tuple(row) for row in tokens.tolist()})
    # 30 steps show each of the 83 + 25 pictures, most of them several times.
    assert len(set(media_keys.tolist())) == 108
    lengths = torch.cat([each.views["text"].lengths for each in rows])
    assert torch.equal(lengths, (tokens != 0).sum(dim=1))


def test_one_stream_per_step_leaves_the_others_empty_and_orders_each_as_if_alone(
    toy_data, tmp_path, config, tokenizer
):
    values = config.model_dump()
    values["streams"]["image-text"]["weight"] = 3.0
    chosen = type(config).model_validate(values | {"streams_per_step": "one"})
    steps = [
        open_step_loader(chosen, tokenizer, rank=0, world_size=1).load(step).streams
        for step in range(8)
    ]
    everything = open_step_loader(config, tokenizer, rank=0, world_size=1)
    for name, count in (("image-text", 6), ("audio-text", 2)):
        taken = [step[name] for step in steps if len(step[name])]
        assert len(taken) == count
        for number, batch in enumerate(taken):
            alone = everything.load(number).streams[name]
            for view, each in alone.views.items():
                assert torch.equal(batch.views[view].values, each.values)
    assert all(sum(len(stream) > 0 for stream in step.values()) == 1 for step in steps)


def test_a_segment_brings_a_new_source_and_leaves_earlier_steps_alone(
    toy_data, config, tokenizer, expected_steps
):
    values = config.model_dump()
    [colors, more] = values["streams"]["image-text"]["sources"]
    values["streams"]["image-text"]["sources"] = [colors, more]
    again = {**more, "name": "again", "weight": 5.0}
    values["streams"]["image-text"]["segments"] = [
        {"from_step": 4, "sources": [{**colors, "weight": 1.0}, again]}
    ]
    changed = type(config).model_validate(values)
    steps = load_steps(changed, tokenizer, LOADINGS[0], world_size=1, first_step=0, last_step=12)
    assert_same_steps(steps[:4], expected_steps[:4])
    later = sum((step["image-text"]["num_read"] for step in steps[4:]), start=Counter())
    assert {source for source, _ in later} == {"colors", "again"}


def test_readers_survive_pickling_after_use(loader):
    before = loader.load(1)
    after = pickle.loads(pickle.dumps(loader)).load(1)
    pixels = [each.streams["image-text"].views["image"].values for each in (before, after)]
    assert torch.equal(*pixels)


def test_every_picture_comes_with_one_of_its_own_captions(loader, tokenizer):
    reader = loader.readers["image-text"].sources[0]
    [tokens] = tokenizer([f"picture 3 is {COLORS[3]}"])
    assert torch.equal(reader.read_exactly(3)["text"][0], tokens)
    captions = {reader.decode_training(4, epoch=epoch).views["text"].part for epoch in range(20)}
    assert captions == {f"picture 4 is {COLORS[0]}", "also number 4"}
    drawn = loader.load(0).streams["image-text"].views["text"].values
    own = {
        tuple(tokenizer([caption])[0].tolist())
        for each in loader.readers["image-text"].sources
        for ordinal in range(len(each.samples))
        for caption in captions_of(each.dataset.read_sample(ordinal))
    }
    assert {tuple(row) for row in drawn.tolist()} <= own


# -------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("loading", LOADINGS[::2], ids=lambda each: f"{each.num_workers} threads")
def test_a_shard_that_disappears_stops_the_run_with_its_name(
    toy_data, tmp_path, tokenizer, loading
):
    shutil.copytree(toy_data, tmp_path / "data")
    config = toy_config(tmp_path / "data", tmp_path / "run")
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
    (tmp_path / "data" / "tones" / "00000000.tar").unlink()
    with start_loader(loading) as load, pytest.raises(InputError, match=r"tones/00000000\.tar"):
        list(load(loader, first_step=0, last_step=6))


@pytest.mark.parametrize("loading", LOADINGS[::2], ids=lambda each: f"{each.num_workers} threads")
def test_a_fault_that_may_pass_is_told_as_such(loader, monkeypatch, loading):
    def fails(*_, **__):
        raise OSError(110, "Connection timed out", "tones/00000001.tar")

    monkeypatch.setattr(retry, "pause", lambda seconds: None)
    monkeypatch.setattr(Dataset, "read_sample", fails)
    expected = r"cannot read a shard: .*timed out.*tones/00000001\.tar.*nothing was skipped"
    with start_loader(loading) as load, pytest.raises(RunError, match=expected):
        list(load(loader, first_step=0, last_step=6))


def test_a_loader_process_that_is_killed_ends_the_run_with_the_cause(loader):
    process = LoaderProcess(Loading(num_workers=2))
    try:
        steps = process.load(loader, first_step=0, last_step=10**6, is_pinned=False)
        next(steps)
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match="ended with SIGKILL"):
            for _ in steps:
                pass
    finally:
        process.close()


def test_a_loader_process_ignores_the_schedulers_signals_and_ends_with_its_parent(loader):
    process = LoaderProcess(Loading(num_workers=1))
    steps = process.load(loader, first_step=0, last_step=10**6, is_pinned=False)
    next(steps)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(process._process.pid, number)
    assert [batch.step for batch in itertools.islice(steps, 5)] == [1, 2, 3, 4, 5]
    process.close()
    assert not process._process.is_alive()


def test_dataset_reads_what_was_written(toy_data):
    dataset = Dataset(toy_data / "colors")
    assert len(dataset) == 83
    assert dataset.locate(40) == (1, 0)
    assert dataset.locate(82) == (2, 29)
    pixels = decode_image(dataset.read_sample(82).members["png"], "png")
    assert pixels.shape == (12, 10, 3)
    assert pixels.dtype == np.uint8
