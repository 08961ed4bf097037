"""Beam search for captions; with one beam, greedy search.

    1. every caption begins with the start token
    2. the live captions of an item are continued by every token; the best `num_beams` live on
    3. a caption that ends among the best `num_beams` continuations is finished
    4. an item is done once `num_beams` captions are finished, or at the largest length
    5. the finished caption with the highest mean log probability of its tokens is returned

Nothing is random, and equal scores are ordered as torch.topk orders them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.captioning.caption_marks import CaptionMarks

# (token ids [R, t], item of each row [R]) -> logits of the next token [R, V]
NextLogits = Callable[[Tensor, Tensor], Tensor]


@dataclass
class _Item:
    """Captions of one item that are finished, with their scores."""

    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, log_probability: float, ids: list[int], length_penalty: float) -> None:
        num_new = max(1, len(ids) - 1)  # without the start token
        self.finished.append((log_probability / num_new**length_penalty, ids))

    @property
    def best(self) -> list[int]:
        return max(self.finished, key=lambda each: each[0])[1]


@torch.inference_mode()
def search_captions(
    next_logits: NextLogits,
    num_items: int,
    *,
    marks: CaptionMarks,
    max_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    device: torch.device,
) -> list[list[int]]:
    """Finds the caption of each item by beam search.

    Args:
        next_logits: model.
        num_items: B.
        marks: start, end and padding of captions.
        max_tokens: largest number of tokens, including start and end; longer captions are cut.
        num_beams: captions of an item that are continued; 1: greedy search.
        length_penalty: power of the length by which log probabilities are divided; 0: none.
        device: device of the model.

    Returns:
        [B] token ids, which begin with the start token.
    """
    items = [_Item() for _ in range(num_items)]
    ids = torch.full((num_items * num_beams, 1), marks.start, device=device)  # [B * beams, t]
    scores = torch.full((num_items, num_beams), -torch.inf, dtype=torch.float64)
    scores[:, 0] = 0  # all live captions of an item are equal at first
    owners = torch.arange(num_items, device=device).repeat_interleave(num_beams)
    while ids.shape[1] < max_tokens and any(len(item.finished) < num_beams for item in items):
        logits = next_logits(ids, owners).double()
        logits[:, [each for each in (marks.start, marks.pad) if each != marks.end]] = -torch.inf
        totals = scores.to(device).unsqueeze(2) + logits.log_softmax(dim=-1).unflatten(
            0, (num_items, num_beams)
        )  # [B, beams, V]
        best = totals.flatten(1).topk(min(2 * num_beams, totals[0].numel()), dim=1)
        rows = _continue(items, ids, best, marks, totals.shape[2], length_penalty)
        scores = torch.tensor([[score for score, *_ in row] for row in rows], dtype=torch.float64)
        beams = torch.tensor([beam for row in rows for _, beam, _ in row], device=device)
        tokens = torch.tensor([token for row in rows for *_, token in row], device=device)
        ids = torch.cat([ids[beams], tokens[:, None]], dim=1)
    live = ids.unflatten(0, (num_items, num_beams)).tolist()
    for item, own, captions in zip(items, scores.tolist(), live, strict=True):
        if len(item.finished) < num_beams:
            for score, caption in zip(own, captions, strict=True):
                if score > -torch.inf:
                    item.add(score, caption, length_penalty)
    return [item.best for item in items]


def _continue(
    items: list[_Item],
    ids: Tensor,
    best: tuple[Tensor, Tensor],
    marks: CaptionMarks,
    vocab_size: int,
    length_penalty: float,
) -> list[list[tuple[float, int, int]]]:
    """[B][beams] (score, row of the caption that is continued, token) of the captions that live on.

    Captions that end are added to the items.
    """
    num_beams = len(ids) // len(items)
    found = []
    for number, (item, values, places) in enumerate(
        zip(items, best[0].tolist(), best[1].tolist(), strict=True)
    ):
        live: list[tuple[float, int, int]] = []
        for rank, (value, place) in enumerate(zip(values, places, strict=True)):
            beam, token = divmod(place, vocab_size)
            row = number * num_beams + beam
            if value == -torch.inf or len(live) == num_beams:
                break
            if token != marks.end:
                live.append((value, row, token))
            elif rank < num_beams and len(item.finished) < num_beams:
                item.add(value, [*ids[row].tolist(), token], length_penalty)
        dead = (-torch.inf, number * num_beams, marks.end)
        found.append(live + [dead] * (num_beams - len(live)))
    return found
