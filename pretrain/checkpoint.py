"""Checkpoints: whole or not there, of any number of processes, and enough to rebuild the model.

    step_00001000/
      model-00002-of-00004.safetensors       fp32 parameters: what the second of four processes held
      optimizer-00002-of-00004.safetensors   likewise, moments of the optimizer
      buffers.safetensors                    saved buffers of the model, if it has any
      config.yaml                            the run's resolved config
      assets/                                tokenizer and tower configs that libraries do not ship
      checkpoint.json                        step, shapes, who wrote it; size and sha256 of every
                                             other file; written last

Tensors are flattened. A file holds fragments, "<key>/<parameter>@<first element>" (see
fragment_file): keys are "parameter" and the moments' names. Which rank holds which fragment follows
from strategy and number of processes, and is of no importance to who reads them.

A folder counts only if checkpoint.json is there and every sum agrees. Nothing in it is a pickle.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from data_prep.config_file import (
    read_config,
    to_yaml,
)
from data_prep.errors import InputError
from data_prep.storage.remote_file import join, local_path, open_binary
from pretrain.checkpoints.download import download_model, verify_model
from pretrain.checkpoints.record import CheckpointRecord, read_record
from pretrain.checkpoints.slice_file import PieceIndex, StoredPiece, read_pieces
from pretrain.checkpoints.state import (
    BUFFERS_FILE,
    PARAMETER,
    load_fragments,
    read_whole,
    shapes_of,
)
from pretrain.checkpoints.store import (
    CheckpointStore,
    DamagedCheckpointError,
    find_locations,
    read_file,
    tried,
    verify_file,
)
from pretrain.config import MediaKind, PretrainConfig
from pretrain.data.transforms import MediaTransform, build_transforms
from pretrain.distributed.collectives import gather_objects, on_main_process, rank, world_size
from pretrain.distributed.engine import Engine
from pretrain.model.contrastive_model import ContrastiveModel, build_model
from pretrain.model.tokenizer import Tokenizer, build_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WholeCheckpoint:
    """A checkpoint whose sums agree."""

    location: str
    record: CheckpointRecord
    index: PieceIndex


# -------------------------------------------------------------------------------- for training


def files_to_rebuild(
    config: PretrainConfig, model: ContrastiveModel, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """What the model is rebuilt from besides its tensors, by name; the same for all of a run."""
    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder) / "assets"
        assets.mkdir()
        tokenizer.save(assets)
        model.save_assets(assets)
        paths = sorted(path for path in assets.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {"config.yaml": to_yaml(config).encode()} | files


def newest_checkpoint(
    store: CheckpointStore, *, counts: Callable[[CheckpointRecord], bool] = lambda record: True
) -> WholeCheckpoint | None:
    """The newest checkpoint whose sums agree; damaged ones are named in the log.

    Every rank must call it: each checks a part of the files.

    Args:
        store: where they are.
        counts: whether one is taken for the run's own.

    Raises:
        RunError: the store cannot be read.
    """
    found = on_main_process(store.checkpoints)
    for each in found:
        try:
            whole = open_whole(each.location)
        except DamagedCheckpointError as error:
            if rank() == 0:
                logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        if on_main_process(lambda: counts(whole.record)):  # noqa: B023
            return whole
        if rank() == 0:
            logger.warning(
                "%s is skipped: attempt %s wrote it after a newer attempt had gone on from an "
                "earlier step",
                each.location,
                whole.record.written_by["attempt"],
            )
    if found and rank() == 0:
        logger.warning("%s: none of %d checkpoints is whole", store.folder, len(found))
    return None


def open_whole(location: str) -> WholeCheckpoint:
    """A checkpoint, after every file was checked; every rank must call it.

    Raises:
        DamagedCheckpointError: on every rank, naming a file that is missing or differs.
    """
    record, error = on_main_process(lambda: _record_or_damage(location))
    if error is not None:
        raise error
    found: list[StoredPiece] = []
    try:
        for name in sorted(record.files)[rank() :: world_size()]:
            verify_file(location, name, record.files[name])
            if name.startswith(("model-", "optimizer-")):
                found += _pieces_in(location, name)
    except (DamagedCheckpointError, OSError) as raised:
        error = raised
    outcomes = gather_objects((found, error))
    for _, error in outcomes:
        if error is not None:
            raise error
    return WholeCheckpoint(
        location, record, PieceIndex(each for pieces, _ in outcomes for each in pieces)
    )


def _record_or_damage(
    location: str,
) -> tuple[CheckpointRecord | None, DamagedCheckpointError | None]:
    try:
        return read_record(location), None
    except DamagedCheckpointError as error:
        return None, error


def _pieces_in(location: str, name: str) -> list[StoredPiece]:
    path = join(location, name)

    def read() -> list[StoredPiece]:
        with open_binary(path) as file:
            return read_pieces(file, name)

    return tried(path, read)


def restore(engine: Engine, checkpoint: WholeCheckpoint) -> None:
    """Loads a checkpoint into an engine; every rank must call it.

    Raises:
        InputError: it is of another model.
    """
    refuse_other_shapes(checkpoint, shapes_of(engine.model))
    _refuse_missing_moments(engine, checkpoint)
    load_fragments(engine, checkpoint.location, checkpoint.index)
    engine.model.load_state_dict(
        _read_buffers(checkpoint.location, checkpoint.record), strict=False
    )
    engine.after_load(num_updates=checkpoint.record.state.num_updates)


def refuse_other_shapes(checkpoint: WholeCheckpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """
    Raises:
        InputError: the checkpoint holds other parameters than a model of these shapes.
    """
    there = checkpoint.record.shapes
    different = [
        f"  {name}: {there.get(name, 'none')} there, {shapes.get(name, 'none')} here"
        for name in sorted({*there, *shapes})
        if there.get(name) != shapes.get(name)
    ]
    if different:
        more = [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        raise InputError(
            f"{checkpoint.location}: expected parameters of this model, found others (shapes):\n"
            + "\n".join(different[:10] + more)
        )


def _refuse_missing_moments(engine: Engine, checkpoint: WholeCheckpoint) -> None:
    own = {f"{each.key}/{each.name}": each.name for each in engine.fragments()}
    names = {name for tensor, name in own.items() if not checkpoint.index.has(tensor)}
    missing = sorted(set().union(*gather_objects(names)))
    if missing:
        raise InputError(
            f"{checkpoint.location}: expected the optimizer's moments of every parameter that is "
            f"trained here, found none of {', '.join(missing[:10])}"
            f"{f' and {len(missing) - 10} more' if len(missing) > 10 else ''}, which were frozen "
            "there: train the same parameters as the run it begins from"
        )


def _read_buffers(location: str, record: CheckpointRecord) -> dict[str, Tensor]:
    return load(read_file(location, BUFFERS_FILE)) if BUFFERS_FILE in record.files else {}


# -------------------------------------------------------------------------------- for whoever uses


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint a person means by a checkpoint, or by a run folder: its newest.

    Args:
        folder: path or URL. What is behind a URL is copied to the user's cache, without the
            optimizer's files.

    Raises:
        InputError: there is none, or it is damaged. (What is measured is never silently an older
            one; the optimizer's state is not looked at.)
    """
    locations = find_locations(str(folder))
    if not locations:
        raise InputError(
            f"{folder}: expected a run folder with a checkpoint, or a checkpoint; found neither; "
            "train one with python -m pretrain.train"
        )
    try:
        record = read_record(locations[0])
        if local_path(locations[0]) is None:
            return download_model(locations[0], record)
        verify_model(locations[0], record)
    except DamagedCheckpointError as error:
        others = ", ".join(locations[1:]) or "there is none"
        raise InputError(f"damaged checkpoint: {error}; name an older one: {others}") from None
    return local_path(locations[0])


