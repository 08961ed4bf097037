"""Activation checkpointing: a block's activations are computed again in the backward pass.

(Chen et al. 2016, "Training deep nets with sublinear memory cost".) Blocks keep their place and the
names of their parameters. What their layers drop is drawn again from the same keys, so that no
state of a generator is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_prep.errors import InputError
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.sample_dropout import TowerDraws

# Of a tower: with and without gradients, in evaluation, for one row, for any number of rows, for
# any length of captions.
MAX_COMPILATIONS = 32


def checkpoint_blocks(model: ContrastiveModel) -> None:
    """Makes the blocks of all trained towers compute their activations twice instead of keeping
    them.

    Raises:
        InputError: a tower has nothing that looks like blocks.
    """
    for kind, tower in model.towers.items():
        if tower.is_frozen:
            continue
        blocks = list(blocks_of(tower.backbone))
        if not blocks:
            raise InputError(
                f"engine.activation_checkpointing: model.{kind} "
                f"({type(tower.backbone).__name__}) has no list of equal blocks to checkpoint; "
                "set it to false, and lower micro_batch_size to save memory"
            )
        for block in blocks:
            # Not a wrapping module, which would rename the parameters.
            block.forward = partial(_recomputed, block.forward, tower.draws)


def blocks_of(backbone: nn.Module) -> Iterator[nn.Module]:
    """The layers that a transformers model names for this; else the members of lists of equal
    blocks, innermost first where such a list holds others (stages)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    named = [part for part in backbone.modules() if isinstance(part, GradientCheckpointingLayer)]
    return iter(named) if named else _listed_blocks(backbone)


def _listed_blocks(module: nn.Module) -> Iterator[nn.Module]:
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    children = list(module.children())
    are_equal = is_list and len({type(child) for child in children}) == 1
    for child in children:
        inner = list(_listed_blocks(child))
        if inner:
            yield from inner
        elif are_equal and any(True for _ in child.children()):
            yield child


def _recomputed(forward: Callable[..., Any], draws: TowerDraws, *args: Any, **kwargs: Any) -> Any:
    """What a block's own forward returns, without keeping its activations."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        partial(_drawing_from, draws, draws.mark(), forward),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        **kwargs,
    )


def _drawing_from(
    draws: TowerDraws, mark: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if torch.compiler.is_compiling():  # the compiler computes the same graph again, draws and all
        return forward(*args, **kwargs)
    with draws.again_from(mark):
        return forward(*args, **kwargs)


def compile_towers(model: ContrastiveModel, *, backend: str = "inductor") -> None:
    """Compiles all towers when they are first called.

    Args:
        model: with its blocks checkpointed before, if they are to be.
        backend: torch.compile's.
    """
    import torch._dynamo.config

    # In a checkpointed block, layers count their calls. The compiler would refuse that change of
    # state; done in the forward pass alone, it is right.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for tower in model.towers.values():
        tower.compile(backend=backend, isolate_recompiles=True, recompile_limit=MAX_COMPILATIONS)
