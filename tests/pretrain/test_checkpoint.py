import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from data_prep.errors import InputError
from pretrain.checkpoint import (
    find_checkpoint,
    load_model,
    newest_checkpoint,
    open_checkpoint,
    read_model_state,
    restore,
)
from pretrain.checkpoints.record import RunState, parse_record, read_record
from pretrain.checkpoints.store import DamagedCheckpointError, open_store
from pretrain.checkpoints.writer import delete_other_checkpoints
from pretrain.config import PretrainConfig, Run
from pretrain.run.attempts import read_attempts, read_metrics
from tests.support.damage import outcomes_of, single_bit_flips
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_state import ToyEngine, as_version_2, writer_of

MODEL, OPTIMIZER = (f"{kind}-00001-of-00001.safetensors" for kind in ("model", "optimizer"))


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


def warnings_of_training(config):
    """Trains, and returns the warnings."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: messages.append(entry.getMessage())
    logging.getLogger("pretrain").addHandler(handler)
    train(config)
    return messages


def edit_step(checkpoint):
    """Changes the step in the record of a checkpoint of step 6 by hand."""
    record = checkpoint / "checkpoint.json"
    record.write_text(record.read_text().replace('"step": 6', '"step": 7'))


def config_of(toy_data, folder):
    config = toy_config(toy_data, folder, schedule={"num_steps": 6, "warmup_steps": 0})
    settings = {"checkpoint_every_steps": 1, "keep_checkpoints": 2}
    return config.model_copy(update={"run": config.run.model_copy(update=settings)})


@pytest.fixture(scope="module")
def run(toy_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    run_in_processes(1, train, config_of(toy_data, folder))
    return folder


def test_only_the_newest_are_kept_and_each_is_valid(run):
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step_00000005", "step_00000006"]
    assert [open_checkpoint(str(folder)).record.state.step for folder in folders] == [5, 6]


def test_load_model_gives_a_model_that_encodes(run):
    model, transforms, tokenizer = load_model(run)
    image = transforms["image"](Image.new("RGB", (30, 20), "red"))
    embeddings = model.encode_image(image[None])
    assert embeddings.shape == (1, 16)
    assert not embeddings.requires_grad
    texts = model.encode_text(tokenizer(["a red picture", "a sound"]))
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert not model.training


def test_a_checkpoint_folder_is_taken_as_it_is(run):
    folder = run / "checkpoints" / "step_00000005"
    assert find_checkpoint(folder) == folder
    assert find_checkpoint(run).name == "step_00000006"


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "no record", "edited"])
def test_every_damage_is_named_and_the_previous_checkpoint_is_taken(run, tmp_path, damage, caplog):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    weights = newest / MODEL
    content = weights.read_bytes()
    if damage == "flipped bit":
        middle = len(content) // 2
        weights.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncated":
        weights.write_bytes(content[:-1])
    elif damage == "missing":
        (newest / OPTIMIZER).unlink()
    elif damage == "edited":
        edit_step(newest)
    else:
        (newest / "checkpoint.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="step_00000006"):
        open_checkpoint(str(newest))
    found = newest_checkpoint(open_store(newest.parent))
    assert found.location == str(newest.with_name("step_00000005"))
    assert "skipping a damaged checkpoint" in caplog.text


def test_a_run_goes_on_from_the_checkpoint_before_one_whose_step_was_edited(
    toy_data, run, tmp_path
):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    expected = read_model_state(newest)
    edit_step(newest)
    config = config_of(toy_data, tmp_path / "run")
    [messages] = run_in_processes(1, warnings_of_training, config)
    [damage] = [message for message in messages if "damaged" in message]
    assert f"{newest}/checkpoint.json: expected the recorded sha256 of its content" in damage
    last = read_attempts(tmp_path / "run")[-1]
    assert (last.from_step, last.to_step, last.outcome) == (5, 6, "finished")
    found = read_model_state(newest)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_an_earlier_version_began_is_read_and_goes_on(toy_data, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    record = folder / "checkpoints" / "step_00000005" / "checkpoint.json"
    record.write_bytes(as_version_2(record.read_bytes()))
    for path in (*folder.glob("attempts/*.json"), *folder.glob("*.json")):
        values = json.loads(path.read_text())
        del values["sha256"]
        path.write_text(json.dumps(values, indent=2) + "\n")
    for path in folder.glob("metrics/*.jsonl"):
        path.write_text(re.sub(r', "crc32": "[0-9a-f]{8}"', "", path.read_text()))
    config = folder / "config.yaml"
    config.write_text(config.read_text().split("\n", 1)[1])
    load_model(folder)
    [messages] = run_in_processes(1, warnings_of_training, config_of(toy_data, folder))
    assert [message for message in messages if "damaged" in message] == []
    attempts = read_attempts(folder)
    assert [(each.from_step, each.to_step) for each in attempts] == [(0, 6), (5, 6)]
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert read_record(folder / "checkpoints" / "step_00000006").state == RunState(6, 6)


@pytest.mark.slow  # test_record.py has a smaller record
def test_no_flipped_bit_of_a_real_record_goes_unnoticed(run):
    content = (run / "checkpoints" / "step_00000006" / "checkpoint.json").read_bytes()
    original = parse_record(content, location="step_00000006")
    outcomes = outcomes_of(
        lambda damaged: parse_record(damaged, location="step_00000006"),
        single_bit_flips(content),
        error=DamagedCheckpointError,
    )
    assert all(record == original for _, record in outcomes)


def test_going_back_behind_a_damaged_checkpoint_never_deletes_the_good_one(toy_data, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    (newest / MODEL).write_bytes(b"damaged")
    config = toy_config(toy_data, tmp_path / "run", schedule={"num_steps": 6, "warmup_steps": 0})
    stopped_at_6 = {"checkpoint_every_steps": 1, "keep_checkpoints": 1}
    config = config.model_copy(update={"run": config.run.model_copy(update=stopped_at_6)})
    run_in_processes(1, train, config)
    assert [folder.name for folder in newest.parent.iterdir()] == ["step_00000006"]
    open_checkpoint(str(newest))


def test_a_save_deletes_later_steps_that_the_run_went_back_behind(tmp_path):
    for step in (1, 2, 3, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    delete_other_checkpoints(open_store(tmp_path), 3, keep=2)
    kept = sorted(folder.name for folder in tmp_path.iterdir())
    assert kept == ["step_00000002", "step_00000003"]


def test_a_parameter_that_was_frozen_in_the_loaded_checkpoint_is_named(tmp_path):
    class Trained(ToyEngine):
        def slices(self):
            for each in super().slices():
                yield each
                if each.slice.parameter != "w0" and each.slice.key == "exp_avg":
                    other = replace(each.slice, tensor=f"exp_avg_sq/{each.slice.parameter}")
                    yield replace(each, slice=other)

    writer = writer_of(ToyEngine(), tmp_path)
    writer.save(RunState(1, num_updates=1))
    writer.finish()
    with pytest.raises(InputError, match=r"moments for every .* found none for w1, w2, which were"):
        restore(Trained(), newest_checkpoint(open_store(tmp_path)))


def test_multiples_of_keep_every_steps_are_kept(tmp_path):
    for step in range(1, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
        delete_other_checkpoints(open_store(tmp_path), step, keep=2, keep_every_steps=3)
    kept = sorted(int(folder.name.removeprefix("step_")) for folder in tmp_path.iterdir())
    assert kept == [3, 6, 8, 9]


def test_keep_every_steps_must_be_a_multiple_of_checkpoint_every_steps(tmp_path):
    with pytest.raises(ValueError, match=r"not a multiple of .*=200; use 400"):
        Run(folder=tmp_path, checkpoint_every_steps=200, keep_every_steps=500)


def test_an_older_checkpoint_is_never_loaded_silently(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000006"
    (newest / OPTIMIZER).unlink()  # not needed for evaluation
    assert find_checkpoint(tmp_path / "run") == newest
    (newest / MODEL).unlink()
    with pytest.raises(InputError, match=r"damaged checkpoint: .*use an older one: .*00000005"):
        load_model(tmp_path / "run")


def test_a_folder_without_checkpoint_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match=r"expected a run folder with a checkpoint"):
        load_model(tmp_path)


def test_a_checkpoint_does_not_need_the_files_its_towers_were_loaded_from(toy_data, tmp_path):
    from transformers import AutoConfig, AutoModel

    from tests.pretrain.model.test_towers import TINY_BERT, TINY_VIT, write_clip_tokenizer

    sources = tmp_path / "sources"
    AutoModel.from_config(AutoConfig.for_model("vit", **TINY_VIT)).save_pretrained(sources / "vit")
    AutoModel.from_config(AutoConfig.for_model("bert", **TINY_BERT)).save_pretrained(
        sources / "bert"
    )
    write_clip_tokenizer(sources / "tokenizer")
    config = toy_config(toy_data, tmp_path / "run", schedule={"num_steps": 2, "warmup_steps": 0})
    values = config.model_dump(mode="json")
    loaded = {"library": "transformers", "pretrained": True}
    values["model"]["image"] = loaded | {"name": str(sources / "vit")}
    values["model"]["text"] = loaded | {
        "name": str(sources / "bert"),
        "tokenizer": str(sources / "tokenizer"),
        "context_length": 12,
    }
    run_in_processes(1, train, PretrainConfig.model_validate(values))
    shutil.rmtree(sources)
    model, transforms, tokenizer = load_model(tmp_path / "run")
    embeddings = model.encode_text(tokenizer(["a red picture"]))
    saved = read_model_state(tmp_path / "run/checkpoints/step_00000002")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in saved.items())
    assert embeddings.shape == (1, 16)
    assert set(transforms) == {"image", "audio"}


def test_a_checkpoint_holds_no_pickle(run):
    names = {path.suffix for path in run.joinpath("checkpoints").rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ".yaml"}
    record = read_record(run / "checkpoints" / "step_00000006")
    assert set(record.files) == {MODEL, OPTIMIZER, "config.yaml"}
