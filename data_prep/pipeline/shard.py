"""Writer of one shard and its files.

    usable item   -> media bytes, decoded once, re-encoded if configured -> sample and Parquet row
    unusable item -> its pairs in rejected/<shard>.jsonl, each with a reason

The index is written last: its presence means that the shard is finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow

from data_prep.config import AudioOptions, DownloadOptions, ImageOptions, MakeShards
from data_prep.media.decode import MediaError
from data_prep.media.preparation import PreparedMedia, prepare_media
from data_prep.modalities.modality import Modalities
from data_prep.pipeline.media_reader import MediaReader
from data_prep.pipeline.plan import ItemPlan
from data_prep.pipeline.sample_parts import (
    PartSettings,
    PreparedSample,
    prepare_sample,
    read_files,
    rejected_pair,
    sources_of,
)
from data_prep.shards.columns import kept_value, schema_of
from data_prep.shards.parquet import row_of_contents, write_shard_parquet
from data_prep.shards.writer import ShardWriter
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import CLIP_PREFIX, BadItemError, Item, Pair, SampleParts
from data_prep.storage.atomic import write_atomically

DOWNLOAD_FOLDER = "downloads"


@dataclass(frozen=True)
class ShardSettings:
    """The settings for writing the shards of a dataset, named as in `MakeShards`."""

    source: PairSource
    output: Path
    samples_per_shard: int
    captions_per_item: str
    max_media_bytes: int
    image: ImageOptions
    audio: AudioOptions
    mark_only: tuple[str, ...]
    download: DownloadOptions
    remake: tuple[str, ...]

    @classmethod
    def from_config(cls, config: MakeShards) -> ShardSettings:
        """Copies the fields from a config."""
        names = [field.name for field in fields(cls) if field.name != "source"]
        values = {name: getattr(config, name) for name in names}
        return cls(source=PairSource.from_config(config), **values)


@dataclass(frozen=True)
class ShardTask:
    """A worker's task: the shard to write."""

    number: int
    settings: ShardSettings
    plan: ItemPlan

    @property
    def name(self) -> str:
        """Stem of the shard's file names."""
        return f"{self.number:08d}"

    @cached_property
    def modalities(self) -> Modalities | None:
        """Modalities of the samples; None for pairs."""
        return self.plan.named_modalities()

    @property
    def num_items(self) -> int:
        """Number of items that the shard owns, including unusable ones."""
        size = self.settings.samples_per_shard
        return min(size, self.plan.num_items - self.number * size)


@dataclass
class ShardContent:
    """The samples and rejected pairs that a shard contains so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[Pair] = field(default_factory=list)
    dropped_clips: Counter[str] = field(default_factory=Counter)


def rejected_path(folder: Path, name: str) -> Path:
    """Returns the path of a shard's list of rejected pairs; no file exists if there are none."""
    return folder / "rejected" / f"{name}.jsonl"


def write_shard(task: ShardTask) -> int:
    """Writes the Parquet, rejected pairs, tar and index of a shard; returns its number of items.

    Raises:
        InputError, RunError: if a disk, a server or a container currently cannot be read.
    """
    folder = task.settings.output
    # The index of an earlier attempt must never coexist with the new tar.
    (folder / f"{task.name}.idx").unlink(missing_ok=True)
    writer = ShardWriter(folder, task.name, modalities=task.modalities)
    try:
        with _media_reader(task.settings) as reader:
            items = task.plan.read_items(task.number)
            write = _write_items if task.modalities is None else _write_samples
            content = write(items, writer, task=task, reader=reader)
            _write_rejected(rejected_path(folder, task.name), content.rejected)
            write_shard_parquet(folder / f"{task.name}.parquet", _table(content.rows, task))
            rejected = Counter(pair.reason for pair in content.rejected) + content.dropped_clips
            marked = Counter(mark for row in content.rows for mark in row["marks"])
            writer.finish(rejected=dict(rejected), marked=dict(marked))
            reader.forget_downloads()
    except BaseException:
        writer.discard()
        raise
    return len(items)


def _media_reader(settings: ShardSettings) -> MediaReader:
    return MediaReader(
        settings.source,
        downloads=settings.output / DOWNLOAD_FOLDER,
        download=settings.download,
        max_bytes=settings.max_media_bytes,
        retried=settings.remake,
        urls_may_repeat=settings.captions_per_item == "row" or settings.source.media is None,
    )


def _write_items(
    items: Sequence[Item], writer: ShardWriter, *, task: ShardTask, reader: MediaReader
) -> ShardContent:
    content = ShardContent()
    usable = [item for item in items if any(pair.reason is None for pair in item.pairs)]
    read = reader.read_all(usable)
    for item in items:
        content.rejected += [pair for pair in item.pairs if pair.reason is not None]
        pairs = [pair for pair in item.pairs if pair.reason is None]
        if not pairs:
            continue
        _, media = next(read)
        try:
            if isinstance(media, BadItemError):
                raise media
            clips = _prepare(media, pairs, task=task, content=content)
        except BadItemError as error:
            failed = {"reason": error.reason, "detail": error.detail}
            content.rejected += [dataclasses.replace(pair, **failed) for pair in pairs]
            continue
        for suffix, clip in clips.items():
            key = f"{item.number:012d}{suffix}"
            writer.add(key, members=_members(clip, pairs, suffix=suffix))
            content.rows.append(_row(key, clip, pairs, suffix=suffix, task=task))
    return content


