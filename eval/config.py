"""The configs of `python -m eval.evaluate`, `eval.compare`, `eval.embed`, and the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from data_prep.config import NearMedia
from data_prep.config_file import Section
from eval.datasets.columns import DatasetLocation, TableColumns
from eval.models.encoding import EncodingConfig


class _Evaluation(Section):
    """What every evaluation says."""

    renamed: ClassVar[dict[str, str]] = {"main_figure": "main_metric"}
    dataset: DatasetLocation
    split: str = "test"  # of tars or folders of classes that have several
    subset: Path | None = None  # .subset file of shards of ours: measure only what it keeps
    columns: TableColumns = TableColumns()
    # Metric -> least value (of ranks: largest); the command fails if one is missed
    goals: dict[str, float] = {}
    expected_items: PositiveInt | None = None  # the evaluation is refused if there are others
    how_to_get: str | None = None  # said where the dataset is missing
    main_metric: str | None = None  # that averages take; null: of its task (eval.report.averages)
    averages: list[str] = []  # those that it counts in, besides that of all evaluations


class ZeroShotClassificationSection(_Evaluation):
    """Names the class of each media item by the nearest class prompt.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["zero_shot_classification"]
    # A list, or a text file with one name per line, or "open_clip:imagenet"; null: the file that
    # comes with the tars, or the names of the folders
    class_names: list[str] | str | None = None
    # Likewise, {} or {c} stands for the class; or "open_clip:imagenet", "open_clip:simple"
    prompt_templates: list[str] | str | None = None
    # .json of class -> prompts of its own, instead of templates (CuPL)
    class_prompts: Path | None = None
    # Key in .json, or npy[i] for a number in .npy: accuracy of the worst group as well
    group_by: str | None = None


class _TrainedSection(_Evaluation):
    """What every evaluation says that learns from labelled items."""

    class_names: list[str] | str | None = None  # as above
    # Likewise of items to learn from; null: the train_split of `dataset`
    train: DatasetLocation | None = None
    train_split: str = "train"
    train_subset: Path | None = None


class LinearProbeSection(_TrainedSection):
    """Classifies by a regression that is fitted to the embeddings of training items.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    renamed: ClassVar[dict[str, str]] = {"strength": "l2"}
    task: Literal["linear_probe"]
    # Items that the weight of the L2 penalty is chosen on; null: every tenth training item, by a
    # hash of its key
    validation: DatasetLocation | None = None
    validation_split: str = "val"
    l2: PositiveFloat | None = None  # weight of the L2 penalty, 1 / C; null: chosen


class NearestNeighboursSection(_TrainedSection):
    """Classifies by the votes of the training items nearest to each item (DINO's k-NN).

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["nearest_neighbours"]
    num_neighbours: PositiveInt = 20
    temperature: PositiveFloat = 0.07  # a vote weighs exp(cosine / temperature)


class FewShotSection(_TrainedSection):
    """Linear probes on a few training items of each class, drawn several times.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    renamed: ClassVar[dict[str, str]] = {"strength": "l2"}
    task: Literal["few_shot"]
    shots: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16], min_length=1)  # items per class
    num_draws: PositiveInt = 3
    l2: PositiveFloat = 1 / 0.316  # weight of the L2 penalty, 1 / C


class MultiLabelSection(_Evaluation):
    """Ranks the items of each class, of which an item may have several, before all others.

    Samples carry "class_names" in .json, or one number per class, 0 or 1, in .npy.
    """

    task: Literal["multi_label_classification"]
    class_names: list[str] | str | None = None  # as above
    prompt_templates: list[str] | str | None = None
    class_prompts: Path | None = None


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


class MediaRetrievalSection(_Evaluation):
    """Finds the media items of one dataset by those of another, such as sounds by pictures.

    A pair of items is right if both have the same key, or the same value of `pair_by` in .json.
    """

    task: Literal["media_retrieval"]
    other: DatasetLocation  # as dataset
    other_split: str = "test"
    pair_by: str | None = None  # null: the sample's key
    ks: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # of recall@k


class CaptionChoiceSection(_Evaluation):
    """Chooses the right one of a few captions that are nearly alike (SugarCrepe), and the right one
    of a few media items (Winoground).

    Samples carry their caption in .txt or .json, and wrong ones as "negative_captions" in .json.
    """

    task: Literal["caption_choice"]
    # Key in .json: items of one value are each other's wrong answers; null: negative_captions are
    group_by: str | None = None


class AssociationSection(_Evaluation):
    """Chooses the media items that belong to a cue, of a few (WinoGAViL).

    Samples carry the cue as their caption in .json or .txt, and in .json whether they belong to it.
    """

    task: Literal["association"]
    group_by: str  # key in .json: the items of one value are chosen from, by one cue
    right: str = "is_association"  # key in .json: 1 or true, or 0 or false


EvaluationSection = Annotated[
    ZeroShotClassificationSection
    | LinearProbeSection
    | NearestNeighboursSection
    | FewShotSection
    | MultiLabelSection
    | RetrievalSection
    | MediaRetrievalSection
    | CaptionChoiceSection
    | AssociationSection,
    Field(discriminator="task"),
]


class EvaluateConfig(EncodingConfig):
    """What `python -m eval.evaluate` reads."""

    output: Path  # folder for results.json, .md and .csv, report.html and predictions/
    embeddings: Path | None = None  # folder where they are kept and found; null: in the output
    evaluations: dict[str, EvaluationSection] = Field(min_length=1)  # by the name of your choice
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
