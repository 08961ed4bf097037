"""Image towers of a run whose image size changes."""

import pytest
import torch
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed

from data_prep.errors import ConfigError, InputError
from pretrain.towers.image_sizes import (
    refuse_deterministic_sizes,
    refuse_other_sizes,
    resample_positions,
)


def open_clip_tower(**options):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    others = {"mlp_ratio": 4.0, "output_dim": 4}
    return VisionTransformer(**(sizes | others | options)).eval()


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("options", [{}, {"pos_embed_type": "sin_cos_2d"}, {"no_ln_pre": True}])
def test_open_clips_tower_is_unchanged_at_its_own_size(options):
    plain, resampled = open_clip_tower(**options), open_clip_tower(**options)
    resample_positions(resampled)
    assert torch.equal(resampled(images(16)), plain(images(16)))


@pytest.mark.parametrize("size", [8, 24, 40])
def test_at_another_size_it_is_the_tower_whose_positions_timm_resamples(size):
    resampled, built = open_clip_tower(), open_clip_tower(image_size=size)
    state = resampled.state_dict()
    state["positional_embedding"] = resample_abs_pos_embed(
        state["positional_embedding"][None], new_size=[size // 8] * 2
    )[0]
    built.load_state_dict(state)
    resample_positions(resampled)
    torch.testing.assert_close(resampled(images(size)), built(images(size)))


def test_positions_keep_their_shape_and_receive_gradients_at_every_size():
    tower = open_clip_tower()
    resample_positions(tower)
    for size in (16, 32):
        tower.zero_grad()
        tower(images(size)).square().sum().backward()
        assert tower.positional_embedding.grad.shape == (5, 16)
        assert tower.positional_embedding.grad.abs().sum(dim=1).min() > 0


def test_a_tower_of_one_size_is_refused():
    with pytest.raises(InputError, match=r"model\.image does not take images of 24 pixels: .*dyn"):
        refuse_other_sizes(open_clip_tower(), [images(24)], where="model.image")


def test_trained_positions_of_several_sizes_are_refused_where_gradients_must_be_deterministic():
    tower = open_clip_tower()
    with pytest.raises(ConfigError, match=r"model\.image resamples its positions \(positional_"):
        refuse_deterministic_sizes(tower, where="model.image")
    refuse_deterministic_sizes(tower.requires_grad_(False), where="model.image")
    refuse_deterministic_sizes(torch.nn.Conv2d(3, 4, 2), where="model.image")
