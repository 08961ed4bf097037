"""Towers of transformers that start from its dual encoders, and from LAION-CLAP's checkpoints."""

import json
from typing import NamedTuple

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.functional import normalize

from data_prep.errors import ConfigError, InputError
from pretrain.model.contrastive_model import Tower
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.settings.transforms import AudioTransform
from pretrain.settings.warm_start import Start
from pretrain.warm_start.key_table import KeyTable
from pretrain.warm_start.laion_clap import refuse_other_spectrogram
from pretrain.warm_start.layouts import read_layout
from pretrain.warm_start.source import find_source
from pretrain.warm_start.tower_start import start_tower
from tests.support import laion_clap_oracle as laion
from tests.support.toy_starts import assert_equal_embeddings_and_gradients, randomize

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
NAFLEX = SIZES | {"patch_size": 4, "num_patches": 16}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}
ROBERTA = SIZES | {"vocab_size": 50, "max_position_embeddings": 12, "pad_token_id": 1}
EMBED_DIM = 12


class Pooled(nn.Module):
    """A model of transformers as a backbone that returns its own pooled output."""

    def __init__(self, backbone, **inputs):
        super().__init__()
        self.backbone = backbone
        self.inputs = inputs

    def forward(self, inputs):
        name = self.backbone.main_input_name
        mask = {"attention_mask": (inputs != 1).long()} if self.inputs.get("masked") else {}
        others = {name: value for name, value in self.inputs.items() if name != "masked"}
        return self.backbone(**{name: inputs}, **others, **mask).pooler_output


def tower(backbone, projection, **inputs):
    pooled = Pooled(backbone, **inputs)
    return Tower(nn.Identity(), pooled, projection, drop_keys=TowerDropKeys()).eval()


def linear():
    return nn.Linear(16, EMBED_DIM, bias=False)


def mlp():
    return nn.Sequential(nn.Linear(16, EMBED_DIM), nn.ReLU(), nn.Linear(EMBED_DIM, EMBED_DIM))


def build(name, settings):
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


class Half(NamedTuple):
    """A half of a dual encoder, built by itself, and the inputs of both."""

    kind: str
    tower: Tower
    inputs: torch.Tensor
    others: dict


def pixels():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ids():
    found = torch.randint(2, 48, (3, 8), generator=torch.Generator().manual_seed(0))
    found[:, 5] = 49
    return found


def dual_encoder(name):
    """Builds a dual encoder with random weights, and new halves."""
    if name == "CLAP":
        audio, text = laion.AUDIO, ROBERTA
        model = build(
            "Clap", {"audio_config": audio, "text_config": text, "projection_dim": EMBED_DIM}
        )
        mel = torch.randn(3, 1, 200, 16, generator=torch.Generator().manual_seed(0))
        return randomize(model), [
            Half("audio", tower(build("ClapAudio", audio), mlp()), mel, {}),
            Half("text", tower(build("ClapText", text), mlp()), ids(), {}),
        ]
    vision = NAFLEX if name == "Siglip2" else VISION
    joint = {"projection_dim": EMBED_DIM} if name == "CLIP" else {}
    model = build(name, {"vision_config": vision, "text_config": TEXT} | joint)
    projection = linear if name == "CLIP" else nn.Identity
    inputs, others = pixels(), {}
    if name == "Siglip2":
        inputs = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
        shapes = torch.tensor([[4, 4]] * 3)
        others = {"pixel_attention_mask": torch.ones(3, 16), "spatial_shapes": shapes}
    image = tower(build(f"{name}Vision", vision), projection(), **others)
    return randomize(model), [
        Half("image", image, inputs, others),
        Half("text", tower(build(f"{name}Text", TEXT), projection()), ids(), {}),
    ]


