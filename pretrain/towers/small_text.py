"""Text towers for small data, from torch.nn: word vectors and a GRU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.settings.model import TextTower
from pretrain.towers.masked_gru import MaskedGru
from pretrain.towers.pooling import pool_tokens
from pretrain.towers.word_vectors import read_word_vectors

WORD_VECTORS, GRU = "word_vectors", "gru"
_SIZES_FILE = "config.json"


class WordVectorText(nn.Module):
    """Pooled vectors of a caption's words: int64 [B, L] -> [B, W].

    All unknown words have one vector, which also stands for a caption without words.

    Args:
        num_words: number of words with those for padding and unknown words.
        width: numbers of a vector W.
        pad_id: token id of padding.
        unknown_id: token id of unknown words.
        pooling: "mean" or another pooling of tokens.
    """

    ignores_padding = True

    has_blocks = False  # too small for recomputed activations

    def __init__(
        self, num_words: int, width: int, *, pad_id: int, unknown_id: int, pooling: str
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_words, width)
        self.pad_id = pad_id
        self.unknown_id = unknown_id
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = _with_a_word(tokens, pad_id=self.pad_id, unknown_id=self.unknown_id)
        return pool_tokens(self.token_embedding(tokens), mask, pooling=self.pooling)


class GruText(nn.Module):
    """A GRU over embedded tokens: int64 [B, L] -> [B, W].

    Args:
        num_tokens: size of the vocabulary.
        width: width of the embeddings and states W.
        num_layers: number of layers.
        is_bidirectional: whether captions are also read from their end.
        pad_id: token id of padding, which is at the end.
        pooling: "own" is the last state; others pool the states of all tokens.
    """

    ignores_padding = True

    has_blocks = False  # too small for recomputed activations

    def __init__(
        self,
        num_tokens: int,
        *,
        width: int,
        num_layers: int,
        is_bidirectional: bool,
        pad_id: int,
        pooling: str,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_tokens, width)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        self.layers = MaskedGru(
            width, width, num_layers=num_layers, is_bidirectional=is_bidirectional
        )
        self.pad_id = pad_id
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, mask = _with_a_word(tokens, pad_id=self.pad_id, unknown_id=self.pad_id)
        states, last = self.layers(self.token_embedding(tokens), mask.sum(dim=1))
        return last if self.pooling == "own" else pool_tokens(states, mask, pooling=self.pooling)


def _with_a_word(tokens: Tensor, *, pad_id: int, unknown_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask bool [B, L]); a caption without words gets one: zeros have no direction"""
    mask = tokens != pad_id
    is_empty = ~mask.any(dim=1)
    first = torch.zeros_like(mask)
    first[:, 0] = is_empty
    return tokens.masked_fill(first, unknown_id), mask | first


# ------------------------------------------------------------------------------------- building


def build_small_text(config: TextTower, tokenizer: Any, saved: Path | None) -> nn.Module:
    """Builds a text tower of torch.nn; see `build_text_backbone`.

    Raises:
        InputError: if the name or an option is unknown, or the word vectors cannot be read.
    """
    if config.name not in _BUILDERS:
        raise InputError(
            f"model.text.name: expected one of {', '.join(_BUILDERS)} with library: torch, found "
            f"{config.name!r}"
        )
    if getattr(tokenizer.backend, "padding_side", "right") != "right":
        raise InputError(
            "model.text.tokenizer: expected a tokenizer that pads at the end; choose another one"
        )
    return _BUILDERS[config.name](config, tokenizer, saved)


def _build_word_vectors(config: TextTower, tokenizer: Any, saved: Path | None) -> nn.Module:
    _options(config, {"max_words": None})
    if config.pooling == "own":
        raise InputError(
            "model.text.pooling=own: word vectors have no pooling of their own; use mean or max"
        )
    words = tokenizer.backend.get_vocab()
    if tokenizer.backend.unk_token_id is None:
        raise InputError(
            "model.text.tokenizer: expected a tokenizer with an unknown token; remove the key to "
            "look up the words of the file"
        )
    common = {
        "pad_id": tokenizer.pad_id,
        "unknown_id": tokenizer.backend.unk_token_id,
        "pooling": config.pooling,
    }
    if saved is not None:
        sizes = json.loads((saved / _SIZES_FILE).read_bytes())
        return WordVectorText(sizes["num_words"], sizes["width"], **common)
    vectors = read_word_vectors(
        Path(str(config.pretrained)), max_words=config.options.get("max_words")
    )
    width = vectors.values.shape[1]
    tower = WordVectorText(len(words), width, **common)
    with torch.no_grad():
        # Unknown words, and words that only another tokenizer has, begin with the mean.
        tower.token_embedding.weight.copy_(vectors.values.mean(dim=0))
        for word, values in zip(vectors.words, vectors.values, strict=True):
            if word in words:
                tower.token_embedding.weight[words[word]] = values
    return tower


def _build_gru(config: TextTower, tokenizer: Any, saved: Path | None) -> nn.Module:
    if config.pretrained:
        raise InputError(
            "model.text.pretrained: a gru has no released weights; remove it, or use start"
        )
    options = _options(config, {"width": 256, "num_layers": 1, "is_bidirectional": False})
    return GruText(tokenizer.vocab_size, pad_id=tokenizer.pad_id, pooling=config.pooling, **options)


_BUILDERS = {WORD_VECTORS: _build_word_vectors, GRU: _build_gru}


def _options(config: TextTower, defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(config.options.keys() - defaults.keys())
    if unknown:
        raise InputError(
            f"model.text.options: expected {', '.join(defaults)} for {config.name}, found "
            f"{', '.join(unknown)}; remove them"
        )
    return defaults | config.options


def save_sizes(backbone: nn.Module, folder: Path) -> None:
    """Writes the sizes of word vectors, which rebuilding the tower needs without their file."""
    if isinstance(backbone, WordVectorText):
        folder.mkdir(parents=True, exist_ok=True)
        table = backbone.token_embedding  # its weight is empty where ZeRO partitions parameters
        sizes = {"num_words": table.num_embeddings, "width": table.embedding_dim}
        (folder / _SIZES_FILE).write_text(json.dumps(sizes))
