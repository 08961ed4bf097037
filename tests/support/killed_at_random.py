"""Kills make_shards with SIGKILL at random moments and restarts it until it ends by itself.

    python -m tests.support.killed_at_random MANIFEST OUTPUT NUM_KILLS SEED

One process imports everything and forks an attempt at a time: an attempt starts at once, so that
moments anywhere in its work are hit. Prints how many attempts were killed while they worked.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import duckdb  # noqa: F401  imported before the fork, as everything that attempts import lazily
import pyarrow.parquet  # noqa: F401

from data_prep.config import MakeShards
from data_prep.make_shards import make_shards


def main(manifest: str, output: str, num_kills: str, seed: str) -> None:
    generator = random.Random(int(seed))
    config = MakeShards(input=manifest, output=Path(output), media="image", samples_per_shard=5)
    whole = config.model_copy(update={"output": Path(output + "_whole")})
    start = time.monotonic()
    attempt(whole, seconds=None)
    duration = time.monotonic() - start
    killed = 0
    while killed < int(num_kills):
        # An attempt that comes near the end has less to do than a whole run.
        killed += attempt(config, seconds=generator.uniform(0, duration / 4))
        if (config.output / "dataset.json").exists():
            generator.choice(sorted(config.output.glob("*.idx"))).unlink()
    attempt(config, seconds=None)
    print(killed)


def attempt(config: MakeShards, *, seconds: float | None) -> bool:
    """Runs one attempt; returns True if it was killed before its end."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        make_shards(config)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
