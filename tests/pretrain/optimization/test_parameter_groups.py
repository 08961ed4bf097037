import math

import torch
from torch import nn

from pretrain.optimization.parameter_groups import parameter_groups


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
