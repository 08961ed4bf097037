"""Runs whose tokenizer or pretrained weights change or go missing between two starts."""

import json
import shutil

import pytest
import timm
import torch
from transformers import AutoConfig, AutoModel

from data_prep.errors import ConfigError, InputError
from data_prep.storage.sealed import to_sealed_json
from pretrain.checkpoint import read_model_state
from pretrain.run.compatibility import fingerprints_of_run
from pretrain.stored_config import write_config
from pretrain.train import dry_run, pretrain
from tests.pretrain.run.test_fork import put_config, small_config
from tests.support.toy_towers import TINY_BERT, write_word_tokenizer

TIMM = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
WORDS = ("picture", "is", "red", "green", "blue", "white")
KEYS = {"model.text.tokenizer", "model.text.pretrained", "model.image.pretrained"}
FINAL = "checkpoints/step_00000004"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Returns a folder with a tokenizer, a BERT and weights of a timm model."""
    folder = tmp_path_factory.mktemp("sources")
    write_word_tokenizer(folder / "words", WORDS)
    sizes = TINY_BERT | {"vocab_size": 30}
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(folder / "bert")
    model = timm.create_model("test_convnext", num_classes=0, patch_size=1)
    torch.save(model.state_dict(), folder / "timm.pt")
    return folder


def config_of(data, run, sources, **settings):
    text = {"library": "transformers", "name": "bert", "context_length": 8}
    text |= {"pretrained": str(sources / "bert"), "tokenizer": str(sources / "words")}
    model = {"image": TIMM | {"pretrained": str(sources / "timm.pt")}, "text": text}
    # One source: the order of mixed sources differs from that of earlier versions.
    source = {"name": "colors", "dataset": data / "colors"}
    stream = {"global_batch_size": 16, "sources": [source], "objectives": {"image-text": {}}}
    sections = {"model": model, "schedule": {"num_steps": 4}, "run": settings}
    return small_config(data, run, streams={"image-text": stream}, **sections)


def stop(config, step):
    run = config.run.model_copy(update={"stop_after_step": step})
    return config.model_copy(update={"run": run})


@pytest.fixture(scope="module")
def stopped(toy_data, sources, tmp_path_factory):
    """Returns (the folder of a run stopped at step 2, the folder of the same run undisturbed)."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(stop(config_of(toy_data, folder / "stopped", sources), 2))
    pretrain(config_of(toy_data, folder / "whole", sources))
    return folder / "stopped", folder / "whole"


@pytest.fixture
def begun(toy_data, stopped, sources, tmp_path):
    """Returns the config of the stopped run, with copies of its folder and of its sources."""
    shutil.copytree(sources, tmp_path / "sources")
    shutil.copytree(stopped[0], tmp_path / "run")
    config = config_of(toy_data, tmp_path / "run", tmp_path / "sources")
    write_config(tmp_path / "run", config)
    put_config(tmp_path / "run" / "checkpoints" / "step_00000002", config)
    assert fingerprints_of_run(tmp_path / "run").keys() >= KEYS
    return config


def assert_equal_to(whole, folder):
    """Checks that the last parameters of two runs are equal bit for bit."""
    own, expected = (read_model_state(each / FINAL) for each in (folder, whole))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_a_changed_source_is_refused_by_name(begun, tmp_path):
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **TINY_BERT | {"vocab_size": 30}))
    state = torch.load(tmp_path / "sources" / "timm.pt")
    next(iter(state.values())).add_(0.5)
    changes = {
        "model.text.tokenizer": ("words", lambda path: write_word_tokenizer(path, WORDS[::-1])),
        "model.text.pretrained": ("bert", bert.save_pretrained),
        "model.image.pretrained": ("timm.pt", lambda path: torch.save(state, path)),
    }
    for key, (name, change) in changes.items():
        path = tmp_path / "sources" / name
        path.rename(tmp_path / "original")
        change(path)
        with pytest.raises(ConfigError) as raised:
            pretrain(begun)
        told = [line for line in str(raised.value).splitlines() if line.startswith("  ")]
        assert len(told) == 1
        assert told[0].startswith(f"  fingerprint.{key}: ")
        assert f"fingerprint.{key}: the files that this setting names have changed" in str(
            raised.value
        )
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "original").rename(path)
    pretrain(begun)


def test_sources_that_are_gone_are_replaced_by_the_checkpoints_copy(
    begun, stopped, tmp_path, caplog
):
    shutil.rmtree(tmp_path / "sources")
    dry_run(begun)
    pretrain(stop(begun, 3))
    for key in KEYS:
        assert f"{key} cannot be read (" in caplog.text
    assert caplog.text.count(f"its copy in {tmp_path}/run/checkpoints/step_00000002 is used") == 3
    assert fingerprints_of_run(tmp_path / "run") == fingerprints_of_run(stopped[0])
    pretrain(begun)
    assert_equal_to(stopped[1], tmp_path / "run")


def test_without_any_valid_checkpoint_a_source_that_is_gone_is_named(begun, toy_data, tmp_path):
    shutil.rmtree(tmp_path / "sources" / "bert")
    new = begun.model_copy(update={"run": begun.run.model_copy(update={"folder": tmp_path / "x"})})
    with pytest.raises(InputError, match=r"model\.text: transformers cannot build 'bert'"):
        pretrain(new)
    for path in tmp_path.glob("run/checkpoints/*/model-*"):  # damage that the record does not show
        path.write_bytes(path.read_bytes()[:-8])
    for name in ("status.json", "metrics/0001.jsonl"):  # and no trace of what was saved
        (tmp_path / "run" / name).unlink()
    with pytest.raises(InputError, match=r"model\.image\.pretrained|model\.text\.pretrained"):
        pretrain(begun)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_stored_no_fingerprints_and_resumes(begun, tmp_path, stopped):
    path = tmp_path / "run" / "environment.json"
    values = json.loads(path.read_bytes())
    del values["sha256"]
    stored = values["dataset_fingerprints"]
    values["dataset_fingerprints"] = {k: v for k, v in stored.items() if k not in KEYS}
    path.write_bytes(to_sealed_json(values, indent=2))
    record = tmp_path / "run" / "checkpoints" / "step_00000002" / "checkpoint.json"
    values = json.loads(record.read_bytes())
    del values["sha256"]
    of_model = values["written_by"]["fingerprints"].keys() & KEYS
    for key in of_model:
        del values["written_by"]["fingerprints"][key]
    record.write_bytes(to_sealed_json(values, indent=1))
    shutil.rmtree(tmp_path / "sources" / "words")
    pretrain(stop(begun, 3))
    assert fingerprints_of_run(tmp_path / "run").keys() & KEYS == KEYS - {"model.text.tokenizer"}
    pretrain(begun)
    assert_equal_to(stopped[1], tmp_path / "run")
