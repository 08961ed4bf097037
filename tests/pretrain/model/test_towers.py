import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from data_prep.errors import InputError
from pretrain.model.tokenizer import Tokenizer, build_tokenizer
from pretrain.model.towers import (
    REFUSED_OPTIONS,
    build_media_backbone,
    build_text_backbone,
    probe_backbone,
    refuse_quantized_weights,
)
from tests.support.gloo_processes import run_in_processes
from tests.support.toy_run import toy_config
from tests.support.toy_towers import (
    TINY_BERT,
    build_toy_model,
    write_clip_tokenizer,
    write_tiny_open_clip,
)

TINY_VIT = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TINY_AST = {
    "max_length": 26,
    "num_mel_bins": 16,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def config_with(tmp_path):
    """A toy config with some towers replaced."""

    def build(**towers):
        config = toy_config(tmp_path, tmp_path / "run")
        model = config.model.model_dump(mode="json")
        for kind, tower in towers.items():
            model[kind] = (model[kind] if kind == "text" else {}) | tower
        return toy_config(tmp_path, tmp_path / "run", model=model)

    return build


def build(config):
    return build_toy_model(config)


@pytest.mark.parametrize(
    "towers",
    [
        {},
        {"image": {"library": "transformers", "name": "vit", "options": TINY_VIT}},
        {
            "audio": {
                "library": "transformers",
                "name": "audio-spectrogram-transformer",
                "options": TINY_AST,
            }
        },
    ],
    ids=["timm", "transformers image", "transformers audio"],
)
def test_towers_give_normalised_embeddings(config_with, towers):
    model = build(config_with(**towers)).eval()
    for embeddings in (
        model.encode_image(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)),
        model.encode_audio(torch.randn(2, 1600)),
        model.encode_text(torch.randint(1, 400, (2, 12))),
    ):
        assert embeddings.shape == (2, 16)
        assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2), atol=1e-5)
    # A rank may hold no pair of a micro-batch; its parameters still take part.
    pixels, waveforms = torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 1600)
    tokens = torch.zeros(0, 12, dtype=torch.int64)
    empty = [model.encode_image(pixels), model.encode_audio(waveforms), model.encode_text(tokens)]
    assert [embeddings.shape for embeddings in empty] == [(0, 16)] * 3
    sum(embeddings.sum() for embeddings in empty).backward()
    towers = [p for p in model.towers.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in towers)


def test_open_clips_models_keep_their_own_joint_space(config_with):
    resnet = {"library": "open_clip", "name": "RN50", "frozen": True}
    config = config_with(image=resnet)
    large = config.model_copy(update={"image": config.image.model_copy(update={"size": 224})})
    with pytest.raises(InputError, match="ends in a joint space of 1024; set embed_dim to 1024"):
        build(large)
    model = large.model.model_copy(update={"embed_dim": 1024})
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    tower = build(large.model_copy(update={"model": model})).eval().towers["image"]
    with torch.no_grad():
        assert torch.equal(tower(pixels), tower.backbone(tower.input_stage(pixels)))


def test_a_transformers_text_tower_ignores_padding(config_with, tmp_path):
    tokenizer_folder = write_clip_tokenizer(tmp_path / "tokenizer")
    config = config_with(
        text={
            "library": "transformers",
            "name": "bert",
            "options": TINY_BERT,
            "tokenizer": str(tokenizer_folder),
        }
    )
    tokenizer = build_tokenizer(config.model.text)
    model = build_toy_model(config, tokenizer).eval()
    tokens = tokenizer(["a red circle", "a dog"])
    assert tokens.shape == (2, 12)
    longer = torch.cat([tokens, torch.full((2, 5), tokenizer.pad_id)], dim=1)
    torch.testing.assert_close(model.encode_text(tokens), model.encode_text(longer))
    # The features do not use BERT's own pooling layer: no engine waits for its gradient.
    model.encode_text(tokens).sum().backward()
    assert all(p.grad is not None for p in model.towers["text"].parameters() if p.requires_grad)


