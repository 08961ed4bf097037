import json
from pathlib import Path

import pytest

from data_prep.errors import ConfigError
from pretrain.distributed.deepspeed_config import deepspeed_settings
from pretrain.distributed.start import check_engine
from tests.support.toy_run import toy_config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"gradient_clipping": 1.0}, r"gradient_clipping=1\.0: .* optimizer\.gradient_clipping"),
        ({"train_batch_size": 64}, r"train_batch_size=64: .*\.global_batch_size; remove"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps=2: .* micro_batch_size"),
        ({"bf16": {"enabled": True}}, r"bf16=.* engine\.precision"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization: stage=3: .* engine\.strategy"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "unknown key 'zero_quantized"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device: .*'nvme'"),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 1}}, "zero3, found zero2"),
    ],
)
def test_a_deepspeed_file_tunes_and_nothing_else(toy_data, tmp_path, content, expected):
    (tmp_path / "deepspeed.json").write_text(json.dumps(content))
    engine = {"strategy": "zero2", "deepspeed_config": tmp_path / "deepspeed.json"}
    with pytest.raises(ConfigError, match=expected):
        check_engine(toy_config(toy_data, tmp_path / "run", engine=engine).engine, trackers=[])


@pytest.mark.parametrize("strategy", ["ddp", "zero0"])
def test_a_deepspeed_file_without_effect_is_refused(toy_data, tmp_path, strategy):
    (tmp_path / "deepspeed.json").write_text("{}")
    engine = {"strategy": strategy, "deepspeed_config": tmp_path / "deepspeed.json"}
    with pytest.raises(ConfigError, match=f"nothing in it has an effect .*{strategy}"):
        check_engine(toy_config(toy_data, tmp_path / "run", engine=engine).engine, trackers=[])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=str)
def test_every_deepspeed_file_that_comes_along_is_accepted(toy_data, tmp_path, path):
    strategy = path.stem.partition("_")[0]
    engine = {"strategy": strategy, "deepspeed_config": path, "precision": "bf16"}
    settings = deepspeed_settings(toy_config(toy_data, tmp_path / "run", engine=engine).engine)
    assert settings["zero_optimization"]["stage"] == int(strategy[-1])
    assert settings["torch_autocast"]["lower_precision_safe_modules"] == []
