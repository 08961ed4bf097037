from dataclasses import replace

import pytest
import torch

from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.run.model_sources import ModelSources
from pretrain.training.assembly import (
    build_step,
    build_training_model,
    build_training_optimizer,
    open_step_loader,
)
from pretrain.training.gradient_cache import split_into_micro_batches
from pretrain.training.micro_batch_size import StepSizes, choose_num_micro_batches
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_droppers import VIT
from tests.support.toy_run import toy_config

SPEC_AUGMENT = {"mel_bins": 4, "frames": 10}


def config_of(toy_data, run, *, micro_batch_size=64, **audio):
    text = {
        "library": "open_clip",
        "context_length": 24,
        "options": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408},
    }
    config = toy_config(toy_data, run, micro_batch_size=micro_batch_size)
    model = config.model.model_dump(mode="json") | {"text": text}
    return toy_config(
        toy_data, run, micro_batch_size=micro_batch_size, model=model, audio=audio_section(audio)
    )


def audio_section(changes):
    log_mel = {"fft_samples": 128, "hop_samples": 64, "num_mel_bins": 16, "high_hz": 2000.0}
    return {"sample_rate_hz": 4000, "clip_seconds": 0.4, "log_mel": log_mel} | changes


def gradients_of(config, trims_captions=True):
    """Returns (losses, gradients, lengths of the text tower's token batches)."""
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_training_model(ModelSources(config), tokenizer)
    assert model.takes_trimmed_captions
    model.takes_trimmed_captions = trims_captions
    lengths = []
    model.towers["text"].register_forward_pre_hook(
        lambda tower, inputs: lengths.append(inputs[0].shape[1])
    )
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = open_step_loader(config, tokenizer, **share)
    hosts = ["here"] * accelerator.num_processes
    num_micro_batches = choose_num_micro_batches(
        StepSizes.of_config(config), model, loader.layouts, device=accelerator.device, hosts=hosts
    )
    lengths.clear()
    engine = Engine(
        accelerator,
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=None,
    )
    step = build_step(config, engine, num_micro_batches=num_micro_batches)
    losses = step.backward(loader.load(0), PhaseTimer(engine.device))
    gradients = {n: p.grad.clone().tolist() for n, p in small_parameters(model)}
    engine.close()
    return losses.total, gradients, lengths


def small_parameters(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel() < 100_000]


def assert_same_gradients(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            torch.tensor(ours[1][name]), torch.tensor(gradient), atol=2e-5, rtol=1e-3
        )


@pytest.mark.parametrize("micro_batch_size", [64, 3])
def test_trimmed_captions_give_the_gradients_of_untrimmed_ones(
    toy_data, tmp_path, micro_batch_size
):
    config = config_of(toy_data, tmp_path / "run", micro_batch_size=micro_batch_size)
    trimmed, whole = gradients_of(config), gradients_of(config, trims_captions=False)
    assert set(whole[2]) == {24}
    assert max(trimmed[2]) < 24
    assert_same_gradients(trimmed, whole)


def test_masks_reach_the_audio_tower_alike_in_micro_batches_and_on_ranks(toy_data, tmp_path):
    plain = config_of(toy_data, tmp_path / "run")
    masked = config_of(toy_data, tmp_path / "run", spec_augment=SPEC_AUGMENT)
    whole = gradients_of(masked)
    assert whole[0] != pytest.approx(gradients_of(plain)[0], rel=1e-4)
    in_micro_batches = config_of(
        toy_data, tmp_path / "run", micro_batch_size=3, spec_augment=SPEC_AUGMENT
    )
    assert_same_gradients(gradients_of(in_micro_batches), whole)
    for ranks in run_in_processes(3, gradients_of, in_micro_batches):
        assert_same_gradients(ranks, whole)


def dropping(config, *, is_recomputed):
    """Returns the config with dropout in the image tower, and optional checkpointing."""
    image = config.model.image.model_copy(update=VIT)
    engine = config.engine.model_copy(update={"activation_checkpointing": is_recomputed})
    model = config.model.model_copy(update={"image": image})
    return config.model_copy(update={"model": model, "engine": engine})


def test_layers_drop_alike_in_micro_batches_on_ranks_and_when_recomputed(toy_data, tmp_path):
    plain = config_of(toy_data, tmp_path / "run")
    whole = gradients_of(dropping(plain, is_recomputed=False))
    in_micro_batches = dropping(
        config_of(toy_data, tmp_path / "run", micro_batch_size=3), is_recomputed=True
    )
    assert_same_gradients(gradients_of(in_micro_batches), whole)
    for ranks in run_in_processes(3, gradients_of, in_micro_batches):
        assert_same_gradients(ranks, whole)


def test_micro_batches_hold_every_pair_once_and_may_be_empty(toy_data, tmp_path):
    config = config_of(toy_data, tmp_path / "run", spec_augment=SPEC_AUGMENT)
    tokenizer = build_tokenizer(config.model.text)
    batch = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    micro_batches = split_into_micro_batches(batch, num_micro_batches=20, trims_captions=False)
    for name, stream in batch.streams.items():
        for view, whole in stream.views.items():
            parts = [each[name].views[view] for each in micro_batches]
            assert len(parts[-1][0]) == 0
            for number, values in enumerate(whole.inputs):
                assert torch.equal(torch.cat([part[number] for part in parts]), values)
        slots = torch.cat([each[name].drop_keys.slots for each in micro_batches])
        assert torch.equal(slots, torch.arange(len(stream)))
        assert {int(each[name].drop_keys.step) for each in micro_batches} == {0}
    assert batch.streams["audio-text"].views["audio"].masks.shape == (8, 4, 2)
    assert batch.streams["image-text"].views["image"].masks is None


def test_a_micro_batch_is_trimmed_to_its_own_longest_caption(toy_data, tmp_path):
    config = config_of(toy_data, tmp_path / "run")
    tokenizer = build_tokenizer(config.model.text)
    batch = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    stream = batch.streams["image-text"]
    text = replace(stream.views["text"], lengths=torch.tensor([3] * 8 + [11] + [2] * 7))
    stream = replace(stream, views=stream.views | {"text": text})
    batch = replace(batch, streams={"image-text": stream})
    micro_batches = split_into_micro_batches(batch, num_micro_batches=2, trims_captions=True)
    tokens = [each["image-text"].views["text"][0] for each in micro_batches]
    assert [each.shape for each in tokens] == [(8, 8), (8, 16)]
    assert torch.equal(tokens[1], text.values[8:, :16])
