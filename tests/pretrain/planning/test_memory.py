"""The memory of a step against closed formulas, and the largest micro-batch against a search."""

import numpy as np
import pytest
import torch

from pretrain.data.batch import StreamLayout, ViewLayout
from pretrain.planning.memory import StepMemory
from pretrain.planning.model_sizes import ModelSizes, SizesOfSegment
from pretrain.planning.passes import LiveBytes, StreamPass
from tests.support.toy_plans import plan_config, timm_vit

N = 10**6


def live(fixed, per_row):
    return LiveBytes(np.array(fixed), np.array(per_row))


def sizes_of(*, num_trained=N, per_row=3000):
    """Returns sizes of a model whose activations peak first and whose gradients come afterwards."""
    graph = live([100, 50, 0], [per_row, per_row / 2, 10])
    whole = live([100, 50 + 2 * N, 4 * N], [per_row, per_row / 2, 10])
    found = StreamPass(1e9, 2e9, graph, whole, live([80], [per_row]))
    rows = StreamLayout({"image": ViewLayout((4,), torch.uint8)})
    segment = SizesOfSegment(1000, {"pairs": rows}, {"pairs": found})
    return ModelSizes(N, num_trained, 2 * num_trained, 0, [segment])


def memory(num_processes=1, *, strategy="ddp", num_samples=4096, **options):
    engine = {"precision": "fp32", "strategy": strategy}
    config = plan_config(timm_vit(), num_samples=num_samples, engine=engine)
    return StepMemory(config, sizes_of(**options), num_processes, "cuda")


def test_one_process_holds_weights_moments_and_gradients():
    parts = memory(per_row=10**6).plan(4).parts  # activations exceed the tiles of the loss
    assert parts["weights"] == 4 * N
    assert parts["optimizer state"] == 8 * N
    assert parts["gradients"] == 4 * N
    assert parts["copies of the strategy"] == 0
    assert parts["activations"] == 100 + 10**6 * 1024
    assert memory(2).plan(4).parts["copies of the strategy"] == 4 * N  # DDP's buckets


@pytest.mark.parametrize("num_samples", [64, 1024, 8192])
def test_gradients_of_a_single_micro_batch_come_while_activations_go(num_samples):
    plan = memory(num_samples=num_samples).plan(1)
    candidates = {
        "backward": max(
            100 + 3000 * num_samples,
            50 + 1500 * num_samples + 2 * N,
            10 * num_samples + 4 * N,
        ),
        "optimizer": 4 * N,
        "loss": 80 + 3000 * num_samples + plan.parts.get("loss tiles", 0),
    }
    parts = ("activations", "gradients", "loss tiles")
    found = sum(plan.parts.get(part, 0) for part in parts)
    if plan.phase != "loss":
        assert found == max(candidates["backward"], candidates["optimizer"])
    else:
        assert found == candidates["loss"]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_partitions_the_optimizer_state(strategy):
    plans = [memory(number, strategy=strategy).plan(4) for number in (2, 8)]
    assert [each.parts["optimizer state"] for each in plans] == [4 * N, N]


def test_the_largest_micro_batch_is_the_first_that_fits():
    budget = memory(2, num_samples=128, per_row=10**6)
    for limit in range(10**7, 12 * 10**7, 3 * 10**6):
        found = budget.fewest_micro_batches(limit)
        fitting = [n for n in range(1, 65) if budget.plan(n).total <= limit]
        assert (found.num_micro_batches if found else None) == (fitting[0] if fitting else None)
