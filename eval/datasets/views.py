"""Views of evaluation sets: the samples that have them, and their contents.

A view, such as `image` or `text.title`, names a modality of the model and a modality of the dataset
(see pretrain.settings.views). Shards of named modalities have those that dataset.json lists. Every
other set has images or audio clips, and captions as `text`. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.sample import media_extension_of, media_kind_of
from data_prep.shards.sample_contents import SampleContents
from data_prep.shards.subset import KeptSamples
from eval.datasets.datasets import EvaluationSet
from eval.datasets.labels import texts_of
from pretrain.settings.views import View


def modalities_of(dataset: EvaluationSet) -> Modalities:
    """Returns the modalities of a dataset."""
    if isinstance(dataset, KeptSamples):
        return dataset.dataset.modalities
    return Modalities.pair(dataset.info.media)


def media_view(dataset: EvaluationSet) -> str:
    """Returns the view that is measured if the config names none: the first image or audio.

    Raises:
        InputError: if the dataset has neither.
    """
    media = modalities_of(dataset).media
    if not media:
        raise InputError(
            f"{dataset.folder}: expected images or audio clips, found "
            f"{', '.join(modalities_of(dataset))}; name the views to measure in the config"
        )
    return media[0]


def members_of(views: Sequence[str]) -> list[str]:
    """Returns the modalities of the dataset that views show, each once."""
    return list(dict.fromkeys(View.parse(view).member for view in views))


def samples_having(dataset: EvaluationSet, views: Sequence[str]) -> EvaluationSet:
    """Returns the samples of a dataset that have all of some views.

    Raises:
        InputError: if the dataset does not have one of the modalities, or no sample has all.
    """
    members = members_of(views)
    if isinstance(dataset, KeptSamples):
        return dataset.having_all(members)
    modalities_of(dataset).check_known(members, where=str(dataset.folder))
    return dataset


def has_any_with(dataset: EvaluationSet, views: Sequence[str]) -> bool:
    """Returns whether a sample of a dataset has all of some views.

    Args:
        dataset: samples.
        views: views of modalities that the dataset has.
    """
    return not isinstance(dataset, KeptSamples) or dataset.has_any_with(members_of(views))


def read_contents(
    dataset: EvaluationSet, ordinal: int, *, members: Collection[str]
) -> SampleContents:
    """Reads some modalities of a sample.

    Args:
        dataset: dataset of the sample.
        ordinal: index of the sample.
        members: modalities of the dataset.

    Raises:
        CorruptSampleError: if a member is damaged.
        InputError: if a sample of a set without an index lacks its captions.
        OSError: if a file cannot be read.
    """
    if isinstance(dataset, KeptSamples):
        return dataset.read_modalities(ordinal, names=members)
    media = dataset.info.media
    fields = ["json", "txt"] if "text" in members else []
    if media in members:
        fields += [name for name in dataset.info.fields if media_kind_of(name) == media]
    sample = dataset.read_sample(ordinal, fields=fields)
    contents = SampleContents(sample.shard, sample.key)
    extension = media_extension_of(sample.members, media)
    if media in members and extension is not None:
        contents.media[media] = sample.members[extension]
        contents.extensions[media] = extension
    if "text" in members:
        contents.texts["text"] = texts_of(sample, dataset)
    return contents
