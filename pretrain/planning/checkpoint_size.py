"""Size of a checkpoint: parameters, optimizer state, buffers and the resolved config."""

from __future__ import annotations

import json

from data_prep.config_file import to_yaml
from pretrain.checkpoints.slice_file import header_of
from pretrain.checkpoints.state import PARAMETER
from pretrain.config import PretrainConfig
from pretrain.distributed.tensor_slice import TensorSlice
from pretrain.optimization.optimizer import state_sizes
from pretrain.planning.planned_model import PlannedModel
from pretrain.training.memory_budget import FLOAT_BYTES


def checkpoint_bytes(config: PretrainConfig, planned: PlannedModel) -> int:
    """Returns the bytes of a checkpoint's files, without those of a tokenizer.

    Processes split the tensors among their files, which adds a few headers.

    Args:
        config: config of the run.
        planned: its model, after `measure_model`.
    """
    parameters = dict(planned.model.named_parameters())
    trained = {name: each for name, each in parameters.items() if each.requires_grad}
    sizes = state_sizes(config.optimizer, list(trained.values()))
    of_optimizer = dict(zip(trained, sizes, strict=True))
    held = [
        TensorSlice(f"{key}/{name}", 0, size)
        for name, each in parameters.items()
        for key, size in ({PARAMETER: each.numel()} | of_optimizer.get(name, {})).items()
    ]
    values = FLOAT_BYTES * sum(each.length for each in held)
    buffers = {
        name: each for name, each in planned.model.state_dict().items() if name not in parameters
    }
    entries = {name: {"dtype": "F32", "shape": list(each.shape)} for name, each in buffers.items()}
    of_buffers = sum(each.numel() * each.element_size() for each in buffers.values())
    of_buffers += len(json.dumps(entries)) if buffers else 0
    return len(header_of(held)) + values + of_buffers + len(to_yaml(config))
