"""Plans of a run for numbers of GPUs and strategies, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.errors import InputError
from pretrain.planning.config import Gpu, Hardware, PlanConfig
from pretrain.planning.measured_run import MeasuredRun
from pretrain.planning.memory import LARGEST_FRACTION, MemoryPlan, StepMemory
from pretrain.planning.model_sizes import ModelSizes
from pretrain.planning.step_time import Bandwidths, StepTime, plan_bandwidths, plan_step_time
from pretrain.planning.traffic import Exchange, plan_exchanges, stream_fractions
from pretrain.training.micro_batch_size import StepSizes, num_micro_batches_of_size

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
FACTORS = (1 / 4, 1 / 2, 1, 2, 4)  # of the number of GPUs, in the table
SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run on some GPUs with one strategy.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: number of GPUs of each.
        strategy: strategy of the engine.
        memory: memory at the peak of a step.
        largest: memory with the largest micro-batch that fits; None if no sample fits.
        gpu_bytes: memory of a GPU.
        exchanges: exchanges of a step.
        bandwidths: bandwidths of collectives.
        time: duration of a step.
        samples_per_step: samples of the global batches of a step; the mean over steps.
        num_steps: number of steps of the run.
    """

    nodes: int
    gpus_per_node: int
    strategy: str
    memory: MemoryPlan
    largest: MemoryPlan | None
    gpu_bytes: int
    exchanges: list[Exchange]
    bandwidths: Bandwidths
    time: StepTime
    samples_per_step: float
    num_steps: int

    @property
    def num_gpus(self) -> int:
        """Number of processes, one per GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def fits(self) -> bool:
        """Whether the peak is within the largest fraction of a GPU's memory."""
        return self.memory.total <= LARGEST_FRACTION * self.gpu_bytes

    @property
    def days(self) -> float:
        """Duration of all steps."""
        return self.num_steps * self.time.total / SECONDS_PER_DAY

    @property
    def gpu_hours(self) -> float:
        """GPU hours of all steps."""
        return 24 * self.days * self.num_gpus

    @property
    def samples_per_second(self) -> float:
        """Samples of all streams per second."""
        return self.samples_per_step / self.time.total


@dataclass(frozen=True)
class Planner:
    """Plans a run on any number of GPUs.

    Attributes:
        config: config of the plan.
        hardware: figures of links and storage.
        gpu: kind of GPU.
        sizes: sizes of the model.
        measured: measurements of a run; None without one.
    """

    config: PlanConfig
    hardware: Hardware
    gpu: Gpu
    sizes: ModelSizes
    measured: MeasuredRun | None = None

    @property
    def utilization(self) -> float:
        """Fraction of the GPU's FLOPs that a step reaches."""
        if self.config.utilization is not None:
            return self.config.utilization
        return self.hardware.utilization if self.measured is None else self.measured.utilization

    def plan(self, *, nodes: int, gpus_per_node: int, strategy: str) -> RunPlan:
        """Plans the run with a strategy.

        Args:
            nodes: number of nodes.
            gpus_per_node: number of GPUs of each.
            strategy: strategy of the engine.

        Raises:
            InputError: if there are more GPUs than lanes.
        """
        num_processes, config = nodes * gpus_per_node, self._with_strategy(strategy)
        memory = StepMemory(config, self.sizes, num_processes, self.gpu.device)
        largest = memory.fewest_micro_batches(LARGEST_FRACTION * self.gpu.memory_bytes)
        if config.micro_batch_size == "auto":
            chosen = largest or memory.plan(max(1, *memory.rows.values()))
        else:
            sizes = StepSizes.of_config(config)
            chosen = memory.plan(num_micro_batches_of_size(sizes, num_processes=num_processes))
        exchanges = plan_exchanges(
            config,
            self.sizes,
            num_processes=num_processes,
            num_micro_batches=chosen.num_micro_batches,
            device_type=self.gpu.device,
        )
        bandwidths = plan_bandwidths(
            config, self.gpu, self.hardware.network, nodes=nodes, gpus_per_node=gpus_per_node
        )
        peak = self.gpu.flops_per_second(config.engine.precision)
        time = plan_step_time(
            config,
            self.sizes,
            exchanges,
            bandwidths,
            num_processes=num_processes,
            num_micro_batches=chosen.num_micro_batches,
            flops_per_second=peak * self.utilization,
        )
        return RunPlan(
            nodes,
            gpus_per_node,
            strategy,
            chosen,
            largest,
            self.gpu.memory_bytes,
            exchanges,
            bandwidths,
            time,
            samples_per_step(config),
            config.schedule.num_steps,
        )

    def _with_strategy(self, strategy: str) -> PlanConfig:
        """The config with a strategy; the DeepSpeed file is that of the run's own strategy."""
        engine = self.config.engine
        if strategy == engine.strategy:
            return self.config
        changed = engine.model_copy(update={"strategy": strategy, "deepspeed_config": None})
        return self.config.model_copy(update={"engine": changed})

    def table(self) -> list[RunPlan]:
        """Plans the run on fewer and more GPUs, with every strategy.

        Raises:
            InputError: if no number of GPUs is at most that of lanes.
        """
        own = self.config.engine.strategy
        strategies = STRATEGIES if own in STRATEGIES else (*STRATEGIES, own)
        plans = [
            self.plan(nodes=nodes, gpus_per_node=gpus, strategy=strategy)
            for nodes, gpus in self._gpu_counts()
            for strategy in (strategies if nodes * gpus > 1 else ("ddp",))
        ]
        if not plans:
            raise InputError(
                f"nodes={self.config.nodes} and gpus_per_node={self.config.gpus_per_node}: "
                f"expected at most as many GPUs as lanes={self.config.lanes}; use fewer GPUs, or "
                "raise lanes in a new run"
            )
        return plans

    def _gpu_counts(self) -> Iterator[tuple[int, int]]:
        """(nodes, GPUs of each), fewest first: parts of a node, or multiples of whole nodes."""
        counts = set()
        for factor in FACTORS:
            nodes = self.config.nodes * factor
            gpus = self.config.gpus_per_node * min(1.0, nodes)
            if max(1.0, nodes) % 1 == 0 and gpus % 1 == 0 and gpus >= 1:
                counts.add((max(1, int(nodes)), int(gpus)))
        return iter(sorted(each for each in counts if each[0] * each[1] <= self.config.lanes))


def recommended(plans: list[RunPlan]) -> RunPlan | None:
    """Returns the fitting plan with the fewest GPU hours, then the shortest; None if none fits."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: (plan.gpu_hours, plan.days), default=None)


def samples_per_step(config: PlanConfig) -> float:
    """Returns the samples of the global batches of a step; the mean over steps."""
    fractions = stream_fractions(config)
    return sum(fractions[name] * each.global_batch_size for name, each in config.streams.items())
