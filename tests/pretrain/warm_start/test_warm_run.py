"""Runs that start from other models and runs: identity, run folder, dry run and resume."""

import json
import shutil

import pytest
import torch

from data_prep.errors import ConfigError, InputError
from data_prep.storage.atomic import sha256_of
from pretrain.checkpoint import load_model, read_model_state
from pretrain.run.compatibility import fingerprints_of_run
from pretrain.stored_config import read_config_of_run
from pretrain.train import dry_run, pretrain
from tests.pretrain.run.test_fork import small_config
from tests.support.toy_starts import randomize
from tests.support.toy_towers import build_toy_model, write_tiny_open_clip

CLIP = {"library": "open_clip", "name": "tiny"}
FIRST = "checkpoints/step_00000002"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model = randomize(write_tiny_open_clip(folder))
    model.logit_scale.data.fill_(4.25)
    torch.save(model.state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


def config_of(data, run, location, *, num_steps=2, image=None, **start):
    tower = CLIP | {"start": {"from": str(location)} | start}
    text = tower | {"context_length": 12}
    sections = {"image": tower if image is None else image, "text": text}
    return small_config(data, run, model=sections, schedule={"num_steps": num_steps})


@pytest.fixture(scope="module")
def started(toy_data, clip, tmp_path_factory):
    """Returns the folder of a run of two steps that starts from a CLIP."""
    folder = tmp_path_factory.mktemp("started") / "run"
    pretrain(config_of(toy_data, folder, clip))
    return folder


def test_the_dry_run_prints_the_origin_of_tensors(toy_data, clip, tmp_path, capsys):
    dry_run(config_of(toy_data, tmp_path / "run", clip))
    output = capsys.readouterr().out
    assert f"image tower starts from {clip} (sha256 {sha256_of(clip)}): 20 taken, 0 res" in output
    assert "taken      visual.conv1.weight -> backbone.conv1.weight [16, 3, 8, 8]" in output
    assert "logit scale of image-text: 70.1054, from logit_scale of" in output
    assert not (tmp_path / "run").exists()


def test_the_run_folder_keeps_the_table_and_the_identity_the_sha256(started, clip):
    stored = json.loads((started / "warm_start.json").read_text())
    assert stored["towers"].keys() == {"image", "text"}
    for kind, table in stored["towers"].items():
        assert table["sha256"] == sha256_of(clip)
        assert fingerprints_of_run(started)[f"model.{kind}.start"] == sha256_of(clip)
        sources = [name for row in table["rows"] for name in row["source"].split(" + ") if name]
        assert sorted(sources) == sorted(torch.load(clip))  # every tensor of the file, once
        names = {
            name for name, _ in build_toy_model(read_config_of_run(started)).named_parameters()
        }
        own = {f"towers.{kind}.{row['tower']}" for row in table["rows"] if row["tower"]}
        assert {name for name in names if name.startswith(f"towers.{kind}.")} <= own


@pytest.mark.slow
def test_a_moved_source_is_the_same_run_and_a_changed_one_another(
    toy_data, started, clip, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(started, folder)
    moved = shutil.copy(clip, tmp_path / "moved.pt")
    pretrain(config_of(toy_data, folder, moved))
    state = torch.load(moved)
    state["visual.proj"] += 1e-3
    torch.save(state, moved)
    with pytest.raises(ConfigError, match=r"fingerprint\.model\.image\.start: "):
        pretrain(config_of(toy_data, folder, moved))
    moved.unlink()
    pretrain(config_of(toy_data, folder, moved))  # all weights are in the checkpoint
    with pytest.raises(InputError, match=r"model\.image\.start\.from: expected a file, a folder"):
        pretrain(config_of(toy_data, tmp_path / "new", moved))


@pytest.mark.slow
def test_towers_start_from_a_run_and_embed_as_it_does(toy_data, started, tmp_path):
    expected = read_model_state(started / FIRST)
    for location in (started, started / FIRST):
        config = config_of(toy_data, tmp_path / "run", location)
        folder = tmp_path / location.name
        config = config.model_copy(
            update={
                "run": config.run.model_copy(update={"folder": folder}),
                "optimizer": config.optimizer.model_copy(update={"learning_rate": 1e-30}),
            }
        )
        pretrain(config)
        found = read_model_state(folder / FIRST)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():  # at so small a rate, nothing moves
            assert torch.equal(tensor, expected[name]), name
    model, *_ = load_model(folder)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(model.encode_image(pixels), load_model(started)[0].encode_image(pixels))


@pytest.mark.slow
def test_a_tower_alone_starts_from_a_run(toy_data, started, tmp_path, capsys):
    """Starts the text tower from an earlier run, with a new image tower."""
    image = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
    dry_run(config_of(toy_data, tmp_path / "run", started, image=image))
    output = capsys.readouterr().out
    assert "text tower starts from" in output
    assert "image tower starts from" not in output
    assert "its towers do not start from one source" in output


def test_two_ways_of_loading_weights_are_refused(toy_data, clip, tmp_path):
    tower = CLIP | {"start": {"from": str(clip)}, "pretrained": str(clip)}
    with pytest.raises(ValueError, match=r"start and pretrained=.* both name weights"):
        config_of(toy_data, tmp_path, clip, image=tower)
