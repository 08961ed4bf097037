"""Time and peak memory of make_shards on a manifest of 1,000,000 rows.

    python -m tests.benchmarks.million_rows [ROWS]

The rows name 1,000 tiny JPEGs repeatedly, and each row becomes a sample. Memory is the peak total
of the command and its two workers (VmRSS, sampled five times a second).
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PICTURES = 1000
WORKERS = 2
CONFIG = """
media: image
captions_per_item: row
samples_per_shard: 10000
captions: {strip_html: true, max_words: 50, max_repeats: 100000}
"""


def main(num_rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder, num_rows)
        (folder / "config.yaml").write_text(CONFIG)
        command = [sys.executable, "-m", "data_prep.make_shards", str(folder / "config.yaml")]
        command += [f"input={folder / 'pairs.tsv'}", f"output={folder / 'dataset'}"]
        command += [f"workers={WORKERS}"]
        start = time.monotonic()
        with subprocess.Popen(command, cwd=REPOSITORY) as process:
            held: list[int] = []
            watcher = threading.Thread(target=watch, args=(process, held))
            watcher.start()
        watcher.join()
        seconds = time.monotonic() - start
        size = sum(path.stat().st_size for path in (folder / "dataset").glob("*.tar"))
    print(f"rows                     {num_rows:>12,}")
    print(f"seconds                  {seconds:>12,.0f}   {num_rows / seconds:,.0f} rows/s")
    print(f"tars                     {size / 1e9:>12,.2f} GB")
    print(f"peak memory              {max(held) / 1e6:>12,.0f} MB")


def write_manifest(folder: Path, num_rows: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        sink = io.BytesIO()
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG")
        (folder / f"{number}.jpg").write_bytes(sink.getvalue())
    with (folder / "pairs.tsv").open("w") as file:
        file.write("path\tcaption\n")
        for row in range(num_rows):
            file.write(f"{row % NUM_PICTURES}.jpg\ta picture with the number {row} under it\n")


def watch(process: subprocess.Popen, held: list[int]) -> None:
    """Records the memory of a process and its children while it runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        try:
            pids = [process.pid, *map(int, children.read_text().split())]
            held.append(sum(map(resident_bytes, pids)))
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.2)


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(next(lines, "VmRSS: 0").split()[1]) * 1024


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
