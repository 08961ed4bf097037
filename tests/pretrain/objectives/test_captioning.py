"""CoCa's captions against open_clip's model and loss, and against samples encoded one by one."""

import open_clip
import pytest
import torch

from data_prep.errors import InputError
from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.describe import describe
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.model.contrastive_model import StreamInputs
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.assembly import (
    build_step,
    build_training_optimizer,
    open_step_loader,
    standardize_inputs,
)
from pretrain.warm_start.model_start import start_model
from tests.pretrain.test_train import steps_of
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import train
from tests.support.toy_coca import (
    SMALL_DECODER,
    build_tiny_coca,
    coca_config,
    register_tiny_coca,
    small_captioning_config,
    write_tiny_coca,
)
from tests.support.toy_towers import build_toy_model
from tests.support.toy_views import views_config, write_views

# Prefix in our model -> prefix in open_clip's.
PARTS = {
    "towers.image.backbone.": "visual.",
    "towers.text.backbone.": "text.",
    "objective_modules.captions:image-text.decoder.": "text_decoder.",
}


def name_in_open_clip(name):
    """Returns the name of a parameter in open_clip's CoCa."""
    for prefix, other in PARTS.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    assert name == "log_logit_scale.image-text"
    return "logit_scale"


def true_step(oracle, model, batch):
    """Returns (loss, {our parameter: gradient}) of the whole batch, by open_clip."""
    views = batch.streams["image-text"].views
    output = oracle(model.towers["image"].input_stage(views["image"].values), views["text"].values)
    losses = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**output)
    total = sum(losses)
    oracle.zero_grad()
    total.backward()
    of_oracle = dict(oracle.named_parameters())
    return total.item(), {
        name: of_oracle[name_in_open_clip(name)].grad.view_as(p)
        for name, p in model.named_parameters()
    }


def step_of(config, model, batch, *, accelerator, num_micro_batches):
    """Returns the losses of a step, whose gradients are those of the model's parameters."""
    optimizer = build_training_optimizer(config, model)
    engine = Engine(accelerator, model=model, optimizer=optimizer, gradient_clipping=None)
    step = build_step(config, engine, num_micro_batches=num_micro_batches)
    return step.backward(batch, PhaseTimer(engine.device))


def worst_difference(model, expected):
    """Returns the largest relative difference of a parameter's gradient."""
    length = torch.cat([value.flatten() for value in expected.values()]).norm() + 1e-6
    return max(
        ((p.grad - expected[n]).norm() / max(expected[n].norm(), 1e-3 * length)).item()
        for n, p in model.named_parameters()
    )


def errors_of_coca(toy_data, folder, weights):
    """Returns [(error of the loss, worst error of a gradient)] against open_clip."""
    oracle = build_tiny_coca(folder / "oracle")
    found = []
    config = coca_config(toy_data, folder, weights=weights)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_text_tokenizer(config.model)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1).load(0)
    own = open_step_loader(config, tokenizer, **share).load(0)
    for num_micro_batches in (1, 3):
        model = build_toy_model(config, tokenizer)
        starts = {"towers": config.towers_of_temperatures, "modules": config.modules}
        start_model(model, config.model, **starts)
        total, expected = true_step(oracle, model, whole)
        losses = step_of(
            config, model, own, accelerator=accelerator, num_micro_batches=num_micro_batches
        )
        found.append((abs(losses.total / total - 1), worst_difference(model, expected)))
    return found


@pytest.fixture
def weights(tmp_path):
    return write_tiny_coca(tmp_path)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_loss_and_gradient_are_open_clips(toy_data, tmp_path, weights, num_processes):
    for found in run_in_processes(num_processes, errors_of_coca, toy_data, tmp_path, weights):
        for error, worst in found:
            assert error < 1e-6
            assert worst < 1e-5


# -------------------------------------------------------------------------- any views, any towers


def captions_of_views(data, folder):
    """Returns a config of two decoders over samples that may lack any modality."""
    values = views_config(data, folder).model_dump(mode="json")
    captions = {"kind": "captioning", **SMALL_DECODER}
    values["streams"]["clips"]["objectives"] = {
        "image-text": {},
        "audio-text": {},
        "image-scan": {},
        "values-text": {},
        "series-text": {},
        "captions": captions | {"weight": 2.0},
        "again": captions | {"media": {"image": 2}, "text": "text"},
        "sounds": captions | {"media": "audio", "num_queries": 3},
    }
    return PretrainConfig.model_validate(values)


