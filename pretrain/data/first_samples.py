"""The first samples of a run, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from data_prep.errors import InputError
from pretrain.data.batch import StreamBuffers
from pretrain.data.step_loader import StepLoader
from pretrain.data.stream_reader import StreamReader
from pretrain.sampling.order import StepSamples

BATCH = 32  # rows


def first_samples(
    loader: StepLoader, view: str, *, num_samples: int, num_steps: int
) -> Iterator[Tensor]:
    """Yields the first samples of a view in the order of the run, in batches of at most 32.

    They are those of the first stream with this view, from step 0 on, as the run will read them:
    with random crops, without SpecAugment.

    Args:
        loader: loader of any rank.
        view: name of the view, of images or audio clips.
        num_samples: number of samples; those that lack the modality count, but are left out.
        num_steps: number of steps of the run; if they hold fewer samples, all are read.

    Raises:
        InputError: if no stream has the view.
        OSError: if a dataset cannot be read.
    """
    name = next((name for name, each in loader.layouts.items() if view in each[0].views), None)
    if name is None:
        raise InputError(f"expected a stream with {view}, found {', '.join(loader.layouts)}")
    schedule = loader.schedule
    for step in range(num_steps):
        samples = schedule.samples_of_step(name, step, lanes=range(schedule.lanes))
        num_rows = min(len(samples), num_samples)
        for start in range(0, num_rows, BATCH):
            rows = slice(start, min(start + BATCH, num_rows))
            values = _read(loader.readers[name], _part(samples, rows), view)
            if len(values):
                yield values
        num_samples -= num_rows
        if num_samples == 0:
            return


def _part(samples: StepSamples, rows: slice) -> StepSamples:
    return StepSamples(
        samples.slots[rows], samples.sources[rows], samples.epochs[rows], samples.ordinals[rows]
    )


def _read(reader: StreamReader, samples: StepSamples, view: str) -> Tensor:
    """Values of a view, as a batch has them"""
    buffers = StreamBuffers.new(reader.layout, num_rows=len(samples))
    reader.fill_rows(buffers, samples, range(len(samples)))
    values, present = buffers.views[view].values, buffers.views[view].present
    values = values if present is None else values[present]
    return values.movedim(-1, 1) if values.ndim == 4 else values  # -> [B, 3, H, Wd]
