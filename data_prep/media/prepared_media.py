"""What the preparation of a media file makes: the bytes and measures of one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PreparedMedia:
    """What is stored of one media file, or of one clip that was cut out of it."""

    content: bytes
    extension: str
    measures: dict[str, Any]  # the columns of shard_columns.MEASURES
    found: tuple[str, ...]  # filters that would drop it, in a fixed order
