"""Warnings of objectives and modalities of a run that nothing serves or reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress

from pretrain.data.stream_reader import StreamReader
from pretrain.settings.data import Stream, StreamName
from pretrain.settings.model import Model
from pretrain.settings.views import View

logger = logging.getLogger(__name__)


def warn_of_unserved_objectives(readers: Mapping[StreamName, StreamReader]) -> None:
    """Warns of objectives that no sample of their stream can serve, by the indexes."""
    for stream, reader in readers.items():
        unserved: list[str] = []
        with suppress(OSError):  # a URL that cannot be read now; training retries
            unserved = reader.unserved()
        for name in unserved:
            views = " and ".join(reader.objectives[name])
            logger.warning(
                "streams.%s.objectives.%s: no sample of the stream has %s, so its loss is always "
                "0 (%s); remove it, or add a source",
                stream,
                name,
                views,
                "; ".join(_counts_of(reader, name)),
            )


def _counts_of(reader: StreamReader, objective: str) -> list[str]:
    """How many samples of each source's dataset have the modalities of an objective."""
    members = dict.fromkeys(View.parse(view).member for view in reader.objectives[objective])
    lines = []
    for source in reader.sources:
        modalities = source.dataset.modalities
        counts = [
            f"{modalities[member].num_samples if member in modalities else 0} {member}"
            for member in members
        ]
        lines.append(f"of {len(source.dataset)} samples of {source.source}: {', '.join(counts)}")
    return lines


def warn_of_unread_modalities(model: Model, streams: Mapping[StreamName, Stream]) -> None:
    """Warns of modalities with the tower of another one that no objective reads."""
    read = {View.parse(view).modality for stream in streams.values() for view in stream.views}
    for name in model.modalities:
        if name not in read and model.tower_of(name) != name:
            logger.warning(
                "model.modalities.%s is read by no objective: the tower of %s is not trained on "
                "it; add an objective, or remove it",
                name,
                model.tower_of(name),
            )
