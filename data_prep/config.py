"""The config of every command of this package: one frozen section each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from data_prep.config_file import Section, free

MediaKind = Literal["image", "audio"]


class Columns(Section):
    """Which column (of a CSV or TSV) or key (of a JSONL) holds what."""

    media: str = "path"  # path of the picture or clip, from media_root
    caption: str = "caption"  # text; in JSONL also a list of texts
    class_name: str | None = None  # label for zero-shot evaluation; null: there is none
    uid: str | None = None  # identifier for people; null: the sample's key serves


class MakeShards(Section):
    """`python -m data_prep.make_shards`: pairs to a dataset of shards."""

    input: Path  # .csv, .tsv or .jsonl manifest, or a folder of media with .txt or .json beside
    media_root: Path | None = None  # where relative media paths start; null: the input's folder
    output: Path = free()  # dataset folder to make
    media: MediaKind  # image | audio
    columns: Columns = Columns()
    quotes: bool | None = None  # may fields stand in "quotes"? null: in a .csv yes, a .tsv no
    captions_per_item: Literal["group", "row"] = (
        "group"  # rows of one media path: one item, or each
    )
    samples_per_shard: int = Field(10_000, ge=1)  # items a shard owns before bad pairs are dropped
    workers: int = free(1, ge=1)  # processes; never changes a byte of the result
    max_rejected_fraction: float = free(0.01, ge=0, le=1)  # share of bad pairs that fails the job


class VerifyShards(Section):
    """`python -m data_prep.verify_shards`: a dataset against its manifest and index."""

    dataset: Path  # folder that holds dataset.json
    decode: bool = False  # also decode every picture or clip, and read every caption
    workers: int = Field(1, ge=1)  # processes


class IndexShards(Section):
    """`python -m data_prep.index_shards`: sidecars for tars that others made."""

    input: str  # folder of .tar files, or a glob of them
    output: Path = free()  # folder for the sidecars; may be the tars' own
    media: MediaKind  # image | audio
    skip_incomplete: bool = False  # leave out samples without media or caption, instead of failing
    workers: int = free(1, ge=1)  # processes


class DemoData(Section):
    """`python -m data_prep.make_demo_data`: three small sets of pairs to try everything on."""

    output: Path = Path("demo/data")  # folder to write into
    seed: int = Field(0, ge=0)
    scenes_per_combination: int = Field(9, ge=1)  # training pictures of each kind of scene
    clips_per_sound: int = Field(160, ge=1)  # training clips of each kind of sound
    workers: int = free(2, ge=1)  # processes; never changes a byte of the result
