"""Runs whose image size and patch dropout change at some steps."""

import pytest
import torch

from data_prep.errors import InputError
from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.data.loaders import start_loader
from pretrain.model.sample_dropout import patch_dropouts
from pretrain.model.tokenizer import build_tokenizer
from pretrain.run.attempts import read_metrics
from pretrain.run.compatibility import RunIdentity
from pretrain.settings.data import Loading
from pretrain.settings.transforms import ImageTransform
from pretrain.train import pretrain
from pretrain.training.assembly import open_step_loader
from pretrain.training.micro_batch_size import StepSizes, measure
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import train
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

VIT = {
    "library": "timm",
    "name": "test_vit",
    "options": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "dynamic_img_size": True,
        "patch_drop_rate": 0.5,
    },
}
SEGMENTS = [
    {"from_step": 2, "size": 24},
    {"from_step": 3, "patch_dropout": 0.0},
    {"from_step": 4, "size": 32, "patch_dropout": 0.25},
]
SIZES = [16, 16, 24, 24, 32, 32]  # of each step


def config_of(toy_data, folder, *, until=None, segments=SEGMENTS, tower=VIT, **sections):
    values = toy_config(toy_data, folder).model_dump(mode="json")
    values["model"] |= {"image": tower, "audio": None}
    values["streams"] = {"image-text": values["streams"]["image-text"]}
    values["image"]["segments"] = segments
    values["run"]["stop_after_step"] = until
    held_out = {"dataset": str(toy_data / "more_colors"), "batch_size": 10}
    values["validation"] = {"every_steps": 3, "streams": {"image-text": held_out}}
    return PretrainConfig.model_validate(values | sections)


def rows_of(folder):
    return [row for row in read_metrics(folder) if "validation" not in row]


def validations_of(folder):
    return {row["step"]: row["validation"] for row in read_metrics(folder) if "validation" in row}


def weights_of(folder):
    return load_model(folder)[0].state_dict()


@pytest.fixture(scope="module")
def whole(toy_data, tmp_path_factory):
    """Returns the folder of an undisturbed run by one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config_of(toy_data, folder))
    return folder


def test_settings_of_a_step_are_those_of_its_segment():
    image = ImageTransform(size=16, segments=SEGMENTS)
    assert [image.at_step(step).size for step in range(6)] == SIZES
    assert [image.after(num_steps).size for num_steps in (0, 2, 3, 4, 5)] == [16, 16, 24, 24, 32]
    assert image.sizes == {0: 16, 2: 24, 4: 32}
    assert image.patch_dropouts == {3: 0.0, 4: 0.25}


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ([SEGMENTS[1], SEGMENTS[0]], "rising from_step"),
        ([SEGMENTS[0], SEGMENTS[0]], "rising from_step"),
        ([{"from_step": 3}], "set size or patch_dropout"),
        ([{"from_step": 0, "size": 24}], "greater than 0"),
        ([{"from_step": 3, "patch_dropout": 1.0}], "less than 1"),
    ],
)
def test_segments_that_mean_nothing_are_refused(segments, words):
    with pytest.raises(ValueError, match=words):
        ImageTransform(segments=segments)


def test_segments_that_no_step_has_used_may_change_and_others_may_not(toy_data, tmp_path):
    stored = RunIdentity(config_of(toy_data, tmp_path, segments=SEGMENTS[:2]), {})
    later = RunIdentity(config_of(toy_data, tmp_path), {})
    without = RunIdentity(config_of(toy_data, tmp_path, segments=SEGMENTS[:1]), {})
    assert not later.differences_from(stored, steps_done=4)
    assert "image.segments" in str(later.differences_from(stored, steps_done=5))
    assert not without.differences_from(stored, steps_done=3)
    assert "image.segments" in str(without.differences_from(stored, steps_done=4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_loaded_ahead_have_the_images_of_their_segment(toy_data, tmp_path, num_workers):
    config = config_of(toy_data, tmp_path)
    plain = config_of(toy_data, tmp_path, segments=[])
    tokenizer = build_tokenizer(config.model.text)
    loader, expected = (
        open_step_loader(each, tokenizer, rank=0, world_size=1) for each in (config, plain)
    )
    with start_loader(Loading(num_workers=num_workers, batches_ahead=3)) as load_steps:
        for step, batch in enumerate(load_steps(loader, first_step=0, last_step=6)):
            views = batch.streams["image-text"].views
            assert views["image"].values.shape == (16, 3, SIZES[step], SIZES[step])
            assert torch.equal(
                views["image"].values, loader.load(step).streams["image-text"].views["image"].values
            )
            of_plain = expected.load(step).streams["image-text"].views
            assert torch.equal(views["image"].keys, of_plain["image"].keys)
            if SIZES[step] == 16:
                assert torch.equal(views["image"].values, of_plain["image"].values)


def test_the_memory_of_a_step_is_that_of_the_largest_images(toy_data, tmp_path):
    config = config_of(toy_data, tmp_path, segments=SEGMENTS[:2])
    tokenizer, model = build_tokenizer(config.model.text), build_toy_model(config)
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
    device = torch.device("cpu")
    found = measure(StepSizes.of_config(config), model, loader.layouts, device)
    assert [layer.prob for layer in patch_dropouts(model)] == [0.5]  # as it was built
    unmasked = VIT | {"options": VIT["options"] | {"patch_drop_rate": 0.0}}
    plain = config_of(toy_data, tmp_path, segments=[], tower=unmasked)
    plain = plain.model_copy(update={"image": plain.image.model_copy(update={"size": 24})})
    model = build_toy_model(plain)
    loader = open_step_loader(plain, tokenizer, rank=0, world_size=1)
    assert found == measure(StepSizes.of_config(plain), model, loader.layouts, device)


def test_a_tower_that_cannot_change_is_refused(toy_data, tmp_path):
    for option, words in [("dynamic_img_size", "24 pixels"), ("patch_drop_rate", "drops patches")]:
        options = VIT["options"] | {option: 0, "img_size": 16}
        config = config_of(toy_data, tmp_path / option, tower=VIT | {"options": options})
        with pytest.raises(InputError, match=words):
            pretrain(config)


def test_a_run_stopped_in_any_segment_resumes_to_the_same_bits(toy_data, tmp_path, whole):
    for until, size in ((2, 16), (3, 24)):
        pretrain(config_of(toy_data, tmp_path / "run", until=until))
        _, transforms, _ = load_model(tmp_path / "run")
        assert transforms["image"].config.size == size  # that of the last step
    pretrain(config_of(toy_data, tmp_path / "run"))
    found, expected = rows_of(tmp_path / "run"), rows_of(whole)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    validations = validations_of(whole)
    assert set(validations) == {3, 6}
    assert validations.items() <= validations_of(tmp_path / "run").items()
    expected = weights_of(whole)
    for name, value in weights_of(tmp_path / "run").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_run_across_segments_does_not_depend_on_what_it_ran_on(toy_data, tmp_path, whole):
    pretrain(config_of(toy_data, tmp_path / "run", until=1))
    loading = {"num_workers": 1, "window": 16, "batches_ahead": 3}
    others = config_of(toy_data, tmp_path / "run", until=5, micro_batch_size=3, loading=loading)
    run_in_processes(2, train, others)
    pretrain(config_of(toy_data, tmp_path / "run"))
    for row, expected in zip(rows_of(tmp_path / "run"), rows_of(whole), strict=True):
        assert row["data_digest"] == expected["data_digest"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
