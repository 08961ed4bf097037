"""Markdown tables with aligned columns, which are also readable as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table, without a trailing newline.

    Args:
        header: names of the columns.
        rows: rows, each with a cell for every column.
    """
    lines = [[_escaped(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    texts = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def _escaped(cell: str) -> str:
    """Returns a cell without the characters that end cells and rows."""
    return " ".join(cell.splitlines()).replace("|", "\\|")
