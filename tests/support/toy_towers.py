"""Tiny towers of open_clip and transformers, built without a download."""

import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import default_bpe

from pretrain.checkpoint import build_model_of
from pretrain.config import PretrainConfig
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.tokenizer import Tokenizer, build_tokenizer

TINY_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 49408,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def build_toy_model(config: PretrainConfig, tokenizer: Tokenizer | None = None) -> ContrastiveModel:
    """Builds the model of a whole config."""
    return build_model_of(config, tokenizer or build_tokenizer(config.model.text))


def write_clip_tokenizer(folder: Path) -> Path:
    """Writes a transformers tokenizer with the vocabulary that open_clip ships."""
    from transformers import CLIPTokenizer

    simple = open_clip.tokenizer.SimpleTokenizer(default_bpe())
    merges = [" ".join(pair) for pair in simple.bpe_ranks]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(simple.encoder))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    start, end = "<start_of_text>", "<end_of_text>"
    CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token="!",
    ).save_pretrained(folder)
    return folder


def write_tiny_open_clip(folder: Path):
    """Registers an open_clip model "tiny", writes its weights and returns it."""
    transformer = {"width": 16, "layers": 1}
    sizes = {
        "embed_dim": 16,
        "vision_cfg": transformer | {"image_size": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": transformer | {"context_length": 12, "vocab_size": 49408, "heads": 2},
    }
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(folder / "configs")
    clip = open_clip.create_model("tiny", force_custom_text=True)
    torch.save(clip.state_dict(), folder / "clip.pt")
    return clip


def write_word_tokenizer(folder: Path, words: Sequence[str]) -> Path:
    """Writes a transformers tokenizer of whole words, which loads in milliseconds."""
    from tokenizers import Tokenizer as WordTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = WordTokenizer(WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder
