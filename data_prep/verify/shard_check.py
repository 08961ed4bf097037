"""Comparison of a shard with its manifest row, its index and its Parquet file.

    sizes and sha256 -> all headers of the tar -> offset and CRC32 of every sample in the index
    -> keys and sizes in the Parquet file

The text of a finding describes the problem and its location; its kind determines the remedy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.modalities.modality import Modalities
from data_prep.shards.columns import built_in_columns
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import ManifestRow
from data_prep.shards.parquet import (
    measure_media,
    measure_sample,
    media_extension,
    read_shard_parquet,
)
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    media_extension_of,
    media_kind_of,
)
from data_prep.shards.sample_contents import contents_of
from data_prep.storage.atomic import sha256_of
from data_prep.verify.indexed_tar import (
    PROBLEMS_NAMED,
    IndexedSample,
    TarContent,
    member_sizes,
    read_indexed,
    walk_tar,
)
from data_prep.verify.unsealed_parquet import footer_problem

if TYPE_CHECKING:
    import pyarrow

FindingKind = Literal[
    "tar",  # the tar's bytes, order or keys
    "missing tar",
    "index",  # the .idx
    "parquet",
    "totals",  # manifest.jsonl or dataset.json
    "extra shard",  # not listed by manifest.jsonl
    "media",  # undecodable media or caption, in a shard that is otherwise intact
]


@dataclass(frozen=True, order=True)
class Finding:
    """A difference between a dataset and its recorded state."""

    text: str
    kind: FindingKind


@dataclass(frozen=True)
class ShardCheck:
    """A worker's task: the shard to verify."""

    folder: Path
    tar_folder: Path
    row: ManifestRow
    modalities: Modalities
    decode: bool
    has_parquet: bool  # whether the shards of this dataset have Parquet files
    is_foreign: bool  # not written by make_shards; the index may omit samples

    @property
    def tar_path(self) -> Path:
        """The path of the tar."""
        return self.tar_folder / f"{self.row.name}.tar"

    @property
    def index_path(self) -> Path:
        """The path of the index."""
        return self.folder / f"{self.row.name}.idx"

    @property
    def parquet_path(self) -> Path:
        """The path of the Parquet file."""
        return self.folder / f"{self.row.name}.parquet"


def verify_shard(check: ShardCheck) -> list[Finding]:
    """Finds all differences between a shard and its recorded state; [] if it is intact."""
    row = check.row
    tar_sha256, findings = _check_file(check.tar_path, row.tar_bytes, row.tar_sha256, kind="tar")
    index_sha256, found = _check_file(
        check.index_path, row.index_bytes, row.index_sha256, kind="index"
    )
    findings += found
    table, found = _read_parquet(check)
    findings += found
    if row.parquet_sha256 is not None and check.parquet_path.is_file():
        findings += _check_file(
            check.parquet_path, row.parquet_bytes or 0, row.parquet_sha256, kind="parquet"
        )[1]
    index = None
    if index_sha256 is not None:
        try:
            index = ShardIndex.read(check.index_path)
        except InputError as error:
            findings.append(Finding(str(error), "index"))
    keys: list[str | None] = []
    if tar_sha256 is not None:
        content = walk_tar(check.tar_path)
        findings += [Finding(problem, "tar") for problem in content.problems]
        if index is not None and index.tar_sha256 not in (row.tar_sha256, tar_sha256):
            text = f"{check.index_path}: belongs to a different tar than manifest.jsonl records"
            findings.append(Finding(text, "index"))
        elif index is not None:
            # If the tar matches the manifest, a mismatch is an error in the index.
            is_tar_intact = tar_sha256 == row.tar_sha256 and not content.problems
            kind: FindingKind = "index" if is_tar_intact else "tar"
            findings += _check_counts(check, index, content, kind=kind)
            keys, found = _check_samples(check, index, content, kind=kind, table=table)
            findings += found
    if table is not None and index is not None and len(keys) == table.num_rows:
        findings += _check_rows(check, index, table, keys=keys)
    return findings


