"""Checkpoints, written and read by any number of processes, from which a model can be rebuilt.

    step_00001000/
      model-00002-of-00004.safetensors       fp32 parameters: the slices of the second of four ranks
      optimizer-00002-of-00004.safetensors   the same for the optimizer's moments
      ema-00002-of-00004.safetensors         the same for averages of the weights (optimizer.ema)
      optimizer-scalars.json                 numbers of the optimizer's state, if it has any that do
                                             not follow from the number of updates
      buffers.safetensors                    persistent buffers of the model, if it has any
      config.yaml                            resolved config of the run
      assets/                                tokenizer and tower configs that libraries do not ship
      checkpoint.json                        step, shapes, writer; size and sha256 of every other
                                             file; written last

Tensors are flattened. Each entry of a file is a slice, "<key>/<parameter>@<offset>", where the key
is "parameter", "ema" or the name of a moment (see checkpoints/slice_file.py). Which rank writes
which slices depends on the strategy and the number of processes; reading does not.

A folder is a valid checkpoint only if checkpoint.json exists and every checksum agrees. No file is
a pickle.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load
from torch import Tensor

from data_prep.config_file import read_stored_config, to_yaml
from data_prep.errors import InputError, RunError
from data_prep.storage.remote_file import join, local_path, open_binary
from pretrain.checkpoints.download import download_model, verify_model
from pretrain.checkpoints.record import (
    EMA_PREFIX,
    CheckpointRecord,
    WeightsKind,
    read_record,
)
from pretrain.checkpoints.slice_file import SliceIndex, StoredSlice, read_slices
from pretrain.checkpoints.state import (
    BUFFERS_FILE,
    SCALARS_FILE,
    load_slices,
    read_whole,
    shapes_of,
)
from pretrain.checkpoints.store import (
    RECORD,
    CheckpointStore,
    DamagedCheckpointError,
    find_locations,
    read_file,
    retry_remote,
    verify_file,
)
from pretrain.config import PretrainConfig
from pretrain.data.transforms import MediaTransform, build_transforms
from pretrain.distributed.collectives import gather_objects, on_main_process, rank, world_size
from pretrain.distributed.tensor_slice import PARAMETER, TensorSlice
from pretrain.model.contrastive_model import ContrastiveModel, build_model
from pretrain.model.tokenizer import Tokenizer, build_text_tokenizer
from pretrain.settings.optimizers import EMA

if TYPE_CHECKING:
    from pretrain.distributed.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose checksums agree."""

    location: str
    record: CheckpointRecord
    index: SliceIndex


# ---------------------------------------------------------------------- used by the training loop


