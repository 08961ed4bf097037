"""Memory of a process at the peak of a step, by part.

A step has its peak in one of three phases:

    loss        the graph of a single micro-batch waits, while the loss has its tiles
    backward    activations are largest; the gradients of a single micro-batch come one by one,
                those of several exist from the first one on
    optimizer   all gradients exist, and no activations
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.config import Engine, PretrainConfig
from pretrain.distributed.deepspeed_config import read_deepspeed_file
from pretrain.planning.model_sizes import ModelSizes, SizesOfSegment
from pretrain.planning.passes import StreamPass
from pretrain.sampling.order import pairs_of_ranks
from pretrain.settings.data import StreamName
from pretrain.training.memory_budget import (
    FLOAT_BYTES,
    loss_bytes,
    num_batches_held,
    optimizer_bytes,
)

LARGEST_FRACTION = 0.9  # of a GPU's memory; the rest is for the allocator and libraries
MAX_LIVE_PARAMETERS = 10**9  # of ZeRO stage 3 on a process; DeepSpeed's default


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the process with the most samples, at the peak of a step.

    Attributes:
        phase: phase of the peak.
        parts: part -> bytes at the peak.
        num_micro_batches: micro-batches per step.
        num_rows: stream -> largest number of samples in a micro-batch.
    """

    phase: str
    parts: dict[str, int]
    num_micro_batches: int
    num_rows: dict[StreamName, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepMemory:
    """Memory of a process as a function of the number of micro-batches.

    Args:
        config: config of the run, with the strategy to plan.
        sizes: sizes of its model.
        num_processes: number of processes.
        device_type: type of the device whose memory is counted.
    """

    config: PretrainConfig
    sizes: ModelSizes
    num_processes: int
    device_type: str

    @property
    def rows(self) -> dict[StreamName, int]:
        """Samples of each stream on the process that has the most."""
        return rows_of_process(self.config, self.num_processes)

    def plan(self, num_micro_batches: int) -> MemoryPlan:
        """Plans the memory with a number of micro-batches."""
        num_rows = {name: -(-rows // num_micro_batches) for name, rows in self.rows.items()}
        plans = []
        for segment in self.sizes.segments:
            lasting = self._lasting_parts(segment)
            phases = self._phases(segment, num_rows, is_single=num_micro_batches == 1)
            plans += [
                MemoryPlan(phase, lasting | parts, num_micro_batches, num_rows)
                for phase, parts in phases.items()
            ]
        return max(plans, key=lambda plan: plan.total)

    def fewest_micro_batches(self, memory_bytes: float) -> MemoryPlan | None:
        """Returns the plan with the largest micro-batch that fits; None if no sample fits."""
        most = max(1, *self.rows.values())
        low, high = 1, most
        if self.plan(1).total <= memory_bytes:
            return self.plan(1)
        if self.plan(most).total > memory_bytes:
            return None
        while high - low > 1:  # `high` micro-batches fit, `low` do not
            middle = (low + high) // 2
            if self.plan(middle).total <= memory_bytes:
                high = middle
            else:
                low = middle
        return self.plan(high)

    def _lasting_parts(self, segment: SizesOfSegment) -> dict[str, int]:
        """Parts that exist in all phases."""
        sizes, engine = self.sizes, self.config.engine
        num_rows = self.rows
        layouts = segment.layouts.items()
        batch = sum(layout.num_bytes(num_rows[name]) for name, layout in layouts)
        held = num_batches_held(self.config.loading.batches_ahead, device_type=self.device_type)
        state = optimizer_state_bytes(
            engine,
            sizes.num_state_values,
            num_processes=self.num_processes,
            device_type=self.device_type,
        )
        of_optimizer = optimizer_bytes(
            engine,
            num_trained=sizes.num_trained,
            num_state_values=sizes.num_state_values,
            num_processes=self.num_processes,
            device_type=self.device_type,
        )
        return {
            "weights": weight_bytes(engine, sizes),
            "optimizer state": state,
            "copies of the strategy": of_optimizer - state - self._gradient_bytes,
            "batches": held * batch,
            "features": self._loss_bytes(sum(num_rows.values())) - self._loss_bytes(0),
        }

    @property
    def _gradient_bytes(self) -> int:
        return FLOAT_BYTES * self.sizes.num_trained

    def _loss_bytes(self, num_pairs: int) -> int:
        streams = self.config.streams.values()
        return loss_bytes(
            num_pairs=num_pairs,
            global_num_pairs=max(each.global_batch_size for each in streams),
            width=self.config.model.embed_dim,
            num_processes=self.num_processes,
            device_type=self.device_type,
        )

    def _phases(
        self, segment: SizesOfSegment, num_rows: Mapping[StreamName, int], *, is_single: bool
    ) -> dict[str, dict[str, int]]:
        """Phase -> part -> bytes of the parts that exist in this phase alone."""
        kept, graph, gradients = 0, 0, 0
        for rows in self._taken(num_rows):
            found = [_bytes_of_pass(segment.passes[name], n) for name, n in rows.items()]
            of_step = tuple(map(sum, zip(*found, strict=True)))
            if of_step[1] + of_step[2] > graph + gradients:
                kept, graph, gradients = of_step
        loss = {"loss tiles": self._loss_bytes(0)}
        if not is_single:
            backward = {"activations": graph, "gradients": self._gradient_bytes}
            return {"loss": loss, "backward": backward}
        gradients = min(gradients, self._gradient_bytes)
        return {
            "loss": loss | {"activations": kept},
            "backward": {"activations": graph, "gradients": gradients},
            "optimizer": {"gradients": self._gradient_bytes},
        }

    def _taken(self, num_rows: Mapping[StreamName, int]) -> list[dict[StreamName, int]]:
        """Rows of each stream in the kinds of steps; a stream that is not taken encodes one."""
        if self.config.streams_per_step == "all":
            return [dict(num_rows)]
        one = dict.fromkeys(num_rows, 1)
        return [one | {name: rows} for name, rows in num_rows.items()]


def _bytes_of_pass(measured: StreamPass, num_rows: int) -> tuple[int, int, int]:
    """(between forward and backward, at the peak of the backward, gradients at that moment)"""
    num_rows = max(1, num_rows)  # a process without samples encodes one
    return measured.kept.peak(num_rows), *measured.peak(num_rows)


def rows_of_process(config: PretrainConfig, num_processes: int) -> dict[StreamName, int]:
    """Returns {stream: samples of a step} of the process that has the most.

    Raises:
        InputError: if there are more processes than lanes.
    """
    return {
        name: max(
            pairs_of_ranks(
                stream.global_batch_size // config.lanes,
                world_size=num_processes,
                lanes=config.lanes,
            )
        )
        for name, stream in config.streams.items()
    }


def weight_bytes(config: Engine, sizes: ModelSizes) -> int:
    """Returns the bytes of the parameters that are whole on a process, and of buffers."""
    whole = sizes.num_parameters
    if config.strategy == "zero3":
        whole = min(whole, max_live_parameters(config))
    return FLOAT_BYTES * whole + sizes.buffer_bytes


def max_live_parameters(config: Engine) -> int:
    """Returns the largest number of parameters that ZeRO stage 3 gathers on a process."""
    return read_deepspeed_file(config).get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)


def optimizer_state_bytes(
    config: Engine, num_state_values: int, *, num_processes: int, device_type: str
) -> int:
    """Returns the bytes of the optimizer's tensors on a process.

    Args:
        config: config section `engine`.
        num_state_values: number of elements of the optimizer's tensors.
        num_processes: number of processes.
        device_type: type of the device whose memory is counted.
    """
    if config.strategy in ("ddp", "zero0"):
        return FLOAT_BYTES * num_state_values
    offload = read_deepspeed_file(config).get("offload_optimizer", {}).get("device", "none")
    if offload == "cpu" and device_type == "cuda":
        return 0
    return FLOAT_BYTES * -(-num_state_values // num_processes)
