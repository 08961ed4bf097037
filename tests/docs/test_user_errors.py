"""What a person can get wrong, through the commands: one clear message, no traceback, a status."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from data_prep.config import MakeShards
from data_prep.config_file import Section, to_yaml, url_settings
from eval.config import CompareConfig
from pretrain.config import PretrainConfig
from tests.support.commands import COMMANDS
from tests.support.toy_run import toy_config, write_toy_dataset


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m verb CONFIG overrides` in this process: (status, message on stderr)."""

    def run(verb, config, *overrides):
        monkeypatch.setattr(sys, "argv", [verb, str(config), *overrides])
        status = importlib.import_module(verb).main()
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.count("error: ") == 1, message
        return status, message

    return run


@pytest.fixture
def config(toy_data, tmp_path):
    """A config file that would train on a copy of the toy data."""
    shutil.copytree(toy_data, tmp_path / "data")
    toy = toy_config(tmp_path / "data", tmp_path / "run")
    (tmp_path / "config.yaml").write_text(to_yaml(toy))
    return tmp_path / "config.yaml"


def test_a_missing_config_file(command, config):
    status, message = command("pretrain.train", config.with_name("confg.yaml"))
    assert status == 2
    assert "no such config file; files there: " in message
    assert "config.yaml" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rat=1", "optimizer: unknown key 'learning_rat'; did you mean"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: Input should be a valid number"),
        ("schedule.num_steps=-3", "schedule.num_steps: Input should be greater than 0"),
        (
            "streams.image-text.global_batch_size=20",
            "streams.image-text.global_batch_size=20 is not a multiple of lanes=8; use 16 or 24",
        ),
        ("streams.video-text={}", "streams.video-text"),
        (
            "model.audio=null",
            "reads 'audio': expected a modality of the model (image, text); set model.audio",
        ),
        ("learning_rate", "'learning_rate': expected section.key=value"),
        ("model.logit_scale.initial=500", "expected 1 <= initial <= maximum, found 500 and 100"),
        ("audio.clip_seconds=0.01", "clip_seconds=0.01 are 40 samples, fewer than"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: Input should be less than 1"),
        ("run.folder=/dev/null", "run.folder=/dev/null: expected a folder, found a file"),
    ],
)
def test_a_wrong_setting_is_named_with_its_key(command, config, override, expected):
    status, message = command("pretrain.train", config, override)
    assert status == 2
    assert expected in message


def test_a_source_that_is_not_there(command, config):
    status, message = command(
        "pretrain.train", config, "streams.audio-text.sources.0.dataset=nowhere"
    )
    assert status == 1
    assert "nowhere/dataset.json: expected a dataset of shards" in message
    assert "python -m data_prep.make_shards" in message


def test_fewer_samples_than_lanes(command, config, tmp_path):
    write_toy_dataset(tmp_path / "few", "audio", shard_sizes=(5,))
    status, message = command(
        "pretrain.train", config, f"streams.audio-text.sources.0.dataset={tmp_path / 'few'}"
    )
    assert status == 1
    assert "source 'tones' has 5 samples, fewer than lanes=8; set lanes to at most 5" in message


def test_a_corrupt_tar(command, config, tmp_path):
    tar = tmp_path / "data" / "tones" / "00000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1000])
    status, message = command("pretrain.train", config)
    assert status == 1
    assert f"{tar}: corrupt shard: expected" in message
    assert "found" in message
    (tmp_path / "verify.yaml").write_text(f"dataset: {tar.parent}")
    status, message = command("data_prep.verify_shards", tmp_path / "verify.yaml")
    assert status == 1
    assert str(tar) in message


def test_the_wrong_kind_of_media(command, config, tmp_path):
    status, message = command(
        "pretrain.train",
        config,
        f"streams.image-text.sources.0.dataset={tmp_path / 'data' / 'tones'}",
    )
    assert status == 1
    assert "source 'colors': expected the views of an objective of streams.image-text" in message
    assert "(image-text reads image and text), found audio, text in " in message


