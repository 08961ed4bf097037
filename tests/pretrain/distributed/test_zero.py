"""DeepSpeed's stages against one process: gradients, norms, clamps, slices, whole runs."""

import itertools
import json
import math
import os
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from data_prep.config_file import read_config
from pretrain.checkpoint import read_model_state
from pretrain.checkpoints.state import shapes_of
from pretrain.config import PretrainConfig
from pretrain.distributed.collectives import gather_objects
from pretrain.distributed.start import (
    build_engine,
    start_accelerator,
)
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.assembly import build_step, build_training_optimizer, open_step_loader
from pretrain.training.gradient_cache import split_into_micro_batches
from pretrain.training.micro_batch_size import StepSizes, choose_num_micro_batches
from tests.pretrain.test_train import assert_same_run, train
from tests.support.gloo_processes import WorkerFailedError, run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

HIGHEST_SCALE = 1.0001
# Towers with dropping layers of every kind; one stream has a bias.
DROPPING = {
    "image": {
        "library": "timm",
        "name": "test_vit",
        "options": {
            "img_size": 16,
            "patch_size": 4,
            "depth": 2,
            "patch_drop_rate": 0.25,
            "proj_drop_rate": 0.1,
            "drop_path_rate": 0.2,
        },
    },
    "audio": {
        "library": "timm",
        "name": "test_convnext",
        "options": {"patch_size": 1, "drop_path_rate": 0.2},
    },
}
# No prefetching, which traverses the model at every module; no parameter stays whole between uses.
STAGE_3 = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
ON_CPU = {"device": "cpu", "pin_memory": False}


