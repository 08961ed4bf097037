import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.model.activation_checkpointing import checkpoint_blocks
from pretrain.model.sample_dropout import (
    DropKeys,
    SampleDropout,
    SampleDropPath,
    SamplePatchDropout,
    TowerDropKeys,
    keep_mask,
    pair_keys,
    scramble,
)
from pretrain.sampling.keyed_random import scramble as scramble_by_numpy
from tests.support.toy_droppers import NUM_PAIRS, Pairs, dropping_config, largest_difference


def keys_of(num_slots, *, step=0, seed=0, stream="image-text", first_slot=0):
    slots = torch.arange(first_slot, first_slot + num_slots)
    return pair_keys(DropKeys(torch.tensor(step), slots), seed=seed, stream=stream, view="text")


def dropped(layer, drop_keys, values, **keys):
    with drop_keys.set_pairs(keys_of(keys.pop("num_slots", len(values)), **keys)):
        return layer(values)


# ---------------------------------------------------------------------------------------- hash


def test_the_hash_is_that_of_the_sample_order():
    values = torch.randint(-(2**63), 2**63 - 1, (10000,))
    expected = scramble_by_numpy(values.numpy().view(np.uint64)).view(np.int64)
    assert scramble(values).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.97])
def test_the_rate_is_right(rate):
    kept = keep_mask(keys_of(500), (20, 101), rate=rate)
    # Five standard deviations of a million draws.
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert kept.float().mean(dtype=torch.float64) == pytest.approx(1 - rate, abs=5 * deviation)


def assert_independent(one, other):
    """Asserts that two masks at rate 0.5 are uncorrelated."""
    ours, theirs = (2.0 * mask.flatten() - 1 for mask in (one, other))
    assert abs((ours * theirs).mean()) < 5 / len(ours) ** 0.5


def test_draws_are_independent_of_one_another():
    """Tests slots, steps, seeds, streams, layers, calls and neighbouring positions."""
    shape = (40, 64)
    masks = [
        keep_mask(keys_of(100, **where), shape, rate=0.5)
        for where in (
            {},
            {"step": 1},
            {"seed": 1},
            {"stream": "audio-text"},
            {"first_slot": 100},
        )
    ]
    for one, other in itertools.combinations(masks, 2):
        assert_independent(one, other)
    mask = masks[0]
    for axis, distance in itertools.product(range(3), (1, 2, 3)):
        length = mask.shape[axis] - distance
        assert_independent(mask.narrow(axis, 0, length), mask.narrow(axis, distance, length))
    drop_keys = TowerDropKeys()
    layers = [
        SampleDropout(name, drop_keys, p=0.5, drops_channels=False) for name in ("a", "a.1", "b")
    ]
    with drop_keys.set_pairs(keys_of(100)):
        calls = [layer(torch.ones(100, *shape)) > 0 for layer in layers for _ in range(2)]
    for one, other in itertools.combinations(calls, 2):
        assert_independent(one, other)


def test_a_longer_row_begins_as_a_shorter_one():
    """Tests what makes it safe to trim the padding of captions."""
    keys = keys_of(3)
    whole = keep_mask(keys, (6, 7, 9), rate=0.3)
    assert torch.equal(keep_mask(keys, (6, 4, 5), rate=0.3), whole[:, :, :4, :5])


# -------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_exactly(dtype):
    drop_keys = TowerDropKeys()
    layer = SampleDropout("a", drop_keys, p=0.25, drops_channels=False)
    values = torch.randn(8, 5, 30, dtype=dtype, requires_grad=True)
    output = dropped(layer, drop_keys, values)
    kept = output != 0
    assert torch.equal(output[kept], (values / 0.75)[kept])
    assert torch.equal(kept, dropped(layer, drop_keys, torch.ones(8, 5, 30)) != 0)
    output.sum().backward()
    assert torch.equal(values.grad != 0, kept)


def test_stochastic_depth_drops_whole_rows():
    drop_keys = TowerDropKeys()
    for scales, value in ((True, 2.0), (False, 1.0)):
        layer = SampleDropPath("a", drop_keys, drop_prob=0.5, scale_by_keep=scales)
        rows = dropped(layer, drop_keys, torch.ones(400, 3, 5)).flatten(1)
        assert set(rows.flatten().tolist()) == {0.0, value}
        assert torch.equal(rows.amin(dim=1), rows.amax(dim=1))
        assert 150 < (rows[:, 0] > 0).sum() < 250


