"""A faster version of open_clip's tokenizer with bounded memory; the token ids are the same.

ASCII captions skip the repair of broken encodings, which would not change them. The token ids of
words are cached.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

MAX_CACHED_WORDS = 100_000  # several megabytes; a full cache is cleared


class ClipTokenizer(SimpleTokenizer):
    """CLIP's byte-pair tokenizer with a cache of words.

    Args:
        context_length: tokens per row.
    """

    def __init__(self, *, context_length: int) -> None:
        super().__init__(context_length=context_length)
        self._special_words = dict(self.cache)
        self._ids_of_word: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encodes a caption to token ids, without start and end tokens."""
        # ftfy and html.unescape repair only captions with other characters.
        if text.isascii() and text.isprintable() and "&" not in text:
            text = " ".join(text.split()).lower()
        else:
            text = self.clean_fn(text)
        ids: list[int] = []
        for word in self.pat.findall(text):
            ids += self._ids_of_word.get(word) or self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if len(self._ids_of_word) >= MAX_CACHED_WORDS:
            self._ids_of_word.clear()
            self.cache = dict(self._special_words)
        characters = "".join(self.byte_encoder[byte] for byte in word.encode("utf-8"))
        ids = [self.encoder[part] for part in self.bpe(characters).split(" ")]
        self._ids_of_word[word] = ids
        return ids

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> Tensor:
        """Encodes captions to int64 [M, L]: start token, ids, end token, zeros.

        Captions that are too long are truncated before the end token.
        """
        length = context_length or self.context_length
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)[: length - 2], self.eot_token_id]
            row[: len(ids)] = ids
        return torch.from_numpy(rows)
