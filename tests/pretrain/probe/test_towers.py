"""The probe accepts towers that encode each sample alone, and names the layer of any other."""

import logging
import threading

import pytest
import torch
from timm.layers import EvoNorm2dB0, EvoNorm2dS0
from torch import nn

from data_prep.errors import InputError
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.model.tokenizer import build_tokenizer
from pretrain.probe.backbone_copy import ProbedBackbone
from pretrain.probe.towers import ProbeSettings, probe_model, probe_tower
from pretrain.run.model_sources import ModelSources
from pretrain.training.assembly import build_training_model
from tests.support.toy_run import toy_config
from tests.support.toy_towers import build_toy_model

CPU = torch.device("cpu")
FP32 = ProbeSettings(CPU)
BF16 = ProbeSettings(CPU, is_bf16=True)
CHECKPOINTED = ProbeSettings(CPU, is_checkpointed=True)


class Function(nn.Module):
    """A layer without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, rows):
        return self.function(rows)


class Backbone(nn.Module):
    """Encodes [B, 4, 6] to [B, 8] with a layer in the middle."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.layer = layer
        self.last = nn.Linear(24, 8)

    def forward(self, rows):
        return self.last(self.layer(self.first(rows)).flatten(1))


def probe(layer, settings=FP32, *, is_trained=True):
    backbone = Backbone(layer)
    drop_keys = replace_drop_layers(backbone, kind="image") if is_trained else TowerDropKeys()
    probed = ProbedBackbone(backbone, drop_keys, "model.image", is_trained)
    examples = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    probe_tower(probed, examples, settings=settings)


class ChangesInput(Backbone):
    """Scales its input in place."""

    def forward(self, rows):
        return super().forward(rows.mul_(2))


def test_a_tower_that_changes_its_input_in_place_is_accepted():
    probed = ProbedBackbone(ChangesInput(nn.Identity()), TowerDropKeys(), "model.image", True)
    examples = torch.ones(3, 4, 6)
    probe_tower(probed, examples, settings=BF16)
    assert (examples == 1).all()


def as_image(norm):
    """Applies a norm of images [B, C, H, W] to [B, 4, 6]."""
    return nn.Sequential(nn.Unflatten(2, (2, 3)), norm, nn.Flatten(2))


MIXING = {
    "mean": lambda rows: rows - rows.mean(dim=0, keepdim=True),
    "variance": lambda rows: rows / (1 + rows.var(dim=(0, 2), keepdim=True, correction=0)),
    "softmax": lambda rows: rows.softmax(dim=0),
    "largest": lambda rows: rows / rows.abs().amax().clamp(min=1e-3),
    "sample before": lambda rows: rows + rows.roll(1, dims=0),
    "sample after": lambda rows: rows + rows.roll(-1, dims=0),
    "all before": lambda rows: rows.cumsum(dim=0),
    "order": lambda rows: rows.sort(dim=0).values,
    "one percent": lambda rows: rows + 0.01 * rows.mean(dim=0, keepdim=True),
    "one millionth": lambda rows: rows + 1e-6 * rows.mean(dim=0, keepdim=True),
    "flattened": lambda rows: rows.flatten().softmax(dim=0).view_as(rows),
    "size of the batch": lambda rows: rows * len(rows),
}


@pytest.mark.parametrize("settings", [FP32, BF16, CHECKPOINTED], ids=["fp32", "bf16", "blocks"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", MIXING)
def test_a_layer_that_mixes_samples_is_refused_by_name(name, is_trained, settings):
    message = r"model\.image: layer layer \(Function\) mixes samples in .* mode: a sample alone"
    with pytest.raises(InputError, match=message):
        probe(Function(MIXING[name]), settings, is_trained=is_trained)


ALONE = {
    "nothing": nn.Identity,
    "linear": lambda: nn.Linear(6, 6),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm1d(4),
    "evonorm of samples": lambda: as_image(EvoNorm2dS0(4, group_size=2)),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 6), nn.Dropout(0.2)),
    "half precision": lambda: Function(lambda rows: rows.half().to(rows.dtype)),
    "no double": lambda: Function(refuse_float64),
}


def refuse_float64(rows):
    if rows.dtype == torch.float64:
        raise NotImplementedError("no kernel for Double")
    return 2 * rows


