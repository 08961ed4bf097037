"""Runs that read from an object store: the same batches as from disk, whatever it does."""

import copy
import os
from contextlib import ExitStack

import pytest
import torch

from data_prep.errors import (
    InputError,
    RunError,
)
from eval.models.model_source import find_model
from pretrain.cache.node import check_room
from pretrain.checkpoint import load_model, newest_checkpoint, restore
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.store import open_store
from pretrain.config import PretrainConfig
from pretrain.data.loaders import start_loader
from pretrain.model.tokenizer import build_tokenizer
from pretrain.run.attempts import read_metrics
from pretrain.settings.data import Loading
from pretrain.training.assembly import open_step_loader
from tests.support.gloo_processes import WorkerFailedError, run_in_processes
from tests.support.toy_object_store import CREDENTIALS, toy_object_store
from tests.support.toy_run import toy_config
from tests.support.toy_state import ToyEngine, writer_of

STEPS = {"num_steps": 10, "warmup_steps": 2}
SOURCES = ("colors", "more_colors", "tones")
NUM_SHARDS = 6


@pytest.fixture(scope="module")
def store(toy_data):
    with toy_object_store() as store:
        for name in SOURCES:
            store.upload(toy_data / name, name)
        yield store


@pytest.fixture(autouse=True)
def _fresh(store):
    store.forget()


def remote_config(config, tmp_path, **loading):
    """Returns the config of the same run with its datasets in the store."""
    values = config.model_dump()
    for stream in values["streams"].values():
        for source in stream["sources"]:
            source["dataset"] = f"s3://shards/{source['name']}"
    cache = {"folder": tmp_path / "cache", "max_gigabytes": 0.01}
    values["loading"] |= {"retries": 3, "cache": cache} | loading
    values["run"]["folder"] = tmp_path / "run"
    return PretrainConfig.model_validate(values)


def loader_of(config, *, rank=0, world_size=1):
    return open_step_loader(
        config,
        build_tokenizer(config.model.text),
        rank=rank,
        world_size=world_size,
        node_ranks=range(world_size),
    )


