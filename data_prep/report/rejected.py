"""Pairs that were dropped when a dataset was created: counts by reason, with examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import FILTER_REASONS
from data_prep.errors import InputError
from data_prep.shards.manifest import DatasetInfo
from data_prep.sources.pair import CLIP_PREFIX

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Rejection:
    """The pairs that were dropped for one reason."""

    reason: str
    kind: str  # description of the kind of reason
    num: int
    fraction: float | None  # fraction of the input's pairs; None: clips, or unknown
    examples: list[dict[str, Any]]  # row, media, reason, detail

    @property
    def is_clip(self) -> bool:
        """Whether these are clips of longer recordings, not pairs of the input."""
        return self.reason.startswith(CLIP_PREFIX)


def read_rejections(folder: Path, info: DatasetInfo) -> list[Rejection]:
    """Reads the dropped pairs by reason, most frequent first.

    Args:
        folder: dataset folder.
        info: content of dataset.json.

    Raises:
        InputError: if rejected.jsonl is damaged.
    """
    num_pairs = num_input_pairs(info)
    examples = rejected_examples(folder / "rejected.jsonl", set(info.rejected))
    return [
        Rejection(
            reason=reason,
            kind=kind_of(reason),
            num=num,
            fraction=num / num_pairs if num_pairs and not reason.startswith(CLIP_PREFIX) else None,
            examples=examples.get(reason, []),
        )
        for reason, num in sorted(info.rejected.items(), key=lambda entry: (-entry[1], entry[0]))
    ]


def kind_of(reason: str) -> str:
    """Describes the kind of a reason."""
    if reason.startswith(CLIP_PREFIX):
        return "clip of a longer recording"
    if reason in FILTER_REASONS:
        return "filter"
    return "download" if reason.startswith("download_") else "unusable"


def num_input_pairs(info: DatasetInfo) -> int | None:
    """Returns the number of pairs in the input; None if it is not recorded."""
    if info.preparation.get("command") == "index_shards":
        return info.num_samples + sum(info.rejected.values())
    return info.num_pairs


def rejected_examples(path: Path, reasons: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Reads the first examples of each reason from rejected.jsonl; stops early if possible.

    Args:
        path: path of rejected.jsonl, which may be missing.
        reasons: reasons that occur in the file.

    Raises:
        InputError: if a line is damaged.
    """
    examples: dict[str, list[dict[str, Any]]] = {}
    missing = {reason for reason in reasons if not reason.startswith(CLIP_PREFIX)}
    if not path.exists():
        return examples
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not missing:
                break
            try:
                pair = json.loads(line)
                found = examples.setdefault(pair["reason"], [])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}: line {number} is damaged ({error!r}); run make_shards again to "
                    "rewrite it"
                ) from None
            if len(found) < NUM_EXAMPLES:
                found.append(pair)
            if len(found) == NUM_EXAMPLES:
                missing.discard(pair["reason"])
    return examples
