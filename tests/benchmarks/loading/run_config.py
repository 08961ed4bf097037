"""Config of a run on a dataset of the benchmarks; only its loader is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig

LANES = 16


def image_run(dataset: Path, *, global_batch_size: int, **loading: Any) -> PretrainConfig:
    """Builds the config of a ViT-B/32 on images of 224 pixels, cropped as in open_clip."""
    return PretrainConfig.model_validate(
        {
            "lanes": LANES,
            "run": {"folder": "unused"},
            "model": {
                "embed_dim": 512,
                "image": {"library": "open_clip", "name": "ViT-B-32"},
                "text": {"library": "open_clip", "name": "ViT-B-32"},
            },
            "image": {"size": 224, "crop_area": [0.9, 1.0], "crop_ratio": [3 / 4, 4 / 3]},
            "streams": {
                "image-text": {
                    "global_batch_size": global_batch_size,
                    "objectives": {"image-text": {}},
                    "sources": [{"name": "photographs", "dataset": str(dataset)}],
                }
            },
            "loading": loading,
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"num_steps": 10**9},
        }
    )
