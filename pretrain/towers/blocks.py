"""Blocks of a backbone, and the layer of every parameter: embeddings, blocks in order, top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Names of lists whose members are blocks, also if they are of several classes.
BLOCK_LISTS = ("blocks", "layers")
# Name in the place of the parameters that follow a model of timm; no pattern of timm matches it.
PROJECTION = "projection_of_tower"


def blocks_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """Finds the blocks of a backbone.

    A transformers model marks its blocks; of a marked stage (HTSAT, Swin), the blocks inside are
    taken. In other models, blocks are the members of lists of equal modules, or of a list named
    `blocks`. If lists are nested (stages), they are the members of the innermost.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    marked = [each for each in backbone.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not marked:
        yield from _listed_blocks(backbone)
    for layer in marked:
        inner = [list(_listed_blocks(getattr(layer, name, None), name)) for name in BLOCK_LISTS]
        yield from next((blocks for blocks in inner if blocks), [layer])


def _listed_blocks(module: nn.Module | None, name: str = "") -> Iterator[nn.Module]:
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    children = [] if module is None else list(module.named_children())
    are_equal = is_list and len({type(child) for _, child in children}) == 1
    for child_name, child in children:
        inner = list(_listed_blocks(child, child_name))
        if inner:
            yield from inner
        elif (are_equal or (is_list and name == "blocks")) and any(True for _ in child.children()):
            yield child


@dataclass(frozen=True)
class Layers:
    """Layers of a backbone.

    Attributes:
        num_blocks: number of blocks.
        of_parameter: name of a parameter -> its layer. 0: embeddings; n: block number n;
            num_blocks + 1: what follows the last block.
    """

    num_blocks: int
    of_parameter: Mapping[str, int]

    @property
    def top(self) -> int:
        """Number of the layer after the last block."""
        return self.num_blocks + 1


def layers_of(backbone: nn.Module, encode: Callable[[], Any]) -> Layers:
    """Finds the layer of every parameter of a backbone.

    Models of timm know their layers. Those of other models follow from the order in which a forward
    pass uses the parameters. A parameter that is used between two blocks is in the layer of the
    second one.

    Args:
        backbone: backbone of a tower.
        encode: function that encodes an example with it.
    """
    for prefix, model in (("", backbone), ("trunk.", getattr(backbone, "trunk", None))):
        if hasattr(model, "group_matcher"):
            return _layers_of_timm(backbone, model, prefix)
    return _layers_by_use(backbone, encode)


def _layers_of_timm(backbone: nn.Module, model: nn.Module, prefix: str) -> Layers:
    """Layers as in timm's layer decay, for a model that is followed by a projection."""
    from timm.models._manipulate import group_with_matcher

    named = [*model.named_parameters(), (PROJECTION, None)]
    layers = group_with_matcher(named, model.group_matcher(coarse=False), reverse=True)
    top = layers[PROJECTION]
    names = [name for name, _ in backbone.named_parameters()]
    return Layers(top - 1, {name: layers.get(name.removeprefix(prefix), top) for name in names})


@torch.no_grad()
def _layers_by_use(backbone: nn.Module, encode: Callable[[], Any]) -> Layers:
    uses = _FirstUses(backbone)
    with ExitStack() as hooks:
        for block in blocks_of(backbone):
            hooks.callback(block.register_forward_pre_hook(uses.enter).remove)
            hooks.callback(block.register_forward_hook(uses.leave).remove)
        with uses:
            encode()
    num_blocks = len(uses.blocks)
    names = backbone.named_parameters()
    return Layers(num_blocks, {n: uses.layer.get(id(p), num_blocks + 1) for n, p in names})


class _FirstUses(TorchFunctionMode):
    """Records the layer in which a function of torch first receives each parameter."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.blocks: list[nn.Module] = []
        self.layer: dict[int, int] = {}  # id of a parameter -> layer
        self._parameters = {id(each) for each in backbone.parameters()}
        self._current = 0

    def enter(self, block: nn.Module, args: Any) -> None:
        if block not in self.blocks:
            self.blocks.append(block)
        self._current = self.blocks.index(block) + 1

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self._current = self.blocks.index(block) + 2

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # an attribute, such as dtype
            for each in tree_leaves((args, kwargs or {})):
                if isinstance(each, Tensor) and id(each) in self._parameters:
                    self.layer.setdefault(id(each), self._current)
        return func(*args, **(kwargs or {}))
