"""A teacher as it is loaded: a checkpoint of Isopair, or a model of another library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from pretrain.checkpoint import find_checkpoint, load_model
from pretrain.checkpoints.record import read_record
from pretrain.checkpoints.store import find_locations
from pretrain.config import PretrainConfig
from pretrain.hub import CONFIG_FILES_OF_HUB, TOKENIZER_FILES_OF_HUB, parse_hub_name
from pretrain.model.contrastive_model import ContrastiveModel, build_model
from pretrain.model.source_files import fingerprint_of_files
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.settings.model import Model
from pretrain.teachers.model_of_location import DescribedModel, describe_model, is_foreign
from pretrain.teachers.teacher_inputs import ModelInputs, shape_of
from pretrain.warm_start.model_start import start_fingerprints, start_model, starts_of
from pretrain.warm_start.needs import refuse_unfetched
from pretrain.warm_start.source import folder_of


@dataclass(frozen=True)
class LoadedTeacher:
    """A model in evaluation mode, its inputs, and the fingerprint of its files."""

    model: ContrastiveModel
    inputs: ModelInputs
    fingerprint: str


def load_teacher(
    location: str, *, where: str, temperature: str, modalities: Sequence[str], device: torch.device
) -> LoadedTeacher:
    """Loads a teacher from a run, a checkpoint, or a model of another library.

    Args:
        location: place of the model, as in pretrain.teachers.model_of_location, or a run folder or
            checkpoint.
        where: config key of the location, for messages.
        temperature: name of the objective's temperature.
        modalities: modalities that the objective contrasts.
        device: device of the model.

    Raises:
        InputError: if the model is missing, damaged, or has no such temperature.
    """
    if is_foreign(location):
        return _load_foreign(location, where, temperature, modalities, device)
    if not find_locations(location) and parse_hub_name(location) is not None:
        raise InputError(
            f"{where}={location}: expected a run folder, a checkpoint or a model of the hub that "
            "was fetched, found none; if it is one of the hub, run python -m pretrain.fetch CONFIG "
            "where there is internet"
        )
    return _load_isopair(location, where, temperature, device)


def shapes_of(model: Model) -> dict[str, tuple[str, int | None, int | None]]:
    """Returns the shape of the inputs of every modality."""
    return {modality: shape_of(model, modality) for modality in model.kinds}


def _load_isopair(
    location: str, where: str, temperature: str, device: torch.device
) -> LoadedTeacher:
    folder = find_checkpoint(location)
    config = read_stored_config(PretrainConfig, folder / "config.yaml")
    if temperature not in config.temperatures:
        raise InputError(
            f"{where}={folder}: expected a model with the temperature {temperature!r}, found "
            f"{', '.join(config.temperatures)}"
        )
    model, _, tokenizer = load_model(folder, device=str(device))
    record = read_record(folder)
    image = config.image.after(record.state.step)
    inputs = ModelInputs(image, config.audio, tokenizer, shapes_of(config.model))
    return LoadedTeacher(model, inputs, record.model_sha256)


def _load_foreign(
    location: str, where: str, temperature: str, modalities: Sequence[str], device: torch.device
) -> LoadedTeacher:
    found = describe_model(location, where=where)
    missing = [each for each in modalities if each not in found.model.kinds]
    if missing:
        raise InputError(
            f"{where}={location}: expected a model of {' and '.join(modalities)}, found one of "
            f"{' and '.join(found.model.kinds)}"
        )
    refuse_unfetched(found.model)
    tokenizer = build_text_tokenizer(found.model)
    model = build_model(
        found.model,
        image=found.image,
        audio=found.audio,
        temperatures={temperature: False},
        seed=0,
        tokenizer=tokenizer,
    )
    scale = model.log_logit_scale[temperature]
    before = scale.detach().clone()
    start_model(model, found.model, towers={temperature: list(found.model.towers)})
    if torch.equal(scale, before):
        raise InputError(f"{where}={location}: expected weights with a logit scale, found none")
    model = model.to(device).eval().requires_grad_(False)
    inputs = ModelInputs(
        found.image, found.audio, tokenizer, shapes_of(found.model), is_foreign=True
    )
    return LoadedTeacher(model, inputs, _fingerprint(location, found))


def _fingerprint(location: str, found: DescribedModel) -> str:
    """SHA-256 of the weights, the files that describe the model, and its preprocessing."""
    parts = sorted(str(each) for each in start_fingerprints(starts_of(found.model)).values())
    folder = folder_of(location)
    if folder is not None:
        paths = [folder / name for name in (*CONFIG_FILES_OF_HUB, *TOKENIZER_FILES_OF_HUB)]
        parts.append(fingerprint_of_files([path for path in paths if Path(path).is_file()]))
    parts += [section.model_dump_json() for section in (found.image, found.audio)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
