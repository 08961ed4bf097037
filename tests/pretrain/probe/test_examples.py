from types import SimpleNamespace

import pytest
import torch

from pretrain.model.tokenizer import Tokenizer
from pretrain.probe.examples import token_rows

FIRST, LAST, PAD, LARGEST = 7, 9, 3, 12


class Backend(SimpleNamespace):
    """Encodes every caption to the same four tokens."""

    def __call__(self, captions, context_length):
        tokens = torch.tensor([FIRST, 1, 2, LAST] + [PAD] * (context_length - 4))
        return tokens[:context_length].repeat(len(captions), 1)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_captions_of_random_tokens_look_like_real_ones(padding_side):
    backend = Backend(padding_side=padding_side)
    tokenizer = Tokenizer(backend, context_length=10, pad_id=PAD, vocab_size=LARGEST + 1)
    lengths = [10, 5, 3, 1]
    rows = token_rows(tokenizer, lengths)
    assert rows.shape == (4, 10)
    assert rows[rows != PAD].max() == LARGEST
    for row, length in zip(rows, lengths, strict=True):
        is_left = padding_side == "left"
        caption, padding = (row[-length:], row[:-length]) if is_left else row.tensor_split([length])
        assert (padding == PAD).all() or length == 10
        assert caption[-1] == LAST
        assert length == 1 or caption[0] == FIRST
        assert not set(caption[1:-1].tolist()) & {FIRST, LAST, PAD}
    assert (rows[1] == LARGEST).any()


def test_a_vocabulary_of_special_tokens_alone_is_used():
    tokenizer = Tokenizer(Backend(), context_length=2, pad_id=1, vocab_size=2)
    tokenizer.backend = lambda captions, context_length: torch.tensor([[0, 1]])
    assert token_rows(tokenizer, [2, 2]).tolist() == [[0, 0], [0, 0]]