@pytest.mark.parametrize("settings", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ALONE)
def test_a_layer_that_encodes_each_sample_alone_is_accepted(name, is_trained, settings):
    probe(ALONE[name](), settings, is_trained=is_trained)


@pytest.mark.parametrize("settings", [FP32, BF16], ids=["fp32", "bf16"])
def test_mixing_is_also_found_where_float64_fails(settings):
    layer = nn.Sequential(Function(refuse_float64), Function(MIXING["mean"]))
    with pytest.raises(InputError, match=r"layer layer\.1 \(Function\) mixes samples"):
        probe(layer, settings)


@pytest.mark.parametrize("settings", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_large_tower_is_compared_in_the_precision_of_the_run(monkeypatch, settings):
    monkeypatch.setattr("pretrain.probe.towers.MAX_FLOAT64_PARAMETERS", 10)
    for name in ("mean", "sample before", "sample after", "order"):
        with pytest.raises(InputError, match=r"layer layer \(Function\) mixes samples"):
            probe(Function(MIXING[name]), settings)
    for build in ALONE.values():
        probe(build(), settings)


@pytest.mark.parametrize("norm", [EvoNorm2dB0, nn.BatchNorm2d])
def test_a_norm_over_the_batch_is_refused_in_trained_towers_alone(norm):
    with pytest.raises(
        InputError, match=rf"layer layer\.1 \({norm.__name__}\) mixes samples in tr"
    ):
        probe(as_image(norm(4)))
    probe(as_image(norm(4)), is_trained=False)


def test_mixing_behind_a_layer_that_is_almost_zero_is_found():
    """Tests LayerScale, whose first values hide the layers before it."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = Function(MIXING["mean"])
            self.scale = nn.Parameter(torch.full((6,), 1e-12))

        def forward(self, rows):
            return rows + self.scale * self.mixing(rows)

    with pytest.raises(InputError, match=r"layer layer\.mixing \(Function\) mixes samples"):
        probe(Residual())


class ScaledGradient(torch.autograd.Function):
    """Passes its input on and divides the gradient by the size of the batch."""

    @staticmethod
    def forward(ctx, rows):
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / len(gradient)


def test_a_gradient_that_depends_on_the_batch_is_refused():
    message = r"the gradient of parameter first\.\w+ mixes samples in training mode"
    with pytest.raises(InputError, match=message):
        probe(Function(ScaledGradient.apply))


class Experts(nn.Module):
    """A mixture of experts; a number of the sample chooses one of them."""

    def __init__(self, num_experts):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(num_experts))

    def forward(self, rows):
        chosen = (rows[:, 0, 0].abs() * 1000).long() % len(self.experts)
        outputs = [self.experts[number](row) for number, row in zip(chosen, rows, strict=True)]
        return torch.stack(outputs)


def test_a_parameter_that_only_some_samples_use_is_refused():
    with pytest.raises(InputError, match=r"parameter layer\.experts\.\d+\.\w+ is used by some"):
        probe(Experts(50))
    probe(Experts(50), is_trained=False)
    probe(Experts(1))


def test_a_buffer_that_changes_with_every_call_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("num_calls", torch.zeros(1))

        def forward(self, rows):
            self.num_calls += self.training
            return rows

    with pytest.raises(InputError, match=r"buffer layer\.num_calls changes with every call in tr"):
        probe(Counting())
    probe(Counting(), is_trained=False)


def test_a_layer_that_fails_in_the_precision_of_the_run_is_named():
    def refuse_bf16(rows):
        if rows.dtype == torch.bfloat16:
            raise NotImplementedError("no kernel for BFloat16")
        return rows

    layer = Function(lambda rows: refuse_bf16(nn.functional.linear(rows, rows.new_ones(6, 6))))
    probe(layer)
    message = (
        r"model\.image: layer layer cannot encode input \[3, 4, 6\] in training mode with "
        r"engine\.precision=bf16: no kernel for BFloat16"
    )
    with pytest.raises(InputError, match=message):
        probe(layer, BF16)


class Block(nn.Module):
    """A block whose output may depend on how often it was called."""

    def __init__(self, *, is_stateful):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.calls = []
        self.is_stateful = is_stateful

    def forward(self, rows):
        factor = 1.0
        if self.is_stateful and torch.is_grad_enabled():
            self.calls.append(None)
            factor = 1.0 + (len(self.calls) > 2)
        return self.inner(rows * factor)


def test_blocks_that_are_not_recomputed_alike_are_refused():
    probe(nn.Sequential(Block(is_stateful=False), Block(is_stateful=False)), CHECKPOINTED)
    message = r"if blocks recompute their activations, .* set engine\.activation_checkpointing to"
    with pytest.raises(InputError, match=message):
        probe(nn.Sequential(Block(is_stateful=True), Block(is_stateful=True)), CHECKPOINTED)
    with pytest.raises(InputError, match=r"activation_checkpointing: model\.image .* no list of"):
        probe(nn.Linear(6, 6), CHECKPOINTED)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="the backbone's features are not finite in training mode"):
        probe(Function(lambda rows: rows / 0))
    with pytest.raises(InputError, match=r"the gradient of first\.\w+ is not finite in training"):
        probe(Function(lambda rows: (rows * 0).sqrt()))


class Locked(nn.Identity):
    """A layer that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def raise_out_of_memory(rows):
    raise torch.OutOfMemoryError("device full\nmore")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Function(raise_out_of_memory), "device full"),
        (Locked(), "Backbone cannot be copied: cannot pickle"),
    ],
    ids=["memory", "copy"],
)
def test_a_tower_that_cannot_be_probed_is_reported(layer, reason, caplog):
    with caplog.at_level(logging.WARNING):
        probe(layer)
    [record] = caplog.records
    assert f"model.image: not checked for layers that mix samples: {reason}" in record.message


