import pytest
import torch

from pretrain.loss import backend
from pretrain.loss.backend import backend_classes, choose_backend

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu_with_triton(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)


def test_kernels_take_bfloat16_on_a_gpu_with_own_pairs_as_the_only_targets(gpu_with_triton):
    assert choose_backend(GPU, torch.bfloat16) == "triton"
    assert choose_backend(CPU, torch.bfloat16) == "library"
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert choose_backend(GPU, dtype) == "library"
    for rare in ({"has_duplicates": True}, {"label_smoothing": 0.1}, {"has_teacher": True}):
        assert choose_backend(GPU, torch.bfloat16, **rare) == "library"


def test_a_gpu_without_triton_is_given_the_library(monkeypatch):
    monkeypatch.setattr(backend, "runs_triton", lambda device: False)
    assert choose_backend(GPU, torch.bfloat16) == "library"


def test_kernels_are_the_parts_of_one_backend_alone():
    assert backend_classes("library").tiles.__name__ == "LogitTiles"
    assert backend_classes("triton").tiles.__name__ == "FeatureTiles"