def test_a_class_named_in_no_list(command, tmp_path):
    (tmp_path / "media").mkdir()
    for number, name in enumerate(["red", "green", "blu"]):
        write_picture(tmp_path / "media" / f"{number}.png")
        sidecar = {"captions": [f"it is {name}"], "class_name": name}
        (tmp_path / "media" / f"{number}.json").write_text(json.dumps(sidecar))
    shards = {"input": str(tmp_path / "media"), "output": str(tmp_path / "set"), "media": "image"}
    (tmp_path / "shards.yaml").write_text(yaml.safe_dump(shards))
    from data_prep.config import MakeShards
    from data_prep.config_file import read_config
    from data_prep.make_shards import make_shards

    make_shards(read_config(MakeShards, tmp_path / "shards.yaml"))
    task = {
        "task": "zero_shot_classification",
        "dataset": str(tmp_path / "set"),
        "class_names": ["red", "green", "blue"],
        "prompt_templates": ["it is {}"],
    }
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    evaluation = {"checkpoint": str(tmp_path), "output": str(tmp_path / "results")}
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump(evaluation | {"evaluations": {"colors": task}}))
    status, message = command("eval.evaluate", path)
    assert status == 1
    assert "'blu'" in message
    assert "blue" in message.replace("'blu'", "")
    assert "00000000.tar" in message


def write_picture(path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(path)


def test_a_wrong_column(command, tmp_path):
    (tmp_path / "pairs.tsv").write_text("file\tcaption\nx.png\ta thing\n")
    shards = {"input": str(tmp_path / "pairs.tsv"), "output": str(tmp_path / "o"), "media": "image"}
    (tmp_path / "shards.yaml").write_text(yaml.safe_dump(shards))
    status, message = command("data_prep.make_shards", tmp_path / "shards.yaml")
    assert status == 1
    assert "expected a column 'path' (columns.media), found file, caption" in message


@pytest.mark.slow
def test_more_processes_than_lanes(config):
    """As every rank would say it; here one stands for all."""
    environment = os.environ | {"WORLD_SIZE": "9"}
    arguments = [sys.executable, "-m", "pretrain.train", str(config), "--dry-run"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 1
    assert "9 processes for lanes=8" in done.stderr
    assert "Traceback" not in done.stderr


def sections_of(base):
    for section in base.__subclasses__():
        yield section
        yield from sections_of(section)


@pytest.mark.parametrize("url", ["s3://bucket/x", "HF://datasets/x", "file:///data/x"])
def test_no_local_path_may_be_a_url(url):
    """Walks every config section: whatever becomes a Path would become a folder named s3:."""
    for command in COMMANDS:
        importlib.import_module(command)  # and with it all sections
    found = set()
    for section in set(sections_of(Section)):
        if not section.__module__.startswith(("data_prep.", "pretrain.", "eval.")):
            continue
        for name, field in section.model_fields.items():
            if "Path" not in str(field.annotation):
                continue
            found.add(f"{section.__name__}.{name}")
            is_sequence = "[" in str(field.annotation)
            with pytest.raises(ValidationError) as raised:
                section.model_validate({name: ["fine", url] if is_sequence else url})
            faults = {fault["loc"]: fault["msg"] for fault in raised.value.errors()}
            expected = f"expected a local path, found the URL '{url}'"
            assert faults[(name,)] == expected, (section, name)
    assert found >= {"Run.folder", "Run.parent", "Cache.folder", "MakeShards.output"}
    assert found >= {"CompareConfig.results", "EvaluateConfig.output", "FindDuplicates.datasets"}


def test_settings_that_may_be_a_url_are_named():
    assert list(url_settings(MakeShards)) == ["input", "media_root"]
    assert list(url_settings(CompareConfig)) == []
    assert "run.checkpoint_folder" in url_settings(PretrainConfig)
    assert "streams.*.segments.*.sources.*.dataset" in url_settings(PretrainConfig)
    accepted = MakeShards.model_validate(
        {"input": "s3://bucket/pairs.csv", "output": "s3", "media": "image"}
    )
    assert accepted.input == "s3://bucket/pairs.csv"
