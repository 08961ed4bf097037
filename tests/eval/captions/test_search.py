"""Beam search against an enumeration of all captions, and greedy search against a loop."""

import itertools

import pytest
import torch

from eval.captions.search import search_captions
from pretrain.captioning.caption_marks import CaptionMarks

MARKS = CaptionMarks(start=0, end=1, pad=2)
VOCABULARY = 6
CPU = torch.device("cpu")


def logits_of(prefix, item):
    """Returns the logits after a prefix [V], a function of the prefix and the item alone."""
    seed = hash((tuple(prefix), item)) % 2**31
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def next_logits(ids, items):
    rows = zip(ids.tolist(), items.tolist(), strict=True)
    return torch.stack([logits_of(prefix, item) for prefix, item in rows])


def log_probabilities(prefix, item):
    """Returns [V] of the tokens that may follow; start and padding may not."""
    logits = logits_of(prefix, item).double()
    logits[[MARKS.start, MARKS.pad]] = -torch.inf
    return logits.log_softmax(dim=-1)


def greedy(item, *, max_tokens):
    ids = [MARKS.start]
    while len(ids) < max_tokens and ids[-1] != MARKS.end:
        ids.append(int(log_probabilities(ids, item).argmax()))
    return ids


def best_of_all(item, *, max_tokens, length_penalty):
    """Returns the caption with the best score of all that can be written."""
    words = [token for token in range(VOCABULARY) if token not in (0, 1, 2)]
    candidates = [
        [MARKS.start, *middle, MARKS.end]
        for length in range(max_tokens - 1)
        for middle in itertools.product(words, repeat=length)
    ]
    candidates += [
        [MARKS.start, *middle] for middle in itertools.product(words, repeat=max_tokens - 1)
    ]

    def score(ids):
        total = sum(
            float(log_probabilities(ids[:place], item)[ids[place]]) for place in range(1, len(ids))
        )
        return total / (len(ids) - 1) ** length_penalty

    return max(candidates, key=score)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9])
def test_one_beam_is_greedy(max_tokens):
    found = search_captions(next_logits, 12, marks=MARKS, max_tokens=max_tokens, device=CPU)
    assert found == [greedy(item, max_tokens=max_tokens) for item in range(12)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_as_many_beams_as_captions_find_the_best_of_all(length_penalty):
    max_tokens, num_items = 5, 4
    found = search_captions(
        next_logits,
        num_items,
        marks=MARKS,
        max_tokens=max_tokens,
        num_beams=200,
        length_penalty=length_penalty,
        device=CPU,
    )
    options = {"max_tokens": max_tokens, "length_penalty": length_penalty}
    assert found == [best_of_all(item, **options) for item in range(num_items)]


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_captions_do_not_depend_on_the_other_items(num_beams):
    options = {"marks": MARKS, "max_tokens": 8, "num_beams": num_beams, "device": CPU}
    together = search_captions(next_logits, 7, **options)
    for item in range(7):
        alone = search_captions(
            lambda ids, items, item=item: next_logits(ids, items + item), 1, **options
        )
        assert alone == [together[item]]


def test_more_beams_find_captions_at_least_as_likely_without_penalty():
    def likelihood(ids, item):
        return sum(float(log_probabilities(ids[:n], item)[ids[n]]) for n in range(1, len(ids)))

    options = {"marks": MARKS, "max_tokens": 5, "length_penalty": 0.0, "device": CPU}
    few, many = (search_captions(next_logits, 20, num_beams=beams, **options) for beams in (1, 200))
    gains = [
        likelihood(m, i) - likelihood(f, i) for i, (f, m) in enumerate(zip(few, many, strict=True))
    ]
    assert min(gains) > -1e-9
    assert max(gains) > 0
