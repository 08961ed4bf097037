"""Trained runs of any modalities are evaluated, embedded and searched."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from data_prep.modalities.modality import Modalities, Modality
from data_prep.modalities.vectors import to_npy
from eval import embed, search
from eval.config import EmbedConfig, EvaluateConfig, SearchConfig
from eval.evaluate import run
from eval.report.search_page import build_app
from pretrain.config import PretrainConfig
from pretrain.train import pretrain
from tests.support.toy_run import toy_config
from tests.support.toy_views import write_views

VECTORS = Modalities(
    {
        "narrow": Modality("vector", width=300),
        "wide": Modality("vector", width=4096),
        "text": Modality("text"),
    }
)


def wide_members(number, present):
    rng = np.random.default_rng(number)
    vectors = {"narrow": rng.normal(size=300), "wide": rng.normal(size=4096)}
    members = {
        f"{name}.npy": to_npy(vector.astype(np.float32))
        for name, vector in vectors.items()
        if name in present
    }
    return members | {"txt": f"text {number}".encode()} if "text" in present else members


def tower_of(data, name):
    return toy_config(data, data).model.model_dump(mode="json")[name]


def run_of(folder, data, model, objectives, *, num_steps=1):
    """Trains a run whose only stream has these objectives."""
    values = toy_config(folder, folder / "run").model_dump(mode="json")
    values["model"] = {"embed_dim": 16} | model
    values["streams"] = {
        "all": {
            "global_batch_size": 16,
            "sources": [{"name": "all", "dataset": str(data)}],
            "objectives": objectives,
        }
    }
    values["schedule"] = {"num_steps": num_steps, "warmup_steps": 0}
    pretrain(PretrainConfig.model_validate(values))
    return folder / "run"


def retrieval(data, left, right):
    return {"task": "modality_retrieval", "dataset": str(data), "left": left, "right": right}


def evaluated(folder, checkpoint, evaluations, *, name="out"):
    values = {"checkpoint": str(checkpoint), "output": str(folder / name), "batch_size": 8}
    values |= {"bootstrap_samples": 100, "evaluations": evaluations}
    run(EvaluateConfig.model_validate(values))
    return json.loads((folder / name / "results.json").read_text())["evaluations"]


def embedded(folder, checkpoint, data):
    """Embeds a dataset; returns {view: number of rows}."""
    values = {"checkpoint": checkpoint, "dataset": data, "output": folder / "embeddings"}
    embed.run(EmbedConfig.model_validate(values))
    return {
        path.name: sum(pyarrow.parquet.read_table(file).num_rows for file in path.glob("*.parquet"))
        for path in (folder / "embeddings").iterdir()
    }


def searched(folder, checkpoint, data, monkeypatch):
    """Builds the indexes; returns a client of the page."""
    engines = []
    monkeypatch.setattr("eval.report.search_page.serve", lambda engine, **_: engines.append(engine))
    values = {"checkpoint": checkpoint, "dataset": str(data), "output": folder / "search"}
    search.run(SearchConfig.model_validate(values))
    return build_app(engines[0]).test_client()


@pytest.mark.slow
def test_an_emergent_pair_is_marked_and_equal_on_several_processes(tmp_path):
    data = write_views(tmp_path / "data", fraction=0.8)
    model = {name: tower_of(tmp_path, name) for name in ("image", "audio", "text")}
    objectives = {"image-text": {}, "audio-text": {}}
    checkpoint = run_of(tmp_path, data, model, objectives)
    evaluations = {
        "trained": retrieval(data, "image", "text"),
        "never trained": retrieval(data, "image", "audio"),
        "titles": retrieval(data, "text.title", "image"),
    }
    records = evaluated(tmp_path, checkpoint, evaluations)
    together = {name: record["trained_together"] for name, record in records.items()}
    assert together == {"trained": True, "never trained": False, "titles": True}
    table, page = ((tmp_path / "out" / name).read_text() for name in ("results.md", "report.html"))
    for text in (table, page):
        assert "never trained (emergent)" in text and "trained (emergent)" in text
        assert "no objective of the run reads image and audio together" in text
        assert "titles (emergent)" not in text

    config = tmp_path / "two.yaml"
    values = {"checkpoint": str(checkpoint), "output": str(tmp_path / "two"), "batch_size": 8}
    config.write_text(yaml.safe_dump(values | {"evaluations": evaluations}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc-per-node", "2", "-m", "eval.evaluate", str(config)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    again = json.loads((tmp_path / "two/results.json").read_text())["evaluations"]
    for name, record in records.items():
        assert again[name]["scores"] == record["scores"]


@pytest.mark.slow
def test_a_model_of_images_and_sounds_alone_is_evaluated_embedded_and_searched(
    tmp_path, monkeypatch
):
    data = write_views(tmp_path / "data", fraction=0.7)
    model = {name: tower_of(tmp_path, name) for name in ("image", "audio")}
    checkpoint = run_of(tmp_path, data, model, {"image-audio": {}})
    record = evaluated(tmp_path, checkpoint, {"pairs": retrieval(data, "image", "audio")})["pairs"]
    assert record["trained_together"] is True
    assert record["scores"]["image_to_audio_recall@1"]["num_queries"] == record["num_left"]
    client = searched(tmp_path, checkpoint, data, monkeypatch)
    assert set(client.get("/about").json["views"]) == {"image", "audio"}
    assert {each["view"] for each in client.get("/like/0?view=audio").json} == {"image", "audio"}


@pytest.mark.slow
def test_two_image_modalities_share_a_tower(tmp_path, monkeypatch):
    data = write_views(tmp_path / "data", fraction=0.7)
    model = {"image": tower_of(tmp_path, "image"), "modalities": {"scan": "image"}}
    checkpoint = run_of(tmp_path, data, model, {"image-scan": {}})
    pairs = {"pairs": retrieval(data, "image", "scan")}
    pairs["by view"] = retrieval(data, "image", {"image": "scan"})
    records = evaluated(tmp_path, checkpoint, pairs)
    shared = records["pairs"]["scores"]["image_to_scan_recall@5"]
    assert shared == records["by view"]["scores"]["image_to_image_scan_recall@5"]
    client = searched(tmp_path, checkpoint, data, monkeypatch)
    assert {each["view"] for each in client.get("/like/0").json} == {"image", "scan"}


@pytest.mark.slow
def test_vectors_of_300_and_4096_numbers_with_texts(tmp_path, monkeypatch):
    data = write_views(tmp_path / "data", fraction=0.8, members_of=wide_members, modalities=VECTORS)
    widths = {name: VECTORS[name].width for name in ("narrow", "wide")}
    model = {"text": tower_of(tmp_path, "text")}
    model["modalities"] = {
        name: {"kind": "vector", "width": width, "tower": {"width": 8}}
        for name, width in widths.items()
    }
    checkpoint = run_of(tmp_path, data, model, {"narrow-text": {}, "wide-text": {}})
    pairs = {name: retrieval(data, name, "text") for name in widths}
    pairs["both"] = retrieval(data, "narrow", "wide")
    pairs["classes"] = {
        "task": "zero_shot_classification",
        "dataset": str(write_views(tmp_path / "labelled", members_of=labelled, modalities=VECTORS)),
        "views": ["narrow", "wide"],
        "class_names": ["odd", "even"],
        "prompt_templates": ["{}"],
    }
    records = evaluated(tmp_path, checkpoint, pairs)
    assert records["both"]["trained_together"] is False
    assert records["classes"]["num_queries"] > 0
    counts = embedded(tmp_path, checkpoint, data)
    assert set(counts) == set(VECTORS) and min(counts.values()) > 20
    client = searched(tmp_path, checkpoint, data, monkeypatch)
    assert {each["view"] for each in client.get("/search?text=text+3").json} == set(VECTORS)


def labelled(number, present):
    members = wide_members(number, present)
    return members | {"json": json.dumps({"class_name": ["even", "odd"][number % 2]}).encode()}
