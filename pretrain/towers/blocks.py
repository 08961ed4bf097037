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
    """Layers of a backbone, by the order in which a forward pass uses them.

    Attributes:
        blocks: blocks, in the order of their first calls.
        of_parameter: name of a parameter -> its layer. 0: used before the first block; n: in block
            number n, or between it and the block before; len(blocks) + 1: after the last block.
    """

    blocks: list[nn.Module]
    of_parameter: Mapping[str, int]

    @property
    def top(self) -> int:
        """Number of the layer after the last block."""
        return len(self.blocks) + 1


@torch.no_grad()
def layers_of(backbone: nn.Module, encode: Callable[[], Any]) -> Layers:
    """Finds the layer of every parameter of a backbone.

    Args:
        backbone: backbone of a tower.
        encode: function that encodes an example with it.

    Returns:
        The layers; there are no blocks if the backbone has none that it calls.
    """
    uses = _FirstUses(backbone)
    with ExitStack() as hooks:
        for block in blocks_of(backbone):
            hooks.callback(block.register_forward_pre_hook(uses.enter).remove)
            hooks.callback(block.register_forward_hook(uses.leave).remove)
        with uses:
            encode()
    top = len(uses.blocks) + 1
    return Layers(
        uses.blocks,
        {name: uses.layer.get(id(each), top) for name, each in backbone.named_parameters()},
    )


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
