"""Tokenizers: from captions to token ids of a fixed length."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.hub import TOKENIZER_FILES_OF_HUB, local_folder
from pretrain.model.library_errors import describe_library_error
from pretrain.sampling.keyed_random import scramble
from pretrain.settings.model import Model, TextTower
from pretrain.towers.caption_cleaning import NO_CLEANING, CaptionCleaning, caption_cleaning
from pretrain.towers.small_text import WORD_VECTORS
from pretrain.towers.word_vectors import read_word_vectors, word_tokenizer

# Folder, in a checkpoint's assets, of a tokenizer that was loaded from a folder or a hub.
TOKENIZER_FOLDER = "tokenizer"


class Tokenizer:
    """Encodes M captions to token ids, int64 [M, L], truncated and padded to L = context_length.

    Threads may share it. A lock serialises their calls, because tokenizers of transformers change
    their own settings in every call.
    """

    def __init__(
        self,
        backend: Any,
        *,
        context_length: int,
        pad_id: int,
        vocab_size: int,
        cleaning: CaptionCleaning = NO_CLEANING,
    ) -> None:
        self.backend = backend
        self.cleaning = cleaning
        self.context_length = context_length
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self._lock = threading.Lock()

    @property
    def is_slow(self) -> bool:
        """Whether the backend is one of transformers' slow tokenizers, written in Python."""
        return not getattr(self.backend, "is_fast", True)

    @property
    def largest_id(self) -> int:
        """Largest token id that an encoded caption can contain."""
        if hasattr(self.backend, "get_vocab"):
            return max(self.backend.get_vocab().values())
        return self.vocab_size - 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        with self._lock:
            if hasattr(self.backend, "save_pretrained"):
                tokens = self.backend(
                    self.cleaning.clean(captions),
                    padding="max_length",
                    truncation=True,
                    max_length=self.context_length,
                    return_tensors="pt",
                )["input_ids"]
                if self.cleaning.strips_separators:
                    tokens[tokens == self.backend.sep_token_id] = 0
                return tokens
            return self.backend(list(captions), context_length=self.context_length)

    def lengths(self, tokens: Tensor) -> Tensor:
        """Counts the tokens of each row of [M, L] without trailing padding: int64 [M].

        If captions are padded with the end token, as in Hugging Face's CLIP, the first one counts.
        """
        positions = torch.arange(1, tokens.shape[1] + 1)
        lengths = ((tokens != self.pad_id) * positions).amax(dim=1)
        if getattr(self.backend, "eos_token_id", None) == self.pad_id:
            lengths = (lengths + 1).clamp(max=tokens.shape[1])
        return lengths

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids without start, end and padding."""
        if hasattr(self.backend, "save_pretrained"):
            return self.backend.decode(list(ids), skip_special_tokens=True).strip()
        return self.backend.decode(list(ids)).strip()

    def save(self, folder: Path) -> None:
        """Writes the files that `build_tokenizer` needs and installed libraries do not ship."""
        if hasattr(self.backend, "save_pretrained"):
            self.backend.save_pretrained(str(folder / TOKENIZER_FOLDER))


def token_keys(tokens: Tensor) -> Tensor:
    """Hashes each row of tokens [M, L] to 64 bits: int64 [M]; equal rows have equal keys."""
    positions = scramble(np.arange(tokens.shape[1], dtype=np.uint64))
    hashes = scramble(tokens.numpy().astype(np.uint64) ^ positions)  # [M, L]
    keys = scramble(hashes.sum(axis=1, dtype=np.uint64))  # [M, L] -> [M]
    return torch.from_numpy(keys.view(np.int64))


def build_text_tokenizer(config: Model, *, assets: Path | None = None) -> Tokenizer | None:
    """Builds the tokenizer of a model's texts; None if it has no text tower.

    Args:
        config: config section `model`.
        assets: see `build_tokenizer`.

    Raises:
        InputError: if the tokenizer cannot be loaded.
    """
    return None if config.text is None else build_tokenizer(config.text, assets=assets)


def build_tokenizer(config: TextTower, *, assets: Path | None = None) -> Tokenizer:
    """Builds the tokenizer of a text tower.

    Args:
        config: config section of the text tower.
        assets: folder of a checkpoint's assets; None to load the tokenizer by name.

    Raises:
        InputError: if the tokenizer cannot be loaded.
    """
    if _has_words(config) and assets is None:
        return _word_tokenizer(config)
    if config.library != "transformers" and config.tokenizer is None and not _has_words(config):
        if config.cleaning is not None:
            raise InputError(
                f"model.text.cleaning={config.cleaning}: CLIP's tokenizer has its own cleaning; "
                "remove it, or set model.text.tokenizer"
            )
        return _open_clip_tokenizer(config)
    from transformers import AutoTokenizer

    name = str(assets / TOKENIZER_FOLDER) if assets else (config.tokenizer or config.name)
    if assets is None:
        key = "tokenizer" if config.tokenizer else "name"
        name = local_folder(name, where=f"model.text.{key}", needs=TOKENIZER_FILES_OF_HUB)
    try:
        backend = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises errors of any type
        raise InputError(
            f"model.text.tokenizer: expected a transformers tokenizer at {name!r}: "
            f"{describe_library_error(error)}"
        ) from error
    if backend.pad_token_id is None:
        raise InputError(
            f"model.text.tokenizer: expected a tokenizer with a padding token, {name!r} has none"
        )
    return Tokenizer(
        backend,
        context_length=config.context_length,
        pad_id=backend.pad_token_id,
        # Ids of added tokens may leave gaps.
        vocab_size=max(len(backend), max(backend.get_vocab().values()) + 1),
        cleaning=caption_cleaning(config),
    )


def _has_words(config: TextTower) -> bool:
    """Whether the tokenizer looks up the words of a file of word vectors."""
    return config.library == "torch" and config.name == WORD_VECTORS and config.tokenizer is None


def _word_tokenizer(config: TextTower) -> Tokenizer:
    if not isinstance(config.pretrained, str):
        raise InputError(
            f"model.text.pretrained={config.pretrained}: word_vectors needs the path of a text "
            "file with a word and its numbers in each line"
        )
    vectors = read_word_vectors(Path(config.pretrained), max_words=config.options.get("max_words"))
    backend = word_tokenizer(vectors.words)
    return Tokenizer(
        backend,
        context_length=config.context_length,
        pad_id=backend.pad_token_id,
        vocab_size=len(backend),
        cleaning=caption_cleaning(config),
    )


def _open_clip_tokenizer(config: TextTower) -> Tokenizer:
    import open_clip

    from pretrain.model.clip_tokenizer import ClipTokenizer

    model_config = open_clip.get_model_config(config.name) or {}
    needed = model_config.get("text_cfg", {}).get("hf_tokenizer_name")
    if needed:
        raise InputError(
            f"model.text: open_clip's {config.name} needs the tokenizer {needed!r}, not CLIP's; "
            "set model.text.tokenizer to its name or to its folder"
        )
    backend = ClipTokenizer(context_length=config.context_length)
    return Tokenizer(
        backend, context_length=config.context_length, pad_id=0, vocab_size=backend.vocab_size
    )
