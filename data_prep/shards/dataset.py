"""The format of a dataset on disk: tars that any WebDataset reader opens, and an index beside each.

    dataset.json          DatasetInfo: version, media kind, totals, drops by reason, fingerprint
    manifest.jsonl        one ManifestRow per shard
    00000000.tar          ustar; the members of a sample stand side by side and share their key
    00000000.idx          ShardIndex: where each member's bytes are, with size and crc32
    00000000.parquet      columns for people and filters; training never reads it

A `.idx` file is, little-endian:

    8 bytes               magic b"ISOIDX1\\n"
    uint32                length of the header in bytes, a multiple of 4
    header                JSON, padded with spaces: fields, num_samples, tar_bytes, tar_sha256,
                          rejected, and marked and long_keys where there are any
    uint32 [n, k, 3]      per sample and field: first block of the member's data (in units of 512
                          bytes from the tar's start), size in bytes, crc32; block 0xFFFFFFFF:
                          absent

A shard is finished if and only if its `.idx`, which is renamed into place last, matches its tar.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from data_prep.config_file import InputError

FORMAT_VERSION = 1
BLOCK_BYTES = 512
ABSENT = 0xFFFFFFFF
INDEX_MAGIC = b"ISOIDX1\n"
MEDIA_EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "mp3", "ogg", "opus"),
}
NUM_OPEN_TARS = 128
NUM_OPEN_INDEXES = 1024  # mapped, so that the processes of a machine share their memory
OPENINGS = 5  # of a file that is taken away again and again
Opened = TypeVar("Opened")
Record = TypeVar("Record", bound="ManifestRow | DatasetInfo")
REPAIR_ADVICE = "rebuild it with python -m data_prep.verify_shards and repair=true"


class CorruptSampleError(ValueError):
    """The bytes of one sample are not what the index says, or do not decode."""


class BadShardError(InputError):
    """A shard that is not there, or is not the one that manifest.jsonl records.

    What may pass, such as a disk or network that fails for the moment, is an OSError instead.
    """


# ---------------------------------------------------------------------------------- one sample


@dataclass(frozen=True)
class Sample:
    """The members of one sample: extension without dot -> bytes."""

    shard: str
    key: str
    members: dict[str, bytes]

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}"


def split_member_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key runs to the first dot of the last path component."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def media_kind_of(extension: str) -> str | None:
    """The kind of media an extension stands for ("image", "audio"), or None."""
    return next((kind for kind, known in MEDIA_EXTENSIONS.items() if extension in known), None)


def media_extension_of(members: Iterable[str], media_kind: str) -> str | None:
    """The first extension among `members`, by the alphabet, that is of this kind of media."""
    known = (extension for extension in sorted(members) if media_kind_of(extension) == media_kind)
    return next(known, None)


def captions_of(sample: Sample) -> list[str]:
    """The captions of a sample: from `.json` (captions, caption or text), else from `.txt`.

    Raises:
        CorruptSampleError: there is no caption, or it is not UTF-8 or JSON.
    """
    metadata = metadata_of(sample)
    for key in ("captions", "caption", "text"):
        if metadata.get(key):
            found = metadata[key] if isinstance(metadata[key], list) else [metadata[key]]
            captions = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            if not captions:
                raise CorruptSampleError(f"{sample}: .json: {key} holds no text: {found!r}")
            return captions
    try:
        caption = sample.members.get("txt", b"").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptSampleError(f"{sample}: .txt is not UTF-8: {error}") from None
    if not caption:
        raise CorruptSampleError(f"{sample}: expected a caption in .json or .txt, found none")
    return [caption]


def metadata_of(sample: Sample) -> dict[str, Any]:
    """What the sample's `.json` member holds; empty where there is none.

    Raises:
        CorruptSampleError: the member is not a JSON object.
    """
    if "json" not in sample.members:
        return {}
    try:
        metadata = json.loads(sample.members["json"])
    except ValueError as error:
        raise CorruptSampleError(f"{sample}: .json is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise CorruptSampleError(f"{sample}: .json holds {type(metadata).__name__}, not an object")
    return metadata


# ----------------------------------------------------------------------------------- one index


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of every sample of one shard are."""

    fields: tuple[str, ...]
    table: np.ndarray  # uint32 [n, k, 3]: data block, size in bytes, crc32
    tar_bytes: int
    tar_sha256: str
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> pairs dropped on writing
    marked: dict[str, int] = field(default_factory=dict)  # filter -> samples it only marked
    # place -> key, where a tar that others made does not hold it in the member's own header
    long_keys: dict[int, str] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.table)

    def entries_at(self, place: int) -> dict[str, tuple[int, int, int]]:
        """Extension -> (data block, size in bytes, crc32) of the members of one sample."""
        entries = zip(self.fields, self.table[place].tolist(), strict=True)
        return {name: tuple(entry) for name, entry in entries if entry[0] != ABSENT}

    def to_bytes(self) -> bytes:
        values = {
            "fields": list(self.fields),
            "num_samples": self.num_samples,
            "tar_bytes": self.tar_bytes,
            "tar_sha256": self.tar_sha256,
            "rejected": self.rejected,
        }
        if self.marked:
            values["marked"] = self.marked
        if self.long_keys:
            values["long_keys"] = self.long_keys
        header = json.dumps(values, sort_keys=True).encode()
        header += b" " * (-len(header) % 4)
        length = np.uint32(len(header)).astype("<u4").tobytes()
        return INDEX_MAGIC + length + header + self.table.astype("<u4").tobytes()

    @classmethod
    def read(cls, path: Path, *, is_mapped: bool = False) -> ShardIndex:
        """
        Args:
            path: of the .idx file.
            is_mapped: leave the table on disk until it is looked at.

        Raises:
            InputError: the file is missing or is not an index of this version.
        """
        try:
            content = _mapped_bytes(path) if is_mapped else path.read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{path}: no index; make it with python -m data_prep.index_shards"
            ) from None
        if content[:8] != INDEX_MAGIC:
            raise InputError(f"{path}: expected an index ({INDEX_MAGIC!r}), found {content[:8]!r}")
        try:
            header_end = 12 + int(np.frombuffer(content, "<u4", 1, 8)[0])
            header = json.loads(content[12:header_end])
            shape = (header["num_samples"], len(header["fields"]), 3)
            long_keys = header.get("long_keys", {})
            return cls(
                fields=tuple(header["fields"]),
                table=np.frombuffer(content, "<u4", offset=header_end).reshape(shape),
                tar_bytes=header["tar_bytes"],
                tar_sha256=header["tar_sha256"],
                rejected=header["rejected"],
                marked=header.get("marked", {}),
                long_keys={int(place): key for place, key in long_keys.items()},
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: damaged index ({error}); {REPAIR_ADVICE}, or make the shard again"
            ) from None


