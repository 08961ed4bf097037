"""Items are encoded in full batches of windows, and few windows wait at a time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.models.encoder import Encoder, ItemEncoder
from eval.models.preprocessing import MediaFrontEnd

WIDTH = 6


class CountingModel:
    """Embeds a window as its sum and square, and records the sizes of batches."""

    def __init__(self):
        self.batches = []

    def encode(self, modality, batch):
        self.batches.append(len(batch))
        return torch.nn.functional.normalize(torch.cat([batch, batch.square()], dim=1), dim=-1)


def encoder_of(batch_size):
    origin = SimpleNamespace(folder="toy")
    device = torch.device("cpu")
    front_ends = {"audio": MediaFrontEnd("audio", None, {}, "windows")}
    return Encoder(CountingModel(), front_ends, None, origin, device, torch.float32, batch_size, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_embeddings_do_not_depend_on_the_grouping_of_items(batch_size):
    generator = np.random.default_rng(batch_size)
    num_windows = generator.integers(1, 9, 40).tolist()
    windows = torch.randn(sum(num_windows), WIDTH, generator=torch.Generator().manual_seed(0))
    expected = encoder_of(batch_size).encode_items("audio", windows, num_windows)
    for group in (1, 2, 7, 40):
        encoder = encoder_of(batch_size)
        items = ItemEncoder(encoder, "audio")
        start = 0
        for first in range(0, 40, group):
            counts = num_windows[first : first + group]
            items.add(windows[start : start + sum(counts)], counts)
            start += sum(counts)
            assert sum(map(len, items._waiting)) < batch_size
        found = items.finish()
        assert torch.equal(found, expected)
        assert encoder.model.batches == [batch_size] * -(-len(windows) // batch_size)


def test_the_number_of_long_clips_prepared_together_is_small():
    assert [encoder_of(size).items_at_once for size in (1, 16, 128, 512)] == [1, 1, 8, 32]
