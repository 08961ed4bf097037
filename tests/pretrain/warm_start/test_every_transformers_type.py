"""Every model type of transformers whose towers are built starts from the folder that it saves.

Files keep the names of older versions of transformers, which differ from those of its modules.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from pretrain.model.contrastive_model import Tower
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.model.transformers_backbone import TransformersMedia, _from_config
from pretrain.settings.warm_start import Start
from pretrain.warm_start.key_table import KeyTable
from pretrain.warm_start.layouts import read_layout
from pretrain.warm_start.source import find_source
from pretrain.warm_start.tower_start import start_tower

SHARED = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_mel_bins": 16,
    "max_length": 32,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
STAGES = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
LLM = SHARED | {"num_key_value_heads": 1, "head_dim": 8}
# Model type -> its own small sizes; None: those of SHARED that it knows.
TYPES = {
    "image": {
        **dict.fromkeys(("vit", "deit", "dinov2", "ijepa", "aimv2_vision_model", "beit")),
        **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")),
        **dict.fromkeys(("metaclip_2_vision_model", "dinov3_vit", "dinov2_with_registers")),
        **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext"), STAGES),
        "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
        "mobilenet_v2": {},
    },
    "audio": {
        "audio-spectrogram-transformer": None,
        "whisper": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 16,
        },
        "clap_audio_model": {
            "patch_embeds_hidden_size": 8,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "hidden_size": 16,
        },
    },
    "text": {
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2")),
        **dict.fromkeys(("xlm-roberta-xl", "modernbert", "mpnet", "deberta-v2", "albert")),
        **dict.fromkeys(("clip_text_model", "siglip_text_model", "siglip2_text_model")),
        **dict.fromkeys(("metaclip_2_text_model", "clap_text_model")),
        **dict.fromkeys(("qwen3", "gemma3_text", "eurobert"), LLM),
        **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    },
}


def build(model_type, kind, sizes):
    known = AutoConfig.for_model(model_type)
    values = known.to_dict()
    names = {*values, *known.attribute_map}
    chosen = {key: value for key, value in (sizes or SHARED).items() if key in names}
    if (values.get("pad_token_id") or 0) >= SHARED["vocab_size"]:
        chosen["pad_token_id"] = 0
    return _from_config(AutoConfig.for_model(model_type, **chosen), kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model_type"), [(kind, name) for kind, types in TYPES.items() for name in types]
)
def test_a_type_starts_from_its_own_folder(tmp_path, kind, model_type):
    torch.manual_seed(0)
    own, oracle = (build(model_type, kind, TYPES[kind][model_type]) for _ in range(2))
    for parameter in oracle.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    oracle.save_pretrained(tmp_path)
    tower = Tower(nn.Identity(), TransformersMedia(own), nn.Identity(), drop_keys=TowerDropKeys())
    layout = read_layout(find_source(str(tmp_path), where="").read(), kind=kind)
    start = Start(**{"from": str(tmp_path)})
    rows = start_tower(
        tower, layout, start, part=kind, where="model.x.start", library="transformers"
    )
    counts = KeyTable(kind, "", tuple(rows)).counts()
    assert counts["unused"] == counts["missing"] == counts["resampled"] == 0
    found, expected = own.state_dict(), oracle.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
