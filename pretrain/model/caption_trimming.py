"""Cuts a batch's tokens behind its longest caption, for text towers to which that is the same.

To those is it the same in which padding stands behind the caption, no token sees it, and it is not
pooled: it then changes no embedding and no gradient, only the time they take.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import TransformersText

# Tokens are kept to a multiple of this: few lengths, each of a shape that GPUs are fast at.
TOKENS_MULTIPLE = 8
# transformers models in which no token sees masked padding behind it, directly or through layers.
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
    """Whether what stands behind a caption may be cut off without changing its embedding."""
    from open_clip.transformer import TextTransformer

    if isinstance(backbone, TransformersText):
        is_behind = getattr(tokenizer.backend, "padding_side", "right") == "right"
        return is_behind and backbone.backbone.config.model_type in MASKS_PADDING
    if not isinstance(backbone, TextTransformer) or backbone.output_tokens:
        return False
    if backbone.attn_mask is None or backbone.cls_emb is not None:
        return False
    # Pooled is the place of the highest token, or of the first end token: padding must be neither.
    if backbone.pool_type == "argmax":
        return tokenizer.pad_id == 0
    return backbone.pool_type == "eos" and tokenizer.pad_id != backbone.eos_id


def accept_trimmed_captions(backbone: nn.Module) -> None:
    """Makes a text tower take fewer tokens than its context_length (those of transformers do)."""
    from open_clip.transformer import TextTransformer

    if isinstance(backbone, TextTransformer):
        backbone.transformer.register_forward_pre_hook(_cut_causal_mask, with_kwargs=True)


def _cut_causal_mask(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """open_clip hands on a mask of context_length, however few tokens there are."""
    length = args[0].shape[1]  # of [B, L, W]
    return args, kwargs | {"attn_mask": kwargs["attn_mask"][:length, :length]}


def trimmed_length(caption_lengths: Tensor, *, context_length: int) -> int:
    """Tokens that hold every caption of a batch.

    Args:
        caption_lengths: [B] tokens up to the last that is not padding; on the CPU, so that nothing
            waits for the device.
        context_length: of the untrimmed batch.
    """
    lengths = caption_lengths.tolist()
    if 0 in lengths:  # nothing but padding: what a tower makes of it may depend on its length
        return context_length
    return min(context_length, -(-max(lengths, default=1) // TOKENS_MULTIPLE) * TOKENS_MULTIPLE)
