"""What was dropped on the way into a dataset: counts by reason, and a few examples of each."""

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
    """All that was dropped for one reason."""

    reason: str
    kind: str  # in words: what dropped it
    num: int
    share: float | None  # of the input's pairs; None for clips, and where that number is not known
    examples: list[dict[str, Any]]  # row, media, reason, detail

    @property
    def is_clip(self) -> bool:
        """Whether these are clips of longer sounds, which are no pairs of the input."""
        return self.reason.startswith(CLIP_PREFIX)


def read_rejections(folder: Path, info: DatasetInfo) -> list[Rejection]:
    """What was dropped, by reason, the most frequent first.

    Args:
        folder: of the dataset.
        info: of the dataset.

    Raises:
        InputError: rejected.jsonl is damaged.
    """
    num_pairs = num_input_pairs(info)
    examples = rejected_examples(folder / "rejected.jsonl", set(info.rejected))
    return [
        Rejection(
            reason=reason,
            kind=kind_of(reason),
            num=num,
            share=num / num_pairs if num_pairs and not reason.startswith(CLIP_PREFIX) else None,
            examples=examples.get(reason, []),
        )
        for reason, num in sorted(info.rejected.items(), key=lambda entry: (-entry[1], entry[0]))
    ]


def kind_of(reason: str) -> str:
    """What kind of fault a reason is, in words."""
    if reason.startswith(CLIP_PREFIX):
        return "clip of a longer sound"
    if reason in FILTER_REASONS:
        return "filter"
    return "download" if reason.startswith("download_") else "unusable"


def num_input_pairs(info: DatasetInfo) -> int | None:
    """How many pairs were in the input; None where that is not recorded."""
    if info.preparation.get("command") == "index_shards":
        return info.num_samples + sum(info.rejected.values())
    return info.num_pairs


def rejected_examples(path: Path, reasons: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Reason -> its first lines in rejected.jsonl, which is read only as far as needed.

    Args:
        path: of rejected.jsonl, which need not exist.
        reasons: those that occur.

    Raises:
        InputError: a line is damaged.
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
                    f"{path}: line {number} is damaged ({error!r}); run make_shards again to have "
                    "it written anew"
                ) from None
            if len(found) < NUM_EXAMPLES:
                found.append(pair)
            if len(found) == NUM_EXAMPLES:
                missing.discard(pair["reason"])
    return examples
