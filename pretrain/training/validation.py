"""Loss and in-batch recall on held-out pairs, equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import CorruptSampleError
from pretrain.cache.shard_cache import ShardCache
from pretrain.config import Engine as EngineSection
from pretrain.config import MediaKind, Pairing, PairingName, Validation, media_of_pairing
from pretrain.data.datasets import open_samples
from pretrain.data.pair_reader import Pair, PairReader
from pretrain.data.transforms import MediaTransform
from pretrain.distributed.collectives import rank, world_size
from pretrain.distributed.engine import Engine
from pretrain.fail_points import fail_point
from pretrain.loss.contrastive_loss import ContrastiveLoss, contrastive_loss
from pretrain.loss.options import LossOptions
from pretrain.model.contrastive_model import PairInputs
from pretrain.model.tokenizer import Tokenizer
from pretrain.training.step_loss import feature_type


@dataclass(frozen=True)
class ValidationSet:
    """Held-out pairs of one pairing, in batches whose pairs are contrasted with one another."""

    pairing: PairingName
    reader: PairReader
    tokenizer: Tokenizer
    batch_size: int
    # Without label smoothing and with duplicates as negatives, so that runs with different settings
    # can be compared.
    options: LossOptions
    feature_type: torch.dtype

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
                f"validation.pairings.{self.pairing}: {error}; samples are not substituted "
                "in validation: repair the dataset, or prepare it without this sample"
            ) from None


def build_validation_sets(
    config: Validation,
    *,
    pairings: Mapping[PairingName, Pairing],
    engine: EngineSection,
    transforms: Mapping[MediaKind, MediaTransform],
    tokenizer: Tokenizer,
    retries: int,
    cache: ShardCache | None = None,
) -> list[ValidationSet]:
    """Opens the held-out pairs of a config.

    Args:
        config: config section `validation`.
        pairings: config section of each pairing, for its kind of loss.
        engine: config section `engine`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of captions.
        retries: retries of a read after a transient error.
        cache: this machine's cache, for datasets behind URLs.

    Raises:
        InputError: if a dataset is missing, empty, or of the wrong kind.
    """
    sets = []
    for name, source in config.pairings.items():
        kind = media_of_pairing(name)
        reader = PairReader(
            f"validation.{name}",
            samples=open_samples(source.dataset, subset=source.subset, cache=cache),
            kind=kind,
            transform=transforms[kind],
            retries=retries,
        )
        if len(reader.samples) == 0:
            raise InputError(f"validation.pairings.{name}: {source.dataset} contains no samples")
        sets.append(
            ValidationSet(
                name,
                reader,
                tokenizer,
                source.batch_size,
                LossOptions(
                    pairings[name].loss,
                    mode=engine.loss_mode,
                    direction=pairings[name].direction,
                    negatives=pairings[name].negatives,
                ),
                feature_type(engine.precision),
            )
        )
    return sets


@torch.no_grad()
def validate(
    engine: Engine,
    validation_set: ValidationSet,
    should_abort: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Computes the mean loss and in-batch recall at 1 of a set; every rank must call it.

    Args:
        engine: engine that holds the model.
        validation_set: held-out pairs; all ranks have the same number of batches.
        should_abort: called after each batch; returns the same value on every rank. If true, the
            validation is aborted.

    Returns:
        Means over pairs, or None if the validation was aborted.

    Raises:
        InputError: if a held-out pair cannot be decoded.
    """
    name = validation_set.pairing
    engine.train_mode(False)
    sums: dict[str, float] = {}
    num_pairs = 0
    is_aborted = False
    for media, tokens in validation_set.batches():
        inputs = PairInputs(media.to(engine.device), tokens.to(engine.device))
        features = engine.forward([{name: inputs}])[name]
        fail_point("validation")
        loss = contrastive_loss(
            features.media.to(validation_set.feature_type),
            features.text.to(validation_set.feature_type),
            features.scale,
            features.bias,
            options=validation_set.options,
        )
        for key, value in _metrics(loss).items():
            sums[key] = sums.get(key, 0.0) + value * loss.num_pairs
        num_pairs += loss.num_pairs
        if should_abort():
            is_aborted = True
            break
    engine.train_mode(True)
    if is_aborted:
        return None
    return {key: value / num_pairs for key, value in sums.items()}


def _metrics(loss: ContrastiveLoss) -> dict[str, float]:
    return {
        "loss": loss.value,
        "media_to_text_recall@1": loss.media_to_text_recall_at_1,
        "text_to_media_recall@1": loss.text_to_media_recall_at_1,
    }
