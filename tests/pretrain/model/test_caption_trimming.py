from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from transformers import AutoConfig, AutoModel

from pretrain.model.caption_trimming import (
    MASKS_PADDING,
    accept_trimmed_captions,
    takes_trimmed_captions,
    trimmed_length,
)
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.transformers_backbone import TransformersText

CONTEXT_LENGTH = 40
SIZES = {"context_length": CONTEXT_LENGTH, "vocab_size": 100, "width": 16, "heads": 2, "layers": 2}
END = 99


def tokenizer_with(pad_id=0, padding_side="right"):
    backend = SimpleNamespace(padding_side=padding_side)
    return Tokenizer(backend, context_length=CONTEXT_LENGTH, pad_id=pad_id, vocab_size=100)


def tokens_of(lengths, pad_id=0):
    """Returns captions that start with 98, end with 99 and are padded with pad_id."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 97, (len(lengths), CONTEXT_LENGTH), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, 0] = 98
        tokens[row, length - 1] = END
        tokens[row, length:] = pad_id
    return tokens


def features_and_gradients(tower, tokens):
    """Returns features and gradients of a sum with a different weight for each feature."""
    tower.zero_grad()
    features = tower(tokens)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {
        name: None if p.grad is None else p.grad.clone() for name, p in tower.named_parameters()
    }


def assert_same_when_trimmed(tower, tokens, *, length):
    features, gradients = features_and_gradients(tower, tokens)
    trimmed_features, trimmed_gradients = features_and_gradients(tower, tokens[:, :length])
    torch.testing.assert_close(trimmed_features, features)
    for name, gradient in gradients.items():
        if gradient is None:
            assert trimmed_gradients[name] is None
            continue
        scale = gradient.abs().max().clamp(min=1)
        torch.testing.assert_close(trimmed_gradients[name] / scale, gradient / scale)
    return gradients


@pytest.mark.parametrize(
    "options", [{}, {"pool_type": "eos", "eos_id": END}], ids=["argmax", "eos"]
)
def test_open_clips_causal_tower_gives_the_same_for_trimmed_captions(options):
    torch.manual_seed(0)
    tower = TextTransformer(**SIZES, **options)
    torch.nn.init.normal_(tower.positional_embedding)  # as large as the tokens: places matter
    names = list(tower.state_dict())
    assert takes_trimmed_captions(tower, tokenizer_with())
    accept_trimmed_captions(tower)
    assert list(tower.state_dict()) == names
    tokens = tokens_of([3, 16, 9])
    gradients = assert_same_when_trimmed(tower, tokens, length=16)
    # The table's first 16 places were used, each as before, and no other.
    used = gradients["positional_embedding"].abs().sum(dim=1) > 0
    assert used.tolist() == [True] * 16 + [False] * 24
    moved = tokens.roll(1, dims=1)
    assert not torch.allclose(tower(moved)[1], tower(tokens)[1], atol=1e-3)


def test_checkpointed_activations_of_open_clip_take_trimmed_captions_too():
    torch.manual_seed(0)
    tower = TextTransformer(**SIZES)
    accept_trimmed_captions(tower)
    tower.set_grad_checkpointing()
    assert_same_when_trimmed(tower.train(), tokens_of([3, 16, 9]), length=16)


def tiny_transformer(model_type, **options):
    sizes = {
        "vocab_size": 100,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": CONTEXT_LENGTH + 2,
        "pad_token_id": 1,
    }
    if model_type == "distilbert":
        sizes = {"vocab_size": 100, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    others = {
        "albert": {"embedding_size": 16},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2}
        | dict.fromkeys(("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 2),
    }
    values = sizes | others.get(model_type, {}) | options
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **values)).eval()


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("model_type", MASKS_PADDING)
def test_transformers_that_mask_padding_give_the_same_for_trimmed_captions(model_type, pooling):
    tower = TransformersText(tiny_transformer(model_type), pad_id=1, pooling=pooling)
    assert takes_trimmed_captions(tower, tokenizer_with(pad_id=1))
    accept_trimmed_captions(tower)
    assert_same_when_trimmed(tower, tokens_of([3, 16, 9], pad_id=1), length=16)


def test_a_tower_that_sees_padding_is_not_trimmed():
    fnet = TransformersText(tiny_transformer("fnet"), pad_id=1, pooling="mean")
    tokens = tokens_of([3, 16, 9], pad_id=1)
    assert not torch.allclose(fnet(tokens), fnet(tokens[:, :16]), atol=1e-3)
    assert not takes_trimmed_captions(fnet, tokenizer_with(pad_id=1))
    bert = TransformersText(tiny_transformer("bert"), pad_id=1, pooling="first")
    assert not takes_trimmed_captions(bert, tokenizer_with(pad_id=1, padding_side="left"))


@pytest.mark.parametrize(
    ("options", "pad_id"),
    [
        ({"no_causal_mask": True}, 0),
        ({"no_causal_mask": True, "use_pad_mask": True}, 0),
        ({"embed_cls": True}, 0),
        ({"pool_type": "last"}, 0),
        ({"pool_type": "first"}, 0),
        ({}, END),  # padding like the end token: it is the highest
        ({"pool_type": "eos", "eos_id": END}, END),
    ],
)
def test_open_clips_other_towers_are_not_trimmed(options, pad_id):
    assert not takes_trimmed_captions(TextTransformer(**SIZES, **options), tokenizer_with(pad_id))


def test_open_clips_wrapper_of_transformers_is_not_trimmed():
    assert not takes_trimmed_captions(torch.nn.Identity(), tokenizer_with())
    assert not issubclass(open_clip.hf_model.HFTextEncoder, TextTransformer)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([3, 16, 9], 16), ([17], 24), ([39, 2], 40), ([37], 40), ([2], 8), ([], 8), ([4, 0], 40)],
)
def test_captions_are_trimmed_to_the_longest_in_steps_of_eight(lengths, expected):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    assert trimmed_length(lengths, context_length=40) == expected
    assert trimmed_length(lengths, context_length=6) == 6
