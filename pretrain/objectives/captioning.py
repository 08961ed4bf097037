"""CoCa's captioning: a decoder predicts each token of a caption from those before it and the media.

The loss is the mean cross-entropy over all caption tokens of the global batch. The decoder computes
a sum for each sample, and the objective divides their total by the number of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from data_prep.errors import InputError
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    ObjectiveSection,
)
from pretrain.settings.views import ViewName
from pretrain.settings.warm_start import Start

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

# Sums over samples: cross-entropy, tokens, tokens that were predicted best, samples
NUM_SUMS = 4
SUM_BYTES = 8  # float64


class CaptioningSection(ObjectiveSection):
    """Predicts the captions of media with a decoder of its own, in addition to another objective.

    The text tower must be a causal transformer of open_clip.
    """

    kind: Literal["captioning"] = "captioning"
    media: ViewName = "image"  # view that is described; its tower has tokens
    text: ViewName = "text"  # view of the captions
    # open_clip model whose decoder is built, such as coca_ViT-B-32; null: one of `layers` and
    # `heads`. Its width is that of the text tower.
    name: str | None = None
    layers: PositiveInt | None = None  # each a block over the caption and one over the media
    heads: PositiveInt | None = None
    # Tokens that an attentional pooler makes of those of the media tower; null: the decoder attends
    # to the tower's tokens, which have the width of the text tower's, as in named CoCa models
    num_queries: PositiveInt | None = Field(256, validate_default=True)
    pooler_heads: PositiveInt = 8
    start: Start | None = None  # weights of the decoder at step 0, as `start` of a tower

    @model_validator(mode="after")
    def _has_sizes(self) -> CaptioningSection:
        sizes = (self.layers, self.heads)
        if (self.name is None) == (None in sizes) or (self.name is not None and any(sizes)):
            raise ValueError(
                f"name={self.name} with layers={self.layers} and heads={self.heads}: expected the "
                "name of a CoCa model of open_clip, or layers and heads, such as layers: 6, heads: "
                "8"
            )
        return self

    def views(self, name: str) -> tuple[str, str]:
        """Returns (media, text); see the base class."""
        return self.media, self.text

    @property
    def reads_tokens(self) -> bool:
        """Always true; see the base class."""
        return True

    @property
    def module_start(self) -> Start | None:
        """Weights of the decoder at step 0; see the base class."""
        return self.start

    def build_module(self, towers: Sequence[Any], *, tokenizer: Any, where: str) -> nn.Module:
        """Builds the decoder; see the base class."""
        from open_clip.transformer import TextTransformer

        from pretrain.captioning.caption_decoder import CaptionDecoder, DecoderSizes
        from pretrain.captioning.caption_marks import find_marks

        media, text = towers
        backbone = text.backbone
        if not isinstance(backbone, TextTransformer) or backbone.attn_mask is None:
            raise InputError(
                f"{where}.text: expected a text tower whose tokens see only those before them; set "
                "library: open_clip and name: TextTransformer, or a CLIP or CoCa model of "
                f"open_clip, without no_causal_mask; found {type(backbone).__name__}"
                + (" with no_causal_mask" if isinstance(backbone, TextTransformer) else "")
            )
        width = text.token_width
        layers, heads = self._sizes(where)
        for key, value in (("heads", heads), ("pooler_heads", self.pooler_heads)):
            if width % value:
                raise InputError(
                    f"{where}.{key}={value}: expected a divisor of the width of the text tower, "
                    f"{width}"
                )
        if self.num_queries is None and media.token_width != width:
            raise InputError(
                f"{where}.num_queries=null: expected tokens of {self.media} of the width of the "
                f"text tower, {width}, found {media.token_width}; set num_queries: 256"
            )
        sizes = DecoderSizes(width, layers, heads, backbone.context_length, backbone.vocab_size)
        return CaptionDecoder(
            sizes,
            media_width=media.token_width,
            num_queries=self.num_queries,
            pooler_heads=self.pooler_heads,
            marks=find_marks(tokenizer, where=where),
        )

    def _sizes(self, where: str) -> tuple[int, int]:
        if self.name is None:
            return self.layers, self.heads
        import open_clip

        config = open_clip.get_model_config(self.name) or {}
        if "multimodal_cfg" not in config:
            known = [n for n in open_clip.list_models() if n.startswith("coca_")]
            raise InputError(
                f"{where}.name={self.name}: expected a CoCa model of open_clip: {', '.join(known)}"
            )
        sizes = config["multimodal_cfg"]
        return sizes["layers"], sizes["heads"]


class CaptioningObjective(Objective, section=CaptioningSection):
    """Mean cross-entropy of the caption tokens of the global batch."""

    def received_bytes(self, *, counts: Sequence[int], width: int, device: torch.device) -> int:
        """Returns the bytes of the all-reduce of sums; see the base class."""
        return round(2 * (len(counts) - 1) * NUM_SUMS * SUM_BYTES / len(counts))

    def loss(self, inputs: ObjectiveInputs) -> ObjectiveLoss:
        """Computes the loss, and the fraction of tokens that were predicted best."""
        from pretrain.distributed.collectives import sum_over_ranks, world_size

        sums = inputs.outputs  # [B, NUM_SUMS]
        totals = sum_over_ranks(sums.detach().double().sum(dim=0))
        loss, num_tokens, num_best, num_samples = totals.tolist()
        tokens = max(1.0, num_tokens)
        return ObjectiveLoss(
            sums[:, 0].sum() * (world_size() / tokens),
            loss / tokens,
            int(num_samples),
            {"caption_token_accuracy": num_best / tokens},
            num_averaged=int(num_tokens),
        )
