"""Measured statistics of batch norm against direct computation, and runs with HTSAT."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.demo.sounds import SOUNDS, encode_sound, sound_caption, synthesise
from pretrain.checkpoint import find_checkpoint, read_model_state
from pretrain.config import PretrainConfig
from pretrain.data.first_samples import first_samples
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.run.attempts import read_metrics
from pretrain.run.model_sources import ModelSources
from pretrain.towers.blocks import blocks_of
from pretrain.towers.frozen_statistics import freeze_batch_norms
from pretrain.towers.measured_statistics import measure_statistics
from pretrain.training.assembly import build_training_tokenizer, open_step_loader
from tests.pretrain.towers.test_every_tower import HTSAT
from tests.support.gloo_processes import run_in_processes
from tests.support.step_gradients import SOME_STEPS, assert_exact, errors_of_steps
from tests.support.toy_run import toy_config, write_toy_dataset
from tests.support.toy_towers import build_toy_model

NUM_SAMPLES = 40


def net_with_batch_norms():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    freeze_batch_norms(net)
    return net


def test_the_first_layer_has_the_statistics_of_all_its_inputs():
    images = 5 + 3 * torch.randn(50, 3, 6, 7, dtype=torch.float64)
    whole = measure_statistics(net_with_batch_norms(), [images])
    parts = measure_statistics(net_with_batch_norms(), images.split(16))
    for found in (whole, parts):
        rows = images.transpose(0, 1).flatten(1)
        torch.testing.assert_close(found["0.running_mean"], rows.mean(dim=1).float())
        torch.testing.assert_close(found["0.running_var"], rows.var(dim=1).float())
        assert found["0.num_batches_tracked"] == 50


def test_later_layers_see_normalised_inputs():
    net, images = net_with_batch_norms(), 5 + 3 * torch.randn(64, 3, 6, 6)
    kept = copy.deepcopy(net.state_dict())
    found = measure_statistics(net, [images])
    assert all(torch.equal(net.state_dict()[name], kept[name]) for name in kept)
    plain = nn.Sequential(*copy.deepcopy(list(net))).double()
    for layer, momentum in ((0, 1.0), (2, 1.0)):
        plain[layer] = nn.BatchNorm2d(plain[layer].num_features, momentum=momentum).double()
    plain.train()(images.double())
    torch.testing.assert_close(found["2.running_mean"], plain[2].running_mean.float())
    torch.testing.assert_close(found["2.running_var"], plain[2].running_var.float())
    net.load_state_dict(found, strict=False)
    normalised = net[2](net[1](net[0](images))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normalised.mean(dim=1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.var(dim=1), torch.ones(4), atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------- HTSAT


def sound_members(number):
    rng = np.random.default_rng(number)
    kind = list(SOUNDS)[number % len(SOUNDS)]
    content = encode_sound(synthesise(kind, rng), "wav")
    return {"wav": content, "txt": sound_caption(kind, rng).encode()}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Writes sounds of the demo."""
    folder = tmp_path_factory.mktemp("sounds") / "sounds"
    return write_toy_dataset(folder, "audio", shard_sizes=(24, 24), members_of=sound_members)


def htsat_config(sounds, run, *, engine=None, **changes):
    audio = {
        "library": "transformers",
        "name": "clap_audio_model",
        "options": HTSAT,
        "batch_norm": "frozen",
        "batch_norm_samples": NUM_SAMPLES,
        "projection": "mlp",
    }
    log_mel = {"fft_samples": 512, "hop_samples": 320, "num_mel_bins": 32, "high_hz": 8000.0}
    values = toy_config(sounds, run).model_dump(mode="json")
    values["model"] |= {"image": None, "audio": audio}
    values["audio"] |= {
        "sample_rate_hz": 16000,
        "clip_seconds": 1.0,
        "padding": "repeatpad",
        "log_mel": log_mel | {"mean_db": 0.0, "std_db": 1.0},
    }
    values["streams"] = {
        "audio-text": {
            "global_batch_size": 16,
            "objectives": {"audio-text": {}},
            "sources": [{"name": "sounds", "dataset": sounds}],
        }
    }
    values["schedule"] = {"num_steps": 20}
    values["run"] |= changes
    values["engine"] |= engine or {}
    return PretrainConfig.model_validate(values)


