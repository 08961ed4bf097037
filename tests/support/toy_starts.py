"""Models with random weights as sources of warm starts, and the comparison with what starts."""

import json
from pathlib import Path

import open_clip
import torch
from torch import nn
from torch.nn.functional import normalize

from pretrain.config import PretrainConfig
from pretrain.warm_start.model_start import WarmStart, start_model
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

TOLERANCE = 1e-5
TEXT_OF_SIGLIP = {
    "context_length": 12,
    "vocab_size": 49408,
    "width": 16,
    "heads": 2,
    "layers": 1,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
SIGLIP_OF_OPEN_CLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": TEXT_OF_SIGLIP,
}


def randomize(model: nn.Module) -> nn.Module:
    """Sets all weights to random values, so that none is zero or one by construction."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.1 if name.endswith(("weight", "bias")) else 0.3)
    return model.eval()


def write_siglip_of_open_clip(folder: Path) -> nn.Module:
    """Registers an open_clip model "tiny-siglip", which takes images of 160 pixels; returns it."""
    (folder / "siglip").mkdir()
    (folder / "siglip" / "tiny-siglip.json").write_text(json.dumps(SIGLIP_OF_OPEN_CLIP))
    open_clip.add_model_config(folder / "siglip")
    return randomize(open_clip.create_model("tiny-siglip", force_custom_text=True))


def start_config(folder: Path, *, image_size: int = 16, **model) -> PretrainConfig:
    """Returns a toy config whose section `model` is replaced."""
    config = toy_config(folder, folder / "run", image={"size": image_size})
    values = config.model.model_dump(mode="json")
    for kind, tower in model.items():
        if kind != "text":
            values[kind] = tower
        else:
            values["text"] = {"context_length": 12} | tower
    return toy_config(folder, folder / "run", model=values, image={"size": image_size})


def start(config: PretrainConfig) -> tuple[nn.Module, WarmStart]:
    """Builds a model and starts it from the sources of its config."""
    model = build_toy_model(config)
    return model.eval(), start_model(model, config.model, towers=config.towers_of_temperatures)


def assert_equal_embeddings_and_gradients(own, tower, oracle, encode, inputs, table):
    """Compares a started tower with its source, in embeddings and in gradients by name.

    Args:
        own: function that encodes inputs to normalised embeddings.
        tower: started tower.
        oracle: model that was the source.
        encode: function that encodes inputs with the oracle.
        inputs: inputs of both.
        table: account of the tower's start.
    """
    found, expected = own(inputs), normalize(encode(inputs), dim=-1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the inputs matter
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for embeddings, model in ((found, tower), (expected, oracle)):
        model.zero_grad()
        (embeddings * direction).sum().backward()
    own_parameters, parameters = dict(tower.named_parameters()), dict(oracle.named_parameters())
    parameters |= {n.removeprefix("text."): p for n, p in parameters.items()}
    compared = 0
    for row in table.rows:
        if row.status == "taken" and row.source in parameters and row.tower in own_parameters:
            gradient, wanted = own_parameters[row.tower].grad, parameters[row.source].grad
            if gradient is None or gradient.shape != wanted.shape:
                continue
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(gradient / scale, wanted / scale, atol=TOLERANCE, rtol=0)
            compared += 1
    assert compared > 3


def tables_of(warm_start: WarmStart) -> dict:
    """Returns the tables by kind; every tensor must have been taken."""
    for table in warm_start.tables:
        counts = table.counts()
        assert counts["unused"] == counts["missing"] == 0
        assert counts["taken"] > 0
    return {table.kind: table for table in warm_start.tables}
