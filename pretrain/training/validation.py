"""Loss and in-batch recall on held-out samples, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import CorruptSampleError
from pretrain.cache.shard_cache import ShardCache
from pretrain.config import Engine as EngineSection
from pretrain.config import Validation
from pretrain.data.datasets import open_samples
from pretrain.data.sample_reader import SampleReader
from pretrain.data.transforms import MediaTransform
from pretrain.data.view_formats import build_formats
from pretrain.distributed.collectives import rank, world_size
from pretrain.distributed.engine import Engine
from pretrain.fail_points import fail_point
from pretrain.model.contrastive_model import PresentRows, StepFeatures, StreamInputs
from pretrain.model.tokenizer import Tokenizer
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    Temperature,
    objective_types,
)
from pretrain.settings.data import Stream, StreamName
from pretrain.settings.model import Model
from pretrain.settings.segments import value_at
from pretrain.settings.views import View
from pretrain.training.step_loss import feature_type, rows_with_all


@dataclass(frozen=True)
class ValidationSet:
    """Held-out samples of one stream, in batches whose samples are contrasted with one another."""

    stream: StreamName
    reader: SampleReader
    batch_size: int
    # Without label smoothing and with duplicates as negatives, so that runs with different settings
    # can be compared.
    objectives: Mapping[str, Objective]
    # Number of steps done -> reader from then on, of images of another size
    later_readers: Mapping[int, SampleReader] = field(default_factory=dict)

    def after(self, num_steps: int) -> ValidationSet:
        """Returns the set with images of the size of the last of `num_steps` steps."""
        readers = {0: self.reader, **self.later_readers}
        return replace(self, reader=value_at(readers, max(0, num_steps - 1)))

    def batches(self) -> Iterator[HeldOutBatch]:
        """Yields this rank's part of each batch; the last batch may be smaller.

        Raises:
            InputError: if a held-out sample cannot be decoded.
        """
        num_samples = len(self.reader.samples)
        for start in range(0, num_samples, self.batch_size):
            stop = min(start + self.batch_size, num_samples)
            first, last = (
                start + (stop - start) * number // world_size() for number in (rank(), rank() + 1)
            )
            yield self._batch([self._read(rank) for rank in range(first, last)])

    def _batch(self, samples: list[dict[str, tuple[Tensor, ...]]]) -> HeldOutBatch:
        inputs, present = {}, {}
        for view, form in self.reader.formats.items():
            rows = [sample[view] for sample in samples if view in sample]
            inputs[view] = (
                tuple(map(torch.stack, zip(*rows, strict=True))) if rows else form.layout.no_rows()
            )
            if self.reader.may_lack(form.view.member):
                present[view] = torch.tensor([view in each for each in samples], dtype=torch.bool)
        return HeldOutBatch(inputs, present)

    def _read(self, rank: int) -> dict[str, tuple[Tensor, ...]]:
        try:
            return self.reader.read_exactly(int(self.reader.samples.ordinals_of([rank])[0]))
        except (CorruptSampleError, MediaError) as error:
            raise InputError(
                f"validation.streams.{self.stream}: {error}; samples are not substituted "
                "in validation: repair the dataset, or prepare it without this sample"
            ) from None


@dataclass(frozen=True)
class HeldOutBatch:
    """This rank's part of a batch of held-out samples."""

    inputs: Mapping[str, tuple[Tensor, ...]]  # view -> inputs of its tower, present samples alone
    present: Mapping[str, Tensor]  # bool [B] of each view that samples may lack

    def on(self, device: torch.device) -> StreamInputs:
        """Returns the inputs of the model on a device."""
        views = {
            view: tuple(values.to(device) for values in inputs)
            for view, inputs in self.inputs.items()
        }
        rows = {
            view: PresentRows(has_it.nonzero()[:, 0].to(device), has_it)
            for view, has_it in self.present.items()
        }
        return StreamInputs(views, present=rows)


