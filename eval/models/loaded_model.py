"""Common interface to the models of all libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.modalities.modality import Kind
from data_prep.versions import package_version
from eval.models.model_source import Library
from pretrain.checkpoints.record import WeightsKind

# Packages whose code determines an embedding; another version may compute a different one
PACKAGES = (
    *("isopair", "numpy", "open-clip-torch", "pillow", "sentencepiece", "simplejpeg"),
    *("soundfile", "soxr", "timm", "tokenizers", "torch", "torchvision", "transformers"),
)


@dataclass(frozen=True)
class ModelOrigin:
    """Identity of a model, recorded in results."""

    library: Library
    folder: Path  # model folder or weights file
    sha256: str  # SHA-256 over the model's files
    step: int | None = None  # training step; known only for Isopair's checkpoints
    tags: tuple[str, ...] = ()  # reasons why the model depends on more than its run's config
    weights: WeightsKind = "plain"
    # Everything except the files that determines the model and its tokenizer, in JSON types
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its transforms and tokenizer."""

    model: Any  # encode(modality, *inputs) to [B, D], L2-normalised
    kinds: Mapping[str, Kind]  # kind of each modality
    # Image or audio modality -> object with decode(content, extension) and __call__(decoded)
    transforms: dict[str, Any]
    settings: dict[str, Any]  # image or audio modality -> settings of its transform, in JSON types
    tokenizer: Callable[[list[str]], Any] | None  # M texts -> input of encode; None: no texts
    origin: ModelOrigin
    # Numbers of first elements of an embedding that were trained to be embeddings as well
    matryoshka_dims: tuple[int, ...] = ()
    # Sets of modalities that an objective of the run reads together; None: not known
    trained_pairs: frozenset[frozenset[str]] | None = None
    # Vector modality -> (width,), or (rows, width) of sequences
    vector_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def encoding_packages() -> dict[str, str | None]:
    """Returns the version of every package in PACKAGES; None if it is not installed."""
    return {name: package_version(name) for name in PACKAGES}


def first_numbers(embeddings: Tensor, dim: int | None) -> Tensor:
    """Returns the first numbers of embeddings, normalised again: [B, D] -> [B, dim].

    Args:
        embeddings: [B, D].
        dim: None for all numbers, unchanged.
    """
    return embeddings if dim is None else normalized(embeddings[:, :dim])


def normalized(embeddings: Tensor) -> Tensor:
    """Normalises the rows of [B, D] to unit length, in float32."""
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
