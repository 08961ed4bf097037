"""A sample of the demo data with its captions, and the writer of a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoItem:
    """The media files of a sample, and its entries in the manifest."""

    files: dict[str, bytes]  # file name inside the split's folder -> content
    captions: tuple[str, ...]
    labels: tuple[str, ...] = ()


def write_split(folder: Path, split: str, items: Iterable[DemoItem], *, header: str) -> int:
    """Writes `<split>/` and `<split>.tsv`, one row per caption; returns the number of samples.

    Args:
        folder: folder of the set.
        split: name of the split.
        items: samples of the split.
        header: columns of files, caption and labels, separated by spaces.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = [tuple(header.split())]
    num_samples = 0
    for item in items:
        for name, content in item.files.items():
            (folder / split / name).write_bytes(content)
        paths = [f"{split}/{name}" for name in item.files]
        rows += [(*paths, caption, *item.labels) for caption in item.captions]
        num_samples += 1
    write_lines(folder / f"{split}.tsv", ["\t".join(row) for row in rows])
    return num_samples


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file with one entry per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
