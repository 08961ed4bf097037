"""Text of descriptions and plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

from pretrain.config import PretrainConfig
from pretrain.monitoring.progress_log import in_words
from pretrain.planning.memory import LARGEST_FRACTION, MemoryPlan
from pretrain.planning.model_sizes import ModelSizes
from pretrain.planning.planned_model import PlannedModel
from pretrain.planning.run_plan import Planner, RunPlan, recommended
from pretrain.planning.tower_facts import describe_tower, facts_of_towers


def describe_model(
    config: PretrainConfig, planned: PlannedModel, sizes: ModelSizes
) -> Iterator[str]:
    """Yields the description of a model, line by line.

    Args:
        config: config of the run.
        planned: its model.
        sizes: sizes of the model.
    """
    for facts in facts_of_towers(config, planned):
        yield from describe_tower(facts)
    others = [
        (name, part)
        for name, part in planned.model.named_children()
        if name != "towers" and any(True for _ in part.parameters())
    ]
    for name, part in others:
        number = sum(each.numel() for each in part.parameters())
        yield f"{name}: {number:,} parameters"
    yield (
        f"all: {sizes.num_parameters:,} parameters, {sizes.num_trained:,} trained, "
        f"{sizes.num_state_values:,} values of optimizer state"
    )
    for segment in sizes.segments:
        for name, each in segment.passes.items():
            factor = (each.forward_flops + each.backward_flops) / max(1, each.forward_flops)
            per_sample = each.graph.peak(1001) - each.graph.peak(1)
            yield (
                f"stream {name}, {segment.num_steps:,} steps: {each.forward_flops / 1e9:,.2f} "
                f"GFLOPs forward per sample, {factor:.2f} times that with backward; "
                f"{_bytes(per_sample / 1000)} of activations per sample"
            )


def describe_run(planner: Planner, plan: RunPlan, *, checkpoint_bytes: int) -> Iterator[str]:
    """Yields the plan of the config's own GPUs and strategy, line by line.

    Args:
        planner: planner of the run.
        plan: plan of the config's GPUs and strategy.
        checkpoint_bytes: bytes of a checkpoint.
    """
    config = planner.config
    yield (
        f"{plan.nodes} x {plan.gpus_per_node} {config.gpu}, {plan.strategy}, "
        f"{config.engine.precision}, utilization {planner.utilization:.2f}"
        f"{'' if planner.measured is None else ' measured in ' + str(config.measured_run)}"
    )
    yield from _memory(plan)
    yield from _traffic(plan)
    time = plan.time
    yield (
        f"step: {time.total:.4g} s: compute {time.compute:.4g} s, input {time.input:.4g} s, "
        f"communication {time.exposed:.4g} s that nothing hides"
    )
    yield (
        f"speed: {plan.samples_per_second:,.0f} samples/s; {plan.num_steps:,} steps take "
        f"{in_words(timedelta(days=plan.days))}, {plan.gpu_hours:,.1f} GPU hours"
    )
    assumed = 1e9 * planner.hardware.storage.write_gigabytes_per_second
    speed = (planner.measured and planner.measured.write_bytes_per_second) or assumed
    number = -(-plan.num_steps // config.run.checkpoint_every_steps)
    yield (
        f"checkpoint: {_bytes(checkpoint_bytes)}, written in {checkpoint_bytes / speed:.3g} s in "
        f"the background; {number:,} in the run"
    )
    for key, objective in config.objectives.items():
        if getattr(objective, "teacher", None) is not None:
            yield f"not planned: memory and time of the teacher of {key}"


def _memory(plan: RunPlan) -> Iterator[str]:
    memory = plan.memory
    share = memory.total / plan.gpu_bytes
    yield (
        f"memory: {_bytes(memory.total)} of {_bytes(plan.gpu_bytes)} per GPU ({share:.0%}) at the "
        f"peak, in the phase {memory.phase}, with {_micro_batches(memory)}"
    )
    for part, size in sorted(memory.parts.items(), key=lambda item: -item[1]):
        if size:
            yield f"  {part}: {_bytes(size)}"
    if plan.largest is None:
        yield (
            f"  not even one sample fits in {LARGEST_FRACTION:.0%} of it; set "
            "engine.activation_checkpointing, partition more (engine.strategy) or use more GPUs"
        )
    elif plan.largest.num_micro_batches != memory.num_micro_batches:
        yield (
            f"  largest micro-batch within {LARGEST_FRACTION:.0%}: {_micro_batches(plan.largest)}, "
            f"{_bytes(plan.largest.total)}"
        )


def _micro_batches(memory: MemoryPlan) -> str:
    rows = ", ".join(f"{number:,} {name}" for name, number in memory.num_rows.items())
    return f"{memory.num_micro_batches:,} micro-batches of at most {rows} samples"


def _traffic(plan: RunPlan) -> Iterator[str]:
    if not plan.exchanges:
        yield "traffic: none, with one process"
        return
    total = sum(each.received_bytes for each in plan.exchanges)
    yield (
        f"traffic: every process receives {_bytes(total)} in a step; the slowest link is "
        f"{plan.bandwidths.link}"
    )
    for each in plan.exchanges:
        hidden = ", during the backward" if each.is_hidden else ""
        yield (
            f"  {each.purpose}: {_bytes(each.received_bytes)} at "
            f"{plan.bandwidths.of(each) / 1e9:,.4g} GB/s: {plan.time.exchanges[each.purpose]:.3g} s"
            f"{hidden}"
        )


HEADER = ("GPUs", "strategy", "micro-batches", "memory", "s/step", "samples/s", "days", "GPU hours")


def describe_table(plans: Sequence[RunPlan]) -> Iterator[str]:
    """Yields a table of plans, and the recommended one."""
    best = recommended(list(plans))
    rows = [HEADER]
    for plan in plans:
        fits = "" if plan.fits else " (too large)"
        rows.append(
            (
                f"{plan.nodes} x {plan.gpus_per_node}",
                plan.strategy,
                f"{plan.memory.num_micro_batches:,}",
                f"{_bytes(plan.memory.total)}{fits}",
                f"{plan.time.total:.4g}",
                f"{plan.samples_per_second:,.0f}",
                f"{plan.days:.3g}",
                f"{plan.gpu_hours:,.1f}{' *' if plan is best else ''}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if best is None:
        yield f"none fits in {LARGEST_FRACTION:.0%} of a GPU's memory"
    else:
        yield (
            f"* recommended: the fewest GPU hours within {LARGEST_FRACTION:.0%} of memory: "
            f"nodes={best.nodes} gpus_per_node={best.gpus_per_node} "
            f"engine.strategy={best.strategy}"
        )


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
