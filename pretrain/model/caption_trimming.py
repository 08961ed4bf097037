"""Trimming of a batch's padding, for text towers whose embeddings do not depend on padding.

Padding after the longest caption can be cut if no token attends to it and it is not pooled.
Trimming then changes no embedding and no gradient; it only saves time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pretrain.model.tokenizer import Tokenizer
from pretrain.model.transformers_backbone import TransformersText

# Lengths are rounded up to a multiple of this, for few distinct shapes that are fast on GPUs.
TOKENS_MULTIPLE = 8
# transformers models in which no token depends on masked padding after it, in any layer.
MASKS_PADDING = (
    "albert",
    "bert",
    "camembert",
    "clip_text_model",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)


def takes_trimmed_captions(backbone: nn.Module, tokenizer: Tokenizer) -> bool:
    """Returns whether padding can be cut without changing an embedding."""
    from open_clip.transformer import TextTransformer

    if isinstance(backbone, TransformersText):
        is_last = getattr(tokenizer.backend, "padding_side", "right") == "right"
        return is_last and backbone.backbone.config.model_type in MASKS_PADDING
    if getattr(backbone, "ignores_padding", False):
        return True
    if not isinstance(backbone, TextTransformer):
        return False
    if backbone.attn_mask is None or backbone.cls_emb is not None:
        return False
    # The pooled position is that of the highest token id, or of the first end token. Padding must
    # be neither.
    if backbone.pool_type == "argmax":
        return tokenizer.pad_id == 0
    return backbone.pool_type == "eos" and tokenizer.pad_id != backbone.eos_id


def accept_trimmed_captions(backbone: nn.Module) -> None:
    """Makes an open_clip text tower accept fewer tokens than its context_length.

    transformers towers always accept fewer tokens.
    """
    from open_clip.transformer import TextTransformer

    if isinstance(backbone, TextTransformer):
        backbone.transformer.register_forward_pre_hook(_cut_causal_mask, with_kwargs=True)


def _cut_causal_mask(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cuts the causal mask, which open_clip always passes with context_length."""
    length = args[0].shape[1]  # input [B, L, W]
    return args, kwargs | {"attn_mask": kwargs["attn_mask"][:length, :length]}


def trimmed_length(caption_lengths: Tensor, *, context_length: int) -> int:
    """Computes the number of tokens that suffice for every caption of a batch.

    Args:
        caption_lengths: [B] tokens up to the last one that is not padding; on the CPU, so that
            reading them does not wait for the device.
        context_length: length of the untrimmed batch.
    """
    lengths = caption_lengths.tolist()
    if 0 in lengths:  # the embedding of a caption that is all padding may depend on the length
        return context_length
    return min(context_length, -(-max(lengths, default=1) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE)
