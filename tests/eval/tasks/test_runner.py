"""Tasks are measured on all numbers of embeddings, and on their first numbers."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from data_prep.errors import InputError
from eval.evaluation import dims_to_measure
from eval.metrics.intervals import Bootstrap
from eval.tasks.retrieval import RetrievalTask
from eval.tasks.runner import Embeddings, measure_tasks

NUM_ITEMS, WIDTH = 20, 6


@dataclass
class ToyStore:
    """Embeddings of one task, instead of those of an encoder."""

    of_media: torch.Tensor
    of_texts: torch.Tensor

    def media(self, dataset, keys, *, view=None):
        return self.of_media

    def texts(self, texts):
        return self.of_texts


def toy_task():
    return RetrievalTask(
        "toy",
        SimpleNamespace(dataset=None),
        [str(n) for n in range(NUM_ITEMS)],
        [f"caption {n}" for n in range(NUM_ITEMS)],
        np.arange(NUM_ITEMS),
        [],
        [1, 5],
    )


def scores_of(media, texts, dims=()):
    embeddings = Embeddings(ToyStore(media, texts), torch.device("cpu"))
    bootstrap = Bootstrap(100, 0)
    [outcome] = measure_tasks([toy_task()], embeddings, bootstrap=bootstrap, matryoshka_dims=dims)
    return outcome.scores


def test_each_dim_is_measured_like_embeddings_of_its_width():
    generator = torch.Generator().manual_seed(0)
    media = torch.randn(NUM_ITEMS, WIDTH, generator=generator)
    texts = media + 0.7 * torch.randn(NUM_ITEMS, WIDTH, generator=generator)
    media, texts = (functional.normalize(side, dim=-1) for side in (media, texts))
    found = scores_of(media, texts, (2, 4))
    expected = scores_of(media, texts)
    for dim in (2, 4):
        short = [side[:, :dim] / side[:, :dim].norm(dim=1, keepdim=True) for side in (media, texts)]
        of_dim = scores_of(*short)
        assert of_dim["mean_recall@1"] != expected["mean_recall@1"]
        expected = expected | {f"dim{dim}_{name}": score for name, score in of_dim.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("of_config", "expected"), [(None, [2, 4]), ([], []), ([3], [3]), ([5, 1, 5], [1, 5])]
)
def test_a_list_of_the_config_replaces_that_of_the_model(of_config, expected):
    config = SimpleNamespace(matryoshka_dims=of_config)
    assert dims_to_measure(config, SimpleNamespace(matryoshka_dims=(2, 4), embed_dim=6)) == expected


def test_dims_beyond_the_embedding_are_refused():
    with pytest.raises(InputError, match="below 6, the width of the model's embeddings, found 6"):
        dims_to_measure(SimpleNamespace(matryoshka_dims=[2, 6]), SimpleNamespace(embed_dim=6))