def _mapped_bytes(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return b""


# ------------------------------------------------------------------------------ dataset folder


@dataclass(frozen=True)
class ManifestRow:
    """One shard as `manifest.jsonl` records it."""

    name: str  # stem of the shard's files
    num_samples: int
    tar_bytes: int
    tar_sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds."""

    media: str  # "image" or "audio"
    fields: list[str]
    num_samples: int
    num_shards: int
    tar_bytes: int
    fingerprint: str  # of the manifest's rows: equal data has equal fingerprints
    rejected: dict[str, int] = field(default_factory=dict)  # pairs dropped, by reason
    marked: dict[str, int] = field(default_factory=dict)  # samples that a filter only marked
    preparation: dict[str, Any] = field(default_factory=dict)  # config that made the dataset
    num_pairs: int | None = None  # pairs in the input, with those dropped; None: not recorded
    isopair_version: str = ""
    tar_folder: str = "."  # where the tars are, from this folder
    format_version: int = FORMAT_VERSION


def fingerprint_of(rows: Sequence[ManifestRow]) -> str:
    """sha256 over what the shards hold, in order: names and places do not count."""
    canonical = [[row.num_samples, row.tar_sha256, row.index_sha256] for row in rows]
    return hashlib.sha256(json.dumps(canonical).encode()).hexdigest()


def manifest_row(folder: Path, name: str) -> ManifestRow:
    """The manifest row of a finished shard, from its index.

    Raises:
        InputError: the index is missing or damaged.
    """
    path = folder / f"{name}.idx"
    index, content = ShardIndex.read(path), path.read_bytes()
    return ManifestRow(
        name=name,
        num_samples=index.num_samples,
        tar_bytes=index.tar_bytes,
        tar_sha256=index.tar_sha256,
        index_bytes=len(content),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )


def temporary_name(name: str) -> str:
    """A name beside `name` that no other process, also on another machine, uses."""
    host = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
    return f".{name}.{host}.{os.getpid()}.tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either whole or absent, also after a power cut.

    Raises:
        OSError: naming the file: the disk is full, or the like.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise name_file(error, path) from None


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_file(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which a full disk's error comes without."""
    if error.filename is None:
        error.filename = str(path)
    return error


def write_dataset_files(
    folder: Path, info: DatasetInfo, *, manifest: Sequence[ManifestRow]
) -> None:
    """Writes `manifest.jsonl` and then `dataset.json`, whose presence says the dataset is whole."""
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in manifest)
    write_atomically(folder / "manifest.jsonl", lines.encode())
    write_atomically(folder / "dataset.json", json.dumps(asdict(info), indent=2).encode() + b"\n")


