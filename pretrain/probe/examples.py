"""Examples for the probe: noise of the run's shapes, and captions of random tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.model.caption_trimming import TOKENS_MULTIPLE
from pretrain.model.contrastive_model import Tower
from pretrain.model.tokenizer import Tokenizer
from pretrain.settings.transforms import AudioTransform, ImageTransform

NUM_SAMPLES = 3


def backbone_examples(
    towers: Mapping[str, Tower],
    kinds: Mapping[str, str],
    *,
    image: ImageTransform,
    audio: AudioTransform,
    tokenizer: Tokenizer | None,
) -> dict[str, Tensor]:
    """Returns {tower: inputs of its backbone [3, ...]}, on the device of the tower.

    The second caption has the shortest length to which training trims.

    Args:
        towers: towers of a model.
        kinds: kind of each tower.
        image: config section `image`.
        audio: config section `audio`.
        tokenizer: tokenizer of the texts; None without a text tower.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (NUM_SAMPLES, 3, image.size, image.size), generator=generator, dtype=torch.uint8
    )
    num_values = round(audio.clip_seconds * audio.sample_rate_hz)
    waveforms = 0.1 * torch.randn(NUM_SAMPLES, num_values, generator=generator)
    inputs = {"image": (pixels,), "audio": (waveforms,)}
    if tokenizer is not None:
        length = tokenizer.context_length
        lengths = [length, min(length, TOKENS_MULTIPLE), max(1, length // 2)]
        inputs["text"] = (token_rows(tokenizer, lengths),)
    examples = {}
    for name, tower in towers.items():
        kind, device = kinds[name], next(tower.parameters()).device
        of_tower = _vectors(tower, generator) if kind == "vector" else inputs[kind]
        with torch.no_grad():
            examples[name] = tower.input_stage(*(each.to(device) for each in of_tower))
    return examples


def _vectors(tower: Tower, generator: torch.Generator) -> tuple[Tensor, ...]:
    shape = tower.input_stage.shape
    values = torch.randn(NUM_SAMPLES, *shape, generator=generator)
    if len(shape) == 1:
        return (values,)
    return values, torch.tensor([shape[0], 1, max(1, shape[0] // 2)])


def token_rows(tokenizer: Tokenizer, lengths: Sequence[int]) -> Tensor:
    """Returns captions of random tokens: int64 [captions, context_length].

    Each begins and ends like a real caption. The second token of the second one is the largest id.

    Args:
        tokenizer: tokenizer of the captions.
        lengths: number of tokens of each caption, at least 1.
    """
    [real] = tokenizer(["a photo of a dog"])
    tokens = real[real != tokenizer.pad_id].tolist() or [tokenizer.pad_id]
    first, last = tokens[0], tokens[-1]
    ordinary = torch.ones(tokenizer.largest_id + 1, dtype=torch.bool)
    ordinary[[first, last, tokenizer.pad_id]] = False
    ids = ordinary.nonzero()[:, 0] if ordinary.any() else torch.tensor([first])
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), tokenizer.context_length)
    rows = ids[torch.randint(len(ids), shape, generator=generator)]
    rows[1:2, 1:2] = tokenizer.largest_id
    pads_left = getattr(tokenizer.backend, "padding_side", "right") == "left"
    for row, length in zip(rows, lengths, strict=True):
        row[0] = first
        row[length - 1 : length] = last
        row[length:] = tokenizer.pad_id
        if pads_left:
            row.copy_(row.roll(len(row) - length))
    return rows
