import math

import pytest
import torch
from torch import nn

from pretrain.config import Schedule
from pretrain.training.optimizer import ClampedAdamW, learning_rate_at, parameter_groups


class SmallModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.log_logit_scale = nn.ParameterDict({"image-text": nn.Parameter(torch.zeros(1))})


def test_only_matrices_decay_and_scales_have_bounds():
    model = SmallModel()
    decayed, undecayed, scales = parameter_groups(model, weight_decay=0.1, max_scale=100)
    assert decayed["params"] == [model.linear.weight]
    assert decayed["weight_decay"] == 0.1
    assert len(undecayed["params"]) == 3  # linear.bias, norm.weight, norm.bias
    assert undecayed["weight_decay"] == scales["weight_decay"] == 0
    assert scales["clamp"] == (0.0, math.log(100))


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


def rates(**schedule):
    schedule = Schedule(num_steps=10, **schedule)
    return [learning_rate_at(step, peak=2.0, schedule=schedule) for step in range(10)]


def test_cosine_rises_linearly_and_falls_to_nearly_zero():
    values = rates(warmup_steps=4)
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert values[7] == pytest.approx(1.0)  # half-way down: cos(pi / 2) = 0
    assert values == sorted(values[:4]) + sorted(values[4:], reverse=True)
    assert 0 < values[-1] < 0.2


def test_constant_stays_and_cooldown_falls_linearly():
    assert rates(shape="constant") == [2.0] * 10
    values = rates(shape="constant_with_cooldown", cooldown_steps=4)
    assert values == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5])


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into num_steps=10"):
        rates(warmup_steps=11)
    with pytest.raises(ValueError, match="needs cooldown_steps above 0"):
        rates(shape="constant_with_cooldown")
