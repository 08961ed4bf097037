"""torch.compile of every tower, by itself and in place: the names of parameters stay.

What differs from step to step (step, slots, number of pairs, length of captions) is in tensors, so
that a step does not compile anew.
"""

from __future__ import annotations

import torch._dynamo.config

from pretrain.model.contrastive_model import ContrastiveModel

# Of a tower: with and without gradients, in evaluation, for one row, for any number of rows, for
# any length of captions.
MAX_COMPILATIONS = 32


def compile_towers(model: ContrastiveModel, *, backend: str = "inductor") -> None:
    """Compiles all towers when they are first called.

    Args:
        model: with its blocks checkpointed before, if they are to be.
        backend: torch.compile's.
    """
    # In a checkpointed block, layers count their calls. The compiler would refuse that change of
    # state; done in the forward pass alone, it is right.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for tower in model.towers.values():
        tower.compile(backend=backend, isolate_recompiles=True, recompile_limit=MAX_COMPILATIONS)