def _write_samples(
    items: Sequence[Item], writer: ShardWriter, *, task: ShardTask, reader: MediaReader
) -> ShardContent:
    """Writes samples of modalities; each item has one pair."""
    content, settings = ShardContent(), task.settings
    parts_settings = PartSettings(
        modalities=task.modalities,
        image=settings.image,
        audio=settings.audio,
        mark_only=settings.mark_only,
        min_modalities=settings.source.min_modalities,
        bad_modality=settings.source.bad_modality,
    )
    read = read_files([item for item in items if item.pairs[0].reason is None], reader)
    for item in items:
        pair = item.pairs[0]
        if pair.reason is not None:
            content.rejected.append(pair)
            continue
        _, parts, files = next(read)
        key = f"{item.number:012d}"
        try:
            sample = prepare_sample(key, pair, parts, files, parts_settings)
        except BadItemError as error:
            content.rejected.append(rejected_pair(pair, error))
            continue
        writer.add(key, members=sample.members, contents=sample.contents)
        content.rows.append(_sample_row(sample, pair, parts, task=task))
    return content


def _sample_row(
    sample: PreparedSample, pair: Pair, parts: SampleParts, *, task: ShardTask
) -> dict[str, Any]:
    kept, plan = json.loads(pair.kept or "{}"), task.plan
    return {
        **row_of_contents(
            sample.contents,
            task.modalities,
            measures=sample.measures,
            sources=sources_of(parts),
            members=sample.members,
        ),
        "uid": pair.uid or sample.contents.key,
        "class_name": pair.class_name,
        "language": pair.language,
        "marks": sorted(sample.marks),
        "source_row": pair.row,
        **{name: kept_value(parts.labels.get(name), kind) for name, kind in plan.labels.items()},
        **{name: kept_value(kept.get(name), kind) for name, kind in plan.kept.items()},
    }


def _prepare(
    media: bytes, pairs: Sequence[Pair], *, task: ShardTask, content: ShardContent
) -> dict[str, PreparedMedia]:
    """Returns {key suffix: image or clip}, without clips that a filter drops.

    Raises:
        BadItemError: if the media is unusable, or filters drop all clips.
    """
    settings = task.settings
    try:
        clips = prepare_media(
            media, kind=settings.source.media, image=settings.image, audio=settings.audio
        )
    except MediaError as error:
        raise BadItemError(error.reason, str(error)) from None
    suffixes = [f"_{n:04d}" for n in range(len(clips))] if len(clips) > 1 else [""]
    good: dict[str, PreparedMedia] = {}
    dropped: Counter[str] = Counter()
    for suffix, clip in zip(suffixes, clips, strict=True):
        dropping = next((name for name in clip.found if name not in settings.mark_only), None)
        if dropping is None:
            good[suffix] = clip
        else:
            dropped[dropping] += 1
    if not good:
        reason, count = dropped.most_common(1)[0]
        raise BadItemError(reason, f"{count} of {len(clips)} clips" if len(clips) > 1 else "")
    content.dropped_clips.update({CLIP_PREFIX + name: count for name, count in dropped.items()})
    return good


# -------------------------------------------------------------------------------- sample and row


def _members(clip: PreparedMedia, pairs: Sequence[Pair], *, suffix: str) -> dict[str, bytes]:
    # A single caption is stored as .txt; several captions, a class name or a uid also need a .json.
    first = pairs[0]
    members = {clip.extension: clip.content, "txt": first.caption.encode("utf-8")}
    if len(pairs) > 1 or first.class_name or first.uid:
        values: dict[str, Any] = {"captions": [pair.caption for pair in pairs]}
        values |= {"class_name": first.class_name} if first.class_name else {}
        values |= {"uid": first.uid + suffix} if first.uid else {}
        members["json"] = json.dumps(values, ensure_ascii=False).encode("utf-8")
    return members


def _row(
    key: str, clip: PreparedMedia, pairs: Sequence[Pair], *, suffix: str, task: ShardTask
) -> dict[str, Any]:
    first = pairs[0]
    kept = json.loads(first.kept or "{}")
    return {
        "key": key,
        "uid": first.uid + suffix if first.uid else key,
        "captions": [pair.caption for pair in pairs],
        "class_name": first.class_name,
        "language": first.language,
        "marks": sorted({mark for pair in pairs for mark in pair.marks} | set(clip.found)),
        "extension": clip.extension,
        "bytes": len(clip.content),
        "sha256": hashlib.sha256(clip.content).hexdigest(),
        **clip.measures,
        "source": first.media,
        "source_row": first.row,
        **{name: kept_value(kept.get(name), kind) for name, kind in task.plan.kept.items()},
    }


def _table(rows: Sequence[dict[str, Any]], task: ShardTask) -> pyarrow.Table:
    modalities = task.modalities or Modalities.pair(task.settings.source.media)
    schema = schema_of(modalities, kept=task.plan.kept, labels=task.plan.labels)
    return pyarrow.Table.from_pylist(list(rows), schema=schema)


def _write_rejected(path: Path, pairs: Sequence[Pair]) -> None:
    if not pairs:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"row": pair.row, "media": pair.media, "reason": pair.reason, "detail": pair.detail}
        | ({"modality": pair.modality} if pair.modality else {})
        for pair in pairs
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
