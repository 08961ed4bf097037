"""The tables of docs/code-tour.md, from the packages themselves and the rules of their imports.

python -m tests.support.room_tables     writes them into the page
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/code-tour.md"
PACKAGES = ("data_prep", "pretrain", "eval")
# Package -> another package -> its rooms and modules that it may import.
ALLOWED_ROOMS = {
    "data_prep": {},
    "pretrain": {
        "data_prep": (
            *("errors", "config_file", "command", "versions"),
            *("storage", "shards", "modalities", "media", "report"),
        ),
    },
    "eval": {
        "data_prep": (
            *("errors", "config_file", "command", "config", "versions"),
            *("storage", "shards", "modalities", "media", "report", "dedup", "sources"),
        ),
        "pretrain": (
            *("config", "settings", "checkpoint", "checkpoints", "distributed", "model", "run"),
            "captioning",
        ),
    },
}
ROOM_HEADER = "| room | content |\n|---|---|\n"
ARROW_HEADER = "| package | may import |\n|---|---|\n"


def room_table():
    """A row for every room, with the first line of its docstring."""
    rows = []
    for package in PACKAGES:
        for init in sorted((ROOT / package).glob("*/__init__.py")):
            room = init.parent.relative_to(ROOT).as_posix()
            summary = ast.get_docstring(ast.parse(init.read_text())).splitlines()[0]
            rows.append(f"| [{room}/](../{room}) | {summary} |\n")
    return ROOM_HEADER + "".join(rows)


def arrow_table():
    """A row for every package, with the rooms of other packages that it may import."""
    rows = []
    for package, others in ALLOWED_ROOMS.items():
        names = [f"`{other}`: {', '.join(rooms)}" for other, rooms in others.items()]
        rows.append(f"| `{package}` | {'; '.join(names) or 'no other package'} |\n")
    return ARROW_HEADER + "".join(rows)


def write_tables():
    """Replaces the tables of the page."""
    text = PAGE.read_text()
    for header, table in ((ROOM_HEADER, room_table()), (ARROW_HEADER, arrow_table())):
        before, _, after = text.partition(header)
        rest = after[after.index("\n\n") + 1 :] if after.startswith("|") else after
        text = before + table + rest
    PAGE.write_text(text)


if __name__ == "__main__":
    write_tables()
