"""A model of all modalities of toy_views without training: fixed random projections."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import normalize

from data_prep.media.decode import decode_audio, decode_image

DIM = 8
SHAPES = {"values": (3,), "series": (4, 2)}
KINDS = {
    "image": "image",
    "audio": "audio",
    "text": "text",
    "scan": "image",
    "title": "text",
    "values": "vector",
    "series": "vector",
}


class ViewsModel(torch.nn.Module):
    """Encodes any modality; `without` leaves some out."""

    def __init__(self, *, without=()):
        super().__init__()
        self.kinds = {name: kind for name, kind in KINDS.items() if name not in without}
        self.tower_names = {name: name for name in self.kinds}
        self.towers = {
            name: SimpleNamespace(input_stage=SimpleNamespace(shape=shape))
            for name, shape in SHAPES.items()
        }

    def encode(self, modality, values, num_rows=None):
        if num_rows is not None:  # only rows that are not padding count
            is_row = torch.arange(values.shape[1]) < num_rows[:, None]
            values = (values * is_row[..., None]).sum(dim=1) + num_rows[:, None]
        rows = values.double().flatten(1)
        generator = torch.Generator().manual_seed(list(KINDS).index(modality))
        matrix = torch.randn(rows.shape[1], DIM, generator=generator, dtype=torch.float64)
        return normalize(torch.sin(rows @ matrix).float() + 0.1, dim=-1)


class FewNumbers:
    """Transform of an image or a clip to a few numbers that differ between contents."""

    config = SimpleNamespace(model_dump=lambda mode: {})
    clip_samples = 10_000

    def __init__(self, kind):
        self.kind = kind

    def decode(self, content, extension):
        if self.kind == "image":
            return decode_image(content, extension)
        return decode_audio(content, sample_rate_hz=16_000)

    def __call__(self, decoded):
        flat = np.asarray(decoded, dtype=np.float32).ravel()
        flat = flat / 255 if self.kind == "image" else 10 * flat
        return torch.from_numpy(np.resize(flat, 64)[:64].copy())


def tokenizer_of_letters(texts):
    """Returns the letters of M texts as int64 [M, 32]."""
    tokens = torch.zeros(len(texts), 32, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor([ord(letter) for letter in text[:32]])
    return tokens


def load_views_model(folder, *, device="cpu", weights="plain", without=()):
    """Replaces pretrain.checkpoint.load_model."""
    model = ViewsModel(without=without)
    transforms = {
        name: FewNumbers(kind) for name, kind in model.kinds.items() if kind in ("image", "audio")
    }
    has_text = "text" in model.kinds.values()
    return model, transforms, tokenizer_of_letters if has_text else None
