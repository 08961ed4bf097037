"""The configs of `python -m eval.evaluate`, `eval.compare` and `eval.embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from data_prep.config_file import Section


class _Evaluation(Section):
    """What every evaluation says."""

    # Folder of shards, or of tars of clip_benchmark's layout (see eval.tar_dataset)
    dataset: Path
    split: str = "test"  # of tars of that layout
    subset: Path | None = None  # .subset file of the dataset: measure only what it keeps
    # Figure -> least value (of ranks: largest); the command fails if one is missed
    goals: dict[str, float] = {}


class ZeroShotClassificationSection(_Evaluation):
    """Names the class of each media item by the nearest class prompt.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["zero_shot_classification"]
    # A list, or a text file with one name per line; null: the file that comes with the tars
    class_names: list[str] | Path | None = None
    prompt_templates: list[str] | Path | None = None  # likewise; {} or {c} stands for the class


class LinearProbeSection(_Evaluation):
    """Classifies by a regression that is fitted to the embeddings of training items.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["linear_probe"]
    class_names: list[str] | Path | None = None  # as above
    # Folder of shards, or of tars; null: the train_split of `dataset`
    train: Path | None = None
    train_split: str = "train"
    train_subset: Path | None = None
    # Likewise, what the strength of the regularisation is chosen on; null: every tenth training
    # item, by a hash of its key
    validation: Path | None = None
    validation_split: str = "val"
    strength: PositiveFloat | None = None  # of the regularisation, 1 / C; null: chosen


class MultiLabelSection(_Evaluation):
    """Ranks the items of each class, of which an item may have several, before all others.

    Samples carry "class_names" in .json, or one number per class, 0 or 1, in .npy.
    """

    task: Literal["multi_label_classification"]
    class_names: list[str] | Path | None = None  # as above
    prompt_templates: list[str] | Path | None = None


class RetrievalSection(_Evaluation):
    """Finds the captions of each media item, and the media item of each caption.

    Samples carry captions in .json or .txt.
    """

    task: Literal["retrieval"]
    # Text file with one caption per line: wrong captions that join the gallery of media to text.
    distractor_captions: Path | None = None
    ks: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # of recall@k
    # A caption whose words stand at several items is right for its own item alone, as in the
    # literature, or for all of them
    equal_captions: Literal["own", "merged"] = "own"

    @field_validator("ks")
    @classmethod
    def _check_ks(cls, ks: list[int]) -> list[int]:
        if sorted(set(ks)) != ks:
            raise ValueError(f"expected rising numbers without repeats, found {ks}")
        return ks


EvaluationSection = Annotated[
    ZeroShotClassificationSection | LinearProbeSection | MultiLabelSection | RetrievalSection,
    Field(discriminator="task"),
]


class EncodingConfig(Section):
    """Which model encodes, and how."""

    # A run folder (its newest checkpoint), one checkpoint's folder, or another library's model:
    # see eval.model_source
    checkpoint: Path
    # open_clip's name of the model, such as ViT-B-32, if checkpoint is a file of its weights
    open_clip_architecture: str | None = None
    batch_size: PositiveInt = 128  # media items or captions encoded at once; memory and speed only
    workers: int = Field(0, ge=0)  # processes that read and decode; 0: none besides the main one
    # Of the towers; embeddings and scores are float32 always
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Of a clip longer than the model takes: the mean over windows that cover it, or a part of it
    long_clips: Literal["windows", "first", "centre"] = "windows"


class EvaluateConfig(EncodingConfig):
    """What `python -m eval.evaluate` reads."""

    output: Path  # folder for results.json, .md and .csv, report.html and predictions/
    embeddings: Path | None = None  # folder where they are kept and found; null: in the output
    evaluations: dict[str, EvaluationSection] = Field(min_length=1)  # by the name of your choice
    seed: int = Field(0, ge=0)  # of the bootstrap
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval


class CompareConfig(Section):
    """What `python -m eval.compare` reads."""

    # Folders that eval.evaluate wrote; all others are compared with the first
    results: list[Path] = Field(min_length=2)
    output: Path  # folder for compare.json and compare.md
    seed: int = Field(0, ge=0)  # of the bootstrap
    bootstrap_samples: int = Field(1000, ge=100)  # resamples per interval


class EmbedConfig(EncodingConfig):
    """What `python -m eval.embed` reads."""

    dataset: Path  # folder of shards
    output: Path  # folder for one Parquet per shard, and embeddings.json
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)  # unreadable samples that fail the job
