"""Config sections of data: streams with their sources and objectives, and their loading."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from data_prep.config_file import Location, Section, free
from pretrain.settings.objectives import ObjectiveSection
from pretrain.settings.objectives import validate_section as validate_objective
from pretrain.settings.old_form import OBJECTIVE_KEYS
from pretrain.settings.segments import check_rising_steps
from pretrain.settings.transforms import Share
from pretrain.settings.views import View

StreamName = str
StreamNameKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Source(Section):
    """One dataset of a stream."""

    name: str  # part of every random key: renaming a source changes the order
    # Folder or URL (s3://, gs://, hf://, http://, file://) with dataset.json; its fingerprint is
    # part of the run's identity. A folder is read in place, a URL through loading.cache.
    dataset: Location = free()
    # .subset file: only the samples that it lists are read; its fingerprint is part of the identity
    subset: Location | None = free(None)
    weight: PositiveFloat = 1.0  # fraction of the stream's batch, relative to its other sources


def _refuse_equal_names(sources: list[Source]) -> list[Source]:
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"expected sources with different names, found {names}")
    return sources


Sources = Annotated[list[Source], Field(min_length=1), AfterValidator(_refuse_equal_names)]


class Segment(Section):
    """New sources or weights from a step on; a source that is kept continues at its position."""

    from_step: PositiveInt  # number of steps done before the segment
    sources: Sources


# Validated by the section of the objective's `kind`
AnyObjective = Annotated[SerializeAsAny[ObjectiveSection], BeforeValidator(validate_objective)]
ObjectiveName = Annotated[str, Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+)?$")]


class Stream(Section):
    """Samples that are drawn together, and the objectives that read them."""

    global_batch_size: PositiveInt  # samples of a step, contrasted with one another
    # With duplicates=negatives, a new run is refused if this fraction of a step's samples repeats a
    # sample of the same step, because a source is small; 1: never
    max_repeated_fraction: float = Field(0.5, gt=0, le=1)
    weight: PositiveFloat = 1.0  # streams_per_step one: fraction of the steps
    sources: Sources
    segments: list[Segment] = []  # more may be added while a run is stopped; none may change
    # all: only samples that have every modality of the objectives. any: samples that lack one take
    # no part in the objectives that read it
    require: Literal["all", "any"] = "any"
    objectives: dict[ObjectiveName, AnyObjective] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _show_new_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and (old := set(OBJECTIVE_KEYS).intersection(values)):
            raise ValueError(
                f"{', '.join(sorted(old))}: settings of an objective, which stand under "
                "`objectives` now, such as objectives: {image-text: {loss: softmax}}"
            )
        return values

    @property
    def views(self) -> list[str]:
        """Views that the objectives read, each once, in the order in which they are encoded."""
        views = [each.views(name) for name, each in self.objectives.items()]
        return list(
            dict.fromkeys(view for of_one in zip_longest(*views) for view in of_one if view)
        )

    @property
    def requires_all(self) -> bool:
        """Whether samples that lack a modality are left out of the order."""
        return self.require == "all"

    @model_validator(mode="after")
    def _objectives_read_different_views(self) -> Stream:
        for name, objective in self.objectives.items():
            views = objective.views(name)
            if not all(views):
                raise ValueError(
                    f"objectives.{name}: its name is not that of two views, such as image-text; "
                    "set left and right"
                )
            for view in views:
                View.parse(view)
            if len(set(views)) < len(views):
                raise ValueError(
                    f"objectives.{name} reads {views[0]!r} twice; set left and right, such as "
                    f"{{left: {views[0]}, right: {{{views[0]}: 2}}}} for two augmentations"
                )
        return self

    @model_validator(mode="after")
    def _segments_in_order(self) -> Stream:
        check_rising_steps([segment.from_step for segment in self.segments], name="segments")
        return self

    @model_validator(mode="after")
    def _names_mean_one_dataset(self) -> Stream:
        known: dict[str, tuple[str, str | None]] = {}
        for source in self.all_sources:
            location = (source.dataset, source.subset)
            if known.setdefault(source.name, location) != location:
                raise ValueError(
                    f"source name {source.name!r} is used for both {known[source.name]} and "
                    f"{location}; rename the second one"
                )
        return self

    @property
    def all_sources(self) -> list[Source]:
        """Initial sources and those of every segment; a source may be in several segments."""
        return [*self.sources, *(source for each in self.segments for source in each.sources)]

    @property
    def is_mixed(self) -> bool:
        """Whether some steps mix several sources."""
        return any(len(each.sources) > 1 for each in (self, *self.segments))


class Cache(Section):
    """Cache on each node for shards behind URLs, shared by its processes."""

    folder: Path | None = free(None)  # on a local disk of the node; required for URLs
    max_gigabytes: PositiveFloat | None = free(None)  # null: free disk space when the run starts
    num_downloads: PositiveInt = free(4)  # shards that a node downloads concurrently


class Loading(Section):
    """Reading of samples."""

    removed = {"runtime": "every rank has one loader process, of num_workers threads; delete it"}

    window: PositiveInt = 32768  # samples of a lane that are shuffled together
    # Threads of each rank's loader process; 0: load in the training process
    num_workers: int = free(2, ge=0)
    batches_ahead: PositiveInt = free(2)  # steps loaded in advance; each takes memory
    retries: int = free(5, ge=0)  # retries of a read or download after transient errors
    cache: Cache = free(Cache())
    max_bad_fraction: Share = free(1e-3)  # fraction of unreadable samples above which the run stops
    max_bad_fraction_per_shard: Share = free(1e-2)  # the same for each shard
    # substitute: samples of a missing or damaged shard are replaced by others. All results of the
    # run are then tagged, because they are no longer a function of the config alone.
    on_bad_shard: Literal["stop", "substitute"] = "stop"
