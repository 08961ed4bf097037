"""Metrics and stored embeddings do not depend on processes, workers, shards and their order."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from data_prep.config_file import read_config
from eval.config import EvaluateConfig
from eval.evaluate import run
from tests.eval.datasets.test_tar_dataset import write_set
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_evaluation import picture_sample
from tests.support.toy_models import write_open_clip_folder
from tests.support.toy_shards import jpeg

NUM_ITEMS = 29
BATCH_SIZE = 15  # two parts, the last one not full: a third process has no item


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_open_clip_folder(tmp_path_factory.mktemp("model") / "tiny")


def samples_of(num_items=NUM_ITEMS):
    """Draws images with one to three captions each; some images and some captions are equal."""
    samples = []
    for n in range(num_items):
        captions = [f"caption {n % 7} of {n % 3}", *(f"words {n} {k}" for k in range(n % 3))]
        members = {"jpg": jpeg(n % 25), "txt": "\n".join(captions).encode()}
        samples.append(members | {"cls": str(n % 3).encode()})
    return samples


def write_config(folder, model, dataset, **settings):
    folder.mkdir()
    tasks = {
        "classes": {
            "task": "zero_shot_classification",
            "class_names": ["cat", "dog", "cow"],
            "prompt_templates": ["a {}", "one {} in the grass"],
        },
        "captions": {"task": "retrieval"},
    }
    for task in tasks.values():
        task["dataset"] = str(dataset)
    values = {"checkpoint": str(model), "output": str(folder / "out"), "evaluations": tasks}
    values |= {"batch_size": BATCH_SIZE, "bootstrap_samples": 100} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def evaluate(config):
    run(read_config(EvaluateConfig, Path(config)))


def launch(config, *, num_processes):
    """Runs the command in several processes; returns (exit status, standard error)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc-per-node", str(num_processes), "-m", "eval.evaluate", str(config)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.returncode, finished.stderr


def results_of(config):
    """Reads the metrics, the predictions by sample key, and the stored embeddings."""
    out = config.parent / "out"
    record = json.loads((out / "results.json").read_text())["evaluations"]
    scores = {
        (name, metric): score["value"]
        for name, each in record.items()
        for metric, score in each["scores"].items()
    }
    predictions = {
        path.name: sorted(map(str, pyarrow.parquet.read_table(path).to_pylist()))
        for path in (out / "predictions").iterdir()
    }
    embeddings = sorted(
        (path.parent.name.split("_")[0], path.name, path.read_bytes())
        for path in (out / "embeddings").rglob("*.npy")
    )
    return scores, predictions, embeddings


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Evaluates in one process without workers, on one shard."""
    folder = tmp_path_factory.mktemp("alone")
    write_set(folder / "set", samples_of(), samples_per_tar=NUM_ITEMS)
    config = write_config(folder / "run", model, folder / "set")
    evaluate(config)
    return results_of(config)


CASES = [
    pytest.param(2, 1, 5, False),  # processes, workers, samples per shard, shuffled
    pytest.param(3, 4, 15, True, marks=pytest.mark.exhaustive),
    pytest.param(1, 0, 5, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_processes", "workers", "samples_per_tar", "is_shuffled"), CASES)
def test_results_do_not_depend_on_processes_workers_shards_or_order(
    alone, model, tmp_path, num_processes, workers, samples_per_tar, is_shuffled
):
    keyed = [members | {"__key__": f"s{n:07d}"} for n, members in enumerate(samples_of())]
    if is_shuffled:
        keyed = [keyed[n] for n in np.random.default_rng(0).permutation(NUM_ITEMS)]
    write_set(tmp_path / "set", keyed, samples_per_tar=samples_per_tar)
    config = write_config(tmp_path / "run", model, tmp_path / "set", workers=workers)
    run_in_processes(num_processes, evaluate, config)
    scores, predictions, embeddings = results_of(config)
    expected_scores, expected_predictions, expected_embeddings = alone
    assert embeddings == expected_embeddings
    assert predictions == expected_predictions
    assert scores == pytest.approx(expected_scores, abs=1e-12)  # sums in another order


def test_parts_that_were_finished_before_a_kill_are_used_by_the_next_run(model, tmp_path):
    write_set(tmp_path / "set", samples_of(300), samples_per_tar=100)
    config = write_config(tmp_path / "run", model, tmp_path / "set", batch_size=1)
    process = subprocess.Popen([sys.executable, "-m", "eval.evaluate", str(config)])
    while len(finished := list(tmp_path.rglob("0*.npy"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.npy")}
    assert not (tmp_path / "run/out/results.json").exists()
    damaged, *whole = sorted(finished)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    evaluate(config)
    assert (tmp_path / "run/out/results.json").exists()
    assert all(path.stat().st_mtime_ns == finished[path] for path in whole)
    # Another run reuses all of them, and a model with different weights none.
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.npy")}
    assert len(np.load(damaged)) == 1
    evaluate(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*.npy")} == made


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_says_why(model, tmp_path):
    samples = [picture_sample("red", seed=n) for n in range(NUM_ITEMS)]
    samples[20]["png"] = samples[20]["png"][
        :50
    ]  # in the second part, which the second process encodes
    write_set(tmp_path / "set", samples, samples_per_tar=NUM_ITEMS)
    config = write_config(tmp_path / "run", model, tmp_path / "set")
    values = yaml.safe_load(config.read_text())
    del values["evaluations"]["classes"]
    config.write_text(yaml.safe_dump(values))
    status, errors = launch(config, num_processes=2)
    assert status != 0
    assert "sample s0000020: .png cannot be decoded" in errors
    assert "another process ended; see its error message" in errors
    assert not list(Path(tmp_path).rglob("results.json"))
