"""Numbers derived from a config and its datasets, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pretrain.data.batch import step_bytes
from pretrain.data.sample_reader import SampleReader
from pretrain.data.step_loader import StepLoader
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.sampling.order import lanes_of_rank
from pretrain.settings.data import StreamName
from pretrain.training.micro_batch_size import (
    StepSizes,
    estimate_for_plan,
    num_micro_batches_of_size,
)
from pretrain.training.step_loss import StreamObjectives


def describe_plan(
    sizes: StepSizes,
    objectives: Mapping[StreamName, StreamObjectives],
    *,
    loader: StepLoader,
    model: ContrastiveModel,
    device: torch.device,
    num_processes_here: int,
) -> list[str]:
    """Describes the size of the model, the length of the run and the cost of a step, line by line.

    Args:
        sizes: sizes of a step.
        objectives: objectives of every stream, for all ranks of the run.
        loader: reader of rank 0's rows.
        model: model, not yet wrapped by an engine.
        device: device to train on.
        num_processes_here: number of processes on this machine.
    """
    return [
        *_describe_model(model),
        *(line for name in loader.readers for line in _describe(loader, name)),
        *_describe_step(sizes, objectives, loader, device),
        _describe_micro_batches(sizes, objectives, loader, model, device, num_processes_here),
    ]


def _describe_model(model: ContrastiveModel) -> Iterator[str]:
    for kind, tower in model.towers.items():
        total = sum(p.numel() for p in tower.parameters())
        trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
        yield f"{kind} tower: {total:,} parameters, {trained:,} trained"
    for name, module in model.objective_modules.items():
        yield f"module {name}: {sum(p.numel() for p in module.parameters()):,} parameters"


def _describe(loader: StepLoader, stream: StreamName) -> Iterator[str]:
    schedule, order = loader.schedule, loader.schedule.orders[stream]
    yield (
        f"{order.name}: {order.slots_per_lane * order.lanes} pairs a step, "
        f"{order.slots_per_lane} from each of {order.lanes} lanes"
    )
    num_steps = schedule.num_steps_taken(stream, schedule.num_steps)
    drawn = schedule.samples_drawn(stream, schedule.num_steps)
    if num_steps < schedule.num_steps:
        yield f"  used in {num_steps:,} of {schedule.num_steps:,} steps"
    readers = loader.readers[stream].sources
    for reader, source, samples in zip(readers, order.sources, drawn, strict=True):
        per_step = samples / max(1, num_steps)
        steps_per_epoch = f"{source.num_samples / per_step:,.1f}" if samples else "inf"
        yield (
            f"  {source.name}: {source.num_samples:,} samples in {len(source.shard_sizes)} shards, "
            f"{source.lane_length:,} per lane; {per_step:.1f} a step, "
            f"{steps_per_epoch} steps per epoch, "
            f"{samples / source.num_samples:.2f} epochs in {num_steps:,} steps; "
            f"{_describe_fingerprint(reader)}"
        )


def _describe_fingerprint(reader: SampleReader) -> str:
    whole, subset = reader.dataset, reader.samples.subset
    fingerprint = f"fingerprint {whole.info.fingerprint[:12]}"
    if subset is None:
        return fingerprint
    return f"{fingerprint}, subset {subset.fingerprint[:12]} of {len(whole):,} samples"


def _num_processes(objectives: Mapping[StreamName, StreamObjectives]) -> int:
    return len(next(iter(objectives.values())).counts)


def _describe_step(
    sizes: StepSizes,
    objectives: Mapping[StreamName, StreamObjectives],
    loader: StepLoader,
    device: torch.device,
) -> Iterator[str]:
    world_size = _num_processes(objectives)
    lane_counts = [
        len(lanes_of_rank(rank, world_size=world_size, lanes=sizes.lanes))
        for rank in range(world_size)
    ]
    read = sum(_bytes_read(loader, name) for name in loader.readers) / loader.schedule.num_steps
    ahead_bytes = step_bytes(loader.layouts) * (sizes.batches_ahead + 1)
    received = sum(
        objective.received_bytes(counts=own.counts, width=sizes.embed_dim, device=device)
        for own in objectives.values()
        for objective in own.objectives.values()
    )
    yield f"with {world_size} processes: {min(lane_counts)} to {max(lane_counts)} lanes each"
    yield (
        f"a step reads {read / 1e6:.2f} MB from shards, and for its losses every process receives "
        f"{received / 1e6:.2f} MB from the others"
    )
    yield f"batches loaded ahead take up to {ahead_bytes / 1e6:.1f} MB on a process"


def _describe_micro_batches(
    sizes: StepSizes,
    objectives: Mapping[StreamName, StreamObjectives],
    loader: StepLoader,
    model: ContrastiveModel,
    device: torch.device,
    num_processes_here: int,
) -> str:
    if sizes.micro_batch_size != "auto":
        number = num_micro_batches_of_size(sizes, num_processes=_num_processes(objectives))
        return f"micro_batch_size {sizes.micro_batch_size}: {number} micro-batches a step"
    estimate = estimate_for_plan(
        sizes,
        model,
        loader.layouts,
        device=device,
        num_processes=_num_processes(objectives),
        num_processes_here=num_processes_here,
    )
    return f"micro_batch_size auto, on this machine's {device.type}: {estimate.describe()}"


def _bytes_read(loader: StepLoader, stream: StreamName) -> float:
    """Bytes of shards that a stream reads in a run."""
    drawn = loader.schedule.samples_drawn(stream, loader.schedule.num_steps)
    datasets = [reader.dataset for reader in loader.readers[stream].sources]
    mean_bytes = [dataset.info.tar_bytes / len(dataset) for dataset in datasets]
    return sum(n * size for n, size in zip(drawn, mean_bytes, strict=True))