def load_model(
    folder: str | Path, *, device: str = "cpu"
) -> tuple[ContrastiveModel, dict[MediaKind, MediaTransform], Tokenizer]:
    """A trained model in evaluation mode, its transforms by kind of media, and its tokenizer.

    Args:
        folder: a run folder (its newest checkpoint is taken) or one checkpoint; path or URL.
        device: where the model goes.

    Raises:
        InputError: there is no whole checkpoint.
    """
    checkpoint = find_checkpoint(folder)
    config = read_config(PretrainConfig, checkpoint / "config.yaml")
    assets = checkpoint / "assets"
    tokenizer = build_tokenizer(config.model.text, assets=assets)
    model = build_model(config, tokenizer=tokenizer, assets=assets)
    model.load_state_dict(read_model_state(checkpoint))
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    return model, build_transforms(config), tokenizer


def read_model_state(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and saved buffers of a checkpoint by name, as `load_state_dict` takes them."""
    record = read_record(checkpoint)
    location = str(checkpoint)
    names = [name for name in record.files if name.startswith("model-")]
    index = PieceIndex(piece for name in names for piece in _pieces_in(location, name))
    sizes = {f"{PARAMETER}/{name}": prod(shape) for name, shape in record.shapes.items()}
    values = read_whole(location, index, sizes=sizes)
    state = {n: values[f"{PARAMETER}/{n}"].view(shape) for n, shape in record.shapes.items()}
    return state | _read_buffers(location, record)
