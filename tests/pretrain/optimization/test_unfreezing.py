"""Rates, layer decay, freezing and unfreezing against torch alone, and under every strategy."""

import math
import shutil

import pytest
import torch

from pretrain.checkpoint import open_checkpoint
from pretrain.checkpoints.record import RunState
from pretrain.checkpoints.state import read_whole
from pretrain.distributed.engine import Engine
from pretrain.distributed.start import start_accelerator
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.optimization.learning_rate import learning_rate_at
from pretrain.run.attempts import read_metrics
from pretrain.training.assembly import build_step, build_training_optimizer, open_step_loader
from tests.pretrain.test_train import train
from tests.support.gloo_processes import WorkerFailedError, run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

NUM_STEPS, OPENED_AT = 4, 2
STEPS = [f"step_{number:08d}" for number in range(1, NUM_STEPS + 1)]
CLIPPING = 0.5
VIT = {
    "library": "timm",
    "name": "test_vit",
    "options": {"img_size": 16, "patch_size": 4, "depth": 3, "drop_path_rate": 0.5},
    "learning_rate_scale": 0.5,
    "layer_decay": 0.75,
    "frozen_blocks": 1,
}
TEXT = {
    "library": "open_clip",
    "context_length": 12,
    "options": {"width": 32, "heads": 2, "layers": 2, "vocab_size": 49408},
    "frozen_blocks": -1,
}
OPTIMIZER = {
    "learning_rate": 1e-3,
    "eps": 1e-4,  # so that rounding noise of the gradients of key biases moves nothing
    "gradient_clipping": CLIPPING,
    "no_decay": ["*.projection.weight"],
    "frozen": ["towers.audio.backbone.*", "log_logit_scale.audio-text"],
    "unfreeze": [
        {"from_step": OPENED_AT, "parameters": ["towers.audio.*", "log_logit_scale.*"]},
        {"from_step": 100, "parameters": ["towers.text.backbone.transformer.*"]},
    ],
}
FROZEN = ("towers.image.backbone.blocks.0.", "towers.image.backbone.patch_embed.")
LATER = ("towers.audio.backbone.", "log_logit_scale.audio-text")


def grouped_config(toy_data, folder, **sections):
    sections = {
        "model": {"image": VIT, "text": TEXT},
        "optimizer": OPTIMIZER,
        "schedule": {"num_steps": NUM_STEPS, "warmup_steps": 2},
    } | sections
    return toy_config(toy_data, folder, **sections)


def build_engine(config, model):
    return Engine(
        start_accelerator(config.engine, run=config.run),
        model=model,
        optimizer=build_training_optimizer(config, model),
        gradient_clipping=config.optimizer.gradient_clipping,
    )


def scale_of(name):
    """Returns the learning rate of a parameter, relative to that of the run, by its name alone."""
    if not name.startswith("towers.image."):
        return 1.0
    if name.startswith("towers.image.backbone.norm."):
        return 0.5 * 0.75  # timm counts it to the last block
    if name.startswith("towers.image.backbone.blocks."):
        return 0.5 * 0.75 ** (3 - int(name.split(".")[4]))
    is_embedding = ".patch_embed." in name or name.endswith(("cls_token", "pos_embed"))
    return 0.5 * (0.75**4 if is_embedding else 1.0)


def is_frozen(name):
    return scale_of(name) < 0.5 * 0.75**2 or (
        name.startswith(("towers.text.backbone.transformer.resblocks.0.", "towers.text.backbone."))
        and not name.startswith(
            ("towers.text.backbone.transformer.resblocks.1.", "towers.text.backbone.ln_final.")
        )
    )


def decay_of(name, parameter):
    return 0.0 if parameter.ndim < 2 or name.endswith(".projection.weight") else 0.2


def plain_group(config, step, names, parameters):
    """Returns a group of torch.optim.AdamW for each parameter."""
    rate = learning_rate_at(step, peak=config.optimizer.learning_rate, schedule=config.schedule)
    return [
        {
            "params": [parameters[name]],
            "lr": rate * scale_of(name),
            "scale": scale_of(name),
            "weight_decay": decay_of(name, parameters[name]),
        }
        for name in names
    ]


