"""Writes evaluation sets and a model, and prints clip_benchmark's metrics of them.

clip_benchmark 1.6.2 needs numpy < 2.3, and therefore its own environment:

    python3.11 -m venv oracle
    oracle/bin/pip install torch==2.13.0 torchvision==0.28.0 open-clip-torch==3.3.0 \
        clip-benchmark==1.6.2 requests "numpy<2.3"
    oracle/bin/python -m tests.support.clip_benchmark_oracle \
        > tests/support/clip_benchmark_metrics.json
"""

import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from tests.support.toy_models import write_open_clip_folder

NUM_ITEMS = 60
CLASSES = ["cat", "dog", "cow", "hen", "fox", "owl", "bat", "ant"]
TEMPLATES = ["a photo of a {c}.", "one {c}", "{c} on the grass"]
# Set -> (clip_benchmark's task, further arguments)
SETS = {
    "single": ("zeroshot_classification", []),
    "several": ("zeroshot_classification", []),
    "captions": ("zeroshot_retrieval", ["--recall_k", "1", "5", "10"]),
}


def write_model_and_sets(folder):
    """Writes the model tiny/, and sets with one class, several classes, or captions per item."""
    write_open_clip_folder(folder / "tiny")
    generator = np.random.default_rng(0)
    samples = {name: [] for name in SETS}
    for number in range(NUM_ITEMS):
        color = generator.integers(0, 255, 3)
        pixels = (color + generator.integers(-60, 60, (24, 20, 3))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        common = {"__key__": f"s{number:07d}", "png": file.getvalue()}
        flags = generator.integers(0, 2, len(CLASSES))
        captions = [
            f"a {CLASSES[generator.integers(8)]} and {number} words, {k}"
            for k in range(1 + number % 5)
        ]
        array = io.BytesIO()
        np.save(array, flags)
        samples["single"].append(common | {"cls": str(generator.integers(8)).encode()})
        samples["several"].append(common | {"npy": array.getvalue()})
        samples["captions"].append(common | {"txt": "\n".join(captions).encode()})
    types = {"single": "classification", "several": "multilabel", "captions": "retrieval"}
    for name, members in samples.items():
        _write_set(folder / name, members, kind=types[name])


def _write_set(folder, samples, *, kind):
    (folder / "test").mkdir(parents=True)
    for number, start in enumerate(range(0, NUM_ITEMS, 20)):
        with webdataset.TarWriter(str(folder / "test" / f"{number}.tar")) as tar:
            for members in samples[start : start + 20]:
                tar.write(members)
    (folder / "test" / "nshards.txt").write_text("3")
    (folder / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(CLASSES))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))


def main():
    metrics = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_and_sets(folder)
        for dataset, (task, arguments) in SETS.items():
            output = folder / f"{dataset}.json"
            command = [sys.executable, "-m", "clip_benchmark.cli", "eval", "--pretrained", ""]
            command += ["--model", f"local-dir:{folder / 'tiny'}", "--dataset", f"wds/{dataset}"]
            command += ["--dataset_root", str(folder / dataset), "--task", task, "--no_amp"]
            command += ["--num_workers", "1", "--batch_size", "16", "--output", str(output)]
            subprocess.run([*command, *arguments], check=True, stdout=sys.stderr)
            metrics[dataset] = json.loads(output.read_text())["metrics"]
    print(json.dumps(metrics, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
