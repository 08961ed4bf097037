"""Word vectors in text format (word2vec, GloVe, fastText), and a tokenizer of their words.

A line is a word and its numbers, separated by spaces. A first line of two integers (the number of
words, the width) is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError

PADDING, UNKNOWN = "[PAD]", "[UNK]"


@dataclass(frozen=True)
class WordVectors:
    """Words in the order of the file, each once, and their vectors float32 [words, W]."""

    words: list[str]
    values: Tensor


def read_word_vectors(path: Path, *, max_words: int | None = None) -> WordVectors:
    """Reads word vectors.

    Args:
        path: text file in UTF-8.
        max_words: number of words that are read; files begin with the most frequent ones.

    Raises:
        InputError: if the file is missing, empty, or has a line of another width or without
            numbers.
    """
    vectors: dict[str, np.ndarray] = {}
    width = None
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, word, values in _lines(file, path):
                width = len(values) if width is None else width
                if len(values) != width:
                    raise InputError(
                        f"{path}: line {number}: expected a word and {width} numbers, found "
                        f"{len(values)}; correct or remove the line"
                    )
                vectors.setdefault(word, values)  # the first of several, as in other readers
                if len(vectors) == max_words:
                    break
    except OSError as error:
        raise InputError(
            f"model.text.pretrained={path}: expected a text file of word vectors: {error.strerror}"
        ) from error
    if not vectors:
        raise InputError(f"{path}: expected lines of a word and numbers, found none")
    return WordVectors(list(vectors), torch.from_numpy(np.stack(list(vectors.values()))))


def _lines(file: Any, path: Path) -> Iterator[tuple[int, str, np.ndarray]]:
    """(number of the line, word, its numbers); a word may contain spaces"""
    for number, line in enumerate(file, start=1):
        parts = line.strip().split(" ")
        if not parts[0] or (number == 1 and _is_header(parts)):
            continue
        first = len(parts)
        while first > 1 and _is_number(parts[first - 1]):
            first -= 1
        first = max(first, 1)
        values = np.array(parts[first:], dtype=np.float32)
        if not len(values) or not np.isfinite(values).all():
            raise InputError(
                f"{path}: line {number}: expected a word and finite numbers, found "
                f"{line.strip()!r:.80}; correct or remove the line"
            )
        yield number, " ".join(parts[:first]), values


def _is_header(parts: list[str]) -> bool:
    return len(parts) == 2 and all(part.isdigit() for part in parts)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def word_tokenizer(words: list[str]) -> Any:
    """Builds a tokenizer of transformers that looks up whole words and punctuation.

    Captions are lower-cased if no word has an upper-case letter.

    Args:
        words: words with a vector; the others are unknown.
    """
    from tokenizers import Tokenizer as WordTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    ids = {PADDING: 0, UNKNOWN: 1}
    for word in words:
        ids.setdefault(word, len(ids))
    backend = WordTokenizer(WordLevel(ids, unk_token=UNKNOWN))
    if all(word == word.lower() for word in words):
        backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PADDING, unk_token=UNKNOWN)
