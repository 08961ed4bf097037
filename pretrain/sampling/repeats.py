"""Samples that a step holds more than once, because it draws much of a small source.

With `duplicates: negatives`, the loss contrasts a repeated sample with itself as a negative.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_prep.errors import InputError
from pretrain.sampling.order import StepSamples, StreamOrder
from pretrain.sampling.schedule import RunSchedule
from pretrain.settings.data import Stream, StreamName

logger = logging.getLogger(__name__)

STEPS_MEASURED = 16  # of each segment, evenly spaced
FRACTION_TO_REPORT = 0.01
# A step that draws a smaller part of every source repeats less than 0.2 % of its pairs, where a
# step holds the end of an epoch and the beginning of the next.
PART_TO_MEASURE = 0.1


@dataclass(frozen=True)
class Repeats:
    """Repeated samples in the steps of one segment of a stream."""

    fraction: float  # of a step's pairs, those whose sample is in the step already; mean over steps
    drawn: tuple[float, ...]  # [sources] pairs a step


def repeated_fraction(samples: StepSamples, *, datasets: np.ndarray) -> float:
    """Returns the fraction of a step's pairs whose sample another pair of the step holds already.

    Args:
        samples: samples of a step.
        datasets: int64 [sources], the number of each source's dataset; sources may share one.
    """
    keys = (datasets[samples.sources] << 56) + samples.ordinals
    return 1 - len(np.unique(keys)) / max(1, len(keys))


def measure_repeats(
    order: StreamOrder, *, num_steps: int, datasets: Sequence[str]
) -> Iterator[Repeats]:
    """Yields the repeats of each segment, from a few of its steps.

    Args:
        order: order of a stream's samples.
        num_steps: steps of the run that take the stream.
        datasets: [sources] fingerprint of each source's dataset.
    """
    numbers = np.unique(np.array(datasets), return_inverse=True)[1].astype(np.int64)
    lengths = np.array([source.num_samples for source in order.sources])
    # A set, because no step may take the stream between two segments.
    bounds = sorted({step for step in order.segment_steps if step < num_steps})
    for first, end in pairwise([*bounds, num_steps]):
        drawn = np.array(order.samples_drawn(end)) - np.array(order.samples_drawn(first))
        per_step = drawn / (end - first)
        fraction = 0.0
        if any(
            per_step[numbers == number].sum() > PART_TO_MEASURE * lengths[numbers == number].min()
            for number in set(numbers.tolist())
        ):
            steps = {
                first + (end - first) * (2 * n + 1) // (2 * STEPS_MEASURED)
                for n in range(STEPS_MEASURED)
            }
            of_steps = [
                order.samples_of_step(step, lanes=range(order.lanes)) for step in sorted(steps)
            ]
            fraction = float(
                np.mean([repeated_fraction(each, datasets=numbers) for each in of_steps])
            )
        yield Repeats(fraction, tuple(per_step.tolist()))


def check_repeats(
    streams: Mapping[StreamName, Stream],
    schedule: RunSchedule,
    *,
    datasets: Mapping[StreamName, Sequence[str]],
    is_new_run: bool,
) -> None:
    """Warns of streams whose steps repeat samples; refuses a new run with too many.

    Args:
        streams: sections of the config, by name.
        schedule: samples of every step.
        datasets: {stream: [sources] fingerprint of the source's dataset}.
        is_new_run: whether no earlier attempt was accepted with these repeats.

    Raises:
        InputError: if the fraction of repeats reaches `max_repeated_fraction` of the stream.
    """
    for name, order in schedule.orders.items():
        num_steps = schedule.num_steps_taken(name, schedule.num_steps)
        measured = measure_repeats(order, num_steps=num_steps, datasets=datasets[name])
        worst = max(measured, key=lambda each: each.fraction, default=None)
        if worst is None or not _is_reported(order, worst):
            continue
        stream, key = streams[name], f"streams.{name}"
        found = (
            f"{key}.global_batch_size={order.global_batch_size}: {100 * worst.fraction:.1f} % of a "
            f"step's pairs repeat a sample of the same step ({_largest_draw(order, worst)})"
        )
        contrasting = [
            f"{key}.objectives.{objective}.duplicates"
            for objective, section in stream.objectives.items()
            if section.contrasts_repeats
        ]
        if not contrasting:
            logger.warning("%s; no objective contrasts them with one another", found)
            continue
        limit = stream.max_repeated_fraction
        if is_new_run and worst.fraction >= limit:
            raise InputError(
                f"{found} and are its negatives; expected a fraction below "
                f"max_repeated_fraction={limit:g}: lower global_batch_size or the weight of the "
                f"source, set {contrasting[0]}=masked, or allow it with "
                f"{key}.max_repeated_fraction=1"
            )
        logger.warning("%s and are its negatives; consider %s=masked", found, contrasting[0])


def _is_reported(order: StreamOrder, repeats: Repeats) -> bool:
    draws = zip(repeats.drawn, order.sources, strict=True)
    return repeats.fraction >= FRACTION_TO_REPORT or any(
        drawn > source.num_samples for drawn, source in draws
    )


def _largest_draw(order: StreamOrder, repeats: Repeats) -> str:
    """The source that is smallest for what a step draws from it."""
    drawn, source = max(
        zip(repeats.drawn, order.sources, strict=True),
        key=lambda pair: pair[0] / pair[1].num_samples,
    )
    return f"source {source.name!r}: {drawn:,.1f} drawn a step, of {source.num_samples:,} samples"
