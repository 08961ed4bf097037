"""Configs of the commands of eval; each task of eval.evaluate defines its own section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
)

from data_prep.config import NearMedia
from data_prep.config_file import Section
from data_prep.storage.file_names import file_name_of
from eval.datasets.columns import DatasetLocation, EvaluatedView, TableColumns
from eval.models.encoding import EncodingConfig
from eval.tasks.task import EvaluationSection, validate_section

# Validated by the section of the task that the evaluation names
AnyEvaluation = Annotated[SerializeAsAny[EvaluationSection], BeforeValidator(validate_section)]


def _check_name(name: str) -> str:
    file_name_of(name)  # predictions are stored under this name
    return name


EvaluationName = Annotated[str, AfterValidator(_check_name)]


class EvaluateConfig(EncodingConfig):
    """The config of `python -m eval.evaluate`."""

    output: Path  # folder for results.json, .md and .csv, report.html and predictions/
    # Folder of cached embeddings, which evaluations may share; null: a folder in `output`
    embeddings: Path | None = None
    # Keys: names of your choice
    evaluations: dict[EvaluationName, AnyEvaluation] = Field(min_length=1)
    skip_missing: bool = False  # skip and report evaluations whose dataset is missing
    seed: int = Field(0, ge=0)  # seeds the bootstrap and the training items of few-shot probes
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval
    # Every evaluation is repeated on the first d numbers of the embeddings, normalised again, for
    # each d; null: those of the run's matryoshka_dims, and none for models of other libraries
    matryoshka_dims: list[PositiveInt] | None = None


class WatchConfig(EvaluateConfig):
    """The config of `python -m eval.watch`; `checkpoint` is the run folder."""

    wait: bool = True  # wait for further checkpoints until the run has finished
    poll_seconds: PositiveFloat = 60  # seconds between checks for a new checkpoint


class CompareConfig(Section):
    """The config of `python -m eval.compare`."""

    # Results folders of eval.evaluate; the first is the baseline for all others
    results: list[Path] = Field(min_length=2)
    output: Path  # folder for compare.json and compare.md
    seed: int = Field(0, ge=0)  # seeds the bootstrap
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval


class SearchConfig(EncodingConfig):
    """The config of `python -m eval.search`."""

    dataset: DatasetLocation
    split: str = "test"
    subset: Path | None = None
    columns: TableColumns = TableColumns()
    # Views to search in, such as [image, {text: title}]. null: the images or audio clips; of shards
    # with named modalities, all that the model has
    views: list[EvaluatedView] | None = Field(None, min_length=1)
    output: Path  # folder for embeddings and the indexes
    # Number of items; above it the index is approximate, and finds nearly all nearest items
    exact_up_to: int = Field(500_000, ge=0)
    num_results: PositiveInt = 24  # of each view
    serve: bool = True  # false: only build the index
    # 127.0.0.1: only this machine; 0.0.0.0: everyone who can reach it, without a password
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)


class OverlapConfig(Section):
    """The config of `python -m eval.check_overlap`."""

    dataset: DatasetLocation  # the evaluation set
    split: str = "test"
    subset: Path | None = None
    columns: TableColumns = TableColumns()
    train: list[Path] = Field(min_length=1)  # folders of Isopair shards
    output: Path  # folder for overlap.parquet, overlap.json and clean.subset
    keys: bool = True  # match file names and uids; set false if they are just numbers
    near_media: NearMedia | None = NearMedia()  # match similar media; null: off
    captions: bool = True  # match equal captions
    workers: PositiveInt = 1  # threads that compare images


class EmbedConfig(EncodingConfig):
    """The config of `python -m eval.embed`."""

    dataset: Path  # folder of shards
    output: Path  # folder for one Parquet per shard, and embeddings.json
    # Views to embed, each into a folder of `output` named after it, such as [image, {text: title}].
    # null: media and captions in one file; of shards with named modalities, every modality
    views: list[EvaluatedView] | None = Field(None, min_length=1)
    # Fraction of unreadable samples above which the job fails
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)
