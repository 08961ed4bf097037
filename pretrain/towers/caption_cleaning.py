"""Cleaning of captions before a tokenizer of transformers, as open_clip's models were trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.settings.model import TextTower


@dataclass(frozen=True)
class CaptionCleaning:
    """Cleaning of captions and of their tokens.

    Attributes:
        form: "none", or a form of open_clip: "whitespace", "lower" or "canonicalize".
        strips_separators: whether separator tokens are replaced by 0 (CLIPA).
    """

    form: str = "none"
    strips_separators: bool = False

    def clean(self, captions: Sequence[str]) -> list[str]:
        """Returns the cleaned captions."""
        if self.form == "none":
            return list(captions)
        from open_clip.tokenizer import get_clean_fn

        clean = get_clean_fn(self.form)
        return [clean(caption) for caption in captions]


NO_CLEANING = CaptionCleaning()


def caption_cleaning(config: TextTower) -> CaptionCleaning:
    """Returns the cleaning that a config sets, or that of its open_clip model."""
    own = _own_settings(config)
    form = config.cleaning or own.get("clean", "none")
    return CaptionCleaning(form, strips_separators=own.get("strip_sep_token", False))


def _own_settings(config: TextTower) -> dict[str, Any]:
    """Settings of the tokenizer in open_clip's config of a model."""
    if config.library != "open_clip":
        return {}
    import open_clip

    text = (open_clip.get_model_config(config.name) or {}).get("text_cfg", {})
    if not text.get("hf_tokenizer_name"):
        return {}
    return {"clean": "whitespace"} | (text.get("tokenizer_kwargs") or {})
