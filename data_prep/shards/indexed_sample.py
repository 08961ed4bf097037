"""Reading of one sample through the index of its shard, from any source of the tar's bytes.

The members of a sample are adjacent, so one read covers them. Each is checked against its CRC32.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from data_prep.shards.index import BLOCK_BYTES, ShardIndex
from data_prep.shards.sample import Sample, split_member_name

ReadAt = Callable[[int, int], bytes]  # (number of bytes, start) -> bytes; fewer at the end


def read_indexed(
    index: ShardIndex,
    position: int,
    *,
    read_at: ReadAt,
    fields: Sequence[str] | None,
    tar_name: str,
) -> tuple[Sample, list[str]]:
    """Reads a sample and checks its members.

    Args:
        index: index of the shard.
        position: position of the sample in the shard.
        read_at: reads bytes of the tar.
        fields: extensions of the members to read; None reads all.
        tar_name: path or URL of the tar, for messages.

    Returns:
        (sample, extensions of members with a CRC32 mismatch)
    """
    entries = index.entries_at(position)
    first_block = min(entries.values())[0] - 1  # header with the key
    wanted = entries
    if fields is not None:
        wanted = {name: entry for name, entry in entries.items() if name in fields}
    # One read covers the members, and the header with the key if all are read.
    start_block = first_block
    if len(wanted) < len(entries):
        start_block = min(wanted.values(), default=(first_block,))[0]
    start = start_block * BLOCK_BYTES
    last_block, last_size, _ = max(wanted.values(), default=(start_block, BLOCK_BYTES, 0))
    end = last_block * BLOCK_BYTES + last_size
    content = read_at(end - start, start)
    header = content
    if start_block != first_block:
        header = read_at(BLOCK_BYTES, first_block * BLOCK_BYTES)
    key = index.long_keys.get(position) or _key_in(header[:BLOCK_BYTES])
    sample, bad = Sample(tar_name, key, {}), []
    for name, (block, size, crc32) in wanted.items():
        first = block * BLOCK_BYTES - start
        sample.members[name] = content[first : first + size]
        if len(sample.members[name]) != size or zlib.crc32(sample.members[name]) != crc32:
            bad.append(name)
    return sample, bad


def _key_in(header: bytes) -> str:
    return split_member_name(plain_member_name(header))[0]


def plain_member_name(header: bytes) -> str:
    """Returns the name in a member's ustar header; preceding PAX and GNU headers are ignored."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", errors="replace")
