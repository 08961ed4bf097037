import pickle

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer

from data_prep.errors import InputError
from pretrain.model.tokenizer import build_tokenizer
from pretrain.settings.model import TextTower
from tests.support.toy_towers import write_clip_tokenizer

CAPTIONS = [
    "A photo of a dog.",
    "  two   spaces &amp; an entity; 'quoted' text!  ",
    "It\u2019s caf\u00e9 na\u00efve \ufb01sh",
    "UPPER_case-with, punctuation?",
    "",
    "a " * 50,
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-L-14-CLIPA", "xlm-roberta-base-ViT-B-32"]
)
def test_ids_equal_those_of_open_clips_tokenizer_of_the_model(tokenizer_folder, name):
    """Compares the rules of the model with one vocabulary, because nothing is downloaded."""
    sizes = open_clip.get_model_config(name)["text_cfg"]
    theirs = HFTokenizer(
        str(tokenizer_folder), context_length=20, **sizes.get("tokenizer_kwargs", {})
    )
    config = TextTower(
        library="open_clip", name=name, context_length=20, tokenizer=str(tokenizer_folder)
    )
    ours = build_tokenizer(config)
    if ours.cleaning.strips_separators:
        for backend in (ours.backend, theirs.tokenizer):
            backend.sep_token = "<end_of_text>"
    assert torch.equal(ours(CAPTIONS), theirs(CAPTIONS))
    assert torch.equal(pickle.loads(pickle.dumps(ours))(CAPTIONS), theirs(CAPTIONS))


def test_a_tokenizer_of_transformers_is_not_cleaned_unless_the_config_says_so(tokenizer_folder):
    tower = {"library": "transformers", "name": "bert", "tokenizer": str(tokenizer_folder)}
    plain = build_tokenizer(TextTower(**tower))
    canonical = build_tokenizer(TextTower(**tower, cleaning="canonicalize"))
    expected = plain.backend(
        CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(plain(CAPTIONS), expected)
    assert torch.equal(canonical(["A, dog!"]), plain(["a dog"]))


def test_clips_own_tokenizer_takes_no_cleaning():
    with pytest.raises(InputError, match="cleaning=lower: CLIP's tokenizer has its own cleaning"):
        build_tokenizer(TextTower(library="open_clip", cleaning="lower"))
