"""Steps whose loss or gradient is not a finite number, in real runs."""

import json
import math

import pytest
import torch

from data_prep.errors import RunError
from pretrain.checkpoint import read_model_state
from pretrain.checkpoints.record import read_record
from pretrain.requeue import reason_to_continue
from pretrain.run.attempts import read_attempts
from tests.pretrain.test_train import steps_of
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config

BAD_GRADIENT, BAD_LOSS = 4, 5  # steps
NOT_FINITE = "the norm of the gradient is not finite"


def train_with_bad_steps(*configs):
    """Trains with a NaN in rank 1's gradient in one step, and in one of its sounds in the next.

    Returns:
        Per config: its error or None, and whether each step that was not applied left parameters
        and moments as they were.
    """
    from pretrain.distributed.collectives import rank
    from pretrain.distributed.engine import Engine
    from pretrain.distributed.zero import ZeroEngine
    from pretrain.train import pretrain
    from pretrain.training import loop

    take_step, now, before, unchanged = loop.train_step, [0], [], []

    def bad_step(engine, objective, batch, **others):
        values = [each.values.clone() for each in engine.slices()]
        if before:
            unchanged.append(all(map(torch.equal, before.pop(), values)))
        now[0] = batch.step + 1
        if now[0] == BAD_LOSS and rank() == 1:
            batch.streams["audio-text"].views["audio"].values[2] = math.nan
        try:
            return take_step(engine, objective, batch, **others)
        except FloatingPointError:
            before.append(values)
            raise

    loop.train_step = bad_step
    for kind in (Engine, ZeroEngine):

        def bad_backward(engine, loss, backward=kind.backward):
            factor = math.nan if now[0] == BAD_GRADIENT and rank() == 1 else 1.0
            backward(engine, loss * factor)

        kind.backward = bad_backward
    outcomes = []
    for config in configs:
        try:
            pretrain(config)
        except Exception as error:
            outcomes.append((str(error), unchanged))
        else:
            outcomes.append((None, unchanged))
        unchanged = []
        before.clear()
    return outcomes


def config_of(toy_data, folder, **watch):
    steps = {"num_steps": 7, "warmup_steps": 2}
    return toy_config(toy_data, folder, schedule=steps, watch=watch)


def assert_skipped(folder, steps=(BAD_GRADIENT, BAD_LOSS)):
    state = read_record(folder / "checkpoints" / "step_00000007").state
    assert state.skipped_steps == steps
    assert state.num_updates == 7 - len(steps)
    rows = steps_of(folder)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["step"] for row in rows if "skipped" in row] == list(steps)


def assert_dumps_tell(folder):
    dumps = [json.loads(path.read_text()) for path in sorted((folder / "non_finite").iterdir())]
    gradient, loss = dumps
    assert (gradient["step"], gradient["cause"]) == (
        BAD_GRADIENT,
        NOT_FINITE,
    )
    assert (loss["step"], loss["cause"]) == (BAD_LOSS, "loss of audio-text/audio-text is nan")
    for dump in dumps:
        slots = {name: [each["slot"] for each in rows] for name, rows in dump["samples"].items()}
        assert slots == {"image-text": list(range(16)), "audio-text": list(range(8))}
        norms = dump["norms"]
        assert all(norms["parameter"][name] > 0 for name in norms["parameter"] if "weight" in name)
        assert set(norms["exp_avg"]) == set(norms["exp_avg_sq"]) == set(norms["parameter"])
    assert set(gradient["norms"]["gradient"]) == set(gradient["norms"]["parameter"])
    assert "nan" in gradient["norms"]["gradient"].values()
    assert "gradient" not in loss["norms"]
    assert not any(each["not_finite"] for each in gradient["samples"]["audio-text"])
    [bad] = [each for each in loss["samples"]["audio-text"] if each["not_finite"]]
    assert bad["slot"] == 6  # the third of rank 1's four
    assert bad["not_finite"] == ["audio", "audio_embedding"]
    assert (bad["source"], bad["epoch"], bad["shard"][:7]) == ("tones", 0, "0000000")


def test_a_run_stops_or_skips_and_goes_on_as_if_it_had_never_stopped(toy_data, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    skip = {"on_non_finite": "skip"}
    [(error, _)] = run_in_processes(2, train_with_bad_steps, config_of(toy_data, folder))[0]
    assert error.startswith(f"step 4: {NOT_FINITE}; the step was not applied, and the run stops")
    assert "because watch.on_non_finite=stop" in error
    with pytest.raises(RunError, match="cannot continue without a change"):
        reason_to_continue(read_attempts(folder), last_checkpoint=3)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    config = config_of(toy_data, folder, **skip, max_skipped_steps=1)
    [(error, unchanged)] = run_in_processes(2, train_with_bad_steps, config)[1]
    assert error.startswith(
        "step 5: loss of audio-text/audio-text is nan; the step was not applied"
    )
    assert "one of 2 within 1000 steps, above watch.max_skipped_steps=1" in error
    assert unchanged == [True]
    configs = (config_of(toy_data, folder, **skip), config_of(toy_data, whole, **skip))
    first, second = (run_in_processes(2, train_with_bad_steps, each)[0][0] for each in configs)
    assert (first, second) == ((None, [True]), (None, [True, True]))
    for each in (folder, whole):
        assert_skipped(each)
        assert_dumps_tell(each)
    states = [read_model_state(each / "checkpoints" / "step_00000007") for each in (folder, whole)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "micro_batch_size"),
    [("ddp", 3), ("zero0", 64), ("zero1", 64), ("zero2", 3), ("zero3", 64)],
)
def test_whatever_shares_the_work_nothing_is_applied_and_the_dump_tells(
    toy_data, tmp_path, strategy, micro_batch_size
):
    config = config_of(toy_data, tmp_path / "run", on_non_finite="skip")
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"strategy": strategy}),
            "micro_batch_size": micro_batch_size,
        }
    )
    outcomes = run_in_processes(2, train_with_bad_steps, config)
    assert outcomes == [[(None, [True, True])]] * 2
    assert_skipped(tmp_path / "run")
    assert_dumps_tell(tmp_path / "run")