def assert_same_batches(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name, pairs in other.streams.items():
            for view, each in pairs.views.items():
                assert torch.equal(one.streams[name].views[view].values, each.values)
                assert torch.equal(one.streams[name].views[view].keys, each.keys)
            assert one.streams[name].bad_samples == []


@pytest.mark.parametrize(
    "loading",
    [
        {"num_workers": 0},
        {"num_workers": 2},
    ],
    ids=["itself", "threads"],
)
def test_batches_are_those_from_disk_through_every_fault_that_passes(
    toy_data, store, tmp_path, loading
):
    config = toy_config(toy_data, tmp_path / "run")
    local = [loader_of(config, rank=1, world_size=2).load(step) for step in range(8)]
    store.faults["colors/00000000.tar"] = [503, "cut", "drip"]
    store.faults["tones/00000001.tar"] = ["reset", "flip"]
    store.faults["more_colors/00000000.idx"] = [500]
    with start_loader(Loading(**loading)) as load:
        loader = loader_of(remote_config(config, tmp_path, **loading), rank=1, world_size=2)
        batches = list(map(copy.deepcopy, load(loader, first_step=0, last_step=8)))
    assert_same_batches(batches, local)


def test_the_ranks_of_a_node_fetch_each_shard_once_and_say_how_far_they_are(
    toy_data, store, tmp_path
):
    config = toy_config(toy_data, tmp_path / "run")
    with ExitStack() as stack:  # before this process uses the store: forks do not survive that
        loads = [stack.enter_context(start_loader(Loading(num_workers=2))) for _ in range(2)]
        for rank, load in enumerate(loads):
            local = loader_of(config, rank=rank, world_size=2)
            loader = loader_of(remote_config(config, tmp_path), rank=rank, world_size=2)
            batches = list(map(copy.deepcopy, load(loader, first_step=0, last_step=12)))
            assert_same_batches(batches, [local.load(step) for step in range(12)])
    tars = {name: count for name, count in store.gets.items() if name.endswith(".tar")}
    # Shards of the three sources share their names: 00000000 to 00000002.
    assert sum(tars.values()) == NUM_SHARDS
    assert 9 <= loader.cache.least_progress([0, 1]) <= 12  # the last steps need no word


def test_a_shard_that_is_not_in_the_store_stops_the_run_with_its_name(toy_data, store, tmp_path):
    config = toy_config(toy_data, tmp_path / "run")
    for name in SOURCES:
        store.upload(toy_data / name, f"incomplete/{name}")
    store.delete("s3://shards/incomplete/tones/00000001.tar")
    values = remote_config(config, tmp_path).model_dump()
    [tones] = values["streams"]["audio-text"]["sources"]
    tones["dataset"] = "s3://shards/incomplete/tones"
    expected = r"s3://shards/incomplete/tones/00000001\.tar"
    with start_loader(Loading(num_workers=2)) as load, pytest.raises(InputError, match=expected):
        loader = loader_of(PretrainConfig.model_validate(values))
        list(load(loader, first_step=0, last_step=6))


def test_a_store_that_stays_away_stops_the_run_and_nothing_is_substituted(
    toy_data, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own tries come on top
    config = toy_config(toy_data, tmp_path / "run")
    for name in SOURCES:
        store.faults[f"{name}/00000000.tar"] = [503] * 200
    with (
        start_loader(Loading(num_workers=2)) as load,
        pytest.raises(RunError, match=r"cannot read a shard: .*00000000\.tar.*nothing was skipped"),
    ):
        loader = loader_of(remote_config(config, tmp_path, retries=1))
        list(load(loader, first_step=0, last_step=6))


def test_a_dataset_that_cannot_be_reached_at_the_start_is_told_as_such(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path / "run")
    values = remote_config(config, tmp_path, retries=0).model_dump()
    [tones] = values["streams"]["audio-text"]["sources"]
    tones["dataset"] = "http://127.0.0.1:9/tones"
    with pytest.raises(RunError, match=r"cannot open a dataset now: http://127\.0\.0\.1:9/tones/d"):
        loader_of(PretrainConfig.model_validate(values))


def test_a_cache_that_cannot_hold_two_windows_is_refused_with_the_numbers(
    toy_data, store, tmp_path
):
    config = toy_config(toy_data, tmp_path / "run")
    cache = {"folder": tmp_path / "cache", "max_gigabytes": 1e-5}
    loader = loader_of(remote_config(config, tmp_path, cache=cache))
    expected = "two windows of loading.window=16 samples in each of the 8 lanes of this node: 0.00"
    with pytest.raises(InputError, match=expected):
        check_room(loader.node)


def train_from_store(config, environment):
    os.environ |= environment
    from pretrain.train import pretrain

    pretrain(config)


def test_a_run_from_the_store_is_the_run_from_disk(toy_data, store, tmp_path, monkeypatch):
    """Runs the command with two processes that share the cache, through a few faults, and resumes
    with one process from a checkpoint in the store."""
    config = toy_config(toy_data, tmp_path / "local", schedule=STEPS)
    run_in_processes(1, train_from_store, config, {})
    store.faults["colors/00000001.tar"] = [503, "cut"]
    environment = CREDENTIALS | {"AWS_ENDPOINT_URL_S3": store.url}
    remote = remote_config(config, tmp_path, num_workers=2)
    kept = {"checkpoint_folder": "s3://shards/run", "keep_checkpoints": 1}
    remote = remote.model_copy(update={"run": remote.run.model_copy(update=kept)})
    stopping = remote.run.model_copy(update={"stop_after_step": 6})
    run_in_processes(2, train_from_store, remote.model_copy(update={"run": stopping}), environment)
    run_in_processes(1, train_from_store, remote, environment)
    rows, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "local")
    assert [row["data_digest"] for row in rows] == [row["data_digest"] for row in expected]
    for row, truth in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(truth["loss"], rel=1e-4)
    tars = sum(count for name, count in store.gets.items() if name.endswith(".tar"))
    assert tars == NUM_SHARDS
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    expected_state = load_model(tmp_path / "local")[0].state_dict()
    for folder in ("s3://shards/run/step_00000010_attempt_0002", tmp_path / "run"):
        for name, values in load_model(folder)[0].state_dict().items():
            torch.testing.assert_close(values, expected_state[name], rtol=1e-3, atol=2e-5)
    assert find_model(tmp_path / "run").library == "isopair"  # as the commands of eval do
    without_cache = remote_config(config, tmp_path, cache={})
    with pytest.raises(WorkerFailedError, match=r"s3://shards/colors.*set loading\.cache\.folder"):
        run_in_processes(1, train_from_store, without_cache, environment)


def test_in_an_object_store_a_checkpoint_counts_when_its_record_is_there(store, caplog):
    checkpoints = open_store("s3://shards/checkpoints")

    def write(step, attempt):
        writer = writer_of(engine, ".", store=checkpoints, attempt=attempt, keep_checkpoints=2)
        writer.save(RunState(step, step))
        writer.finish()
        writer.refuse_failure()
        return [(each.step, each.attempt) for each in checkpoints.checkpoints()]

    engine = ToyEngine()
    for step in (1, 2, 3):
        listed = write(step, "0001")
    assert listed == [(3, "0001"), (2, "0001")]
    store.delete("s3://shards/checkpoints/step_00000003_attempt_0001/checkpoint.json")
    model = "step_00000002_attempt_0001/model-00001-of-00001.safetensors"
    other = ToyEngine(seed=1)
    newest = newest_checkpoint(checkpoints)
    restore(other, newest)
    assert newest.record.state.step == 2
    assert "step_00000003_attempt_0001/checkpoint.json: missing" in caplog.text
    assert all(map(torch.equal, other.values(), engine.values()))
    # The next attempt deletes what was never finished, and the same step may be written again.
    assert write(3, "0002") == [(3, "0002"), (2, "0001")]
    store.faults[model] = ["flip", 503]  # which pass
    assert newest_checkpoint(checkpoints).record.state.step == 3
    store.client.put_object(Bucket="shards", Key=f"checkpoints/{model}", Body=b"damaged")
    store.delete("s3://shards/checkpoints/step_00000003_attempt_0002/checkpoint.json")
    assert newest_checkpoint(checkpoints) is None
    assert f"{model}: sha256 is" in caplog.text
    assert "none of 2 checkpoints is valid" in caplog.text
