"""Activation checkpointing and compilation of towers.

Checkpointed blocks recompute their activations in the backward pass (Chen et al. 2016, "Training
deep nets with sublinear memory cost"). Blocks stay in their modules, so parameters keep their
names. Recomputed dropout uses the same keys, so no generator state is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from data_prep.errors import InputError
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.settings.model import tower_key
from pretrain.towers.blocks import blocks_of

# Enough for all graphs of a tower: with and without gradients, in evaluation, for one row, for any
# number of rows, for any caption length.
MAX_COMPILATIONS = 32


def checkpoint_blocks(model: ContrastiveModel) -> None:
    """Makes blocks of trained towers and of modules of objectives recompute their activations.

    Raises:
        InputError: if no blocks are found in a tower.
    """
    for name, tower in model.towers.items():
        if not tower.is_frozen:
            checkpoint_backbone(tower.backbone, tower.drop_keys, where=tower_key(name))
    for name, module in model.objective_modules.items():
        checkpoint_backbone(module, TowerDropKeys(), where=name)


def checkpoint_backbone(backbone: nn.Module, drop_keys: TowerDropKeys, *, where: str) -> None:
    """Makes the blocks of a backbone recompute their activations instead of storing them.

    Small towers of this project, whose `has_blocks` is False, store them.

    Args:
        backbone: backbone of a tower.
        drop_keys: keys of its dropout layers.
        where: config key of the tower.

    Raises:
        InputError: if no blocks are found.
    """
    blocks = list(blocks_of(backbone))
    if not blocks and getattr(backbone, "has_blocks", True):
        raise InputError(
            f"engine.activation_checkpointing: {where} ({type(backbone).__name__}) has no list of "
            "equal blocks to checkpoint; set the key to false and lower micro_batch_size to save "
            "memory"
        )
    for block in blocks:
        # A wrapping module would rename the parameters.
        block.forward = partial(_recomputed, block.forward, drop_keys)


def _recomputed(
    forward: Callable[..., Any], drop_keys: TowerDropKeys, *args: Any, **kwargs: Any
) -> Any:
    """Calls a block's own forward without storing its activations."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        partial(_replayed, drop_keys, drop_keys.snapshot(), forward),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        **kwargs,
    )


def _replayed(
    drop_keys: TowerDropKeys,
    snapshot: Any,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if torch.compiler.is_compiling():  # the compiler recomputes the same graph with the same keys
        return forward(*args, **kwargs)
    with drop_keys.replay(snapshot):
        return forward(*args, **kwargs)


def compile_towers(model: ContrastiveModel, *, backend: str = "inductor") -> None:
    """Compiles all towers, lazily at their first call.

    Args:
        model: model; `checkpoint_blocks`, if used, must be called first.
        backend: backend of torch.compile.
    """
    import torch._dynamo.config

    # Layers of a checkpointed block count their calls, a side effect that the compiler rejects by
    # default. Applying it in the forward pass only is correct.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for tower in model.towers.values():
        tower.compile(backend=backend, isolate_recompiles=True, recompile_limit=MAX_COMPILATIONS)
