"""From files to a trained model: samples that make_shards prepares, trained, resumed and loaded."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_prep.config import MakeShards
from data_prep.make_shards import make_shards
from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from tests.pretrain.test_train import steps_of
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import train
from tests.support.toy_modalities import image, sound
from tests.support.toy_run import toy_config

NUM_SAMPLES = 24
NUM_STEPS = 4


def prepare(folder, columns, source):
    """Returns the dataset of a source, in which samples may lack modalities."""
    make_shards(
        MakeShards(input=str(source), output=folder / "dataset", columns=columns, min_modalities=1)
    )
    return folder / "dataset"


def two_photographs(folder):
    """Writes two photographs of each object to a folder; every fifth object has one."""
    (folder / "in").mkdir()
    for number in range(NUM_SAMPLES):
        for name in ("front", "side")[: 1 + (number % 5 > 0)]:
            (folder / f"in/{number:03d}.{name}.png").write_bytes(image(number))
    kinds = {name: {"kind": "image", "column": name} for name in ("front", "side")}
    return prepare(folder, {"named": kinds}, folder / "in")


def vectors_with_texts(folder):
    """Writes lists of 300 numbers, .npy files of 4,096 numbers, and texts, to Parquet."""
    rng, rows = np.random.default_rng(0), []
    for number in range(NUM_SAMPLES):
        np.save(folder / f"{number}.npy", rng.normal(size=4096).astype(np.float16))
        words = None if number % 5 == 0 else rng.normal(size=300).tolist()
        rows.append({"words": words, "frozen": f"{number}.npy", "report": f"report {number}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    kinds = {name: {"kind": "vector", "column": name} for name in ("words", "frozen")}
    return prepare(folder, {"text": "report", "named": kinds}, folder / "rows.parquet")


def frames_with_sounds(folder):
    """Writes a table of images and sounds without texts; every fifth image is silent."""
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["frame", "sound"])
        for number in range(NUM_SAMPLES):
            (folder / f"{number}.png").write_bytes(image(number))
            (folder / f"{number}.flac").write_bytes(sound(number))
            rows.writerow([f"{number}.png", f"{number}.flac" if number % 5 else ""])
    return prepare(folder, {"image": "frame", "audio": "sound"}, folder / "rows.csv")


CONVNEXT = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
# Name -> (function that prepares the dataset, towers that replace those of toy_config, objectives)
CASES = {
    "a shared tower": (
        two_photographs,
        dict.fromkeys(("image", "audio", "text"))
        | {
            "modalities": {
                "front": {"kind": "image", "tower": CONVNEXT},
                "side": {"kind": "image", "tower": "front"},
            }
        },
        {"front-side": {}},
    ),
    "vectors with texts": (
        vectors_with_texts,
        dict.fromkeys(("image", "audio"))
        | {
            "modalities": {
                "words": {"kind": "vector", "width": 300},
                "frozen": {"kind": "vector", "width": 4096},
            }
        },
        {"words-text": {}, "frozen-text": {"loss": "sigmoid"}},
    ),
    "image and audio alone": (frames_with_sounds, {"text": None}, {"image-audio": {}}),
}


def config_of(dataset, folder, model, objectives, *, until=None):
    values = toy_config(folder, folder / "run").model_dump(mode="json")
    values["model"] |= model
    sources = [{"name": "samples", "dataset": dataset}]
    values["streams"] = {
        "samples": {"global_batch_size": 8, "sources": sources, "objectives": objectives}
    }
    values["schedule"] |= {"num_steps": NUM_STEPS}
    values["run"] |= {"stop_after_step": until}
    held_out = {"samples": {"dataset": dataset, "batch_size": 12}}
    values["validation"] |= {"every_steps": 2, "streams": held_out}
    return PretrainConfig.model_validate(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_prepared_samples_are_trained_resumed_and_encoded(tmp_path, name):
    prepare_dataset, model, objectives = CASES[name]
    dataset = prepare_dataset(tmp_path)
    for num_processes, until in ((1, 2), (2, None)):
        config = config_of(dataset, tmp_path, model, objectives, until=until)
        run_in_processes(num_processes, train, config)
    rows = steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert set(rows[-1]["loss"]) == {f"samples/{objective}" for objective in objectives}
    assert all(np.isfinite(list(row["loss"].values())).all() for row in rows)
    trained, *_ = load_model(tmp_path / "run")
    assert set(trained.kinds) == {
        modality for objective in objectives for modality in objective.split("-")
    }
    inputs = {
        "image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        "audio": torch.ones(2, 1600),
        "text": torch.ones(2, 12, dtype=torch.int64),
    }
    for modality, kind in trained.kinds.items():
        width = trained.towers[modality].input_stage.mean.numel() if kind == "vector" else 0
        values = torch.ones(2, width) if kind == "vector" else inputs[kind]
        with torch.no_grad():
            norms = trained.encode(modality, values).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones(2))
