"""Small towers of all libraries: the probe's verdict is compared with short runs."""

import copy

import pytest
import timm
import torch
from torch import nn

from data_prep.errors import InputError
from pretrain.model.sample_dropout import scramble
from pretrain.model.tokenizer import build_tokenizer
from pretrain.probe.examples import token_rows
from pretrain.probe.towers import ProbeSettings, probe_model
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model, write_clip_tokenizer, write_tiny_open_clip

SAMPLES = 5
TRIMMED_TOKENS = 8
NUM_STEPS = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = SIZES | {"intermediate_size": 16, "vocab_size": 49408}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = BERT | {"num_key_value_heads": 2, "attention_dropout": 0.0}
VIT = SIZES | {"intermediate_size": 16, "image_size": 64, "patch_size": 16}
TEXTS = {
    ("open_clip", "TextTransformer"): {"width": 32, "heads": 2, "layers": 1},
    ("transformers", "albert"): BERT | NO_DROPOUT | {"embedding_size": 16},
    ("transformers", "bert"): BERT | NO_DROPOUT,
    ("transformers", "canine"): SIZES | {"intermediate_size": 16} | NO_DROPOUT,
    ("transformers", "electra"): BERT | NO_DROPOUT | {"embedding_size": 16},
    ("transformers", "fnet"): {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 49408,
        "hidden_dropout_prob": 0.1,
    },
    ("transformers", "gpt2"): SIZES | {"vocab_size": 49408, "attn_pdrop": 0.0},
    ("transformers", "ibert"): BERT | NO_DROPOUT,
    ("transformers", "llama"): DECODER,
    ("transformers", "mamba"): {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 49408},
    ("transformers", "mixtral"): DECODER | {"num_local_experts": 4},
    ("transformers", "mpnet"): BERT | NO_DROPOUT,
    ("transformers", "qwen3"): DECODER | {"head_dim": 8},
    ("transformers", "roberta"): BERT | NO_DROPOUT,
}
# Models that are refused when they are built -> reason.
REFUSED = {
    "test_byobnet": "BatchNorm",
    "test_coatnet": "BatchNorm",
    "test_efficientnet": "BatchNorm",
    "test_maxvit": "BatchNorm",
    "test_resnet": "BatchNorm",
    "test_vit_relpos": "drops from",
    "resnet": "BatchNorm",
    "vit_mae": "draws random numbers",
}
IMAGES = {
    **{
        ("timm", name): {"img_size": 64} if name.startswith("test_vit") else {}
        for name in timm.list_models("test_*")
    },
    ("timm", "test_vit drop"): {"img_size": 64, "drop_path_rate": 0.3, "proj_drop_rate": 0.2},
    **{
        ("timm", f"test_efficientnet {norm}"): {"norm_layer": norm}
        for norm in ("evonormb0", "evonormb1", "evonormb2", "groupnorm1")
    },
    ("open_clip", "tiny"): {"force_image_size": 64},
    ("transformers", "beit"): VIT | NO_DROPOUT,
    ("transformers", "dinov2"): SIZES | {"image_size": 64, "patch_size": 16, "drop_path_rate": 0.3},
    ("transformers", "hiera"): {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1]},
    ("transformers", "resnet"): {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8]},
    ("transformers", "vit"): VIT,
    ("transformers", "vit_mae"): VIT,
}
# Norms over the batch, which are no subclass of torch's batch norm.
MIXING = ("evonormb0", "evonormb1", "evonormb2")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


def build(folder, kind, **tower):
    config = toy_config(folder, folder / "run", image={"size": 64}, model={kind: tower})
    tokenizer = build_tokenizer(config.model.text)
    return config, tokenizer, build_toy_model(config, tokenizer).train()


def probe(config, tokenizer, model, kind):
    return probe_model(
        model,
        tokenizer=tokenizer,
        image=config.image,
        audio=config.audio,
        settings=ProbeSettings(torch.device("cpu")),
        names=[kind],
    )


def way_apart(model, kind, inputs, *, length=None):
    """Returns the distance of two short runs, relative to the way that they go.

    One run encodes whole batches, the other one micro-batches of 1 and 4 samples, whose captions
    are cut to `length`.
    """
    whole, split = copy.deepcopy(model.towers[kind]), copy.deepcopy(model.towers[kind])
    start = [p.detach().clone() for p in whole.parameters()]
    weights = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(0))
    for tower, sizes in ((whole, [SAMPLES]), (split, [1, SAMPLES - 1])):
        optimizer = torch.optim.SGD(
            [p for p in tower.parameters() if p.requires_grad], lr=1e-3, momentum=0.9
        )
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            for rows in torch.arange(SAMPLES).split(sizes):
                examples = inputs[rows] if len(sizes) == 1 else inputs[rows][:, :length]
                keys = scramble(rows + 100 * step)
                features = nn.functional.normalize(tower(examples, keys=keys), dim=-1)
                (features * weights[rows]).sum().backward()
            optimizer.step()
    ends = [[p.detach() for p in tower.parameters()] for tower in (whole, split)]
    distance, way = (
        torch.cat([(a - b).flatten() for a, b in zip(one, other, strict=True)]).norm()
        for one, other in ((ends[0], ends[1]), (ends[0], start))
    )
    return float(distance / way)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), IMAGES)
def test_the_verdict_on_an_image_tower_is_that_of_short_runs(tmp_path, library, name):
    options = IMAGES[library, name]
    if library == "open_clip":
        write_tiny_open_clip(tmp_path)
    tower = {"library": library, "name": name.split()[0], "options": options}
    if name in REFUSED:
        with pytest.raises(InputError, match=rf"model\.image: layer \S+ .*{REFUSED[name]}"):
            build(tmp_path, "image", **tower)
        return
    built = build(tmp_path, "image", **tower)
    pixels = torch.randint(0, 256, (SAMPLES, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    apart = way_apart(built[-1], "image", pixels.to(torch.uint8))
    if name.split()[-1] in MIXING:
        assert apart > 1e-2
        with pytest.raises(InputError, match=r"model\.image: layer \S+ \(EvoNorm2dB\d\) mixes"):
            probe(*built, "image")
    else:
        probe(*built, "image")
        assert apart < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), TEXTS)
def test_the_verdict_on_a_text_tower_is_that_of_short_runs(
    tmp_path, tokenizer_folder, library, name
):
    text = {"library": library, "name": name, "options": TEXTS[library, name]}
    text |= {"context_length": 24, "tokenizer": str(tokenizer_folder)}
    config, tokenizer, model = build(tmp_path, "text", **text)
    tokens = token_rows(tokenizer, [8, 5, 8, 2, 7])
    if name == "ibert":
        with pytest.raises(InputError, match=r"buffer \S+ changes with every call"):
            probe(config, tokenizer, model, "text")
        return
    takes_trimmed = probe(config, tokenizer, model, "text")
    length = TRIMMED_TOKENS if takes_trimmed else None
    assert way_apart(model, "text", tokens, length=length) < 1e-3
    if name in ("fnet", "canine"):
        assert way_apart(model, "text", tokens, length=TRIMMED_TOKENS) > 1e-2