def test_dropout_of_channels_drops_whole_channels():
    drop_keys = TowerDropKeys()
    layer = SampleDropout("a", drop_keys, p=0.5, drops_channels=True)
    channels = dropped(layer, drop_keys, torch.ones(20, 10, 4, 6)).flatten(2)
    assert torch.equal(channels.amin(dim=2), channels.amax(dim=2))
    assert 60 < (channels[:, :, 0] > 0).sum() < 140


@pytest.mark.parametrize("is_ordered", [True, False])
def test_patch_dropout_keeps_equally_many_of_each_sample(is_ordered):
    drop_keys = TowerDropKeys()
    layer = SamplePatchDropout(
        "a", drop_keys, prob=0.7, num_prefix_tokens=1, is_ordered=is_ordered, returns_indices=True
    )
    tokens = torch.arange(11.0).expand(2000, 11)[..., None] + torch.zeros(2)
    kept, indices = dropped(layer, drop_keys, tokens)
    assert kept.shape == (2000, 1 + 3, 2)
    assert indices.shape == (2000, 3)
    assert not kept[:, 0].any()
    assert torch.equal(kept[:, 1:, 0].long(), indices + 1)
    if is_ordered:
        assert (indices.diff(dim=1) > 0).all()
    counts = indices.flatten().bincount(minlength=10)
    assert ((counts - 600).abs() < 5 * (2000 * 0.3 * 0.7) ** 0.5).all()


def test_rows_of_one_sample_follow_each_other():
    drop_keys = TowerDropKeys()
    layer = SampleDropout("a", drop_keys, p=0.5, drops_channels=False)
    windows = torch.ones(12, 4, 6)  # four of each of three samples
    whole = dropped(layer, drop_keys, windows, num_slots=3)
    alone = dropped(layer, drop_keys, windows[:4], num_slots=1, first_slot=2)
    assert torch.equal(whole[8:], alone)
    assert not torch.equal(whole[8], whole[9])
    with pytest.raises(RuntimeError, match=r"a: expected a multiple of 3 rows, .* found 4"):
        dropped(layer, drop_keys, windows[:4], num_slots=3)


def test_a_layer_without_draws_says_so_in_training_and_keeps_all_in_evaluation():
    layer = SampleDropout("text.dropout", TowerDropKeys(), p=0.5, drops_channels=False)
    with pytest.raises(RuntimeError, match=r"text\.dropout has dropout in training.*eval\(\)"):
        layer(torch.ones(2, 3))
    assert torch.equal(layer.eval()(torch.ones(2, 3)), torch.ones(2, 3))
    assert not layer.state_dict()
    assert not list(nn.Sequential(layer).parameters())


# ----------------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return dropping_config(tmp_path_factory.mktemp("droppers"))


@pytest.fixture(scope="module")
def pairs(config):
    return Pairs(config)


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "recomputed"])
def model(config, pairs, request):
    model = pairs.build_model(config)
    if request.param:
        checkpoint_blocks(model)
    return model


@pytest.fixture(scope="module")
def expected(config, pairs):
    """Returns the gradients of the batch encoded as a whole."""
    return pairs.gradients(pairs.build_model(config))


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (3, 3, 2), (2, 2, 0, 4), (1,) * 8], ids=str)
def test_no_split_changes_a_gradient(model, pairs, expected, sizes):
    """Tests micro-batches, halves as on two ranks, and recomputed activations."""
    assert largest_difference(pairs.gradients(model, sizes), expected) < 1e-12


def test_cut_captions_drop_what_whole_ones_do(model, pairs, expected):
    assert largest_difference(pairs.gradients(model, (3, 3, 2), trims=True), expected) < 1e-12


def test_another_step_or_seed_drops_otherwise(config, pairs, expected):
    model = pairs.build_model(config)
    assert largest_difference(pairs.gradients(model, step=4), expected) > 0.1
    model.seed = 1
    assert largest_difference(pairs.gradients(model), expected) > 0.1


def test_streams_draw_differently_from_a_tower_they_share(model, pairs):
    features = model([pairs.micro_batch(slice(0, NUM_PAIRS), step=3)])
    texts = [features.views[name]["text"] for name in ("image-text", "audio-text")]
    assert not torch.allclose(*texts, atol=1e-2)


def test_nothing_is_dropped_in_evaluation(config, pairs):
    model = pairs.build_model(config).eval()
    one, other = (model([pairs.micro_batch(slice(0, NUM_PAIRS), step=step)]) for step in (3, 4))
    for name, views in one.views.items():
        assert all(torch.equal(views[view], other.views[name][view]) for view in views)
