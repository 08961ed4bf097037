"""Captions that a model writes for a dataset, and the loss of its references, by all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from eval.captions.captioner import Captioner
from eval.captions.search import search_captions
from eval.datasets.datasets import EvaluationSet
from eval.embeddings.batches import media_batches
from eval.models.encoder import Encoder
from pretrain.captioning.caption_decoder import caption_sums
from pretrain.distributed.collectives import gather_objects, rank, world_size
from pretrain.settings.views import View


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the search; see `search_captions`."""

    num_beams: int
    max_tokens: int
    length_penalty: float
    batch_size: int  # items captioned at once


@dataclass(frozen=True)
class WrittenCaption:
    """The caption of one item, and the model's predictions of the item's references."""

    ordinal: int
    caption: str
    loss: float  # sum of cross-entropy over the tokens of all references, in nats
    num_tokens: int
    num_best: int  # tokens that were predicted best


def write_captions(
    captioner: Captioner,
    encoder: Encoder,
    dataset: EvaluationSet,
    references: Sequence[Sequence[str]],
    *,
    keys: Sequence[str],
    view: str,
    settings: SearchSettings,
) -> list[WrittenCaption]:
    """Writes the captions of a dataset; every process must call it and gets all of them.

    Batches of items in the order of their keys are shared among the processes. They are the same
    for any number of processes. Of a clip of several windows, the first one is described.

    Args:
        captioner: decoder of the model.
        encoder: encoder of the model.
        dataset: dataset of Q items.
        references: [Q] captions of each item.
        keys: [Q] keys of the items.
        view: view of the items that is described.
        settings: settings of the search.

    Raises:
        InputError: if a sample cannot be read.
    """
    order = np.argsort(np.array(keys), kind="stable").tolist()
    size = settings.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    own = batches[rank() :: world_size()]
    shown = View.parse(view)
    front_end = encoder.front_ends[shown.modality]
    found = []
    prepared = media_batches(dataset, front_end, own, member=shown.member, workers=encoder.workers)
    for ordinals, (windows, num_windows) in zip(own, prepared, strict=True):
        firsts = [0, *accumulate(num_windows)][:-1]
        found += _write(
            captioner,
            encoder,
            front_end.inputs(windows[firsts].to(encoder.device)),
            ordinals,
            [references[ordinal] for ordinal in ordinals],
            settings,
        )
    gathered = [each for of_rank in gather_objects(found) for each in of_rank]
    return sorted(gathered, key=lambda each: each.ordinal)


@torch.inference_mode()
def _write(
    captioner: Captioner,
    encoder: Encoder,
    media: tuple[Tensor, ...],
    ordinals: Sequence[int],
    references: Sequence[Sequence[str]],
    settings: SearchSettings,
) -> list[WrittenCaption]:
    with encoder.precision():
        memory = captioner.memory(*media)  # [B, Q, W]
        captions = search_captions(
            lambda ids, items: captioner.logits(memory[items], ids)[:, -1],
            len(ordinals),
            marks=captioner.marks,
            max_tokens=settings.max_tokens,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            device=encoder.device,
        )
        sums = _sums_of_references(captioner, memory, references, size=settings.batch_size)
    marks = captioner.marks
    return [
        WrittenCaption(
            ordinal,
            captioner.text_of([each for each in ids if each not in (marks.start, marks.end)]),
            loss,
            int(num_tokens),
            int(num_best),
        )
        for ordinal, ids, (loss, num_tokens, num_best, _) in zip(
            ordinals, captions, sums.tolist(), strict=True
        )
    ]


def _sums_of_references(
    captioner: Captioner, memory: Tensor, references: Sequence[Sequence[str]], *, size: int
) -> Tensor:
    """float64 [B, 4], the sums of `caption_sums` over the references of each item"""
    items = [item for item, own in enumerate(references) for _ in own]
    ids = captioner.tokenize([text for own in references for text in own]).to(memory.device)
    totals = torch.zeros(len(references), 4, dtype=torch.float64)
    for start in range(0, len(items), size):
        part = slice(start, start + size)
        rows = torch.tensor(items[part])
        logits = captioner.logits(memory[rows.to(memory.device)], ids[part, :-1])
        sums = caption_sums(logits, ids[part], marks=captioner.marks)
        totals.index_add_(0, rows, sums.double().cpu())
    return totals