def _check_file(
    path: Path, num_bytes: int, sha256: str, *, kind: Literal["tar", "index", "parquet"]
) -> tuple[str | None, list[Finding]]:
    """Returns (sha256 of the file, findings); the sha256 of a missing file is None."""
    if not path.is_file():
        return None, [Finding(f"{path}: missing", "missing tar" if kind == "tar" else kind)]
    found_sha256, found_bytes = sha256_of(path), path.stat().st_size
    if found_bytes != num_bytes:
        text = f"{path}: expected {num_bytes} bytes, found {found_bytes}"
    elif found_sha256 != sha256:
        text = f"{path}: sha256 mismatch with manifest.jsonl"
    else:
        return found_sha256, []
    return found_sha256, [Finding(text, kind)]


def _check_counts(
    check: ShardCheck, index: ShardIndex, content: TarContent, *, kind: FindingKind
) -> Iterator[Finding]:
    if index.num_samples != check.row.num_samples:
        yield Finding(
            f"{check.index_path}: expected {check.row.num_samples} samples (manifest.jsonl), "
            f"found {index.num_samples}",
            "index",
        )
    left_out = len(content.keys) - index.num_samples
    most = sum(index.rejected.values()) if check.is_foreign else 0
    if not content.problems and not 0 <= left_out <= most:
        yield Finding(
            f"{check.tar_path}: expected {index.num_samples} samples (its index), found "
            f"{len(content.keys)}",
            kind,
        )


# ------------------------------------------------------------------------------------- samples


def _check_samples(
    check: ShardCheck,
    index: ShardIndex,
    content: TarContent,
    *,
    kind: FindingKind,
    table: pyarrow.Table | None,
) -> tuple[list[str | None], list[Finding]]:
    """Returns (keys, findings); the key of a sample without a readable header is None."""
    labels = [f"number {position}" for position in range(index.num_samples)]
    if table is not None and table.num_rows == index.num_samples:
        labels = table["key"].to_pylist()
    sums = _unsealed_sums(check, index, table)
    keys: list[str | None] = []
    findings: list[Finding] = []
    num_bad = last_bad = 0
    of_other_media = None  # first row of the Parquet file that describes other media
    with check.tar_path.open("rb") as tar:
        for position in range(index.num_samples):
            sample = read_indexed(tar, index, position, content=content)
            label = sample.key or labels[position]
            recorded = -1 if index.presence is None else int(index.presence[position])
            found = list(
                _check_sample(
                    sample, label, check=check, content=content, kind=kind, recorded=recorded
                )
            )
            keys.append(sample.key)
            if sums is not None and of_other_media is None and not sample.problems:
                of_other_media = None if _has_media(sample, sums[position], check) else label
            if found:
                num_bad, last_bad = num_bad + 1, position
                findings += found if num_bad <= PROBLEMS_NAMED else []
    if num_bad > PROBLEMS_NAMED:
        findings.append(
            Finding(
                f"{check.tar_path}: {num_bad - PROBLEMS_NAMED} more of {index.num_samples} samples "
                f"are damaged; the last is number {last_bad}",
                kind,
            )
        )
    if of_other_media is not None:
        text = f"{check.parquet_path}: the row of {of_other_media} describes other media"
        findings.append(Finding(text, "parquet"))
    return keys, findings


def _unsealed_sums(
    check: ShardCheck, index: ShardIndex, table: pyarrow.Table | None
) -> list[str] | None:
    """Returns the sha256 of each sample's media, if the manifest does not vouch for them."""
    is_sealed = check.row.parquet_sha256 is not None
    is_readable = table is not None and table.num_rows == index.num_samples
    if is_sealed or not is_readable or not check.modalities.is_pair:
        return None
    return table["sha256"].to_pylist()


def _has_media(sample: IndexedSample, sha256: str, check: ShardCheck) -> bool:
    extension = media_extension_of(sample.members, check.modalities.media[0])
    return extension is None or (hashlib.sha256(sample.members[extension]).hexdigest() == sha256)


