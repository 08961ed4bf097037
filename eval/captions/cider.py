"""CIDEr-D, the consensus of a caption with references (Vedantam et al. 2015, section 5).

It is the "CIDEr" of pycocoevalcap and of the COCO server. It compares n-grams of 1 to 4 words by
clipped counts, which are weighted by their rarity among the references of all items. A Gaussian
penalises different lengths, counted in bigrams as pycocoevalcap does. Published
values use Stanford's PTBTokenizer, which splits some words ("don't" into "do n't"); `caption_words`
does not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

MAX_WORDS = 4  # of an n-gram
SIGMA = 6.0  # of the penalty of lengths
SCALE = 10.0

Ngrams = Counter[tuple[str, ...]]


def caption_words(caption: str) -> list[str]:
    """Splits a caption into words, in lower case and without punctuation."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*", caption.lower())


def cider_d(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """Computes CIDEr-D of each item, float64 [Q], from 0 to 10; published values are the mean.

    Args:
        captions: [Q] words of the caption of each item.
        references: [Q] words of one or more references of each item.
    """
    of_references = [[_ngrams(words) for words in each] for each in references]
    num_items = Counter(ngram for each in of_references for ngram in set().union(*each))
    rarity = {ngram: math.log(len(captions) / count) for ngram, count in num_items.items()}
    unseen = math.log(len(captions))
    return np.array(
        [
            SCALE * np.mean([_similarity(_ngrams(words), each, rarity, unseen) for each in own])
            for words, own in zip(captions, of_references, strict=True)
        ]
    )


def _ngrams(words: Sequence[str]) -> Ngrams:
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, MAX_WORDS + 1)
        for start in range(len(words) - size + 1)
    )


def _similarity(
    caption: Ngrams, reference: Ngrams, rarity: Mapping[tuple[str, ...], float], unseen: float
) -> float:
    """Mean over n of the penalised cosine of clipped, weighted counts"""
    weighted = [
        {ngram: count * rarity.get(ngram, unseen) for ngram, count in each.items()}
        for each in (caption, reference)
    ]
    delta = _num_bigrams(caption) - _num_bigrams(reference)
    penalty = math.exp(-(delta**2) / (2 * SIGMA**2))
    total = 0.0
    for size in range(1, MAX_WORDS + 1):
        own, other = (
            {ngram: value for ngram, value in each.items() if len(ngram) == size}
            for each in weighted
        )
        product = sum(min(own[n], other[n]) * other[n] for n in own.keys() & other.keys())
        norms = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in other.values()))
        total += product / norms * penalty if norms else 0.0
    return total / MAX_WORDS


def _num_bigrams(ngrams: Ngrams) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
