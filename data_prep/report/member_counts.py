"""What the tars of a dataset hold, by extension: from the indexes alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from data_prep.shards.dataset import ABSENT, ShardIndex
from data_prep.shards.subset import KeptSamples


@dataclass
class MemberCount:
    """Members of one extension."""

    num_samples: int = 0
    num_bytes: int = 0


def count_members(kept: KeptSamples) -> dict[str, MemberCount]:
    """Extension -> how many of the kept samples have such a member, and its bytes in all.

    Raises:
        InputError: an index is missing or damaged.
    """
    counts: dict[str, MemberCount] = defaultdict(MemberCount)
    is_kept = None if kept.subset is None else kept.subset.bitmap
    for shard, row in enumerate(kept.dataset.manifest):
        index = ShardIndex.read(kept.folder / f"{row.name}.idx")
        table = index.table  # uint32 [n, k, 3]
        if is_kept is not None:
            start, end = kept.dataset.shard_starts[shard : shard + 2]
            table = table[is_kept[start:end]]
        is_present = table[:, :, 0] != ABSENT  # [n, k]
        sizes = np.where(is_present, table[:, :, 1], 0).sum(axis=0, dtype=np.int64)
        for field, num, size in zip(index.fields, is_present.sum(axis=0), sizes, strict=True):
            counts[field].num_samples += int(num)
            counts[field].num_bytes += int(size)
    return dict(sorted(counts.items()))
