"""The configs of `python -m eval.evaluate`, `eval.compare`, `eval.embed`, and the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, SerializeAsAny

from data_prep.config import NearMedia
from data_prep.config_file import Section
from eval.datasets.columns import DatasetLocation, TableColumns
from eval.models.encoding import EncodingConfig
from eval.tasks.task import EvaluationSection, validate_section

# The section of whichever task the evaluation names
AnyEvaluation = Annotated[SerializeAsAny[EvaluationSection], BeforeValidator(validate_section)]


class EvaluateConfig(EncodingConfig):
    """What `python -m eval.evaluate` reads."""

    output: Path  # folder for results.json, .md and .csv, report.html and predictions/
    embeddings: Path | None = None  # folder where they are kept and found; null: in the output
    evaluations: dict[str, AnyEvaluation] = Field(min_length=1)  # by a name of your choice
    skip_missing: bool = False  # leave out, and name, evaluations whose dataset is not there
    seed: int = Field(0, ge=0)  # of the bootstrap, and of what few-shot probes learn from
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval


class WatchConfig(EvaluateConfig):
    """What `python -m eval.watch` reads; `checkpoint` is the run's folder."""

    wait: bool = True  # for checkpoints to come, until the run has finished
    poll_seconds: PositiveFloat = 60  # between looks for a new one


class CompareConfig(Section):
    """What `python -m eval.compare` reads."""

    # Folders that eval.evaluate wrote; all others are compared with the first
    results: list[Path] = Field(min_length=2)
    output: Path  # folder for compare.json and compare.md
    seed: int = Field(0, ge=0)  # of the bootstrap
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval


class SearchConfig(EncodingConfig):
    """What `python -m eval.search` reads."""

    dataset: DatasetLocation
    split: str = "test"
    subset: Path | None = None
    columns: TableColumns = TableColumns()
    output: Path  # folder for embeddings and the index
    exact_up_to: int = Field(500_000, ge=0)  # items; above, nearly all of the nearest are found
    num_results: PositiveInt = 24
    serve: bool = True  # false: only build the index
    host: str = "127.0.0.1"  # only this machine; 0.0.0.0: whoever reaches it, without a password
    port: int = Field(8000, ge=1, le=65535)


class OverlapConfig(Section):
    """What `python -m eval.check_overlap` reads."""

    dataset: DatasetLocation  # the evaluation set
    split: str = "test"
    subset: Path | None = None
    columns: TableColumns = TableColumns()
    train: list[Path] = Field(min_length=1)  # folders of shards of ours
    output: Path  # folder for overlap.parquet, overlap.json and clean.subset
    keys: bool = True  # names of files, and uids; false where both are mere numbers
    near_media: NearMedia | None = NearMedia()  # null: not looked for
    captions: bool = True
    workers: PositiveInt = 1  # threads that compare pictures


class EmbedConfig(EncodingConfig):
    """What `python -m eval.embed` reads."""

    dataset: Path  # folder of shards
    output: Path  # folder for one Parquet per shard, and embeddings.json
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)  # unreadable samples that fail the job