def loss_one_by_one(config, model, batch):
    """Returns (weighted caption losses with a graph, {objective: samples}), sample by sample."""
    # so that all parameters have a gradient
    total, counts = sum(p.sum() for p in model.objective_modules.parameters()) * 0.0, {}
    for name, uses in config.modules.items():
        views = batch.streams[name].views
        for use in uses:
            sums = []
            for row in range(len(batch.streams[name])):
                sides = [views[view] for view in use.views]
                if not all(s.present is None or s.present[row] for s in sides):
                    continue
                inputs = {
                    view: tuple(each[row : row + 1] for each in side.inputs)
                    for view, side in zip(use.views, sides, strict=True)
                }
                encoded = {
                    view: model._encode_view(name, view, StreamInputs(inputs)) for view in use.views
                }
                sums.append(model._run_module(use, encoded, StreamInputs(inputs))[0])
            counts[f"{name}/{use.objective}"] = len(sums)
            if sums:
                loss, num_tokens, *_ = torch.stack(sums).sum(dim=0)
                total = total + use.section.weight * loss / num_tokens
    return total, counts


def errors_of_views(data, folder):
    """Returns [(error of the loss, worst error of a gradient, has the counts)]."""
    found = []
    config = captions_of_views(data, folder)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_text_tokenizer(config.model)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    whole = open_step_loader(config, tokenizer, rank=0, world_size=1)
    own = open_step_loader(config, tokenizer, **share)
    for num_micro_batches in (1, 4):
        model = build_toy_model(config, tokenizer)
        standardize_inputs(config, model, whole)
        captions, counts = loss_one_by_one(config, model, whole.load(0))
        captions.backward()
        expected = {
            name: p.grad.clone()
            for name, p in model.named_parameters()
            if name.startswith("objective_modules.")
        }
        model.zero_grad()
        losses = step_of(
            config,
            model,
            own.load(0),
            accelerator=accelerator,
            num_micro_batches=num_micro_batches,
        ).by_objective
        value = sum(
            config.streams[key.partition("/")[0]].objectives[key.partition("/")[2]].weight
            * losses[key].value
            for key in counts
        )
        modules = {n: p for n, p in model.named_parameters() if n in expected}
        length = torch.cat([each.flatten() for each in expected.values()]).norm() + 1e-6
        worst = max(
            ((p.grad - expected[n]).norm() / max(expected[n].norm(), 1e-3 * length)).item()
            for n, p in modules.items()
        )
        have_gradients = all(p.grad is not None for p in model.parameters() if p.requires_grad)
        has_counts = {key: losses[key].num_samples for key in counts} == counts
        error = abs(value - captions.item()) / max(captions.item(), 1e-3)
        found.append((error, worst, has_counts, have_gradients))
    return found