def start(half, location, *, library="transformers", **settings):
    source = find_source(str(location), where="model.x.start.from")
    layout = read_layout(source.read(), kind=half.kind)
    section = Start(**{"from": str(location)} | settings)
    rows = start_tower(
        half.tower, layout, section, part=half.kind, where="model.x.start", library=library
    )
    return KeyTable(half.kind, str(location), tuple(rows)), layout


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2", "CLAP"])
def test_halves_of_a_dual_encoder_embed_as_the_whole(tmp_path, name):
    model, halves = dual_encoder(name)
    model.save_pretrained(tmp_path / "model")
    for half in halves:
        table, layout = start(half, tmp_path / "model")
        counts = table.counts()
        assert counts["unused"] == counts["missing"] == counts["resampled"] == 0
        names = [n for row in table.rows for n in row.source.split(" + ") if n]
        assert sorted(names) == sorted(find_source(str(tmp_path / "model"), where="").read())
        encode = getattr(model, f"get_{half.kind}_features")
        main = half.tower.backbone.backbone.main_input_name
        assert_equal_embeddings_and_gradients(
            lambda x, tower=half.tower: normalize(tower(x), dim=-1),
            half.tower,
            model,
            lambda x, e=encode, m=main, o=half.others: e(**{m: x}, **o).pooler_output,
            half.inputs,
            table,
        )
    assert {"logit_scale", "logit_scale_a"} & layout.temperatures.keys()


def test_shards_and_pickles_of_transformers_are_read_alike(tmp_path):
    model, (half, _) = dual_encoder("Siglip")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "pickle").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    for folder in ("shards", "pickle"):
        start(half, tmp_path / folder)
        found = half.tower.backbone.backbone.head.probe
        assert torch.equal(found, model.vision_model.head.probe)
        found.data.zero_()