class Dataset:
    """Reads any sample of a dataset by its ordinal: its place when all shards are laid end to end.

    Args:
        folder: the folder that holds dataset.json.
        fetch_shard: called with a shard's manifest row before its files are opened, for folders
            whose shards come when they are needed; raises BadShardError or OSError. None: all are
            there, which is checked at once.
        takes_bad_shards: note shards that are missing or cut in `bad_shards` instead of refusing
            the dataset; reading a sample of theirs then raises BadShardError.

    Raises:
        InputError: the dataset is missing or unfinished.
        BadShardError: a tar is missing or has not its recorded size.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fetch_shard: Callable[[ManifestRow], None] | None = None,
        takes_bad_shards: bool = False,
    ):
        self.folder = folder
        self.info, self.manifest = read_dataset_files(folder)
        _check_fingerprint(folder, self.info, self.manifest)
        self.tar_folder = folder / self.info.tar_folder
        self.shard_sizes = np.array([row.num_samples for row in self.manifest], dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.fetch_shard = fetch_shard
        self.bad_shards: dict[int, str] = {}  # number of the shard -> what is wrong with it
        self._set_up_caches()
        if fetch_shard is None:
            self._check_tar_sizes(takes_bad_shards=takes_bad_shards)

    def _set_up_caches(self) -> None:
        self._index = lru_cache(maxsize=NUM_OPEN_INDEXES)(self._read_index)
        self._tar_descriptor = lru_cache(maxsize=NUM_OPEN_TARS)(self._open_tar)
        self._tar_name = lru_cache(maxsize=NUM_OPEN_TARS)(lambda shard: str(self.tar_path(shard)))

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, so that loader processes can be started in any way."""
        caches = ("_index", "_tar_descriptor", "_tar_name")
        return {name: value for name, value in vars(self).items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up_caches()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def locate(self, ordinal: int) -> tuple[int, int]:
        """(number of the shard, place inside it) of a sample."""
        shard = int(np.searchsorted(self.shard_starts, ordinal, side="right")) - 1
        return shard, ordinal - int(self.shard_starts[shard])

    def tar_path(self, shard: int) -> Path:
        return self.tar_folder / f"{self.manifest[shard].name}.tar"

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """The sample's members, each checked against its crc32.

        Args:
            ordinal: 0 to len - 1.
            fields: the extensions wanted; None for all.

        Raises:
            CorruptSampleError: a member's bytes differ from its crc32 or are missing.
            BadShardError: its shard is missing or damaged.
            OSError: the tar cannot be read.
        """
        shard, place = self.locate(ordinal)
        tar = self._tar_descriptor(shard)
        sample, bad = self._read_checked(tar.number, shard, place, fields)
        # It was taken away, and comes again: what is read from it meanwhile says nothing.
        for _ in range(OPENINGS):
            if not bad or os.fstat(tar.number).st_nlink > 0:
                break
            self._tar_descriptor.cache_clear()
            tar = self._tar_descriptor(shard)
            sample, bad = self._read_checked(tar.number, shard, place, fields)
        if bad and os.fstat(tar.number).st_nlink == 0:
            raise OSError(f"{sample}: taken away {OPENINGS} times while it was read")
        if bad:
            raise CorruptSampleError(
                f"{sample}: .{bad[0]} has not the crc32 of its index; "
                "check the dataset with python -m data_prep.verify_shards"
            )
        return sample

    def _read_checked(
        self, tar: int, shard: int, place: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """(the sample, extensions whose bytes have not their crc32)"""
        index = self._index(shard)
        entries = index.entries_at(place)
        first_block = min(block for block, _, _ in entries.values()) - 1  # the key's header
        wanted = {
            name: entry for name, entry in entries.items() if fields is None or name in fields
        }
        # In one read, with the key's header if all is wanted: members stand side by side.
        start_block = first_block
        if len(wanted) < len(entries):
            start_block = min((block for block, _, _ in wanted.values()), default=first_block)
        start = start_block * BLOCK_BYTES
        end = max(
            (block * BLOCK_BYTES + size for block, size, _ in wanted.values()),
            default=start + BLOCK_BYTES,
        )
        content = os.pread(tar, end - start, start)
        header = content
        if start_block != first_block:
            header = os.pread(tar, BLOCK_BYTES, first_block * BLOCK_BYTES)
        key = index.long_keys.get(place) or _key_in(header[:BLOCK_BYTES])
        sample, bad = Sample(self._tar_name(shard), key, {}), []
        for name, (block, size, crc32) in wanted.items():
            first = block * BLOCK_BYTES - start
            sample.members[name] = content[first : first + size]
            if len(sample.members[name]) != size or zlib.crc32(sample.members[name]) != crc32:
                bad.append(name)
        return sample, bad

    def _open_tar(self, shard: int) -> _Descriptor:
        path = self.tar_path(shard)

        def open_tar() -> _Descriptor:
            try:
                return _Descriptor(os.open(path, os.O_RDONLY))
            except (FileNotFoundError, PermissionError) as error:
                raise BadShardError(f"{path}: cannot open the shard: {error.strerror}") from None

        return self._opened(shard, open_tar)

    def _read_index(self, shard: int) -> ShardIndex:
        path = self.folder / f"{self.manifest[shard].name}.idx"

        def read_index() -> ShardIndex:
            try:
                index = ShardIndex.read(path, is_mapped=True)
            except InputError as error:
                raise BadShardError(str(error)) from None
            if index.tar_sha256 != self.manifest[shard].tar_sha256:
                raise BadShardError(f"{path}: belongs to another tar than manifest.jsonl records")
            return index

        return self._opened(shard, read_index)

    def _opened(self, shard: int, open_file: Callable[[], Opened]) -> Opened:
        """What `open_file` gives, after making the shard's files be there; notes what is bad.

        Files that come when they are needed may be taken away before they are opened: then they
        are asked for again.
        """
        if shard in self.bad_shards:
            raise BadShardError(self.bad_shards[shard])
        try:
            if self.fetch_shard is None:
                return open_file()
            for _ in range(OPENINGS - 1):
                self.fetch_shard(self.manifest[shard])
                with suppress(BadShardError):
                    return open_file()
            self.fetch_shard(self.manifest[shard])
            return open_file()
        except BadShardError as error:
            self.bad_shards[shard] = str(error)
            raise

    def _check_tar_sizes(self, *, takes_bad_shards: bool) -> None:
        for number, row in enumerate(self.manifest):
            try:
                _check_tar_size(self.tar_folder / f"{row.name}.tar", row.tar_bytes)
            except BadShardError as error:
                if not takes_bad_shards:
                    raise
                self.bad_shards[number] = str(error)


def _check_tar_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise BadShardError(
            f"{path}: expected a shard of {expected} bytes: {error.strerror}"
        ) from None
    if found != expected:
        raise BadShardError(
            f"{path}: corrupt shard: expected {expected} bytes (manifest.jsonl), found "
            f"{found}; restore it, or prepare it again after deleting it and its .idx"
        )


def read_dataset_files(folder: Path) -> tuple[DatasetInfo, list[ManifestRow]]:
    """What dataset.json and manifest.jsonl hold, whether or not they agree.

    Raises:
        InputError: one of them is missing, is damaged, or is of another version.
    """
    try:
        info_text = (folder / "dataset.json").read_bytes()
        manifest_text = (folder / "manifest.jsonl").read_bytes()
    except OSError as error:
        raise InputError(
            f"{error.filename}: expected a dataset of shards: {error.strerror}; make one with "
            "python -m data_prep.make_shards, or index tars that you have with "
            "python -m data_prep.index_shards; if only this file is lost, "
            f"{REPAIR_ADVICE}"
        ) from None
    return (
        parse_info(info_text, folder / "dataset.json"),
        parse_manifest(manifest_text, folder / "manifest.jsonl"),
    )


def parse_info(content: bytes, path: Path | str) -> DatasetInfo:
    """What a dataset.json holds.

    Raises:
        InputError: it is damaged, or is of another version.
    """
    try:
        values = json.loads(content)
        version = values.get("format_version")
        if version == FORMAT_VERSION and values["media"] in MEDIA_EXTENSIONS:
            return _checked_types(DatasetInfo(**values))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); {REPAIR_ADVICE}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format version {FORMAT_VERSION}, found {version}")
    raise InputError(f"{path}: damaged (media {values['media']!r}); {REPAIR_ADVICE}")


def parse_manifest(content: bytes, path: Path | str) -> list[ManifestRow]:
    """What a manifest.jsonl holds.

    Raises:
        InputError: a line is damaged, or its name leads out of the folder.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = _checked_types(ManifestRow(**json.loads(line)))
            if row.name.startswith("/") or ".." in row.name.split("/"):
                raise ValueError(f"name {row.name!r} leads out of the folder")
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: line {number}: damaged ({error}); {REPAIR_ADVICE}") from None
        rows.append(row)
    return rows


def _checked_types(record: Record) -> Record:
    """The record, whose values all are of the types of its class; a ValueError if not."""
    try:
        _types_of(type(record)).validate_json(json.dumps(asdict(record)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place} {first['input']!r}: {first['msg']}") from None
    return record


@cache
def _types_of(record_class: type) -> TypeAdapter:
    return TypeAdapter(record_class)


def _check_fingerprint(folder: Path, info: DatasetInfo, manifest: list[ManifestRow]) -> None:
    if fingerprint_of(manifest) != info.fingerprint:
        raise InputError(
            f"{folder}: manifest.jsonl has not the fingerprint that dataset.json records; "
            "check the dataset with python -m data_prep.verify_shards"
        )


class _Descriptor:
    """An open file that is closed when the last reader lets go of it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _key_in(header: bytes) -> str:
    return split_member_name(plain_member_name(header))[0]


def plain_member_name(header: bytes) -> str:
    """The name that a member's own header holds, without those of PAX or GNU before it."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", errors="replace")
