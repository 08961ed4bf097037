"""Configs of plans: models of any size, without datasets."""

from pretrain.planning.config import PlanConfig
from pretrain.planning.model_sizes import ModelSizes, measure_model
from pretrain.planning.planned_model import plan_model

SOURCE = {"name": "none", "dataset": "none"}
TEXT = {
    "library": "open_clip",
    "context_length": 12,
    "options": {"width": 32, "heads": 2, "layers": 2, "vocab_size": 100},
}


def plan_config(tower, /, *, text=TEXT, embed_dim=16, num_samples=64, **sections):
    """Returns a config of a plan for images and texts; `sections` replace whole sections."""
    values = {
        "lanes": 64,
        "run": {"folder": "none"},
        "model": {"embed_dim": embed_dim, "image": tower, "text": text},
        "streams": {
            "pairs": {
                "global_batch_size": num_samples,
                "sources": [SOURCE],
                "objectives": {"image-text": {}},
            }
        },
        "optimizer": {"learning_rate": 1e-4},
        "schedule": {"num_steps": 1000},
        "engine": {"precision": "fp32"},
        "gpu": "h200",
    }
    return PlanConfig.model_validate(values | sections)


def timm_vit(**options):
    """Returns the section of a small vision transformer of timm."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return {"library": "timm", "name": "vit_tiny_patch16_224", "options": sizes | options}


def measured(config, *, is_gpu=False) -> ModelSizes:
    """Returns the sizes of the model of a config."""
    return measure_model(config, plan_model(config), is_gpu=is_gpu)