def test_patches_and_positions_of_another_size_are_resampled(tmp_path):
    """Compares with timm's functions, on the layout of each model."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    for name, prefixes in (("CLIP", 1), ("Siglip", 0), ("Siglip2", 0)):
        model, _ = dual_encoder(name)
        model.save_pretrained(tmp_path / name)
        sizes = {"patch_size": 2, "num_patches": 25} if name == "Siglip2" else {"patch_size": 4}
        vision = (NAFLEX if name == "Siglip2" else VISION | {"image_size": 24}) | sizes
        projection = linear() if name == "CLIP" else nn.Identity()
        half = Half("image", tower(build(f"{name}Vision", vision), projection), None, {})
        table, _ = start(half, tmp_path / name)
        assert table.counts()["resampled"] == 2
        found = half.tower.backbone.backbone.embeddings
        old = model.vision_model.embeddings
        side = 5 if name == "Siglip2" else 6
        expected = resample_abs_pos_embed(
            old.position_embedding.weight[None], [side, side], num_prefix_tokens=prefixes
        )
        torch.testing.assert_close(found.position_embedding.weight[None], expected, atol=0, rtol=0)
        kernels = [each.patch_embedding.weight for each in (old, found)]
        if name == "Siglip2":  # [W, side * side * 3]
            kernels = [k.unflatten(1, (-1, 3)).movedim(2, 1) for k in kernels]
            kernels = [k.unflatten(2, (s, s)) for k, s in zip(kernels, (4, 2), strict=True)]
        expected = resample_patch_embed(kernels[0], list(kernels[1].shape[2:]))
        torch.testing.assert_close(kernels[1], expected, atol=0, rtol=0)


def test_spectrograms_of_another_length_are_resampled_along_time(tmp_path):
    from timm.layers import resample_abs_pos_embed

    sizes = SIZES | {"num_mel_bins": 16, "patch_size": 4, "time_stride": 3, "frequency_stride": 4}
    model = randomize(build("AST", sizes | {"max_length": 64}))
    model.save_pretrained(tmp_path)
    own = tower(build("AST", sizes | {"max_length": 40}), linear())
    table, _ = start(Half("audio", own, None, {}), tmp_path, expect_missing=["projection.*"])
    assert table.counts()["resampled"] == 1
    old, new = (each.embeddings.position_embeddings for each in (model, own.backbone.backbone))
    expected = resample_abs_pos_embed(old, [4, 13], old_size=[4, 21], num_prefix_tokens=2)
    torch.testing.assert_close(new, expected, atol=0, rtol=0)


def test_whispers_encoder_keeps_its_first_positions(tmp_path):
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0}
    config = transformers.WhisperConfig(max_source_positions=30, **sizes)
    model = randomize(transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    short = transformers.WhisperConfig(max_source_positions=12, **sizes)
    own = tower(WhisperEncoder(short), linear())
    named = {"expect_missing": ["projection.*"], "ignore": ["model.decoder.*"]}
    table, _ = start(Half("audio", own, None, {}), tmp_path, **named)
    assert table.counts()["resampled"] == 1
    found, expected = own.backbone.backbone.state_dict(), model.model.encoder.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name][: len(tensor)]), name


def test_a_longer_text_keeps_its_positions_and_a_shorter_one_the_first(tmp_path):
    model, _ = dual_encoder("CLIP")
    model.save_pretrained(tmp_path)
    old = model.text_model.embeddings.position_embedding.weight
    for length in (6, 12):
        text = build("CLIPText", TEXT | {"max_position_embeddings": length})
        own = text.embeddings.position_embedding.weight.detach().clone()
        table, _ = start(Half("text", tower(text, linear()), None, {}), tmp_path)
        assert table.counts()["resampled"] == 1
        found = text.embeddings.position_embedding.weight
        kept = min(length, 8)
        assert torch.equal(found[:kept], old[:kept])
        assert torch.equal(found[kept:], own[kept:])


def test_a_model_with_a_head_starts_a_tower_without_it(tmp_path):
    """Reads a file that names the encoder "bert", and norms gamma and beta as old ones do."""
    settings = ROBERTA | {"pad_token_id": 0}
    model = randomize(transformers.BertForMaskedLM(transformers.BertConfig(**settings)))
    state = model.state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    }
    torch.save(old, tmp_path / "bert.bin")
    own = tower(build("Bert", settings), linear())
    half = Half("text", own, None, {})
    with pytest.raises(ConfigError, match=r"expect_missing: \[.*\], ignore: \[\"cls"):
        start(half, tmp_path / "bert.bin")
    named = {"expect_missing": ["projection.*", "*pooler*"], "ignore": ["cls.*"]}
    start(half, tmp_path / "bert.bin", **named)
    for name, tensor in own.backbone.backbone.state_dict().items():
        if "pooler" not in name:
            assert torch.equal(tensor, state[f"bert.{name}"]), name


def test_laion_clap_embeds_as_its_own_code_did():
    expected = laion.read_outputs()
    halves = [
        Half("audio", tower(build("ClapAudio", laion.AUDIO), mlp()), expected["mel"], {}),
        Half("text", tower(build("ClapText", laion.TEXT), mlp(), masked=True), expected["ids"], {}),
    ]
    ignore = {
        "audio": [
            "*.spectrogram_extractor.*",
            "*.melW",
            "*.attn_mask",
            "*.tscam_conv.*",
            "*.head.*",
        ],
        "text": [],
    }
    for half in halves:
        named = {"ignore": ["*_transform.*", *ignore[half.kind]]}
        table, layout = start(half, laion.CHECKPOINT, **named)
        assert table.counts()["missing"] == 0
        found = normalize(half.tower(half.inputs), dim=-1)
        torch.testing.assert_close(found, expected[half.kind], atol=1e-5, rtol=0)
        (found * expected[f"{half.kind}_direction"]).sum().backward()
        parameters = dict(half.tower.named_parameters())
        compared = [row for row in table.rows if row.tower and f"gradient.{row.source}" in expected]
        for row in compared:
            wanted, gradient = expected[f"gradient.{row.source}"], parameters[row.tower].grad
            if ".qkv." in row.source:  # one row for each third
                part = ("query", "key", "value").index(row.tower.split(".")[-2])
                wanted = wanted.chunk(3)[part]
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(gradient / scale, wanted / scale, atol=1e-5, rtol=0)
        assert len(compared) >= 4
    assert {n: t.item() for n, t in layout.temperatures.items()}["logit_scale_a"] == 3.0


def test_laion_claps_filters_are_compared_with_those_of_the_tower():
    tensors = find_source(str(laion.CHECKPOINT), where="").read()
    bank = {"fft_samples": 64, "hop_samples": 32, "num_mel_bins": 16, "high_hz": 2000.0}
    bank |= {"mean_db": 0.0, "std_db": 1.0}

    def compare(**changes):
        section = AudioTransform(sample_rate_hz=4000, clip_seconds=1.0, log_mel=bank | changes)
        refuse_other_spectrogram(tensors, LogMelSpectrogram(section), where="x")

    compare()
    for changes in (
        {"mel_scale": "htk"},
        {"mel_norm": None},
        {"low_hz": 40.0},
        {"num_mel_bins": 8},
        {"fft_samples": 128},
        {"mean_db": -30.0},
        {"std_db": 20.0},
    ):
        with pytest.raises(ConfigError, match=r"x: expected the spectrogram that .*mean_db: 0"):
            compare(**changes)
    refuse_other_spectrogram(tensors, nn.Identity(), where="x")
    refuse_other_spectrogram({}, LogMelSpectrogram(AudioTransform()), where="x")


def test_every_tensor_of_laion_clap_is_accounted_for():
    stored = find_source(str(laion.CHECKPOINT), where="").read()
    half = Half("audio", tower(build("ClapAudio", laion.AUDIO), mlp()), None, {})
    with pytest.raises(ConfigError) as raised:
        start(half, laion.CHECKPOINT)
    advised = json.loads(str(raised.value).partition("ignore: ")[2])
    table, _ = start(half, laion.CHECKPOINT, ignore=advised)
    assert {name for row in table.rows for name in [row.source] if name} == set(stored)


def test_clip_moves_between_open_clip_and_transformers_and_back(tmp_path):
    """Compares each way with the other library's own computation, and the round trip exactly."""
    model, halves = dual_encoder("CLIP")
    model.save_pretrained(tmp_path / "transformers")
    image, text = open_clip_halves()
    for own, half in ((image, halves[0]), (text, halves[1])):
        table, _ = start(half._replace(tower=own), tmp_path / "transformers", library="open_clip")
        counts = table.counts()
        assert counts["unused"] == counts["missing"] == 0
        whole = getattr(model, f"get_{half.kind}_features")
        main = half.tower.backbone.backbone.main_input_name
        expected = whole(**{main: half.inputs}).pooler_output
        torch.testing.assert_close(own(half.inputs), expected, atol=1e-5, rtol=0)
    state = {f"visual.{n}": t for n, t in image.backbone.state_dict().items()}
    state |= {f"text.{n}": t for n, t in text.backbone.state_dict().items() if n != "attn_mask"}
    torch.save(state, tmp_path / "open_clip.pt")
    for half in halves:
        table, _ = start(half, tmp_path / "open_clip.pt")
        assert table.counts()["missing"] == table.counts()["unused"] == 0
    found = halves[0].tower.state_dict() | {
        "t." + n: t for n, t in halves[1].tower.state_dict().items()
    }
    own = {
        "projection.weight": model.visual_projection.weight,
        "t.projection.weight": model.text_projection.weight,
        **{f"backbone.backbone.{n}": t for n, t in model.vision_model.state_dict().items()},
        **{f"t.backbone.backbone.{n}": t for n, t in model.text_model.state_dict().items()},
    }
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_clips_image_tower_of_transformers_starts_one_of_timm(tmp_path):
    model, (half, _) = dual_encoder("CLIP")
    model.save_pretrained(tmp_path)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    name = "vit_base_patch32_clip_quickgelu_224"
    vit = timm.create_model(name, num_classes=0, mlp_ratio=1.0, **sizes)
    own = Tower(nn.Identity(), vit, linear(), drop_keys=TowerDropKeys()).eval()
    table, _ = start(half._replace(tower=own), tmp_path, library="timm")
    assert table.counts()["unused"] == table.counts()["missing"] == 0
    expected = model.get_image_features(pixel_values=half.inputs).pooler_output
    torch.testing.assert_close(own(half.inputs), expected, atol=1e-5, rtol=0)


def open_clip_halves():
    """Builds towers of open_clip with the sizes of the tiny CLIP, and its activation."""
    from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer

    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp_ratio": 1.0, "output_dim": EMBED_DIM}
    image = VisionTransformer(image_size=16, patch_size=8, act_layer=QuickGELU, **sizes)
    text = TextTransformer(
        context_length=8, vocab_size=50, act_layer=QuickGELU, pool_type="eos", eos_id=49, **sizes
    )
    return [
        Tower(nn.Identity(), each, nn.Identity(), drop_keys=TowerDropKeys()).eval()
        for each in (image, text)
    ]


def test_towers_without_a_counterpart_are_refused_with_the_library_to_use(tmp_path):
    model, (half, _) = dual_encoder("Siglip")
    model.save_pretrained(tmp_path)
    for library, advice in (("open_clip", "CLIP's towers"), ("timm", "CLIP's image tower")):
        with pytest.raises(InputError, match=advice):
            start(half, tmp_path, library=library)