def files_to_rebuild(
    config: PretrainConfig, model: ContrastiveModel, tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """Returns {name: content} of the files that rebuild the model, in addition to its tensors.

    They are the same for all checkpoints of a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        assets = Path(folder) / "assets"
        assets.mkdir()
        if tokenizer is not None:
            tokenizer.save(assets)
        model.save_assets(assets)
        paths = sorted(path for path in assets.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {"config.yaml": to_yaml(config).encode()} | files


def newest_checkpoint(
    store: CheckpointStore,
    *,
    step: int | None = None,
    is_of_run: Callable[[CheckpointRecord], bool] = lambda record: True,
) -> VerifiedCheckpoint | None:
    """Finds the newest valid checkpoint and logs the damaged ones that it skips.

    Every rank must call it: each verifies a part of the files.

    Args:
        store: the store to search.
        step: step of the checkpoint; None searches all steps.
        is_of_run: returns whether a checkpoint belongs to the run's history; others are skipped.

    Raises:
        RunError: if the store cannot be read.
    """
    found = [each for each in on_main_process(store.checkpoints) if step in (None, each.step)]
    for each in found:
        try:
            checkpoint = open_checkpoint(each.location)
        except DamagedCheckpointError as error:
            if rank() == 0:
                logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        if on_main_process(lambda: is_of_run(checkpoint.record)):  # noqa: B023
            return checkpoint
        if rank() == 0:
            logger.warning(
                "%s is skipped: attempt %s wrote it after a newer attempt had resumed from an "
                "earlier step",
                each.location,
                checkpoint.record.written_by["attempt"],
            )
    if found and rank() == 0:
        logger.warning("%s: none of %d checkpoints is valid", store.folder, len(found))
    return None


def open_checkpoint(location: str) -> VerifiedCheckpoint:
    """Opens a checkpoint after verifying every file; every rank must call it.

    Raises:
        DamagedCheckpointError: on every rank, if a file is missing or its checksum differs.
    """
    record, error = on_main_process(lambda: _record_or_damage(location))
    if error is not None:
        raise error
    found: list[StoredSlice] = []
    try:
        for name in sorted(record.files)[rank() :: world_size()]:
            verify_file(location, name, record.files[name])
            if name.endswith(".safetensors") and name != BUFFERS_FILE:
                found += _slices_in(location, name)
    except (DamagedCheckpointError, OSError) as raised:
        error = raised
    outcomes = gather_objects((found, error))
    for _, error in outcomes:
        if error is not None:
            raise error
    index = SliceIndex(each for slices, _ in outcomes for each in slices)
    refuse_missing_parameters(location, record, index)
    return VerifiedCheckpoint(location, record, index)


def refuse_missing_parameters(location: str, record: CheckpointRecord, index: SliceIndex) -> None:
    """Checks that the files hold every parameter of the record whole.

    Raises:
        DamagedCheckpointError: if elements are missing.
    """
    for name, shape in record.shapes.items():
        try:
            for _ in index.parts_of(TensorSlice(f"{PARAMETER}/{name}", 0, prod(shape))):
                pass
        except ValueError as error:
            raise DamagedCheckpointError(f"{location}/{RECORD}: {error}") from None


def _record_or_damage(
    location: str,
) -> tuple[CheckpointRecord | None, DamagedCheckpointError | None]:
    try:
        return read_record(location), None
    except DamagedCheckpointError as error:
        return None, error


def _read_scalars(location: str, record: CheckpointRecord) -> dict[str, dict[str, float]]:
    return json.loads(read_file(location, SCALARS_FILE)) if SCALARS_FILE in record.files else {}


def _slices_in(location: str, name: str) -> list[StoredSlice]:
    path = join(location, name)

    def read() -> list[StoredSlice]:
        with open_binary(path) as file:
            return read_slices(file, name)

    return retry_remote(path, read)


def restore(engine: Engine, checkpoint: VerifiedCheckpoint) -> None:
    """Loads a checkpoint into an engine; every rank must call it.

    If the checkpoint has no averages of the weights, those of the engine begin with its weights.

    Raises:
        InputError: if the checkpoint belongs to a different model.
    """
    refuse_other_shapes(checkpoint, shapes_of(engine.model))
    state = checkpoint.record.state
    engine.open_groups(state.step, updates_before=state.num_updates_before)
    _refuse_missing_moments(engine, checkpoint)
    has_ema = checkpoint.record.has_ema
    _load_model(engine, checkpoint, is_loaded=lambda held: held.key != EMA or has_ema)
    engine.after_load(
        num_updates=state.num_updates,
        scalars=_read_scalars(checkpoint.location, checkpoint.record),
    )
    if not has_ema:
        engine.begin_averages()


def restore_weights(engine: Engine, checkpoint: VerifiedCheckpoint) -> None:
    """Loads the parameters and buffers of a checkpoint into an engine; every rank must call it.

    The optimizer keeps the state of a new run: no updates, moments of zero, and averages that begin
    with the weights.

    Raises:
        InputError: if the checkpoint belongs to a different model.
    """
    refuse_other_shapes(checkpoint, shapes_of(engine.model))
    _load_model(engine, checkpoint, is_loaded=lambda held: held.key == PARAMETER)
    engine.after_load(num_updates=0)
    engine.begin_averages()


def _load_model(
    engine: Engine, checkpoint: VerifiedCheckpoint, *, is_loaded: Callable[[TensorSlice], bool]
) -> None:
    load_slices(engine, checkpoint.location, checkpoint.index, is_loaded=is_loaded)
    engine.model.load_state_dict(
        _read_buffers(checkpoint.location, checkpoint.record), strict=False
    )


def refuse_other_shapes(checkpoint: VerifiedCheckpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Checks that a checkpoint and a model have the same parameters.

    Args:
        checkpoint: the checkpoint.
        shapes: parameter name -> shape in the model.

    Raises:
        InputError: if names or shapes differ.
    """
    stored = checkpoint.record.shapes
    different = [
        f"  {name}: {stored.get(name, 'none')} in the checkpoint, "
        f"{shapes.get(name, 'none')} in the model"
        for name in sorted({*stored, *shapes})
        if stored.get(name) != shapes.get(name)
    ]
    if different:
        more = [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        raise InputError(
            f"{checkpoint.location}: expected the parameters of this model, found other names or "
            "shapes:\n" + "\n".join(different[:10] + more)
        )


def _refuse_missing_moments(engine: Engine, checkpoint: VerifiedCheckpoint) -> None:
    own = {
        held.slice.tensor: held.slice.parameter
        for held in engine.slices()
        if held.slice.key != EMA or checkpoint.record.has_ema
    }
    names = {name for tensor, name in own.items() if not checkpoint.index.has(tensor)}
    missing = sorted(set().union(*gather_objects(names)))
    if missing:
        raise InputError(
            f"{checkpoint.location}: expected optimizer moments for every parameter that this run "
            f"trains, found none for {', '.join(missing[:10])}"
            f"{f' and {len(missing) - 10} more' if len(missing) > 10 else ''}, which were frozen "
            "in the checkpoint's run: train the same parameters as that run, or freeze them and "
            "open them from a later step on (optimizer.frozen, optimizer.unfreeze)"
        )


def _read_buffers(location: str, record: CheckpointRecord) -> dict[str, Tensor]:
    return load(read_file(location, BUFFERS_FILE)) if BUFFERS_FILE in record.files else {}


# ------------------------------------------------------------------- used by consumers of a model


def find_checkpoint(folder: str | Path, *, weights: WeightsKind = "plain") -> Path:
    """Finds a checkpoint and verifies the files of its model.

    Args:
        folder: path or URL of a checkpoint, or of a run folder, whose newest checkpoint is used.
            A remote checkpoint is downloaded to the user's cache, without the optimizer's files.
        weights: weights that will be read.

    Raises:
        InputError: if there is no checkpoint, it is damaged, or it does not hold the weights. There
            is no silent fallback to an older one.
        RunError: if the network or the server fails.
    """
    locations = find_locations(str(folder))
    if not locations:
        raise InputError(
            f"{folder}: expected a run folder with a checkpoint, or a checkpoint; found neither; "
            "train one with python -m pretrain.train"
        )
    try:
        record = read_record(locations[0])
        record.refuse_missing_ema(weights, location=locations[0])
        if local_path(locations[0]) is None:
            return download_model(locations[0], record, weights=weights)
        verify_model(locations[0], record, weights=weights)
    except DamagedCheckpointError as error:
        others = ", ".join(locations[1:])
        advice = f"use an older one: {others}" if others else "there is no older one"
        raise InputError(f"damaged checkpoint: {error}; {advice}") from None
    except OSError as error:
        if local_path(locations[0]) is not None:
            raise
        raise RunError(f"{locations[0]}: cannot be read now: {error}") from None
    return local_path(locations[0])


def load_model(
    folder: str | Path, *, device: str = "cpu", weights: WeightsKind = "plain"
) -> tuple[ContrastiveModel, dict[str, MediaTransform], Tokenizer | None]:
    """Loads a trained model in evaluation mode.

    Args:
        folder: path or URL of a checkpoint, or of a run folder, whose newest checkpoint is used.
        device: device of the model.
        weights: "plain", or "ema": the averages that a run with optimizer.ema keeps.

    Returns:
        (model, {modality: transform} of images and clips, tokenizer of texts or None)

    Raises:
        InputError: if there is no checkpoint, it is damaged, or it does not hold the weights.
    """
    checkpoint = find_checkpoint(folder, weights=weights)
    config = read_stored_config(PretrainConfig, checkpoint / "config.yaml")
    assets = checkpoint / "assets"
    tokenizer = build_text_tokenizer(config.model, assets=assets)
    model = build_model_of(config, tokenizer, assets=assets)
    try:
        model.load_state_dict(read_model_state(checkpoint, weights=weights))
    except DamagedCheckpointError as error:
        raise InputError(f"damaged checkpoint: {error}; name an older one") from None
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    image = config.image.after(read_record(checkpoint).state.step)
    by_kind = build_transforms(config.model, image=image, audio=config.audio)
    transforms = {
        modality: by_kind[kind] for modality, kind in config.model.kinds.items() if kind in by_kind
    }
    return model, transforms, tokenizer


def build_model_of(
    config: PretrainConfig, tokenizer: Tokenizer | None, *, assets: Path | None = None
) -> ContrastiveModel:
    """Builds the model of a run; see `build_model`.

    Args:
        config: config of the run.
        tokenizer: tokenizer of texts; None without a text tower.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if a tower cannot be built.
    """
    return build_model(
        config.model,
        image=config.image,
        audio=config.audio,
        temperatures=config.temperatures,
        heads=config.heads,
        module_uses=config.modules,
        seed=config.seed,
        tokenizer=tokenizer,
        assets=assets,
    )


def read_model_state(checkpoint: Path, *, weights: WeightsKind = "plain") -> dict[str, Tensor]:
    """Reads the parameters and persistent buffers of a checkpoint, for `load_state_dict`.

    Args:
        checkpoint: folder of the checkpoint.
        weights: weights to read. Frozen parameters have no averages and are always plain.

    Raises:
        InputError: if the checkpoint does not hold the weights.
    """
    record = read_record(checkpoint)
    location = str(checkpoint)
    record.refuse_missing_ema(weights, location=location)
    names = [name for name in record.files_of(weights) if name.startswith(("model-", EMA_PREFIX))]
    index = SliceIndex(each for name in names for each in _slices_in(location, name))
    refuse_missing_parameters(location, record, index)
    tensors = {
        name: f"{EMA}/{name}" if index.has(f"{EMA}/{name}") else f"{PARAMETER}/{name}"
        for name in record.shapes
    }
    sizes = {tensors[name]: prod(shape) for name, shape in record.shapes.items()}
    try:
        values = read_whole(location, index, sizes=sizes)
    except ValueError as error:
        raise DamagedCheckpointError(f"{location}/{RECORD}: {error}") from None
    state = {name: values[tensors[name]].view(shape) for name, shape in record.shapes.items()}
    return state | _read_buffers(location, record)
