"""A media file of the demo data with its captions, and the writer of a split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoItem:
    """A media file to write, and its entries in the manifest."""

    name: str  # file name inside the split's folder
    content: bytes
    captions: tuple[str, ...]
    class_name: str | None = None


def write_split(folder: Path, split: str, items: Iterable[DemoItem]) -> int:
    """Writes `<split>/` and `<split>.tsv`, one row per caption; returns the number of files."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    num_files = 0
    for item in items:
        path = f"{split}/{item.name}"
        (folder / path).write_bytes(item.content)
        label = () if item.class_name is None else (item.class_name,)
        rows += [(path, caption, *label) for caption in item.captions]
        num_files += 1
    header = ("path", "caption", "class_name")[: len(rows[0])]
    write_lines(folder / f"{split}.tsv", ["\t".join(row) for row in [header, *rows]])
    return num_files


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file with one entry per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
