"""Tiny towers with every layer that drops per sample, and gradients for any split of a batch."""

from pathlib import Path

import torch
from torch.nn import functional

from pretrain.model.contrastive_model import ContrastiveModel, StreamInputs
from pretrain.model.sample_dropout import DropKeys
from pretrain.model.tokenizer import build_tokenizer
from tests.support.toy_run import toy_config
from tests.support.toy_towers import TINY_BERT, build_toy_model, write_clip_tokenizer

NUM_PAIRS = 8
VIT = {
    "library": "timm",
    "name": "test_vit",
    "options": {
        "img_size": 16,
        "patch_size": 4,
        "depth": 2,
        "pos_drop_rate": 0.1,
        "patch_drop_rate": 0.4,
        "proj_drop_rate": 0.2,
        "drop_path_rate": 0.4,
        "drop_rate": 0.1,
    },
}
# Windows of a log-mel spectrogram, so that a row is part of a sample.
SWIN = {
    "library": "timm",
    "name": "swin_tiny_patch4_window7_224",
    "options": {
        "img_size": [16, 24],
        "patch_size": 2,
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "proj_drop_rate": 0.2,
        "drop_path_rate": 0.4,
    },
}
LOG_MEL = {"fft_samples": 128, "hop_samples": 68, "num_mel_bins": 16, "high_hz": 2000.0}


def dropping_config(folder: Path, **sections):
    """Builds a toy config with three dropping towers."""
    text = {
        "library": "transformers",
        "name": "bert",
        "options": TINY_BERT | {"hidden_dropout_prob": 0.2},
        "context_length": 24,
        "tokenizer": str(write_clip_tokenizer(folder / "tokenizer")),
    }
    model = {"image": VIT, "audio": SWIN, "text": text}
    return toy_config(folder, folder / "run", model=model, audio={"log_mel": LOG_MEL}, **sections)


class Pairs:
    """Pairs of one step for both streams, for a model in float64."""

    def __init__(self, config) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokenizer = build_tokenizer(config.model.text)
        self.media = {
            "image-text": torch.randint(0, 256, (NUM_PAIRS, 3, 16, 16), generator=generator).byte(),
            "audio-text": torch.randn(NUM_PAIRS, 1600, generator=generator).double(),
        }
        captions = [f"picture {number} of {'something ' * number}" for number in range(NUM_PAIRS)]
        self.tokens = self.tokenizer(captions)

    def build_model(self, config) -> ContrastiveModel:
        """Builds the model in float64 and training mode, with the same weights each time."""
        return build_toy_model(config, self.tokenizer).double().train()

    def micro_batch(
        self, rows: slice, *, step: int, num_tokens: int = 24
    ) -> dict[str, StreamInputs]:
        """Returns the inputs of a micro-batch or a rank."""
        drop_keys = DropKeys(torch.tensor(step), torch.arange(NUM_PAIRS)[rows])
        return {
            name: StreamInputs(
                {name.partition("-")[0]: (media[rows],), "text": (self.tokens[rows, :num_tokens],)},
                drop_keys,
            )
            for name, media in self.media.items()
        }

    def gradients(self, model, sizes=(NUM_PAIRS,), *, step: int = 3, trims: bool = False):
        """Computes all gradients, with the batch encoded in micro-batches of the given sizes."""
        micro_batches, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            lengths = self.tokenizer.lengths(self.tokens[rows]).tolist()
            longest = max(lengths, default=1) if trims else 24
            micro_batches.append(model([self.micro_batch(rows, step=step, num_tokens=longest)]))
            start += size
        assert start == NUM_PAIRS
        loss = torch.zeros((), dtype=torch.float64)
        for name in self.media:
            media, text = (
                torch.cat([p.views[name][view] for p in micro_batches]).double()
                for view in (name.partition("-")[0], "text")
            )
            logits = micro_batches[0].scales[name] * media @ text.T
            loss = loss + functional.cross_entropy(logits, torch.arange(NUM_PAIRS))
        model.zero_grad()
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def largest_difference(ours, theirs) -> float:
    """Computes the largest difference over all gradients, each relative to its largest element.

    Gradients that are rounding noise, such as of the bias of attention's keys, count less.
    """
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3))
        for name in theirs
    )
