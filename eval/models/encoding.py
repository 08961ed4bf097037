"""The config section that selects a model and its encoding options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from data_prep.config_file import Section


class EncodingConfig(Section):
    """Which model encodes, and how."""

    # A run folder (its newest checkpoint), one checkpoint's folder, or another library's model:
    # see eval.models.model_source
    checkpoint: Path
    # open_clip's name of the model, such as ViT-B-32, if checkpoint is a file of its weights
    open_clip_architecture: str | None = None
    batch_size: PositiveInt = 128  # media items or captions encoded at once; memory and speed only
    workers: int = Field(0, ge=0)  # processes that read and decode; 0: none besides the main one
    # Of the towers; embeddings and scores are float32 always
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Of a clip longer than the model takes: the mean over windows that cover it, or a part of it
    long_clips: Literal["windows", "first", "centre"] = "windows"
