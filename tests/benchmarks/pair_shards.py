"""Pair datasets made, read and loaded, compared with another commit of this repository, in turns.

    git worktree add /tmp/before COMMIT --detach
    python -m tests.benchmarks.pair_shards /tmp/before

CPU seconds, the least of NUM_RUNS; the files are small, so that overhead is a large part. The tars,
indexes and Parquet files of both commits must be equal.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

NUM_PAIRS = 1500
NUM_RUNS = 8
SUFFIXES = (".tar", ".idx", ".parquet")
HERE = Path(__file__).parents[2]
# Runs in the folder of either commit.
CHILD = """
import contextlib, gc, io, json, sys, time
from pathlib import Path
from data_prep.config import MakeShards
from data_prep.make_shards import make_shards
from data_prep.shards.dataset import Dataset
from data_prep.shards.writer import ShardWriter
from pretrain.model.tokenizer import build_tokenizer
from pretrain.training.assembly import open_step_loader
from tests.benchmarks.loading.run_config import image_run

source, output = map(Path, sys.argv[1:])
seconds = {}

@contextlib.contextmanager
def timed(name):
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start

config = dict(media="image", samples_per_shard=250, image=dict(reencode="never"))
few = source.with_name("few.csv")
with contextlib.redirect_stdout(io.StringIO()):
    make_shards(MakeShards(input=str(few), output=output / "few", **config))  # imports modules
    with timed("make_shards"):
        make_shards(MakeShards(input=str(source), output=output / "all", **config))
output = output / "all"
dataset = Dataset(output)
with timed("read an index and verify its sha256, 10,000 times"):
    for _ in range(10_000):
        dataset._read_index(0)
samples = [dataset.read_sample(n) for n in range(len(dataset))]
gc.freeze()  # otherwise the collector's passes over all modules are measured
with timed("read every sample, 20 times"):
    for _ in range(20):
        for number in range(len(dataset)):
            dataset.read_sample(number)
writer = ShardWriter(output, "other")
with timed("add every sample to a shard, 10 times"):
    for number in range(10 * len(dataset)):
        writer.add(f"{number:012d}", members=samples[number % len(samples)].members)
writer.discard()
config = image_run(output, global_batch_size=64)
tokenizer = build_tokenizer(config.model.text)
loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
loader.load(0)  # reads the indexes
with timed("load 20 steps of 64 pairs for training"):
    for step in range(1, 21):
        loader.load(step)
print(json.dumps(seconds))
"""


def main(before: Path) -> None:
    """Measures both commits in turns, and prints the ratios."""
    with tempfile.TemporaryDirectory() as name:
        source = write_pairs(Path(name) / "in")
        runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for number in range(NUM_RUNS):
            outputs = {}
            commits = [("before", before), ("now", HERE)]
            for commit, folder in commits[:: -1 if number % 2 else 1]:
                outputs[commit] = Path(name) / f"{commit}-{number}"
                runs[commit].append(measure(folder, source, outputs[commit]))
            assert contents(outputs["before"]) == contents(outputs["now"]), "other bytes"
    for step in runs["now"][0]:
        old, new = (min(run[step] for run in runs[commit]) for commit in ("before", "now"))
        print(f"{step}: {old:.2f} s before, {new:.2f} s now, ratio {new / old:.3f}")


def write_pairs(folder: Path) -> Path:
    """Writes JPEGs of 64 x 64 pixels with captions, and returns their table."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,caption"]
    for number in range(NUM_PAIRS):
        pixels = np.repeat(np.repeat(rng.integers(0, 255, (8, 8, 3)), 8, axis=0), 8, axis=1)
        sink = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG")
        (folder / f"{number}.jpg").write_bytes(sink.getvalue())
        lines.append(f"{number}.jpg,caption number {number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    (folder / "few.csv").write_text("\n".join(lines[:100]) + "\n")
    return folder / "pairs.csv"


def measure(folder: Path, source: Path, output: Path) -> dict[str, float]:
    """Runs the child process in the folder of a commit, and returns its CPU seconds."""
    command = [sys.executable, "-c", CHILD, str(source), str(output)]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, str]:
    """Returns the sha256 of the tars, indexes and Parquet files."""
    paths = [path for path in (folder / "all").iterdir() if path.suffix in SUFFIXES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