def observe(config):
    """Records an engine's step, a step with a non-finite gradient, and another step.

    Without clipping, the first moments are a tenth of the first gradient.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(config.run.folder)  # where DeepSpeed would compile
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = open_step_loader(config, tokenizer, **share)
    hosts = ["here"] * accelerator.num_processes
    num_micro_batches = choose_num_micro_batches(
        StepSizes.of_config(config), model, loader.layouts, device=accelerator.device, hosts=hosts
    )
    optimizer = build_training_optimizer(config, model)
    engine = build_engine(
        accelerator,
        strategy=config.engine.strategy,
        model=model,
        optimizer=optimizer,
        gradient_clipping=config.optimizer.gradient_clipping,
    )
    seen = {"dtypes": {str(each.dtype) for each in model.parameters()}}

    step = build_step(config, engine, num_micro_batches=num_micro_batches)
    seen["loss"] = step.backward(loader.load(0), PhaseTimer(engine.device)).total
    seen["norm"] = engine.step(learning_rate=1e-3)
    seen["gradient"] = {
        name.partition("/")[2]: 10 * values.numpy()
        for name, values in copies(engine).items()
        if name.startswith("exp_avg/")
    }
    before = copies(engine)
    [micro_batch] = split_into_micro_batches(
        loader.load(1), num_micro_batches=1, trims_captions=False
    )
    features = engine.forward([micro_batch])
    views = [view for of_stream in features.views.values() for view in of_stream.values()]
    tensors = [*views, *features.scales.values(), *features.biases.values()]
    engine.backward(sum(each.sum() for each in tensors) * math.nan)
    with pytest.raises(FloatingPointError, match="norm of the gradient is"):
        engine.step(learning_rate=1e-3)
    after = copies(engine)
    seen["changed"] = [name for name in before if not torch.equal(before[name], after[name])]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.backward(loader.load(2), PhaseTimer(engine.device))
        seen["last norm"] = engine.step(learning_rate=1e-3)
    seen["collectives"] = Counter(
        event.name for event in profile.events() if event.name.startswith("c10d::")
    )
    seen["parameters"] = {name: values.numpy() for name, values in copies(engine).items()}
    seen["slices"] = [
        (held.slice, num_elements(engine)[held.slice.parameter]) for held in engine.slices()
    ]
    engine.close()
    seen["compiled"] = list(config.run.folder.rglob("*.so"))
    return seen


def copies(engine):
    """Assembles {"<key>/<parameter>": flat tensor} from the slices of all ranks."""
    whole, totals = {}, num_elements(engine)
    parts = [(held.slice, held.values.clone()) for held in engine.slices()]
    for part, values in itertools.chain(*gather_objects(parts)):
        tensor = whole.setdefault(part.tensor, torch.full((totals[part.parameter],), math.nan))
        tensor[part.offset : part.stop] = values
    return whole


def num_elements(engine):
    """Counts {parameter name: elements}."""
    return {name: math.prod(shape) for name, shape in shapes_of(engine.model).items()}


def config_of(toy_data, folder, strategy, *, precision="fp32", tuning=None, **sections):
    folder.mkdir(exist_ok=True)
    engine = {"strategy": strategy, "precision": precision} | sections.pop("engine", {})
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    streams["audio-text"]["objectives"]["audio-text"]["loss"] = "sigmoid"
    if tuning is not None:
        (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": tuning}))
        engine["deepspeed_config"] = folder / "deepspeed.json"
    return toy_config(toy_data, folder / "run", engine=engine, streams=streams, **sections)


def observed(toy_data, folder, num_processes, strategy, **changes):
    """Returns [ranks] results of `observe`.

    A tower is frozen, and every step would move the logit scales beyond their bounds.
    """
    model = toy_config(toy_data, folder).model.model_dump()
    model["logit_scale"] = {"initial": 1.0, "maximum": HIGHEST_SCALE}
    model["audio"]["frozen"] = True
    optimizer = {"gradient_clipping": None}
    config = config_of(toy_data, folder, strategy, model=model, optimizer=optimizer, **changes)
    return run_in_processes(num_processes, observe, config)


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    [seen] = observed(toy_data, tmp_path_factory.mktemp("alone"), 1, "ddp")
    return seen


def assert_same_gradient(seen, expected, *, tolerance=1e-5):
    """Asserts that gradients differ by at most a fraction of their norm.

    Norms below a thousandth of the global norm count as that.
    """
    assert seen["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    assert seen["gradient"].keys() == expected["gradient"].keys()
    for name, truth in expected["gradient"].items():
        length = max(np.linalg.norm(truth), 1e-3 * expected["norm"])
        error = np.linalg.norm(seen["gradient"][name].ravel() - truth.ravel())
        assert error <= tolerance * length, name


def assert_slices_tile(ranks, *, is_replicated):
    """Asserts that the slices of all ranks cover every tensor, once unless all are replicated."""
    held = defaultdict(list)
    for seen in ranks[:1] if is_replicated else ranks:
        for part, total in seen["slices"]:
            held[part.key, part.parameter, total].append((part.offset, part.length))
    assert held.keys() >= {("exp_avg", name, v.size) for name, v in ranks[0]["gradient"].items()}
    for (_, name, total), parts in held.items():
        if name.startswith("towers.audio.backbone."):  # frozen: may be whole on every rank
            parts = sorted(set(parts))
        end = 0
        for offset, length in sorted(parts):
            assert offset == end, name
            end += length
        assert end == total, name


STRATEGIES = {
    "ddp": (2, "ddp", {"micro_batch_size": 3}),
    "zero0": (2, "zero0", {"micro_batch_size": 3}),
    "zero1, one pair at a time": (2, "zero1", {"micro_batch_size": 1}),
    "zero2, 3 processes, small buckets": (
        3,
        "zero2",
        {
            "micro_batch_size": 3,
            "tuning": {
                "reduce_bucket_size": 5000,
                "allgather_bucket_size": 5000,
                "overlap_comm": True,
                "reduce_scatter": False,
            },
        },
    ),
    "zero2, optimizer offloaded": (
        2,
        "zero2",
        {"micro_batch_size": 3, "tuning": {"offload_optimizer": ON_CPU}},
    ),
    "zero3": (2, "zero3", {"micro_batch_size": 3, "tuning": STAGE_3}),
    "zero3, all offloaded": (
        2,
        "zero3",
        {
            "tuning": {
                "stage3_prefetch_bucket_size": 0,
                "offload_optimizer": ON_CPU,
                "offload_param": ON_CPU,
            }
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STRATEGIES)
def test_every_strategy_takes_the_same_steps_as_one_process(toy_data, tmp_path, alone, case):
    num_processes, strategy, changes = STRATEGIES[case]
    ranks = observed(toy_data, tmp_path, num_processes, strategy, **changes)
    assert_slices_tile(ranks, is_replicated=strategy in ("ddp", "zero0"))
    for other in ranks[1:]:
        assert (other["norm"], other["last norm"]) == (ranks[0]["norm"], ranks[0]["last norm"])
    seen = ranks[0]
    assert_same_gradient(seen, alone)
    assert seen["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    # A non-finite gradient changes nothing, and nothing of it remains for the next step.
    assert seen["changed"] == alone["changed"] == []
    assert seen["last norm"] == pytest.approx(alone["last norm"], rel=1e-5)
    for name, values in alone["parameters"].items():
        if name.startswith("parameter/log_logit_scale."):
            assert values[0] in (0.0, np.float32(math.log(HIGHEST_SCALE)))
            assert seen["parameters"][name] == values
        elif not name.endswith("in_proj_bias"):  # Adam sees only rounding noise of key biases
            np.testing.assert_allclose(
                seen["parameters"][name].ravel(), values.ravel(), atol=1e-5, rtol=1e-4, err_msg=name
            )
    assert seen["compiled"] == []


@pytest.mark.slow
def test_micro_batches_are_reduced_once(toy_data, tmp_path):
    """Compares the number of collectives with and without micro-batches."""
    whole, in_micro_batches = (
        observed(toy_data, tmp_path / str(size), 2, "zero2", micro_batch_size=size)[0]
        for size in ("auto", 3)
    )
    assert in_micro_batches["collectives"] == whole["collectives"]


@pytest.mark.slow
def test_bfloat16_is_autocast_alone(toy_data, tmp_path):
    """Tests that parameters, moments and reductions stay float32, so gradients agree."""
    expected, *others = (
        observed(toy_data, tmp_path / strategy, 2, strategy, precision="bf16")[0]
        for strategy in ("ddp", "zero2", "zero3")
    )
    # At stage 3, attention rounds its gradient to bf16 (8 bits) at a different point.
    for seen, tolerance in zip(others, (1e-5, 2**-8), strict=True):
        assert seen["dtypes"] == {"torch.float32"}
        assert seen["loss"] == expected["loss"]
        assert_same_gradient(seen, expected, tolerance=tolerance)


# --------------------------------------------------------------------------------- whole runs


def run(toy_data, folder, num_processes, strategy, *, stop_after_step=None, **sections):
    """Runs up to 20 steps, each on one of the streams, and returns the run folder."""
    sections = {
        "schedule": {"num_steps": 20, "warmup_steps": 2},
        "optimizer": {"gradient_clipping": 0.5},
        "streams_per_step": "one",
        "model": DROPPING,
    } | sections
    config = config_of(toy_data, folder, strategy, **sections)
    stopping = config.run.model_copy(update={"stop_after_step": stop_after_step})
    config = config.model_copy(update={"run": stopping})
    run_in_processes(num_processes, train, config)
    return config.run.folder


@pytest.fixture(scope="module")
def run_alone(toy_data, tmp_path_factory):
    return run(toy_data, tmp_path_factory.mktemp("run_alone"), 1, "ddp")


def assert_same_end(toy_data, folder, expected):
    """Asserts equal metrics, and parameters within 1 % of the distance they moved."""
    assert_same_run(folder, expected)
    config = read_config(PretrainConfig, folder / "config.yaml")
    model = build_toy_model(config)
    beginning = dict(model.named_parameters())
    final = "checkpoints/step_00000020"
    ours, theirs = (read_model_state(each / final) for each in (folder, expected))
    for name, start in beginning.items():
        if not name.endswith("in_proj_bias"):  # gradients of key biases are rounding noise
            distance = (theirs[name] - start.detach()).norm()
            assert (ours[name] - theirs[name]).norm() <= 0.01 * distance, name


RECOMPUTED = {"engine": {"activation_checkpointing": True}}


@pytest.mark.parametrize(
    ("num_processes", "strategy", "sections"),
    [
        (2, "zero2", {"micro_batch_size": 3}),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                (2, "ddp", RECOMPUTED),
                (3, "zero3", {"tuning": STAGE_3}),
            ]
        ),
        *(
            pytest.param(*values, marks=pytest.mark.exhaustive)
            for values in [
                (1, "ddp", {"micro_batch_size": 6}),
                (2, "ddp", {"micro_batch_size": 2}),
                (3, "ddp", {"micro_batch_size": 2}),
                (4, "ddp", {}),
                (2, "zero0", {}),
                (3, "zero1", {"micro_batch_size": 2}),
                (1, "zero2", {"micro_batch_size": 6}),
                (4, "zero2", {"micro_batch_size": 1}),
                (2, "zero3", {"tuning": STAGE_3, "micro_batch_size": 3} | RECOMPUTED),
            ]
        ),
    ],
)
def test_a_run_does_not_depend_on_the_strategy(
    toy_data, tmp_path, run_alone, num_processes, strategy, sections
):
    folder = run(toy_data, tmp_path, num_processes, strategy, **sections)
    assert_same_end(toy_data, folder, run_alone)


@pytest.mark.exhaustive
def test_a_run_goes_on_under_other_strategies_as_if_it_had_never_stopped(
    toy_data, tmp_path, run_alone
):
    run(toy_data, tmp_path, 2, "ddp", stop_after_step=6)
    run(toy_data, tmp_path, 2, "zero3", tuning=STAGE_3, micro_batch_size=6, stop_after_step=9)
    run(toy_data, tmp_path, 3, "zero2", stop_after_step=14)
    folder = run(toy_data, tmp_path, 1, "ddp")
    assert_same_end(toy_data, folder, run_alone)


def test_a_deepspeed_file_of_the_launcher_is_refused(toy_data, tmp_path):
    with pytest.raises(WorkerFailedError, match=r"deepspeed_config_file=ds\.json; remove"):
        run_in_processes(2, start_with_file_of_launcher, config_of(toy_data, tmp_path, "zero2"))


def start_with_file_of_launcher(config):
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "ds.json"
    start_accelerator(config.engine, run=config.run)