def test_the_sample_is_the_first_of_the_run_on_any_number_of_processes(sounds, tmp_path):
    config = htsat_config(sounds, tmp_path / "run")

    with ModelSources(config) as sources:
        tokenizer = build_training_tokenizer(sources)
    found = []
    for rank, world_size in ((0, 1), (1, 2), (2, 4)):
        loader = open_step_loader(config, tokenizer, rank=rank, world_size=world_size)
        batches = list(first_samples(loader, "audio", num_samples=NUM_SAMPLES, num_steps=20))
        assert [len(each) for each in batches] == [16, 16, 8]
        found.append(torch.cat(batches))
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1)
    steps = [whole.load(step).streams["audio-text"].views["audio"].values for step in range(3)]
    for each in found:
        assert torch.equal(each, torch.cat(steps)[:NUM_SAMPLES])
    few = first_samples(whole, "audio", num_samples=NUM_SAMPLES, num_steps=2)
    assert sum(map(len, few)) == 32


def test_features_of_a_clip_alone_and_in_a_batch_are_equal(sounds, tmp_path):
    model = build_toy_model(htsat_config(sounds, tmp_path / "run"))
    backbone = model.towers["audio"].backbone
    replace_drop_layers(backbone, kind="audio")
    mel = -50 + 20 * torch.randn(5, 1, 32, 51)
    backbone.load_state_dict(measure_statistics(backbone, [mel]), strict=False)
    with torch.no_grad():
        together = backbone.eval()(mel)
        alone = torch.cat([backbone(mel[row : row + 1]) for row in range(5)])
    assert torch.equal(alone, together)
    assert {type(block).__name__ for block in blocks_of(backbone)} == {"ClapAudioLayer"}


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


@pytest.mark.slow
def test_htsat_trains_on_the_demos_sounds_the_same_on_two_processes(sounds, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    run_in_processes(1, train, htsat_config(sounds, alone, stop_after_step=10))
    run_in_processes(1, train, htsat_config(sounds, alone))  # keeps the statistics
    run_in_processes(2, train, htsat_config(sounds, two))
    losses = [[sum(row["loss"].values()) for row in read_metrics(each)] for each in (alone, two)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
    states = [read_model_state(find_checkpoint(each)) for each in (alone, two)]
    name = "towers.audio.backbone.backbone.audio_encoder.batch_norm.running_mean"
    assert torch.equal(states[0][name], states[1][name])
    assert states[0][name].abs().min() > 1  # decibels
    assert states[0][name.replace("running_mean", "num_batches_tracked")] == NUM_SAMPLES
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_htsat_has_the_gradient_of_one_process(sounds, tmp_path, strategy):
    engine = {"strategy": strategy}
    config = htsat_config(sounds, tmp_path / "steps", engine=engine)
    steps = SOME_STEPS if strategy == "ddp" else SOME_STEPS[:1]
    of_ranks = run_in_processes(2, errors_of_steps, config, steps)
    assert_exact(of_ranks)


@pytest.mark.slow
def test_htsat_trains_under_deepspeed_as_on_one_process(sounds, tmp_path):
    folders = {"ddp": tmp_path / "ddp"}
    run_in_processes(1, train, htsat_config(sounds, folders["ddp"]))
    for strategy in ("zero1", "zero2", "zero3"):
        folders[strategy] = tmp_path / strategy
        config = htsat_config(sounds, folders[strategy], engine={"strategy": strategy})
        run_in_processes(2, train, config)
    losses = {
        name: [sum(row["loss"].values()) for row in read_metrics(folder)]
        for name, folder in folders.items()
    }
    states = {name: read_model_state(find_checkpoint(folder)) for name, folder in folders.items()}
    for strategy in list(folders)[1:]:
        assert len(losses[strategy]) == 20
        np.testing.assert_allclose(losses[strategy], losses["ddp"], rtol=1e-4)
        assert states[strategy].keys() == states["ddp"].keys()
        for key, value in states["ddp"].items():
            torch.testing.assert_close(states[strategy][key], value, rtol=0, atol=3e-4)
