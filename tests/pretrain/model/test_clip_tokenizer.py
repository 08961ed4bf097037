import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from open_clip.tokenizer import SimpleTokenizer

from pretrain.model import clip_tokenizer
from pretrain.model.clip_tokenizer import ClipTokenizer

ODD = [
    "",
    "   ",
    "A photo of a cat.",
    "don't &amp;amp; &lt;b&gt; AT&T",
    "caf\u00e9 \u201cquoted\u201d \ufb01ne sch\u00c3\u00b6n",
    "tabs\tand\nlines\r\n and \x1b[31mred\x1b[0m nul\x00",
    "<start_of_text> <END_OF_TEXT> [x] 1234567",
    "\U0001f600 emoji \u4e2d\u6587 \uff28\uff21\uff2c\uff26",
    "word " * 100,
]


@pytest.fixture(scope="module")
def tokenizers():
    return ClipTokenizer(context_length=20), SimpleTokenizer(context_length=20)


def test_token_ids_are_those_of_open_clip(tokenizers):
    own, peer = tokenizers
    for _ in range(2):  # words met for the first time, and words remembered
        assert torch.equal(own(ODD), peer(ODD))
    assert torch.equal(own(ODD[2:4], context_length=7), peer(ODD[2:4], context_length=7))


@given(st.text() | st.text(st.characters(max_codepoint=127)))
@settings(max_examples=300)
def test_token_ids_of_any_text_are_those_of_open_clip(tokenizers, text):
    own, peer = tokenizers
    assert torch.equal(own([text]), peer([text]))


def test_what_it_remembers_is_bounded_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(clip_tokenizer, "MAX_CACHED_WORDS", 5)
    own, peer = ClipTokenizer(context_length=20), SimpleTokenizer(context_length=20)
    texts = [f"word{chr(97 + n)} other thing{chr(97 + n)}" for n in range(20)] * 2
    assert torch.equal(own(texts), peer(texts))
    assert len(own._ids_of_word) <= 5
    assert len(own.cache) <= 5 + 2
