"""The config section that selects a model and its encoding options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from data_prep.config_file import Section


class EncodingConfig(Section):
    """Model and encoding options."""

    # Run folder (its newest checkpoint), checkpoint folder, or model of another library: see
    # eval.models.model_source
    checkpoint: Path
    # open_clip's name of the architecture, such as ViT-B-32, if checkpoint is a weights file
    open_clip_architecture: str | None = None
    # Of a checkpoint of Isopair: plain, or ema: the averages that a run with optimizer.ema keeps
    weights: Literal["plain", "ema"] = "plain"
    batch_size: PositiveInt = 128  # media items or captions; affects memory and speed only
    workers: int = Field(0, ge=0)  # worker processes that read and decode; 0: the main process
    # Precision of the towers; embeddings and scores are always float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Clips longer than the model's input: mean over windows that cover the clip, or a single window
    long_clips: Literal["windows", "first", "centre"] = "windows"
