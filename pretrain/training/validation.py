"""Loss and in-batch recall on held-out pairs, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import CorruptSampleError
from pretrain.cache.shard_cache import ShardCache
from pretrain.config import Engine as EngineSection
from pretrain.config import MediaKind, Stream, StreamName, Validation
from pretrain.data.datasets import open_samples
from pretrain.data.pair_reader import Pair, PairReader
from pretrain.data.transforms import MediaTransform
from pretrain.distributed.collectives import rank, world_size
from pretrain.distributed.engine import Engine
from pretrain.fail_points import fail_point
from pretrain.model.contrastive_model import StepFeatures, StreamInputs
from pretrain.model.tokenizer import Tokenizer
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    Temperature,
    objective_types,
)
from pretrain.training.step_loss import feature_type


@dataclass(frozen=True)
class ValidationSet:
    """Held-out pairs of one stream, in batches whose pairs are contrasted with one another."""

    stream: StreamName
    kind: MediaKind
    reader: PairReader
    tokenizer: Tokenizer
    batch_size: int
    # Without label smoothing and with duplicates as negatives, so that runs with different settings
    # can be compared.
    objectives: Mapping[str, Objective]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (media, tokens) of this rank's part of each batch; the last batch may be smaller.

        Raises:
            InputError: if a held-out pair cannot be decoded.
        """
        num_pairs = len(self.reader.samples)
        for start in range(0, num_pairs, self.batch_size):
            stop = min(start + self.batch_size, num_pairs)
            first, last = (
                start + (stop - start) * number // world_size() for number in (rank(), rank() + 1)
            )
            pairs = [self._read(rank) for rank in range(first, last)]
            media = [self.reader.transform(pair.media) for pair in pairs]
            tokens = self.tokenizer([pair.captions[0] for pair in pairs])
            yield self._stack(media), tokens

    def _stack(self, media: list[Tensor]) -> Tensor:
        if media:
            return torch.stack(media)
        example = self.reader.transform(self._read(0).media)
        return example.new_zeros(0, *example.shape)

    def _read(self, rank: int) -> Pair:
        try:
            return self.reader.read_exactly(int(self.reader.samples.ordinals_of([rank])[0]))
        except (CorruptSampleError, MediaError) as error:
            raise InputError(
                f"validation.streams.{self.stream}: {error}; samples are not substituted "
                "in validation: repair the dataset, or prepare it without this sample"
            ) from None


def build_validation_sets(
    config: Validation,
    *,
    streams: Mapping[StreamName, Stream],
    engine: EngineSection,
    transforms: Mapping[MediaKind, MediaTransform],
    tokenizer: Tokenizer,
    retries: int,
    cache: ShardCache | None = None,
) -> list[ValidationSet]:
    """Opens the held-out pairs of a config.

    Args:
        config: config section `validation`.
        streams: config section of each stream, for its objectives.
        engine: config section `engine`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of captions.
        retries: retries of a read after a transient error.
        cache: this machine's cache, for datasets behind URLs.

    Raises:
        InputError: if a dataset is missing, empty, or of the wrong kind.
    """
    sets = []
    types = objective_types()
    for name, source in config.streams.items():
        stream = streams[name]
        reader = PairReader(
            f"validation.{name}",
            samples=open_samples(source.dataset, subset=source.subset, cache=cache),
            kind=stream.media,
            transform=transforms[stream.media],
            retries=retries,
        )
        if len(reader.samples) == 0:
            raise InputError(f"validation.streams.{name}: {source.dataset} contains no samples")
        objectives = {
            f"{name}/{objective}": types[section.kind](
                objective,
                section.for_validation(),
                feature_type(engine.precision),
                engine.loss_mode,
            )
            for objective, section in stream.objectives.items()
        }
        sets.append(
            ValidationSet(name, stream.media, reader, tokenizer, source.batch_size, objectives)
        )
    return sets


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
        Means over samples of each "<stream>/<objective>", or None if the validation was aborted.

    Raises:
        InputError: if a held-out pair cannot be decoded.
    """
    engine.train_mode(False)
    means: dict[str, RunningMean] = {key: RunningMean() for key in validation_set.objectives}
    is_aborted = False
    for media, tokens in validation_set.batches():
        views = {validation_set.kind: media.to(engine.device), "text": tokens.to(engine.device)}
        inputs = StreamInputs({view: (values,) for view, values in views.items()})
        features = engine.forward([{validation_set.stream: inputs}])
        fail_point("validation")
        for key, objective in validation_set.objectives.items():
            means[key].add(
                objective.loss(_objective_inputs(objective, features, validation_set.stream))
            )
        if should_abort():
            is_aborted = True
            break
    engine.train_mode(True)
    return None if is_aborted else {key: mean.values() for key, mean in means.items()}


def _objective_inputs(
    objective: Objective, features: StepFeatures, stream: StreamName
) -> ObjectiveInputs:
    name = objective.temperature_name
    temperature = None
    if name is not None:
        temperature = Temperature(features.scales[name], features.biases.get(name))
    return ObjectiveInputs(features.views[stream], {}, temperature, counts=None)


@dataclass
class RunningMean:
    """Means of an objective's loss and metrics over the samples of several batches."""

    sums: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0

    def add(self, loss: ObjectiveLoss) -> None:
        """Adds a batch."""
        for name, value in {"loss": loss.value, **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * loss.num_samples
        self.num_samples += loss.num_samples

    def values(self) -> dict[str, float]:
        """Returns the means; 0 if no sample took part."""
        return {name: total / max(1, self.num_samples) for name, total in self.sums.items()}