def test_initial_weights_depend_on_the_seed_alone(config_with):
    states = [build(config_with()).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = build(config_with().model_copy(update={"seed": 1})).state_dict()
    assert not torch.equal(
        states[0]["towers.text.projection.weight"], other["towers.text.projection.weight"]
    )


def test_pretrained_towers_load_from_files(config_with, tmp_path):
    """Tests each library with weights saved to disk; nothing is downloaded."""
    import timm
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    timm_model = timm.create_model("test_convnext", num_classes=0, patch_size=1)
    save_file(timm_model.state_dict(), tmp_path / "timm.safetensors")
    options = {"patch_size": 1}
    tower = {"library": "timm", "name": "test_convnext", "options": options}
    config = config_with(image=tower | {"pretrained": str(tmp_path / "timm.safetensors")})
    assert_same_weights(build(config).towers["image"].backbone, timm_model)

    transformers_model = AutoModel.from_config(AutoConfig.for_model("vit", **TINY_VIT))
    transformers_model.save_pretrained(tmp_path / "vit")
    tower = {"library": "transformers", "name": str(tmp_path / "vit"), "pretrained": True}
    loaded = build(config_with(image=tower)).towers["image"].backbone.backbone
    assert_same_weights(loaded, transformers_model)

    clip = write_tiny_open_clip(tmp_path)
    tower = {"library": "open_clip", "name": "tiny", "pretrained": str(tmp_path / "clip.pt")}
    model = build(config_with(image=tower, text=tower | {"options": {}}))
    assert_same_weights(model.towers["image"].backbone, clip.visual)
    assert_same_weights(model.towers["text"].backbone, clip.text)


@pytest.mark.parametrize(
    ("dtype", "is_frozen"),
    [
        (torch.bfloat16, False),
        *(
            pytest.param(dtype, is_frozen, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float16, torch.float64)
            for is_frozen in (False, True)
            if (dtype, is_frozen) != (torch.bfloat16, False)
        ),
    ],
)
def test_weights_saved_in_any_precision_become_float32(config_with, tmp_path, dtype, is_frozen):
    import timm
    from safetensors.torch import save_file

    timm_model = timm.create_model("test_convnext", num_classes=0, patch_size=1).to(dtype)
    save_file(timm_model.state_dict(), tmp_path / "timm.safetensors")
    clip = write_tiny_open_clip(tmp_path).to(dtype)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    bert = write_bert(tmp_path / "bert", dtype=dtype)
    shared = {"frozen": is_frozen}
    timm_tower = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
    clip_tower = {"library": "open_clip", "name": "tiny", "pretrained": str(tmp_path / "clip.pt")}
    model = build(
        config_with(
            audio=shared | timm_tower,
            image=shared | timm_tower | {"pretrained": str(tmp_path / "timm.safetensors")},
            text=shared | bert_tower(tmp_path),
        )
    )
    with_clip = build(config_with(image=shared | clip_tower, text=shared | clip_text(clip_tower)))
    for towers in (model.towers, with_clip.towers):
        tensors = [*towers.parameters(), *towers.buffers()]
        assert {each.dtype for each in tensors if each.is_floating_point()} == {torch.float32}
    assert_same_weights(model.towers["image"].backbone, timm_model.float())
    assert_same_weights(model.towers["text"].backbone.backbone, bert.float())
    assert_same_weights(with_clip.towers["image"].backbone, clip.visual.float())
    assert_same_weights(with_clip.towers["text"].backbone, clip.text.float())


def clip_text(tower):
    return tower | {"options": {}}


def write_bert(folder, *, dtype):
    """Saves a BERT in a folder with weights of a type, and returns it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **TINY_BERT)).to(dtype)
    bert.save_pretrained(folder)
    return bert


def bert_tower(folder):
    return {
        "library": "transformers",
        "name": str(folder / "bert"),
        "pretrained": True,
        "options": {},
        "tokenizer": str(write_clip_tokenizer(folder / "tokenizer")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_does_not_depend_on_the_precision_of_saved_weights(toy_data, tmp_path, precision):
    """Compares all parameters and moments to the bit, and their type."""
    bert = write_bert(tmp_path / "bert", dtype=torch.bfloat16)
    bert.float().save_pretrained(tmp_path / "bert_float32")
    tower = bert_tower(tmp_path) | {"context_length": 12}
    states = []
    for name in ("bert", "bert_float32"):
        text = tower | {"name": str(tmp_path / name)}
        folder = tmp_path / f"run_{name}"
        config = toy_config(
            toy_data,
            folder,
            model={"text": text},
            engine={"precision": precision},
            schedule={"num_steps": 2, "warmup_steps": 1},
        )
        run_in_processes(1, train, config)
        files = sorted((folder / "checkpoints/step_00000002").glob("*-of-00001.safetensors"))
        states.append({key: value for path in files for key, value in load_file(path).items()})
    assert {key.partition("/")[0] for key in states[0]} == {"parameter", "exp_avg", "exp_avg_sq"}
    assert states[0].keys() == states[1].keys()
    for key, values in states[0].items():
        assert values.dtype == torch.float32, key
        assert torch.equal(values, states[1][key]), key


def train(config):
    from pretrain.train import pretrain

    pretrain(config)


@pytest.mark.parametrize("kind", ["image", "audio", "text"])
@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_options_that_the_config_decides_are_refused_by_name(config_with, kind, name):
    library = {"library": "transformers", "name": "vit" if kind == "image" else "bert"}
    for options in ({name: "bfloat16"}, {"text_config": {name: "bfloat16"}}):
        config = config_with(**{kind: library | {"options": options}})
        message = rf"model\.{kind}: expected no option '{name}', found 'bfloat16': .*(engine|load)"
        with pytest.raises(InputError, match=message):
            build_backbone(config, kind)


def build_backbone(config, kind):
    if kind == "text":
        tokenizer = Tokenizer(None, context_length=12, pad_id=0, vocab_size=49408)
        return build_text_backbone(config.model.text, tokenizer=tokenizer)
    return build_media_backbone(getattr(config.model, kind), kind=kind)


def test_quantized_weights_are_refused():
    backbone = nn.Linear(2, 2)
    backbone.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"model\.image: .* found torch\.uint8 in weight"):
        refuse_quantized_weights(backbone, "model.image")


def assert_same_weights(module, expected):
    state = module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())


def test_batch_norm_in_a_trained_tower_is_refused_and_frozen_is_accepted(config_with):
    resnet = {"library": "timm", "name": "test_resnet"}
    with pytest.raises(InputError, match=r"model\.image: layer .* is a BatchNorm.*frozen: true"):
        build(config_with(image=resnet))
    model = build(config_with(image=resnet | {"frozen": True})).train()
    assert not model.towers["image"].backbone.training
    assert model.towers["text"].backbone.training
    trained = [name for name, p in model.towers["image"].named_parameters() if p.requires_grad]
    assert trained == ["projection.weight"]


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"library": "timm", "name": "test_convnexx"}, "timm cannot build 'test_convnexx'"),
        (
            {"library": "timm", "name": "test_convnext", "options": {"patch_size": 2}},
            r"cannot encode input \[1, 3, 16, 16\]",
        ),
        ({"library": "open_clip", "name": "ViT-Z"}, "open_clip has no model 'ViT-Z'"),
        (
            {"library": "open_clip", "name": "ViT-B-32", "pretrained": True},
            "does not name the weights",
        ),
        ({"library": "transformers", "name": "no-such"}, "transformers cannot build 'no-such'"),
    ],
)
def test_a_tower_that_cannot_be_built_says_why(config_with, tower, message):
    with pytest.raises(InputError, match=message):
        build(config_with(image=tower))


def raising(error):
    def raise_error(*_, **__):
        raise error

    return raise_error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("hidden"), "KeyError: 'hidden'"),
        (AttributeError("no shape"), "AttributeError: no shape"),
        (IndexError(), "IndexError"),
        (pickle.UnpicklingError("weights only"), "weights only"),
        (StrictDataclassError("two\n  lines"), "two lines"),
        (ImportError("pip install sentencepiece"), "pip install sentencepiece"),
        (
            ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"),
            "No module named 'tiktoken'; install the package that provides tiktoken",
        ),
        (NotImplementedError("x" * 1000), "x" * 400 + "..."),
        (ZeroDivisionError("division by zero"), "division by zero"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_of_a_library_names_the_tower(config_with, monkeypatch, error, reason):
    monkeypatch.setattr("timm.create_model", raising(error))
    config = config_with(image={"library": "timm", "name": "any", "options": {"size": 3}})
    with pytest.raises(InputError) as raised:
        build_backbone(config, "image")
    expected = f"model.image: timm cannot build 'any' with options {{'size': 3}}: {reason}"
    assert str(raised.value).startswith(expected)


def test_a_tower_that_returns_no_single_tensor_is_refused():
    backbone = ReturnsTwo()
    with pytest.raises(InputError, match=r"model\.image: expected features \[B, W\] .* a tuple"):
        probe_backbone(backbone, torch.zeros(2, 3), where="model.image")


class ReturnsTwo(nn.Module):
    """A tower like CoCa's, which returns pooled features and tokens."""

    def forward(self, inputs):
        return inputs, inputs


def tiny_text_tower(library, vocab_size, *, tokenizer):
    name, options = {
        "open_clip": ("TextTransformer", {"width": 32, "heads": 2, "layers": 1}),
        "transformers": ("bert", TINY_BERT),
    }[library]
    options = options | {"vocab_size": vocab_size}
    return {"library": library, "name": name, "options": options, "tokenizer": str(tokenizer)}


def test_a_vocabulary_below_the_largest_token_id_is_refused(config_with, tmp_path, monkeypatch):
    """Tests a tokenizer with an added token, which its attribute vocab_size does not count."""
    folder = write_clip_tokenizer(tmp_path / "tokenizer")
    backend = AutoTokenizer.from_pretrained(folder)
    backend.add_tokens(["isopair"])
    assert backend.vocab_size == 49408
    assert backend("isopair")["input_ids"][1] == 49408
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: backend)
    for library in ("open_clip", "transformers"):
        for vocab_size in (100, 49408):
            message = (
                rf"model\.text: the tower has embeddings of {vocab_size} tokens, but the largest "
                r"token id of the tokenizer is 49408; .* options: \{vocab_size: 49409\}"
            )
            with pytest.raises(InputError, match=message):
                build_text(config_with(text=tiny_text_tower(library, vocab_size, tokenizer=folder)))
        build_text(config_with(text=tiny_text_tower(library, 49409, tokenizer=folder)))
    # Ids of added tokens may leave gaps.
    vocabulary = backend.get_vocab() | {"gap": 50000}
    monkeypatch.setattr(backend, "get_vocab", lambda: vocabulary)
    tokenizer = build_tokenizer(
        config_with(text=tiny_text_tower("open_clip", 49408, tokenizer=folder)).model.text
    )
    assert (tokenizer.largest_id, tokenizer.vocab_size) == (50000, 50001)


def build_text(config):
    tokenizer = build_tokenizer(config.model.text)
    return build_text_backbone(config.model.text, tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_be_read_says_why(config_with, tmp_path):
    """Tests errors that are neither OSError nor ValueError."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    tower = tiny_text_tower("transformers", 49408, tokenizer=tmp_path)
    with pytest.raises(InputError, match=r"model\.text\.tokenizer: expected .* AttributeError: "):
        build_tokenizer(config_with(text=tower).model.text)


def test_an_open_clip_model_made_for_another_tokenizer_asks_for_it(config_with):
    config = config_with(text={"library": "open_clip", "name": "xlm-roberta-base-ViT-B-32"})
    with pytest.raises(InputError, match=r"needs the tokenizer 'xlm-roberta-base'"):
        build_tokenizer(config.model.text)


def test_open_clip_has_no_audio_towers(config_with):
    with pytest.raises(InputError, match=r"model\.audio: open_clip has no audio towers"):
        build(config_with(audio={"library": "open_clip", "name": "ViT-B-32"}))
