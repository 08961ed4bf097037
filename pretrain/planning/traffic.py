"""Bytes that a process receives from others in a step, by what they carry.

Ring algorithms are counted, as in pretrain.distributed.collectives. N trained parameters, W
processes and m micro-batches:

    losses        features, their gradients and sums               `Objective.received_bytes`
    gradients     all-reduce, 2 * 4 N (W - 1) / W                   ddp, zero0 to zero2
                  reduce-scatter, 4 N (W - 1) / W                   zero3
    parameters    all-gather of updated parameters, 4 N (W - 1) / W zero1, zero2
                  all-gather before their use                       zero3

The engine reduces gradients once per step, in a form of DeepSpeed that is an all-reduce up to stage
2. At stage 3, DeepSpeed keeps the parameters of models of at most `stage3_max_live_parameters`
between forward and backward. There is one gather for each micro-batch, and one for the forward
passes of gradient caching. For larger models, every pass gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pretrain.config import PretrainConfig
from pretrain.planning.memory import max_live_parameters
from pretrain.planning.model_sizes import ModelSizes
from pretrain.settings.data import StreamName
from pretrain.training.memory_budget import FLOAT_BYTES
from pretrain.training.step_loss import StreamObjectives, build_objectives


@dataclass(frozen=True)
class Exchange:
    """Collectives of one purpose in a step."""

    purpose: str
    received_bytes: float  # by one process
    num_messages: int  # that follow one another
    is_gather: bool = False  # all-gather; otherwise a sum over processes
    is_hidden: bool = False  # runs during the backward of the last micro-batch


def plan_exchanges(
    config: PretrainConfig,
    sizes: ModelSizes,
    *,
    num_processes: int,
    num_micro_batches: int,
    device_type: str,
) -> list[Exchange]:
    """Returns the exchanges of a step; empty for one process.

    Args:
        config: config of the run, with the strategy to plan.
        sizes: sizes of its model.
        num_processes: number of processes.
        num_micro_batches: number of micro-batches per step.
        device_type: type of the devices.
    """
    if num_processes == 1:
        return []
    strategy, neighbours = config.engine.strategy, num_processes - 1
    part = FLOAT_BYTES * sizes.num_trained * neighbours / num_processes
    losses = Exchange("losses", loss_traffic(config, num_processes, device_type), 2 * neighbours)
    if strategy in ("ddp", "zero0"):
        is_hidden = strategy == "ddp"
        return [losses, Exchange("gradients", 2 * part, 2 * neighbours, is_hidden=is_hidden)]
    if strategy != "zero3":
        gradients = Exchange("gradients", 2 * part, 2 * neighbours)
        return [losses, gradients, Exchange("parameters", part, neighbours, is_gather=True)]
    gradients = Exchange("gradients", part, neighbours)
    if sizes.num_parameters <= max_live_parameters(config.engine):
        num_uses = 1 if num_micro_batches == 1 else 1 + num_micro_batches
    else:
        num_uses = 2 if num_micro_batches == 1 else 3 * num_micro_batches
    part = FLOAT_BYTES * sizes.num_parameters * neighbours / num_processes
    gathers = Exchange("parameters", num_uses * part, num_uses * neighbours, is_gather=True)
    return [losses, gradients, gathers]


def loss_traffic(config: PretrainConfig, num_processes: int, device_type: str) -> float:
    """Returns the bytes that a process receives for the losses of a step; the mean over steps."""
    objectives = build_objectives(
        config.streams,
        lanes=config.lanes,
        mode=config.engine.loss_mode,
        precision=config.engine.precision,
        world_size=num_processes,
    )
    fractions = stream_fractions(config)
    device = torch.device(device_type)
    return sum(
        fractions[name] * _received_bytes(own, config.model.embed_dim, device)
        for name, own in objectives.items()
    )


def _received_bytes(own: StreamObjectives, width: int, device: torch.device) -> int:
    return sum(
        each.received_bytes(counts=own.counts, width=width, device=device)
        for each in own.objectives.values()
    )


def stream_fractions(config: PretrainConfig) -> Mapping[StreamName, float]:
    """Returns {stream: fraction of the steps that take it}."""
    if config.streams_per_step == "all":
        return dict.fromkeys(config.streams, 1.0)
    total = sum(stream.weight for stream in config.streams.values())
    return {name: stream.weight / total for name, stream in config.streams.items()}
