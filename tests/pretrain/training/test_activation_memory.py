"""Measured activations against torch's profiler, which traces the allocator itself."""

import pytest
import timm
import torch
from open_clip.transformer import TextTransformer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from data_prep.errors import InputError
from pretrain.data.batch import StreamLayout, ViewLayout
from pretrain.model.contrastive_model import ContrastiveModel, Tower
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.training.activation_memory import AllocationTrace, _inputs_of, measure_activations

CPU = torch.device("cpu")
PAIRS = StreamLayout(
    {
        "image": ViewLayout((64, 64, 3), torch.uint8),
        "text": ViewLayout((20,), torch.int64, has_lengths=True),
    }
)
NUM_PAIRS = 40


class Pixels(nn.Module):
    def forward(self, pixels):
        return pixels.float() / 255


def transformers(*, has_checkpointing=False):
    """Returns a timm ViT and open_clip's text transformer, with few parameters for their size."""
    vit = timm.create_model("test_vit", num_classes=0, img_size=64, patch_size=8)
    text = TextTransformer(
        vocab_size=300, context_length=20, width=64, heads=2, layers=4, output_dim=None
    )
    if has_checkpointing:
        vit.set_grad_checkpointing(True)
        text.set_grad_checkpointing(True)
    towers = {
        "image": Tower(Pixels(), vit, nn.Linear(vit.num_features, 32), drop_keys=TowerDropKeys()),
        "text": Tower(nn.Identity(), text, nn.Linear(64, 32), drop_keys=TowerDropKeys()),
    }
    return ContrastiveModel(towers, temperatures=["image-text"], initial_scale=10.0, seed=0)


def measured(model, *, is_bf16=False):
    layouts = {"image-text": PAIRS}
    return measure_activations(model, layouts, device=CPU, is_bf16=is_bf16)["image-text"]


def profiled_peak(model, num_rows, *, is_bf16=False):
    """Returns the peak of allocated bytes in a forward and backward pass."""
    inputs = _inputs_of("image-text", PAIRS, num_rows, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            features = model([inputs])
        parts = [*features.views["image-text"].values(), *features.scales.values()]
        sum(part.sum() for part in parts).backward()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return torch.tensor([num_bytes for _, num_bytes in changes]).cumsum(0).max().item()


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_a_few_pairs_foretell_the_memory_of_many(has_checkpointing, is_bf16):
    model = transformers(has_checkpointing=has_checkpointing)
    graph = measured(model, is_bf16=is_bf16)
    estimated = graph.fixed + NUM_PAIRS * graph.per_pair
    gradients = sum(4 * each.numel() for each in model.parameters())
    peak = profiled_peak(model, NUM_PAIRS, is_bf16=is_bf16)
    assert gradients < 0.2 * peak
    assert 0.98 * (peak - gradients) <= estimated <= 1.02 * peak


def test_activation_checkpointing_is_seen():
    assert measured(transformers(has_checkpointing=True)).per_pair < (
        0.5 * measured(transformers()).per_pair
    )


def test_a_frozen_tower_keeps_nothing():
    model = transformers()
    whole = measured(model).per_pair
    model.towers["image"].backbone.requires_grad_(False)
    assert measured(model).per_pair < 0.5 * whole


def test_measuring_leaves_no_trace():
    model = transformers()
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.towers["text"].backbone.transformer.register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.1)
    )
    measured(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(each.grad is None for each in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, parameters[name])


def test_a_trace_counts_what_lives_at_once():
    known = torch.zeros(1000)  # of 4000 bytes
    with AllocationTrace(CPU, [known]) as trace:
        twice = known * 2
        view = twice[:10].add_(1)  # nothing new
        known.view(10, 100).t()  # likewise
        del twice
        other = view.repeat(50)  # 2000 bytes, while the view holds 4000
        del view
        last = other + 1  # 2000 bytes, while the other holds 2000
    assert trace.live_bytes().tolist() == [4000, 6000, 4000]
    assert trace.live_bytes(without=[last]).tolist() == [4000, 6000, 2000]
    assert trace.live_bytes(without=[other, last]).tolist() == [4000, 4000, 0]


class AddsTwiceForMore(nn.Module):
    def forward(self, pixels):
        means = pixels.float().mean(dim=(2, 3))
        return means + 1 if len(pixels) == 2 else means + 1 + 1


def test_towers_whose_memory_is_not_linear_are_refused():
    model = transformers()
    model.towers["image"] = Tower(
        nn.Identity(), AddsTwiceForMore(), nn.Linear(3, 32), drop_keys=TowerDropKeys()
    )
    with pytest.raises(InputError, match=r"allocations for 4 as for 2 pairs of image-text, found"):
        measured(model)
