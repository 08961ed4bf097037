"""The text decoder of CoCa (Yu et al. 2022, "CoCa: Contrastive captioners are image-text foundation
models") with open_clip's modules.

It continues the text tower with blocks that also attend to the tokens of the media tower. At every
position, it predicts the next token of the caption.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from open_clip.transformer import AttentionalPooler, MultimodalTransformer
from torch import Tensor, nn
from torch.nn import functional

from pretrain.captioning.caption_marks import CaptionMarks
from pretrain.captioning.tower_tokens import ViewTokens


class DecoderSizes(NamedTuple):
    """Sizes of a decoder."""

    width: int  # that of the text tower's tokens
    layers: int  # each a block over the caption and one that attends to the media
    heads: int
    context_length: int
    vocab_size: int


class CaptionDecoder(nn.Module):
    """Predicts captions from the tokens of a media and a text tower.

    Args:
        sizes: sizes of the decoder.
        media_width: width of the media tower's tokens.
        num_queries: number of tokens that an attentional pooler makes of those of the media tower;
            None without a pooler.
        pooler_heads: attention heads of the pooler.
        marks: start, end and padding of captions.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        *,
        media_width: int,
        num_queries: int | None,
        pooler_heads: int,
        marks: CaptionMarks,
    ) -> None:
        super().__init__()
        self.marks = marks
        self.pooler = None
        if num_queries is not None:
            self.pooler = AttentionalPooler(
                sizes.width, media_width, n_head=pooler_heads, n_queries=num_queries
            )
        self.decoder = MultimodalTransformer(
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            context_length=sizes.context_length,
            output_dim=sizes.vocab_size,
        )
        _initialise(self.decoder)

    def forward(self, media: ViewTokens, text: ViewTokens) -> Tensor:
        """Computes the numbers of `captioning` for every sample.

        Returns:
            [B, 4]: sum over the caption's tokens of the cross-entropy, number of these tokens,
            number of those that were predicted best, and 1.
        """
        logits = self.logits(self.memory(media.tokens), text.tokens[:, :-1])  # [B, L - 1, V]
        return caption_sums(logits, text.ids, marks=self.marks)

    def memory(self, media_tokens: Tensor) -> Tensor:
        """Returns what captions attend to: [B, P, W'] -> [B, Q, W]."""
        return media_tokens if self.pooler is None else self.pooler(media_tokens)

    def logits(self, memory: Tensor, text_tokens: Tensor) -> Tensor:
        """Returns the logits of the token after each: [B, Q, W], [B, L, W] -> [B, L, V]."""
        return self.decoder(memory, text_tokens)


def caption_sums(logits: Tensor, ids: Tensor, *, marks: CaptionMarks) -> Tensor:
    """Sums the cross-entropy of captions over their tokens; padding is left out.

    Args:
        logits: [B, L - 1, V] of the token after each of the first L - 1.
        ids: int64 [B, L].
        marks: start, end and padding of captions.

    Returns:
        [B, 4], see `CaptionDecoder.forward`; only the first column has a gradient.
    """
    labels = ids[:, 1:]  # [B, L - 1]
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    is_label = positions < marks.lengths(ids)[:, None]  # [B, L - 1]
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
    ).view_as(labels)
    is_best = (logits.detach().argmax(dim=-1) == labels) & is_label
    counts = is_label.sum(dim=1), is_best.sum(dim=1), torch.ones_like(labels[:, 0])
    sums = torch.where(is_label, losses, 0.0).sum(dim=1)  # [B, L - 1] -> [B]
    return torch.stack([sums, *(each.to(sums.dtype) for each in counts)], dim=1)


def _initialise(decoder: MultimodalTransformer) -> None:
    """Sets initial weights as open_clip's text transformer does.

    The constructor leaves the projection to the vocabulary uninitialised.
    """
    width, layers = decoder.width, decoder.layers
    for block in [*decoder.resblocks, *decoder.cross_attn]:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
    nn.init.normal_(decoder.text_projection, std=width**-0.5)
