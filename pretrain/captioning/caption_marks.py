"""Start, end and padding of tokenised captions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import InputError


@dataclass(frozen=True)
class CaptionMarks:
    """Token ids around a caption: start, ids, end, padding.

    Attributes:
        start: first token of every caption.
        end: last token of every caption.
        pad: padding after the end; may be the same token as `end`.
    """

    start: int
    end: int
    pad: int

    def lengths(self, ids: Tensor) -> Tensor:
        """Counts the tokens up to the end of captions, int64 [B, L] -> [B].

        A token within a caption may have the id of padding, such as "!" of CLIP's tokenizer.
        """
        positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        lengths = ((ids != self.pad) * positions).amax(dim=1)
        return (lengths + 1).clamp(max=ids.shape[1]) if self.end == self.pad else lengths


def find_marks(tokenizer: object, *, where: str) -> CaptionMarks:
    """Finds the tokens with which a tokenizer begins and ends captions.

    Args:
        tokenizer: tokenizer of the captions, from pretrain.model.tokenizer.
        where: config key of what needs them, for messages.

    Raises:
        InputError: if captions do not begin and end with the same tokens, or are padded in front.
    """
    ids = tokenizer(["a photo", "the dog runs", ""])
    pad = tokenizer.pad_id
    if ids.is_meta:  # of a plan, which computes shapes alone
        return CaptionMarks(start=0, end=1, pad=pad)
    rows = ids.tolist()
    end_is_pad = getattr(tokenizer.backend, "eos_token_id", None) == pad
    lengths = [max((n for n, id_ in enumerate(row, 1) if id_ != pad), default=0) for row in rows]
    lasts = {
        row[min(length, len(row) - 1) if end_is_pad else length - 1]
        for row, length in zip(rows, lengths, strict=True)
    }
    starts = {row[0] for row in rows}
    if len(starts) > 1 or len(lasts) > 1 or starts & {pad} or min(lengths) < 1 or starts == lasts:
        raise InputError(
            f"{where}: a decoder of captions needs a tokenizer that begins every caption with one "
            "token, ends it with another, and pads behind it; choose another model.text.tokenizer, "
            "such as CLIP's"
        )
    return CaptionMarks(starts.pop(), lasts.pop(), pad)