def _check_sample(
    indexed: IndexedSample,
    label: str,
    *,
    check: ShardCheck,
    content: TarContent,
    kind: FindingKind,
    recorded: int,
) -> Iterator[Finding]:
    sample = Sample(shard=str(check.tar_path), key=label, members=indexed.members)
    if indexed.problems:
        yield Finding(f"{sample}: {'; '.join(indexed.problems)}", kind)
    num_members = content.num_members.get(sample.key, indexed.num_members)
    if not indexed.problems and num_members != indexed.num_members:
        yield Finding(
            f"{sample}: expected {indexed.num_members} members (its index), found {num_members}",
            kind,
        )
    if check.decode and not indexed.problems:
        for problem in _decoding_problems(sample, check.modalities, recorded=recorded):
            yield Finding(f"{sample}: {problem}", "media")


def _decoding_problems(sample: Sample, modalities: Modalities, *, recorded: int) -> Iterator[str]:
    if not modalities.is_pair:
        try:
            measure_sample(sample, modalities)
            found = contents_of(sample, modalities).present
            if found != set(modalities.names_in(recorded)):
                yield f"has {', '.join(sorted(found))}, which differs from its index"
        except (MediaError, CorruptSampleError) as error:
            yield str(error).removeprefix(f"{sample}: ")
        return
    media_kind = modalities.media[0]
    try:
        captions_of(sample)
    except CorruptSampleError as error:
        yield str(error).removeprefix(f"{sample}: ")
    if not any(media_kind_of(extension) == media_kind for extension in sample.members):
        yield f"contains no {media_kind}"
        return
    try:
        measure_media(sample, media_kind)
    except MediaError as error:
        yield f".{media_extension(sample, media_kind)}: {error}"


# ------------------------------------------------------------------------------------- Parquet


def _read_parquet(check: ShardCheck) -> tuple[pyarrow.Table | None, list[Finding]]:
    """Returns (table, findings); an absent or damaged table is None."""
    path = check.parquet_path
    if not check.has_parquet and check.row.parquet_sha256 is None:
        return None, []
    try:
        table = read_shard_parquet(path)  # all columns, to verify the checksums of all pages
    except InputError as error:
        return None, [Finding(str(error), "parquet")]
    missing = built_in_columns(check.modalities).difference(table.column_names)
    problem = footer_problem(path, table) if check.row.parquet_sha256 is None else None
    if missing:
        text = f"{path}: has no column {', '.join(sorted(missing))}"
    elif table.num_rows != check.row.num_samples:
        expected = f"expected {check.row.num_samples} rows (manifest.jsonl)"
        text = f"{path}: {expected}, found {table.num_rows}"
    elif problem is not None:
        text = problem
    else:
        return table, []
    return None, [Finding(text, "parquet")]


def _check_rows(
    check: ShardCheck, index: ShardIndex, table: pyarrow.Table, *, keys: Sequence[str | None]
) -> list[Finding]:
    """Finds the first row that does not match the sample in the tar."""
    for name, modality in check.modalities.items():
        if modality.kind == "text":
            continue
        column = "bytes" if check.modalities.is_pair else f"{name}_bytes"
        found = [num_bytes or 0 for num_bytes in table[column].to_pylist()]
        sizes = member_sizes(index, check.modalities, name)
        rows = zip(table["key"].to_pylist(), found, keys, sizes, strict=True)
        for number, (key, num_bytes, tar_key, tar_bytes) in enumerate(rows):
            if tar_key is not None and (key, num_bytes) != (tar_key, tar_bytes):
                expected = f"expected {tar_key} with {tar_bytes} bytes of {name}"
                found = f"found {key} with {num_bytes}"
                text = f"{check.parquet_path}: row {number}: {expected}, {found}"
                return [Finding(text, "parquet")]
    return _check_presence(check, index, table)


def _check_presence(check: ShardCheck, index: ShardIndex, table: pyarrow.Table) -> list[Finding]:
    """Finds the first modality whose presence in the rows differs from the index."""
    for bit, name in enumerate(check.modalities if index.presence is not None else ()):
        recorded = (index.presence >> np.uint32(bit)) & np.uint32(1)
        found = np.array(table[f"has_{name}"].to_pylist(), dtype=bool)
        different = np.flatnonzero(recorded.astype(bool) != found)
        if len(different):
            text = f"row {different[0]}: has_{name} differs from the index"
            return [Finding(f"{check.parquet_path}: {text}", "parquet")]
    return []