def build_validation_sets(
    config: Validation,
    *,
    streams: Mapping[StreamName, Stream],
    engine: EngineSection,
    model: Model,
    transforms: Mapping[int, Mapping[str, MediaTransform]],
    tokenizer: Tokenizer | None,
    retries: int,
    cache: ShardCache | None = None,
) -> list[ValidationSet]:
    """Opens the held-out pairs of a config.

    Args:
        config: config section `validation`.
        streams: config section of each stream, for its objectives.
        engine: config section `engine`.
        model: config section `model`.
        transforms: number of steps done -> transform of each kind of media from then on.
        tokenizer: tokenizer of texts; None without a text tower.
        retries: retries of a read after a transient error.
        cache: this machine's cache, for datasets behind URLs.

    Raises:
        InputError: if a dataset is missing, empty, or of the wrong kind.
    """
    sets = []
    types = objective_types()
    for name, source in config.streams.items():
        stream = streams[name]
        where = f"validation.streams.{name}"
        formats = {
            step: build_formats(stream.views, model, transforms=each, tokenizer=tokenizer)
            for step, each in transforms.items()
        }
        reader = SampleReader(
            f"validation.{name}",
            samples=open_samples(source.dataset, subset=source.subset, cache=cache),
            formats=formats.pop(0),
            retries=retries,
        )
        if len(reader.samples) == 0:
            raise InputError(f"{where}: {source.dataset} contains no samples")
        objectives = {
            f"{name}/{objective}": types[section.kind](
                objective,
                section.for_validation(),
                feature_type(engine.precision),
                engine.loss_mode,
            )
            for objective, section in stream.objectives.items()
            if _is_measured(section.views(objective), reader)
        }
        if not objectives:
            raise InputError(
                f"{where}: {source.dataset} has {', '.join(reader.dataset.modalities)}; expected "
                f"different views of an objective among {', '.join(stream.views)}"
            )
        later = {step: reader.with_formats(each) for step, each in formats.items()}
        sets.append(ValidationSet(name, reader, source.batch_size, objectives, later))
    return sets


def _is_measured(views: Sequence[str], reader: SampleReader) -> bool:
    """Whether the data has the views of an objective, and they differ without augmentation."""
    shown = {(View.parse(view).modality, View.parse(view).member) for view in views}
    return set(views) <= set(reader.formats) and len(shown) == len(views)


@torch.no_grad()
def validate(
    engine: Engine,
    validation_set: ValidationSet,
    should_abort: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]] | None:
    """Computes the mean loss and metrics of a set; every rank must call it.

    Args:
        engine: engine that holds the model.
        validation_set: held-out pairs; all ranks have the same number of batches.
        should_abort: called after each batch; returns the same value on every rank. If true, the
            validation is aborted.

    Returns:
        Means over samples of each "<stream>/<objective>" that some sample can serve, or None if the
        validation was aborted.

    Raises:
        InputError: if a held-out pair cannot be decoded.
    """
    engine.train_mode(False)
    means: dict[str, RunningMean] = {key: RunningMean() for key in validation_set.objectives}
    is_aborted = False
    for batch in validation_set.batches():
        features = engine.forward([{validation_set.stream: batch.on(engine.device)}])
        fail_point("validation")
        for key, objective in validation_set.objectives.items():
            means[key].add(
                objective.loss(_objective_inputs(objective, features, batch, validation_set.stream))
            )
        if should_abort():
            is_aborted = True
            break
    engine.train_mode(True)
    return (
        None if is_aborted else {k: each.values() for k, each in means.items() if each.num_samples}
    )


def _objective_inputs(
    objective: Objective, features: StepFeatures, batch: HeldOutBatch, stream: StreamName
) -> ObjectiveInputs:
    name = objective.temperature_name
    temperature = None
    if name is not None:
        temperature = Temperature(features.scales[name], features.biases.get(name))
    found = features.views[stream]
    rows = rows_with_all([batch.present.get(view) for view in objective.views], found)
    read, outputs = objective.read(found)
    return ObjectiveInputs(read, {}, temperature, counts=None, rows=rows, outputs=outputs)


@dataclass
class RunningMean:
    """Means of an objective's loss and metrics over the samples of several batches.

    Those of a mean over other terms, such as tokens, are weighted by their number.
    """

    sums: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_averaged: int = 0

    def add(self, loss: ObjectiveLoss) -> None:
        """Adds a batch."""
        num_averaged = loss.num_samples if loss.num_averaged is None else loss.num_averaged
        for name, value in {"loss": loss.value, **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * num_averaged
        self.num_samples += loss.num_samples
        self.num_averaged += num_averaged

    def values(self) -> dict[str, float]:
        """Returns the means; 0 if no sample took part."""
        return {name: total / max(1, self.num_averaged) for name, total in self.sums.items()}
