"""Choice of the number of micro-batches per step, once, before the first step.

With `micro_batch_size: auto`, it is the smallest number that fits into memory:

    1. measure the activations per pair in a forward and backward pass       activation_memory
    2. find the free memory of this rank and subtract all other needs        memory_budget
    3. choose the smallest number that fits on every rank

The result of a step does not depend on the number (see pretrain.training.gradient_cache).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from data_prep.errors import InputError
from pretrain.config import Engine, PretrainConfig
from pretrain.data.batch import StreamLayout
from pretrain.distributed.collectives import gather_objects, rank, world_size
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.sample_dropout import patch_dropouts, set_patch_dropout
from pretrain.optimization.optimizer import num_state_values
from pretrain.settings.data import StreamName
from pretrain.settings.optimizer import Optimizer
from pretrain.training.activation_memory import MEASURED_ROWS, ActivationBytes, measure_activations
from pretrain.training.memory_budget import (
    bytes_without_graph,
    free_bytes,
    memory_name,
)

logger = logging.getLogger(__name__)

# Fraction of the memory left for graphs that is kept free, by device type. On a GPU, it covers
# fragmentation and the workspaces of operators. On a CPU, malloc does not return freed tensors
# below 32 MB: graphs were measured to use up to 2.4 times their size.
FRACTION_KEPT_FREE = {"cuda": 0.1, "cpu": 0.6}
ADVICE = (
    "set engine.activation_checkpointing, partition more state (engine.strategy), use more "
    "processes or smaller towers, or set micro_batch_size to a number to try it anyway"
)
Layouts = Mapping[StreamName, tuple[StreamLayout, int]]  # (layout, largest number of rows)


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimate of the micro-batches that fit into the memory of a rank."""

    free: int  # free bytes of this rank
    other_bytes: dict[str, int]  # {purpose: bytes} needed in addition to graphs
    num_pairs: dict[StreamName, int]  # pairs of this rank in a step
    activations: dict[StreamName, ActivationBytes] | None  # None: too large to measure
    takes_all: bool  # whether a step uses all streams or one
    fraction_kept_free: float  # fraction of the memory left for graphs that is not used

    @property
    def left(self) -> int:
        """Bytes left for graphs."""
        return max(0, self.free - sum(self.other_bytes.values()))

    @property
    def usable(self) -> float:
        """Bytes that graphs may use."""
        return self.left * (1 - self.fraction_kept_free)

    @property
    def num_micro_batches(self) -> int | None:
        """Smallest number of micro-batches whose graphs fit; None if not even one pair fits."""
        if self.activations is None:
            return None
        most = max(1, *self.num_pairs.values())
        fitting = (n for n in range(1, most + 1) if self.graph_bytes(n) <= self.usable)
        return next(fitting, None)

    def graph_bytes(self, num_micro_batches: int) -> int:
        """Returns the peak bytes of the graphs of a micro-batch."""
        graphs = {name: self._graph_bytes(name, num_micro_batches) for name in self.num_pairs}
        if self.takes_all:
            return sum(graphs.values())
        without_pairs = {name: self._bytes_of_rows(name, 1) for name in self.num_pairs}
        others = sum(without_pairs.values())
        return max(graphs[name] + others - without_pairs[name] for name in graphs)

    def _graph_bytes(self, name: StreamName, num_micro_batches: int) -> int:
        return self._bytes_of_rows(name, -(-self.num_pairs[name] // num_micro_batches))

    def _bytes_of_rows(self, name: StreamName, num_rows: int) -> int:
        graph = self.activations[name]
        # A rank without rows encodes one row (see contrastive_model).
        return graph.fixed + graph.per_pair * max(1, num_rows)

    def describe(self) -> str:
        """Describes the choice and its reasons in one line."""
        needs = [f"{_in_units(size)} for {what}" for what, size in self.other_bytes.items()]
        memory = (
            f"{_in_units(self.left)} of {_in_units(self.free)} left after {', '.join(needs)}, "
            f"{self.fraction_kept_free:.0%} of it kept free"
        )
        if self.activations is None:
            return f"not even {MEASURED_ROWS[-1]} pairs could be encoded to measure; {memory}"
        if self.num_micro_batches is None:
            return f"not even {self._describe_sizes(max(self.num_pairs.values()))} fit; {memory}"
        sizes = self._describe_sizes(self.num_micro_batches)
        return f"{self.num_micro_batches} micro-batches a step, of at most {sizes}; {memory}"

    def _describe_sizes(self, num_micro_batches: int) -> str:
        sizes = [
            f"{-(-num_pairs // num_micro_batches)} {name} pairs "
            f"({_in_units(self.activations[name].per_pair)} each)"
            for name, num_pairs in self.num_pairs.items()
        ]
        return f" {'and' if self.takes_all else 'or'} ".join(sizes)


def _in_units(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a step, and the settings that determine its memory."""

    micro_batch_size: int | Literal["auto"]
    lanes: int
    global_batch_sizes: Mapping[StreamName, int]
    takes_all: bool  # whether a step uses all streams or one
    embed_dim: int
    contrasted_width: int  # numbers per sample and view that the losses of a stream read
    batches_ahead: int  # steps loaded ahead
    engine: Engine  # config section
    optimizer: Optimizer  # config section
    # least fraction of patches that a step drops, if segments set it: its activations are largest
    patch_dropout: float | None = None

    @classmethod
    def of_config(cls, config: PretrainConfig) -> StepSizes:
        """Collects the sizes from a config."""
        sizes = {name: stream.global_batch_size for name, stream in config.streams.items()}
        return cls(
            config.micro_batch_size,
            config.lanes,
            sizes,
            takes_all=config.streams_per_step == "all",
            embed_dim=config.model.embed_dim,
            contrasted_width=config.contrasted_width,
            batches_ahead=config.loading.batches_ahead,
            engine=config.engine,
            patch_dropout=min(config.image.patch_dropouts.values(), default=None),
            optimizer=config.optimizer,
        )


def num_micro_batches_of_size(sizes: StepSizes, *, num_processes: int) -> int:
    """Returns the number of micro-batches per step for a fixed micro_batch_size, on every rank.

    No micro-batch holds more than micro_batch_size pairs of a stream.
    """
    most_lanes = -(-sizes.lanes // num_processes)
    most_pairs = most_lanes * (max(sizes.global_batch_sizes.values()) // sizes.lanes)
    return -(-most_pairs // sizes.micro_batch_size)


def choose_num_micro_batches(
    sizes: StepSizes,
    model: ContrastiveModel,
    layouts: Layouts,
    *,
    device: torch.device,
    hosts: list[str],
    kept: int | None = None,
) -> int:
    """Returns the number of micro-batches per step, equal on all ranks; every rank must call it.

    Args:
        sizes: sizes of a step.
        model: model, not yet wrapped by an engine.
        layouts: layout and number of rows of this rank's part of a step.
        device: device of this rank.
        hosts: [ranks] machine names.
        kept: number that a resumed run keeps if `micro_batch_size` is auto; None to choose it.

    Raises:
        InputError: if `micro_batch_size` is auto and not even one pair fits on some rank.
    """
    if sizes.micro_batch_size != "auto":
        return num_micro_batches_of_size(sizes, num_processes=world_size())
    if kept is not None:
        return kept
    activations = measure(sizes, model, layouts, device)
    # Also a barrier: afterwards every rank has freed the memory of its measurement.
    memories = gather_objects((hosts[rank()], memory_name(device)))
    estimate = estimate_memory(
        sizes,
        model,
        layouts,
        activations=activations,
        free=free_bytes(device) // memories.count(memories[rank()]),
        num_processes=world_size(),
    )
    estimates = gather_objects(estimate)
    counts = [each.num_micro_batches or math.inf for each in estimates]
    neediest = counts.index(max(counts))
    text = f"micro_batch_size auto: rank {neediest}: {estimates[neediest].describe()}"
    if estimates[neediest].num_micro_batches is None:
        raise InputError(f"{text}; {ADVICE}")
    if rank() == 0:
        logger.info("%s", text)
    return estimates[neediest].num_micro_batches


def estimate_for_plan(
    sizes: StepSizes,
    model: ContrastiveModel,
    layouts: Layouts,
    *,
    device: torch.device,
    num_processes: int,
    num_processes_here: int,
) -> MemoryEstimate:
    """Returns the estimate of rank 0 on this machine, without starting the other ranks.

    Args:
        sizes: sizes of a step.
        model: model, not yet wrapped by an engine.
        layouts: layout and number of rows of rank 0's part of a step.
        device: device to train on.
        num_processes: number of processes.
        num_processes_here: number of processes on this machine.
    """
    activations = measure(sizes, model, layouts, device)
    num_sharing = num_processes_here if device.type == "cpu" else 1
    return estimate_memory(
        sizes,
        model,
        layouts,
        activations=activations,
        free=free_bytes(device) // num_sharing,
        num_processes=num_processes,
    )


def measure(
    sizes: StepSizes, model: ContrastiveModel, layouts: Layouts, device: torch.device
) -> dict[StreamName, ActivationBytes] | None:
    """Calls `measure_activations`; returns None if the device runs out of memory.

    With segments of images, `layouts` have the largest size, and the fewest patches are dropped,
    so that the result holds for all segments.
    """
    if sizes.patch_dropout is not None:
        first = (layer.first_prob for layer in patch_dropouts(model))
        set_patch_dropout(model, min(sizes.patch_dropout, *first))
    try:
        return measure_activations(
            model,
            {name: layout for name, (layout, _) in layouts.items()},
            device=device,
            is_bf16=sizes.engine.precision == "bf16",
        )
    except torch.OutOfMemoryError:
        return None
    finally:
        set_patch_dropout(model, None)


def estimate_memory(
    sizes: StepSizes,
    model: ContrastiveModel,
    layouts: Layouts,
    *,
    activations: dict[StreamName, ActivationBytes] | None,
    free: int,
    num_processes: int,
) -> MemoryEstimate:
    """Estimates which micro-batches fit into the free memory of a rank.

    Args:
        sizes: sizes of a step.
        model: model on the device.
        layouts: layout and number of rows of the rank's part of a step.
        activations: measured activations; None if the memory did not suffice to measure them.
        free: free bytes of the rank.
        num_processes: number of processes.
    """
    device_type = next(model.parameters()).device.type
    trained = [each for each in model.parameters() if each.requires_grad]
    other_bytes = bytes_without_graph(
        sizes.engine,
        layouts,
        global_num_pairs=max(sizes.global_batch_sizes.values()),
        width=sizes.contrasted_width,
        batches_ahead=sizes.batches_ahead,
        num_trained=sum(each.numel() for each in trained),
        num_state_values=num_state_values(sizes.optimizer, trained),
        num_processes=num_processes,
        device_type=device_type,
    )
    return MemoryEstimate(
        free=free,
        other_bytes=other_bytes,
        num_pairs={name: num_rows for name, (_, num_rows) in layouts.items()},
        activations=activations,
        takes_all=sizes.takes_all,
        fraction_kept_free=FRACTION_KEPT_FREE[device_type],
    )