def test_the_steps_are_those_of_torch_with_groups_that_are_added_later(toy_data, tmp_path):
    config = grouped_config(toy_data, tmp_path / "run")
    tokenizer = build_tokenizer(config.model.text)
    model, plain = (build_toy_model(config, tokenizer) for _ in range(2))
    engine, of_plain = build_engine(config, model), None
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
    step = build_step(config, engine, num_micro_batches=1)
    engine.train_mode(True)

    parameters = dict(plain.named_parameters())
    first = [n for n in parameters if not is_frozen(n) and not n.startswith(LATER)]
    later = [n for n in parameters if n.startswith(LATER)]
    of_plain = torch.optim.AdamW(
        plain_group(config, 0, first, parameters),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for number in range(NUM_STEPS):
        rate = learning_rate_at(
            number, peak=config.optimizer.learning_rate, schedule=config.schedule
        )
        engine.begin_step(number)
        step.backward(loader.load(number), PhaseTimer(engine.device))
        # Gradients at the weights of the plain model, which are the same ones.
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = engine.step(learning_rate=rate)
        opened = first + (later if number >= OPENED_AT else [])
        if number == OPENED_AT:
            for group in plain_group(config, number, later, parameters):
                of_plain.add_param_group(group)
        for name in opened:
            parameters[name].grad = gradients[name]
        expected_norm = torch.nn.utils.clip_grad_norm_(
            [parameters[name] for name in opened], CLIPPING
        )
        assert norm == pytest.approx(expected_norm.item(), rel=1e-6)
        for group in of_plain.param_groups:
            group["lr"] = rate * group["scale"]
        of_plain.step()
        with torch.no_grad():
            for name in opened:
                if name.startswith("log_logit_scale."):
                    parameters[name].clamp_(0, math.log(100))
        for name, parameter in model.named_parameters():
            if name in opened:
                torch.testing.assert_close(parameter, parameters[name], atol=1e-7, rtol=1e-6)
            else:
                assert torch.equal(parameter, before[name]), name
        with_moments = {held.slice.parameter for held in engine.slices() if "exp" in held.slice.key}
        assert with_moments == set(opened)
    engine.close()


def test_a_group_counts_the_updates_since_it_was_opened(toy_data, tmp_path):
    config = grouped_config(toy_data, tmp_path / "run")
    model = build_toy_model(config)
    engine = build_engine(config, model)
    state = RunState(6, 3, skipped_steps=(1, 3, 6))  # of the first two steps, one was applied
    assert [state.num_updates_before(step) for step in range(7)] == [0, 0, 1, 1, 2, 3, 3]
    engine.open_groups(state.step, updates_before=state.num_updates_before)
    engine.after_load(num_updates=state.num_updates)
    for name, parameter in model.named_parameters():
        updates = [each["step"].item() for each in [engine.optimizer.state[parameter]] if each]
        if is_frozen(name):
            assert updates == [], name
        else:
            assert updates == [2.0 if name.startswith(LATER) else 3.0], name
    assert engine.learning_rates["text.from_step_100"] == 0
    engine.close()


def test_gradients_that_are_not_finite_do_not_count_before_a_group_is_open(toy_data, tmp_path):
    config = grouped_config(toy_data, tmp_path / "run")
    model = build_toy_model(config)
    engine = build_engine(config, model)
    parameter = model.log_logit_scale["audio-text"]

    def step_with_nan(number):
        engine.begin_step(number)
        others = sum(each.sum() for each in model.parameters() if each is not parameter)
        engine.backward(others + (parameter * math.nan).sum())
        return engine.step(learning_rate=1e-3)

    assert math.isfinite(step_with_nan(OPENED_AT - 1))
    with pytest.raises(FloatingPointError):
        step_with_nan(OPENED_AT)
    assert (engine.num_updates, len(engine.optimizer.state[parameter])) == (1, 0)
    engine.close()


# --------------------------------------------------------------------------- every strategy


def tensors_at(folder, step):
    """Returns {"<key>/<parameter>": values} of a checkpoint: parameters and moments."""
    checkpoint = open_checkpoint(str(folder / "checkpoints" / STEPS[step - 1]))
    sizes = {
        f"{key}/{name}": math.prod(shape)
        for key in ("parameter", "exp_avg", "exp_avg_sq")
        for name, shape in checkpoint.record.shapes.items()
        if checkpoint.index.has(f"{key}/{name}")
    }
    return read_whole(checkpoint.location, checkpoint.index, sizes=sizes)


def run(toy_data, folder, num_processes, strategy, **sections):
    own = {"log_every_steps": 1, "checkpoint_every_steps": 1, "keep_checkpoints": 9}
    own |= {"folder": folder, "trackers": [], "stop_after_step": sections.pop("last_step", None)}
    config = grouped_config(
        toy_data,
        folder,
        run=own,
        engine={"strategy": strategy},
        **sections,
    )
    run_in_processes(num_processes, train, config)
    return folder


def resumed(toy_data, folder, num_processes, strategy, *, step):
    """Resumes a copy of a run from its checkpoint after a step."""
    copied = folder.with_name(f"{num_processes} processes from step {step}")
    shutil.copytree(folder, copied)
    for name in STEPS[step:]:
        shutil.rmtree(copied / "checkpoints" / name)
    return run(toy_data, copied, num_processes, strategy)


@pytest.fixture(scope="module")
def alone(toy_data, tmp_path_factory):
    return run(toy_data, tmp_path_factory.mktemp("alone") / "run", 1, "ddp")


def assert_near(ours, theirs):
    """Asserts that two ends differ by rounding, with the same moments."""
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        if name.startswith("parameter/"):
            assert (ours[name] - values).abs().max() <= 3e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_every_strategy_trains_and_resumes_the_same_groups(toy_data, tmp_path, alone, strategy):
    expected = tensors_at(alone, NUM_STEPS)
    folder = run(toy_data, tmp_path / "run", 2, strategy)
    end = tensors_at(folder, NUM_STEPS)
    assert_near(end, expected)

    at_start, opened = tensors_at(folder, 1), tensors_at(folder, OPENED_AT + 1)
    for name in (each.partition("/")[2] for each in end if each.startswith("parameter/")):
        is_later = name.startswith(LATER)
        assert (f"exp_avg/{name}" in at_start) == (not is_frozen(name) and not is_later), name
        assert (f"exp_avg/{name}" in opened) == (not is_frozen(name)), name
        if is_later or is_frozen(name):
            before = tensors_at(folder, OPENED_AT)[f"parameter/{name}"]
            assert torch.equal(before, at_start[f"parameter/{name}"]), name

    # The group opens in the second attempt; on another number of processes it is open before.
    same = tensors_at(resumed(toy_data, folder, 2, strategy, step=1), NUM_STEPS)
    assert same.keys() == end.keys()
    assert all(torch.equal(same[name], end[name]) for name in end)
    other = resumed(toy_data, folder, 1, strategy, step=OPENED_AT + 1)
    assert_near(tensors_at(other, NUM_STEPS), expected)
    rates = [row["learning_rates"] for row in read_metrics(other)[:NUM_STEPS]]
    assert [row["audio.from_step_2"] for row in rates] == pytest.approx([0, 0, 1e-3, 5e-4])
    assert rates[2]["image.block_2"] == pytest.approx(1e-3 * 0.5 * 0.75**2)


@pytest.mark.slow
def test_an_entry_that_is_added_while_a_run_is_stopped_changes_nothing_before(
    toy_data, tmp_path, alone
):
    without = OPTIMIZER | {"unfreeze": []}
    folder = tmp_path / "run"
    run(toy_data, folder, 1, "ddp", optimizer=without, last_step=OPENED_AT)
    with pytest.raises(WorkerFailedError, match=r"optimizer\.unfreeze"):
        early = [OPTIMIZER["unfreeze"][0] | {"from_step": 1}]
        run(toy_data, folder, 1, "ddp", optimizer=OPTIMIZER | {"unfreeze": early})
    run(toy_data, folder, 1, "ddp")
    ours, theirs = (tensors_at(each, NUM_STEPS) for each in (folder, alone))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