# --------------------------------------------------------------------------------------- models


def toy_model(folder, **towers):
    base = toy_config(folder, folder / "run").model.model_dump(mode="json")
    model = {kind: base[kind] | tower for kind, tower in towers.items()}
    config = toy_config(folder, folder / "run", model=model)
    tokenizer = build_tokenizer(config.model.text)
    return config, tokenizer, build_toy_model(config, tokenizer)


def probe_toy_model(config, tokenizer, model, **settings):
    return probe_model(
        model,
        tokenizer=tokenizer,
        image=config.image,
        audio=config.audio,
        settings=FP32,
        **settings,
    )


@pytest.mark.parametrize("is_training", [True, False])
def test_the_probe_changes_nothing(tmp_path, is_training):
    config, tokenizer, model = toy_model(tmp_path)
    model.train(is_training)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [each.training for each in model.modules()]
    assert probe_toy_model(config, tokenizer, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [each.training for each in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(each.grad is None for each in model.parameters())


def test_a_token_that_the_tower_does_not_know_is_refused(tmp_path):
    config, tokenizer, model = toy_model(tmp_path)
    table = model.towers["text"].backbone.token_embedding
    table.weight = nn.Parameter(table.weight[:49407].detach())
    message = (
        r"model\.text: layer token_embedding cannot encode input \[1, 12\] with token ids up to"
    )
    with pytest.raises(InputError, match=message):
        probe_toy_model(config, tokenizer, model)


def test_captions_are_trimmed_only_if_it_changes_nothing(tmp_path):
    """Tests a tower that claims to take trimmed captions, and attends to padding."""
    options = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408, "no_causal_mask": True}
    config, tokenizer, model = toy_model(tmp_path, text={"options": options})
    model.takes_trimmed_captions = True
    assert not probe_toy_model(config, tokenizer, model, names=["text"])


def test_a_run_refuses_a_tower_that_mixes_samples(tmp_path):
    image = {"name": "test_efficientnet", "options": {"norm_layer": "evonormb0"}}
    model = toy_config(tmp_path, tmp_path / "run").model.model_dump(mode="json")
    model["image"] |= image
    config = toy_config(tmp_path, tmp_path / "run", model=model, image={"size": 64})
    with pytest.raises(InputError, match=r"model\.image: layer bn1 \(EvoNorm2dB0\) mixes samples"):
        build_training_model(ModelSources(config), build_tokenizer(config.model.text))
    model["image"]["frozen"] = True
    config = toy_config(tmp_path, tmp_path / "run", model=model, image={"size": 64})
    build_training_model(ModelSources(config), build_tokenizer(config.model.text))
