"""Averages of the weights in whole runs: stored, measured, read, and begun by a fork."""

import json
from functools import cache

import pytest
import torch

from data_prep.errors import InputError
from eval.models.encoder import load_any_model
from eval.models.model_source import find_model
from pretrain.checkpoint import find_checkpoint, load_model, read_model_state
from pretrain.config import PretrainConfig
from pretrain.run.fork import config_of_fork
from pretrain.warm_start.source import find_source
from tests.pretrain.run.test_fork import small_config, train_each
from tests.support.gloo_processes import run_in_processes

DECAY = 0.6
NUM_STEPS = 4
KINDS = ("plain", "ema")
EMA = {"ema": {"decay": DECAY, "warmup": False}}


@pytest.fixture(scope="module")
def runs(toy_data, tmp_path_factory):
    """Returns the folders of runs without and with averages, of a fork, and the refused fork."""
    folder = tmp_path_factory.mktemp("runs")
    run = {"checkpoint_every_steps": 1, "keep_checkpoints": 9}
    common = {
        "run": run,
        "schedule": {"num_steps": NUM_STEPS},
        "optimizer": {"frozen": ["*.projection.*"]},
    }
    held_out = {"image-text": {"dataset": toy_data / "colors", "batch_size": 8}}
    plain = small_config(toy_data, folder / "plain", **common)
    averages = common | {"optimizer": common["optimizer"] | EMA}
    averaged = small_config(toy_data, folder / "averaged", **averages)
    validation = {"ema": True, "every_steps": 2, "streams": held_out}
    values = averaged.model_dump(exclude_unset=True) | {"validation": validation}
    averaged = PretrainConfig.model_validate(values)
    forked, other = (
        config_of_fork(
            small_config(
                toy_data,
                folder / "plain",
                **common | {"run": run | {"fork": {"step": 2}}, "optimizer": optimizer},
            )
        )
        for optimizer in (common["optimizer"] | EMA, common["optimizer"] | {"name": "lion"})
    )
    [errors] = run_in_processes(1, train_each, plain, averaged, forked, other)
    assert errors[:3] == [None, None, None]
    return plain.run.folder, averaged.run.folder, forked.run.folder, errors[3]


@cache
def state(folder, step, weights="plain"):
    return read_model_state(folder / f"checkpoints/step_{step:08d}", weights=weights)


@pytest.mark.slow
def test_averages_follow_the_weights_and_change_nothing_else(runs):
    plain, averaged, *_ = runs
    for step in range(1, NUM_STEPS + 1):
        weights, averages = state(averaged, step), state(averaged, step, "ema")
        assert all(torch.equal(weights[n], each) for n, each in state(plain, step).items())
        for name, values in averages.items():
            if ".projection." in name or not values.is_floating_point():  # frozen, and buffers
                assert torch.equal(values, weights[name]), name
            elif step > 1:
                expected = DECAY * state(averaged, step - 1, "ema")[name]
                expected = expected + (1 - DECAY) * weights[name]
                torch.testing.assert_close(values, expected)
    assert any(not torch.equal(averages[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_averages_are_validated_next_to_the_weights(runs):
    rows = [json.loads(r) for r in (runs[1] / "metrics/0001.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "validation" in row]
    assert [row["step"] for row in measured] == [2, 4]
    for row in measured:
        assert row["validation"].keys() == row["validation_ema"].keys() == {"image-text/image-text"}
        assert row["validation"] != row["validation_ema"]


@pytest.mark.slow
def test_a_fork_begins_averages_with_its_first_weights(runs):
    plain, _, forked, refused = runs
    first = state(forked, 2, "ema")
    assert all(torch.equal(first[name], each) for name, each in state(plain, 2).items())
    for name, values in state(forked, 3, "ema").items():
        if values.is_floating_point() and ".projection." not in name:
            expected = DECAY * first[name] + (1 - DECAY) * state(forked, 3)[name]
            torch.testing.assert_close(values, expected)
    assert "optimizer.name=lion: the run would continue with the moments of adamw" in refused


@pytest.mark.slow
def test_averages_are_read_wherever_a_model_is(runs):
    plain, averaged, *_ = runs
    expected = state(averaged, NUM_STEPS, "ema")
    evaluated = load_any_model(find_model(averaged, weights="ema"))
    assert evaluated.origin.weights == "ema"
    loaded = [
        load_model(averaged, weights="ema")[0].state_dict(),
        evaluated.model.state_dict(),
        find_source(str(averaged), where="", weights="ema").read(),
    ]
    for found in loaded:
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    origins = {load_any_model(find_model(averaged, weights=w)).origin.sha256 for w in KINDS}
    fingerprints = {find_source(str(averaged), where="", weights=w).fingerprint() for w in KINDS}
    assert len(origins) == len(fingerprints) == 2
    for read in (load_model, find_checkpoint, lambda run, weights: state(run, 1, weights)):
        with pytest.raises(InputError, match=r"trained without optimizer\.ema; use weights: plain"):
            read(plain, weights="ema")


def test_other_models_have_no_averages(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="weights=ema needs a checkpoint of Isopair"):
        find_model(tmp_path, weights="ema")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.image\.start\.from=.*remove `weights`"):
        find_source(str(file), where="model.image.start.from", weights="ema")
