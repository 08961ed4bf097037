"""Duration of a step: max(compute, input) + communication that does not overlap with compute.

    compute         FLOPs of the process with the most samples / (FLOPs of the GPU * utilization)
    input           its samples / the samples that it can load per second
    communication   bytes / bandwidth + messages * latency, for each exchange

DDP reduces gradients during the backward of the last micro-batch; only what takes longer counts.
All other exchanges are waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.config import PretrainConfig
from pretrain.planning.config import Gpu, Network, PlanConfig
from pretrain.planning.memory import rows_of_process
from pretrain.planning.model_sizes import ModelSizes
from pretrain.planning.traffic import Exchange, stream_fractions


@dataclass(frozen=True)
class Bandwidths:
    """Bus bandwidths of collectives in bytes per second, and the link that limits them.

    A ring over several nodes uses the network links of all GPUs of a node at once.
    """

    sums: float
    gathers: float
    latency_seconds: float
    link: str

    def of(self, exchange: Exchange) -> float:
        """Returns the bandwidth of an exchange."""
        return self.gathers if exchange.is_gather else self.sums


def plan_bandwidths(
    config: PlanConfig, gpu: Gpu, network: Network, *, nodes: int, gpus_per_node: int
) -> Bandwidths:
    """Returns the bandwidths of collectives over all processes.

    Limits of `preflight` that were measured on the cluster replace those of the file.

    Args:
        config: config of the plan.
        gpu: kind of GPU.
        network: links between nodes.
        nodes: number of nodes.
        gpus_per_node: number of processes on each.
    """
    inside = gpu.link_gigabytes_per_second
    between = network.gigabytes_per_second_per_gpu * gpus_per_node
    link = "between GPUs of a node" if nodes == 1 or inside <= between else "between nodes"
    assumed = inside if nodes == 1 else min(inside, between)
    limits = config.preflight
    return Bandwidths(
        1e9 * (limits.min_all_reduce_gigabytes_per_second or assumed),
        1e9 * (limits.min_all_gather_gigabytes_per_second or assumed),
        1e-6 * network.latency_microseconds,
        link,
    )


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part."""

    compute: float
    input: float
    exposed: float  # communication that is waited for
    exchanges: Mapping[str, float]  # purpose -> seconds, hidden or not

    @property
    def total(self) -> float:
        """Duration of the step."""
        return max(self.compute, self.input) + self.exposed


def plan_step_time(
    config: PlanConfig,
    sizes: ModelSizes,
    exchanges: Sequence[Exchange],
    bandwidths: Bandwidths,
    *,
    num_processes: int,
    num_micro_batches: int,
    flops_per_second: float,
) -> StepTime:
    """Plans the duration of a step, the mean over all steps of the run.

    Args:
        config: config of the plan.
        sizes: sizes of the model.
        exchanges: exchanges of a step.
        bandwidths: bandwidths of collectives.
        num_processes: number of processes.
        num_micro_batches: number of micro-batches per step.
        flops_per_second: FLOPs per second that a GPU reaches.
    """
    forward, backward = step_flops(config, sizes, num_processes, num_micro_batches)
    last_backward = backward / num_micro_batches / flops_per_second
    seconds = {
        each.purpose: each.received_bytes / bandwidths.of(each)
        + each.num_messages * bandwidths.latency_seconds
        for each in exchanges
    }
    exposed = sum(
        max(0.0, seconds[each.purpose] - (last_backward if each.is_hidden else 0.0))
        for each in exchanges
    )
    loading = config.loading_samples_per_second
    samples = sum(
        fraction * rows_of_process(config, num_processes)[name]
        for name, fraction in stream_fractions(config).items()
    )
    return StepTime(
        compute=(forward + backward) / flops_per_second,
        input=samples / loading if loading else 0.0,
        exposed=exposed,
        exchanges=seconds,
    )


def step_flops(
    config: PretrainConfig, sizes: ModelSizes, num_processes: int, num_micro_batches: int
) -> tuple[float, float]:
    """Returns FLOPs of (forward, backward) of the process with the most samples; the mean of steps.

    Gradient caching encodes several micro-batches twice.
    """
    rows = rows_of_process(config, num_processes)
    num_forwards = 1 if num_micro_batches == 1 else 2
    forward = backward = 0.0
    for segment in sizes.segments:
        of_steps = segment.num_steps / config.schedule.num_steps
        for name, fraction in stream_fractions(config).items():
            samples = of_steps * fraction * rows[name]
            forward += samples * num_forwards * segment.passes[name].forward_flops
            backward += samples * segment.passes[name].backward_flops
    return forward, backward
