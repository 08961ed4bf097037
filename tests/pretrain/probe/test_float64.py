import functools

import torch
from torch import nn

from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.probe.backbone_copy import ProbedBackbone
from pretrain.probe.towers import ProbeSettings, probe_tower


@functools.lru_cache
def cached_table(dtype):
    return torch.linspace(0, 1, 6, dtype=dtype)


def wrapped(function):
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def wrapper(*arguments):
        return cached(*arguments)

    return wrapper


@wrapped
def wrapped_table(dtype):
    return torch.linspace(0, 1, 6, dtype=dtype)


class Cached(nn.Module):
    """A backbone with tables that functions and methods keep."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    @functools.lru_cache  # noqa: B019
    def method_table(self, dtype):
        return torch.linspace(0, 1, 6, dtype=dtype)

    @staticmethod
    @functools.lru_cache
    def static_table(dtype):
        return torch.linspace(0, 1, 6, dtype=dtype)

    def tables(self):
        builders = (cached_table, wrapped_table, self.method_table, self.static_table)
        return [each(torch.float32) for each in builders]

    def forward(self, rows):
        return self.linear(rows) + sum(self.tables())


def test_tables_that_functions_keep_stay_in_float32():
    backbone = Cached()
    probed = ProbedBackbone(backbone, TowerDropKeys(), "model.image", True)
    probe_tower(probed, torch.randn(3, 6), settings=ProbeSettings(torch.device("cpu")))
    assert [each.dtype for each in backbone.tables()] == [torch.float32] * 4
