"""A model of any library, as evaluation uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.models.model_source import Library


@dataclass(frozen=True)
class ModelOrigin:
    """What results say of a model."""

    library: Library
    folder: Path  # or file
    sha256: str  # of everything that the model is rebuilt from
    step: int | None = None  # of training; known of ours
    tags: tuple[str, ...] = ()  # why the model is not a function of its run's config alone


@dataclass(frozen=True)
class LoadedModel:
    """A model with its transforms and tokenizer."""

    model: Any  # encode_media(kind, batch) and encode_text(tokens), each to [B, D], L2-normalised
    transforms: dict[str, Any]  # by kind of media: decode(content, extension), transform(decoded)
    settings: dict[str, Any]  # of each transform, as JSON can say them
    tokenizer: Callable[[list[str]], Any]  # M texts -> what encode_text takes
    origin: ModelOrigin


def normalized(embeddings: Tensor) -> Tensor:
    """[B, D] with rows of length one, in float32."""
    embeddings = embeddings.float()
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
