"""Steps of samples with any subset of several modalities, against plain autograd."""

import pytest

from pretrain.distributed.start import start_accelerator
from tests.support.gloo_processes import run_in_processes
from tests.support.step_gradients import ALL_STEPS, SOME_STEPS, assert_exact, errors_of_steps
from tests.support.toy_views import views_config, write_views

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "clips", fraction=0.55)
    write_views(folder / "texts", seed=1, always=["title", "text"], never=["image"])
    return folder


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """Writes samples of which few have a modality: some objectives have one sample or none."""
    folder = tmp_path_factory.mktemp("rare")
    write_views(folder / "clips", fraction=0.12)
    write_views(folder / "texts", seed=1, fraction=0.2, never=["image"])
    return folder


@pytest.mark.parametrize("num_processes", [1, 2, *(pytest.param(n, marks=SLOW) for n in (3, 4))])
def test_gradients_are_those_of_the_samples_that_have_both_views(data, tmp_path, num_processes):
    steps = SOME_STEPS if num_processes < 3 else ALL_STEPS
    of_ranks = run_in_processes(num_processes, errors_of_steps, views_config(data, tmp_path), steps)
    assert_exact(of_ranks)
    # 8 views in clips: image, image.2, scan, audio, text, text.title, values, series; 3 in texts
    num_views = 8 + 3
    for steps in of_ranks[0].values():
        for errors in steps[::2]:
            assert errors.encoded == {True: num_views}
        for errors in steps[1::2]:
            assert errors.encoded == {False: 3 * num_views, True: 3 * num_views}


@pytest.mark.parametrize("num_processes", [1, *(pytest.param(n, marks=SLOW) for n in (2, 3, 4))])
def test_objectives_with_one_sample_or_none_have_its_gradient_or_zero(
    rare, tmp_path, num_processes
):
    steps = SOME_STEPS if num_processes == 1 else ALL_STEPS
    of_ranks = run_in_processes(num_processes, errors_of_steps, views_config(rare, tmp_path), steps)
    assert_exact(of_ranks)
    assert_rare(of_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_has_the_same_gradients(data, rare, tmp_path, strategy, num_processes):
    engine = {"strategy": strategy, "precision": "fp32", "device": "cpu"}
    configs = [views_config(folder, tmp_path, engine=engine) for folder in (data, rare)]
    of_ranks = run_in_processes(num_processes, errors_of_configs, configs)
    for number in (0, 1):
        assert_exact([each[number] for each in of_ranks])
    assert_rare([each[1] for each in of_ranks])


def errors_of_configs(configs):
    """Compares a step of each config; stage 3 takes long, and so only one of two micro-batches."""
    engine = configs[0].engine
    accelerator = start_accelerator(engine, run=configs[0].run)
    micro_batches = (2,) if engine.strategy == "zero3" else (1, 3)
    options = {"micro_batches": micro_batches, "accelerator": accelerator}
    return [errors_of_steps(config, ALL_STEPS[:1], **options) for config in configs]


def assert_rare(of_ranks):
    """Asserts that objectives have one sample or none, and that ranks lack what others have."""
    steps = [errors for steps in of_ranks[0].values() for errors in steps]
    assert {0, 1} <= {count for errors in steps for count in errors.counts.values()}
    rows = [
        each
        for of_precision in of_ranks
        for steps in of_precision.values()
        for errors in steps
        for each in errors.rows.values()
    ]
    assert any(own == 0 < total for own, total in rows) == (len(of_ranks) > 1)