@pytest.mark.parametrize("fraction", [0.55, 0.12])
@pytest.mark.parametrize("num_processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_that_lack_a_view_take_no_part(tmp_path, fraction, num_processes):
    write_views(tmp_path / "clips", fraction=fraction)
    write_views(tmp_path / "texts", seed=1, always=["title", "text"], never=["image"])
    for found in run_in_processes(num_processes, errors_of_views, tmp_path, tmp_path / "run"):
        for error, worst, has_counts, have_gradients in found:
            assert error < 1e-6
            assert worst < 1e-5
            assert has_counts
            assert have_gradients


def test_held_out_samples_without_captions_need_no_decoder(toy_data, tmp_path):
    model = build_toy_model(small_captioning_config(toy_data, tmp_path)).eval()
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for views in ({"image": (pixels,)}, {"text": (torch.ones(2, 12, dtype=torch.int64),)}):
        found = model([{"image-text": StreamInputs(views)}]).views["image-text"]
        assert found.keys() == views.keys()


def test_a_decoder_is_planned_without_values(tmp_path, capsys):
    describe(small_captioning_config(tmp_path, tmp_path))
    assert "objective_modules: " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- runs


def run_of(toy_data, folder, strategy, *, until=None, **sections):
    """Returns a config of four steps that caption images and sounds."""
    held_out = {"dataset": toy_data / "more_colors", "batch_size": 7}
    return small_captioning_config(
        toy_data,
        folder,
        engine={"strategy": strategy, "precision": "fp32", "device": "cpu"},
        optimizer={"learning_rate": 1e-3, "eps": 1e-4},
        schedule={"num_steps": 4},
        validation={"every_steps": 2, "streams": {"image-text": held_out}},
        run={
            **{"folder": folder, "log_every_steps": 1, "checkpoint_every_steps": 2},
            "stop_after_step": until,
        },
        **sections,
    )


def assert_same_result(folder, expected):
    """Checks losses and weights against those of another run folder."""
    rows, others = steps_of(folder), steps_of(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == [1, 2, 3, 4]
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        accuracy = other["caption_token_accuracy"]
        assert row["caption_token_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    weights, of_other = (load_model(each)[0].state_dict() for each in (folder, expected))
    assert any(name.startswith("objective_modules.captions:audio-text.pooler") for name in weights)
    for name, value in of_other.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_runs_of_every_strategy_are_one_run(toy_data, tmp_path):
    run_in_processes(1, train, run_of(toy_data, tmp_path / "whole", "ddp"))
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        folder = tmp_path / strategy
        if strategy in ("ddp", "zero3"):  # and resumed
            config = run_of(toy_data, folder, strategy, until=2, micro_batch_size=3)
            run_in_processes(2, train, config)
        recomputes = {"activation_checkpointing": strategy == "zero2"}
        config = run_of(toy_data, folder, strategy, micro_batch_size=5)
        config = config.model_copy(update={"engine": config.engine.model_copy(update=recomputes)})
        run_in_processes(2, train, config)
        assert_same_result(folder, tmp_path / "whole")
    losses = [row["loss"]["image-text/captions"] for row in steps_of(tmp_path / "whole")]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------- refusals


def with_captions(toy_data, folder, **settings):
    captions = {"kind": "captioning", **SMALL_DECODER} | settings
    values = small_captioning_config(toy_data, folder).model_dump(mode="json")
    values["streams"]["image-text"]["objectives"]["captions"] = captions
    return PretrainConfig.model_validate(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": None}, "expected the name of a CoCa model of open_clip, or layers and heads"),
        ({"name": "coca_tiny"}, "name=coca_tiny with layers=1"),
        ({"media": "text"}, "reads 'text' twice"),
        ({"media": "video"}, "reads 'video': expected a modality of the model"),
    ],
)
def test_settings_that_no_decoder_has_are_refused(toy_data, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        with_captions(toy_data, tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"captions\.heads=5: expected a divisor of the width of the text tower, 32"),
        ({"pooler_heads": 3}, r"pooler_heads=3: expected a divisor"),
        ({"num_queries": None}, r"num_queries=null: expected tokens of image of the width"),
        (
            {"name": "ViT-B-32", "layers": None, "heads": None},
            "expected a CoCa model of open_clip: coca_",
        ),
        ({"media": "text", "text": "image"}, r"captions\.text: expected a text tower whose tokens"),
    ],
)
def test_decoders_that_do_not_fit_the_towers_are_refused(toy_data, tmp_path, settings, message):
    register_tiny_coca(tmp_path)
    with pytest.raises(InputError, match=message):
        build_toy_model(with_captions(toy_data, tmp_path, **settings))


def test_a_text_tower_that_is_not_causal_is_refused(toy_data, tmp_path):
    config = with_captions(toy_data, tmp_path)
    config.model.text.options["no_causal_mask"] = True
    with pytest.raises(InputError, match="found TextTransformer with no_causal_mask"):
        build_toy_model(config)


def test_objectives_of_one_name_and_towers_have_one_decoder(toy_data, tmp_path):
    values = small_captioning_config(toy_data, tmp_path).model_dump(mode="json")
    again = values["streams"]["image-text"] | {"sources": [{"name": "more", "dataset": "more"}]}
    values["streams"]["more"] = again
    config = PretrainConfig.model_validate(values)
    uses = [use.module for of_stream in config.modules.values() for use in of_stream]
    assert uses == ["captions:image-text", "captions:audio-text", "captions:image-text"]
    values["streams"]["more"]["objectives"] = {
        "captions": {"kind": "captioning", **SMALL_DECODER, "layers": 2}
    }
    with pytest.raises(ValueError, match=r"share a module.*expected the same settings"):
        PretrainConfig.model_validate(values)
