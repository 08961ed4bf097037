"""Warm start of decoders of captions, from open_clip's CoCa and from a run."""

import pytest
import torch

from data_prep.errors import ConfigError
from pretrain.config import PretrainConfig
from pretrain.warm_start.layouts import read_layout
from pretrain.warm_start.model_start import all_starts, start_fingerprints, start_model
from pretrain.warm_start.needs import find_needs, module_starts
from pretrain.warm_start.tower_start import start_module
from tests.support.toy_coca import coca_config, small_captioning_config, write_tiny_coca
from tests.support.toy_towers import build_toy_model

MODULE = "captions:image-text"


def started(config):
    """Returns (model, account of its warm start)."""
    model = build_toy_model(config)
    starts = {"towers": config.towers_of_temperatures, "modules": config.modules}
    return model, start_model(model, config.model, **starts)


def with_settings(config, **settings):
    values = config.model_dump(mode="json")
    values["streams"]["image-text"]["objectives"]["captions"] |= settings
    return PretrainConfig.model_validate(values)


def test_every_tensor_of_coca_is_taken(toy_data, tmp_path):
    weights = write_tiny_coca(tmp_path)
    config = coca_config(toy_data, tmp_path / "run", weights=weights)
    model, account = started(config)
    of_decoder = account.tables[-1]
    assert of_decoder.kind == MODULE
    counts = of_decoder.counts()
    assert (counts["missing"], counts["unused"], counts["resampled"]) == (0, 0, 0)
    stored = torch.load(weights, weights_only=True)
    names = [name for name in stored if name.startswith("text_decoder.")]
    assert counts["taken"] == len(names)
    for name in names:
        own = model.objective_modules[MODULE].get_parameter(name.replace("text_", "", 1))
        assert torch.equal(own, stored[name])
    fingerprints = start_fingerprints(all_starts(config))
    assert fingerprints["objectives.captions:image-text.start"] == fingerprints["model.text.start"]
    lines = account.describe(fingerprints)
    assert any(line.startswith(f"{MODULE} module starts from {weights}") for line in lines)


def test_a_pooler_that_coca_lacks_is_named(toy_data, tmp_path):
    config = coca_config(toy_data, tmp_path / "run", weights=write_tiny_coca(tmp_path))
    config = with_settings(config, num_queries=3, pooler_heads=2)
    with pytest.raises(ConfigError, match=r'captions\.start: .*expect_missing: \["pooler\.\*"\]'):
        started(config)
    start = config.streams["image-text"].objectives["captions"].start.model_dump(mode="json")
    _, account = started(with_settings(config, start=start | {"expect_missing": ["pooler.*"]}))
    assert account.tables[-1].counts()["missing"] > 0


def test_a_decoder_starts_from_that_of_a_run(toy_data, tmp_path):
    config = small_captioning_config(toy_data, tmp_path)
    source = build_toy_model(config)
    target = build_toy_model(config.model_copy(update={"seed": 5}))
    layout = read_layout(dict(source.state_dict()), kind="text_decoder")
    assert {MODULE, "captions:audio-text", "image", "text"} <= layout.towers.keys()
    start = coca_config(toy_data, tmp_path, weights=tmp_path / "x").model.image.start
    module = target.objective_modules[MODULE]
    rows = start_module(module, layout, start, part=MODULE, where="here")
    assert {row.status for row in rows} == {"taken", "kept", "other part"}
    for name, value in source.objective_modules[MODULE].named_parameters():
        assert torch.equal(module.get_parameter(name), value)


def test_a_decoder_on_a_hub_is_fetched(toy_data, tmp_path):
    tag = "open_clip:coca_ViT-B-32/laion2b_s13b_b90k"
    config = with_settings(small_captioning_config(toy_data, tmp_path), start={"from": tag})
    [need] = find_needs(config.model, module_starts(config))
    assert need.key == "streams.image-text.objectives.captions.start.from"
    assert need.model.name.startswith("laion/CoCa-ViT-B-32")
    assert need.with_weights
