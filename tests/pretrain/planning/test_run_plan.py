"""The table of plans, the recommended one, and refusals."""

from dataclasses import replace

import pytest

from data_prep.errors import ConfigError, InputError
from pretrain.planning.run_plan import Planner, recommended
from tests.pretrain.planning.test_memory import sizes_of
from tests.support.toy_plans import plan_config, timm_vit


def planner(**sections):
    config = plan_config(timm_vit(), num_samples=4096, **sections)
    return Planner(config, *config.read_hardware(), sizes_of())


def test_the_recommended_plan_has_the_fewest_gpu_hours_among_those_that_fit():
    plans = planner(nodes=2).table()
    assert {each.num_gpus for each in plans} == {4, 8, 16, 32, 64}
    assert {each.strategy for each in plans} == {"ddp", "zero1", "zero2", "zero3"}
    best = recommended(plans)
    assert best.fits
    assert all(best.gpu_hours <= each.gpu_hours for each in plans if each.fits)
    too_small = [replace(each, gpu_bytes=1) for each in plans]
    assert recommended(too_small) is None
    one_fits = [replace(plans[5], gpu_bytes=plans[5].memory.total * 2), *too_small]
    assert recommended(one_fits) is one_fits[0]


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        (1, 8, {(1, 2), (1, 4), (1, 8), (2, 8), (4, 8)}),
        (4, 8, {(1, 8), (2, 8), (4, 8), (8, 8)}),  # 128 are more than the lanes
        (3, 1, {(3, 1), (6, 1), (12, 1)}),
        (1, 1, {(1, 1), (2, 1), (4, 1)}),
    ],
)
def test_gpu_counts_of_the_table(nodes, gpus, expected):
    found = planner(nodes=nodes, gpus_per_node=gpus).table()
    assert {(each.nodes, each.gpus_per_node) for each in found} == expected


def test_time_and_traffic_follow_the_formulas():
    plan = planner(nodes=2, engine={"precision": "bf16"}, utilization=0.5).plan(
        nodes=2, gpus_per_node=8, strategy="ddp"
    )
    flops = 4096 / 16 * 3e9  # of a process
    assert plan.time.compute == pytest.approx(flops / (0.5 * 989e12))
    _, gradients = plan.exchanges
    assert gradients.received_bytes == 2 * 4 * 10**6 * 15 / 16
    assert plan.bandwidths.sums == 400e9  # eight links of 50 GB/s, which are less than NVLink's
    seconds = gradients.received_bytes / 400e9 + 30 * 10e-6
    assert plan.time.exchanges["gradients"] == pytest.approx(seconds)
    hidden = min(seconds, plan.time.compute * 2 / 3)
    exposed = plan.time.exchanges["losses"] + seconds - hidden
    assert plan.time.total == pytest.approx(plan.time.compute + exposed)
    assert plan.gpu_hours == pytest.approx(1000 * plan.time.total * 16 / 3600)
    limits = {"min_all_reduce_gigabytes_per_second": 20}
    measured = planner(nodes=2, preflight=limits).plan(nodes=2, gpus_per_node=8, strategy="ddp")
    assert measured.bandwidths.sums == 20e9
    assert measured.bandwidths.gathers == 400e9


def test_slow_loading_makes_steps_as_long_as_reading():
    plan = planner(loading_samples_per_second=100).plan(nodes=1, gpus_per_node=8, strategy="ddp")
    assert plan.time.input == 4096 / 8 / 100
    assert plan.time.total >= plan.time.input > plan.time.compute


def test_unknown_gpus_and_too_many_gpus_are_refused():
    with pytest.raises(ConfigError, match="gpu=z9: expected one of b200, h200"):
        planner(gpu="z9")
    with pytest.raises(ConfigError, match=r"hardware=missing\.yaml: .*no such config file"):
        planner(hardware="missing.yaml")
    with pytest.raises(InputError, match="lanes"):
        planner(nodes=100).plan(nodes=100, gpus_per_node=8, strategy="ddp")
    with pytest.raises(InputError, match="expected at most as many GPUs as lanes=64"):
        planner(nodes=7, gpus_per_node=37).table()
