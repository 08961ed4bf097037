"""Without the compiler's code generator, which takes minutes and whose rounding is its own."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pretrain.model.activation_checkpointing import checkpoint_blocks
from pretrain.model.contrastive_model import Tower
from pretrain.model.sample_dropout import (
    Draws,
    SampleDropout,
    SampleDropPath,
    SamplePatchDropout,
    TowerDraws,
    pair_keys,
)
from pretrain.model.tower_compilation import compile_towers
from tests.support.toy_droppers import NUM_PAIRS, Pairs, dropping_config, largest_difference


@pytest.fixture
def num_compilations(monkeypatch):
    """A function that says how many graphs were compiled since the test began."""
    # pytest would have every record of the compiler's trace, which is what takes its time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """With the config of the model that they are for."""
    config = dropping_config(tmp_path_factory.mktemp("droppers"))
    pairs = Pairs(config)
    pairs.config = config
    return pairs


def keys_of(num_pairs, *, step=0):
    draws = Draws(torch.tensor(step), torch.arange(NUM_PAIRS)[:num_pairs])
    return pair_keys(draws, seed=0, pairing="image-text")


def text_gradients(model, pairs, *, step):
    model.zero_grad()
    embeddings = model.encode_text(pairs.tokens, keys=keys_of(NUM_PAIRS, step=step))
    (embeddings.double() @ torch.arange(16.0).double()).sin().sum().backward()
    return {n: p.grad for n, p in model.towers["text"].named_parameters() if p.requires_grad}


def test_a_compiled_tower_gives_the_same_gradients_and_keeps_its_names(pairs, num_compilations):
    """Its blocks are computed again, and another step compiles nothing."""
    model = pairs.build_model(pairs.config)
    expected = [text_gradients(model, pairs, step=step) for step in (3, 4)]
    assert largest_difference(*expected) > 0.1
    names = list(model.state_dict())
    checkpoint_blocks(model)
    compile_towers(model, backend="aot_eager")
    for step, gradients in zip((3, 4), expected, strict=True):
        assert largest_difference(text_gradients(model, pairs, step=step), gradients) < 1e-12
        assert num_compilations() == 1
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_any_number_of_pairs_and_tokens_takes_few_compilations(pairs, num_compilations):
    model = pairs.build_model(pairs.config)

    def encode(num_pairs, num_tokens):
        return model.encode_text(pairs.tokens[:num_pairs, :num_tokens], keys=keys_of(num_pairs))

    shapes = [(8, 24), (5, 24), (5, 16), (3, 24), (7, 16), (0, 24)]
    with torch.no_grad():
        expected = [encode(*shape) for shape in shapes]
        compile_towers(model, backend="eager")
        for shape, features in zip(shapes, expected, strict=True):
            torch.testing.assert_close(encode(*shape), features)
    assert num_compilations() <= 4


def test_compiled_layers_of_every_kind_drop_alike(num_compilations):
    draws = TowerDraws()
    layers = nn.Sequential(
        nn.Linear(7, 7),
        SampleDropout("a", draws, p=0.3, drops_channels=False),
        SampleDropout("b", draws, p=0.3, drops_channels=True),
        SampleDropPath("c", draws, drop_prob=0.3, scale_by_keep=True),
        SamplePatchDropout("d", draws, prob=0.5, num_prefix_tokens=1, is_ordered=True),
    )
    tower = Tower(nn.Identity(), layers, nn.Flatten(), draws=draws)
    values = torch.randn(2 * NUM_PAIRS, 9, 7)  # two rows of each sample
    expected = [tower(values, keys=keys_of(NUM_PAIRS, step=step)) for step in range(3)]
    tower.compile(backend="aot_eager")
    for step in range(3):
        assert torch.equal(tower(values, keys=keys_of(NUM_PAIRS, step=step)), expected[step])
    assert num_compilations() == 1
