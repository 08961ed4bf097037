"""Image towers that take several sizes: positions are resampled in `forward`.

The parameters keep their shape, so that a run whose image size changes can resume at any step. The
towers of timm resample positions with the option dynamic_img_size. Those of open_clip get a
`forward` that does so with the same function of timm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from data_prep.errors import ConfigError, InputError


class ResampledVisionTransformer(VisionTransformer):
    """open_clip's vision transformer for images of any multiple of its patch size."""

    def _embeds(self, x: Tensor) -> Tensor:
        """Returns the tokens of images, [B, 3, H, Wd] -> [B, 1 + P, W]."""
        patches = self.conv1(x)  # [B, W, rows, columns]
        grid = list(patches.shape[2:])
        tokens = patches.flatten(2).transpose(1, 2)  # [B, P, W]
        of_class = self.class_embedding.to(tokens.dtype).expand(len(tokens), 1, -1)
        positions = resample_abs_pos_embed(
            self.positional_embedding[None], new_size=grid, old_size=list(self.grid_size)
        )  # [1, 1 + P, W]
        tokens = torch.cat([of_class, tokens], dim=1) + positions.to(tokens.dtype)
        return self.ln_pre(self.patch_dropout(tokens))


def resample_positions(backbone: nn.Module) -> None:
    """Makes an open_clip vision transformer resample its positions; leaves other towers."""
    if type(backbone) is VisionTransformer:
        backbone.__class__ = ResampledVisionTransformer


def refuse_other_sizes(backbone: nn.Module, examples: Iterable[Tensor], *, where: str) -> None:
    """Checks that a tower takes images of all sizes of a run.

    Args:
        backbone: backbone of the tower.
        examples: images [B, 3, H, Wd], normalised, of each size.
        where: config key of the tower.

    Raises:
        InputError: if it does not.
    """
    was_training = backbone.training
    backbone.eval()
    for images in examples:
        try:
            with torch.no_grad():
                backbone(images)
        except Exception as error:  # libraries raise errors of any type
            raise InputError(
                f"image.segments: {where} does not take images of {images.shape[-1]} pixels: "
                f"{error}; use a convolutional tower, or a vision transformer of open_clip or of "
                "timm with options: {dynamic_img_size: true}; sizes must be multiples of its patch "
                "size"
            ) from error
    backbone.train(was_training)


def refuse_deterministic_sizes(backbone: nn.Module, *, where: str) -> None:
    """Checks that no positions are trained that `forward` resamples.

    torch has no deterministic gradient of interpolation on a GPU, and raises an error in the first
    step that needs it.

    Args:
        backbone: backbone of an image tower of a run with several image sizes.
        where: config key of the tower.

    Raises:
        ConfigError: if it has such positions.
    """
    for name, parameter in backbone.named_parameters():
        if name.endswith(("pos_embed", "positional_embedding")) and parameter.requires_grad:
            raise ConfigError(
                f"engine.deterministic=true with image.segments of several sizes: {where} "
                f"resamples its positions ({name}), whose gradient is not deterministic on a GPU; "
                "set engine.deterministic: false, use one size, or train a convolutional tower"
            )
