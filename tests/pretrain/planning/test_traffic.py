"""Traffic and checkpoints of real steps of two processes against the plan."""

import re
from collections import Counter

import pytest
import torch

from pretrain.checkpoints.state import StateCopy, buffer_file
from pretrain.distributed.collectives import counted_traffic
from pretrain.distributed.start import build_engine, start_accelerator
from pretrain.model.tokenizer import build_tokenizer
from pretrain.monitoring.timing import PhaseTimer
from pretrain.planning.checkpoint_size import checkpoint_bytes
from pretrain.planning.model_sizes import measure_model
from pretrain.planning.planned_model import plan_model
from pretrain.planning.traffic import plan_exchanges
from pretrain.training.assembly import build_step, build_training_optimizer
from tests.pretrain.training.test_step_loss import ACCEPTED, batch_of, config_of
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_towers import build_toy_model

NUM_PROCESSES = 2


def config_with(toy_data, folder, strategy):
    config = config_of(toy_data, folder, ACCEPTED[0])
    engine = config.engine.model_copy(update={"strategy": strategy})
    return config.model_copy(update={"engine": engine})


def observe(toy_data, folder, strategy):
    """Returns (bytes received by purpose, bytes of this process's files of a checkpoint)."""
    config = config_with(toy_data, folder, strategy)
    accelerator = start_accelerator(config.engine, run=config.run)
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer)
    optimizer = build_training_optimizer(config, model)
    engine = build_engine(
        accelerator, strategy=strategy, model=model, optimizer=optimizer, gradient_clipping=1.0
    )
    step = build_step(config, engine, num_micro_batches=1)
    rank, timer = accelerator.process_index, PhaseTimer(engine.device)
    batch = batch_of(config, tokenizer, rank=rank, world_size=NUM_PROCESSES)
    for is_counted in (False, True):  # the first step builds buckets and prefetches
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.profiler.profile(activities=activities, record_shapes=True) as profiled,
            counted_traffic() as of_losses,
        ):
            step.backward(batch, timer)
            engine.step(learning_rate=1e-3)
        if is_counted:
            received = _received(profiled.events(), of_losses)
    files = StateCopy(engine).take()
    written = sum(len(chunk) for file in files for chunk in file.chunks())
    return received, written + (len(b"".join(buffer_file(model).values())) if rank == 0 else 0)


def _received(events, of_losses):
    """Bytes that a ring would send a process, apart from those of losses."""
    elements = Counter()
    for event in events:
        sizes = [int(n) for n in re.findall(r"\[(\d+)\]", str(event.input_shapes))]
        if event.name == "c10d::_allgather_base_" and len(sizes) > 1:
            elements["gathers"] += sizes[0] - sizes[1]
        elif event.name == "c10d::_reduce_scatter_base_":
            elements["scatters"] += sizes[1] - sizes[0]
            elements["sums"] -= sizes[1]  # which gloo carries out as an all-reduce
        elif event.name == "gloo:all_reduce" and sizes:
            elements["sums"] += sizes[0]
    of_losses = of_losses.received_bytes
    return {
        "losses": of_losses.total(),
        # Of losses, a message is counted in bytes, all others in numbers of four bytes.
        "parameters": 4 * (elements["gathers"] - of_losses["all_gather"]),
        "gradients": 4 * (elements["sums"] + elements["scatters"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_traffic_and_checkpoints_are_those_of_real_steps(toy_data, tmp_path, strategy):
    config = config_with(toy_data, tmp_path, strategy)
    planned = plan_model(config)
    sizes = measure_model(config, planned, is_gpu=False)
    exchanges = plan_exchanges(
        config,
        sizes,
        num_processes=NUM_PROCESSES,
        num_micro_batches=1,
        device_type="cpu",
    )
    expected = {each.purpose: each.received_bytes for each in exchanges}
    results = run_in_processes(NUM_PROCESSES, observe, toy_data, tmp_path, strategy)
    for received, _ in results:
        # Messages of losses are padded to 64 bytes; sums of norms and counts are a few numbers.
        assert received["losses"] == pytest.approx(expected["losses"], abs=64 * 8)
        assert received["gradients"] == pytest.approx(expected["gradients"], rel=1e-3)
        assert received["parameters"] == pytest.approx(expected.get("parameters", 0), rel=1e-3)
    assert checkpoint_bytes(config, planned) == pytest.approx(
        sum(written for _, written in results), rel=0.01
    )
