import math

import pytest
import torch
from torch import nn

from pretrain.optimization.optimizer import ClampedAdamW


def test_the_step_keeps_scales_within_their_bounds():
    scale = nn.Parameter(torch.tensor([4.6]))
    optimizer = ClampedAdamW([{"params": [scale], "clamp": (0.0, math.log(100))}], lr=1.0)
    scale.grad = torch.tensor([-1.0])
    optimizer.step()
    assert scale.item() == pytest.approx(math.log(100))


def test_without_bounds_it_is_torchs_adamw():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    optimizers = [
        ClampedAdamW([{"params": [ours], "clamp": None}], **settings),
        torch.optim.AdamW([theirs], **settings),
    ]
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
