"""Sources of weights: where they are, and their tensors by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import InputError
from data_prep.storage.atomic import sha256_of
from data_prep.storage.remote_file import is_url
from pretrain.checkpoint import find_checkpoint, read_model_state
from pretrain.checkpoints.record import WeightsKind, read_record
from pretrain.checkpoints.store import RECORD, find_locations
from pretrain.hub import (
    CONFIG_FILES_OF_HUB,
    WEIGHTS,
    HubModel,
    cached_folder,
    cached_or_refused,
    model_of_tag,
    parse_hub_name,
)
from pretrain.model.source_files import fingerprint_of_files
from pretrain.warm_start.inert_pickle import read_pickle

LOCAL_DIR = "local-dir:"
# Containers of torch.save hold the weights under one of these names.
_WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".th")


@dataclass(frozen=True)
class WeightSource:
    """Files with weights, or a checkpoint of Isopair.

    Attributes:
        location: path, URL or name as in the config.
        files: files with weights; empty for a checkpoint.
        checkpoint: folder of a checkpoint of Isopair.
        settings: content of the config.json next to the weights, if any.
        weights: kind of weights of the checkpoint.
    """

    location: str
    files: tuple[Path, ...] = ()
    checkpoint: Path | None = None
    settings: Mapping[str, object] | None = None
    weights: WeightsKind = "plain"

    def fingerprint(self) -> str:
        """Computes the SHA-256 of the file, or of the names and contents of several."""
        if self.checkpoint is not None:
            return read_record(self.checkpoint).sha256_of(self.weights)
        if len(self.files) == 1:
            return sha256_of(self.files[0])
        return fingerprint_of_files(self.files)

    def read(self) -> dict[str, Tensor]:
        """Reads all tensors, on the CPU.

        Raises:
            InputError: if a file holds no weights, or is damaged.
        """
        if self.checkpoint is not None:
            return read_model_state(self.checkpoint, weights=self.weights)
        tensors: dict[str, Tensor] = {}
        for path in self.files:
            tensors |= _read_file(path)
        return _unwrapped(tensors)


def find_source(location: str, *, where: str, weights: WeightsKind = "plain") -> WeightSource:
    """Finds the files that a location names, on this machine; only checkpoints may be remote.

    Args:
        location: value of a setting `start.from`.
        where: config key of the setting, for messages.
        weights: kind of weights; only checkpoints of Isopair have others than plain ones.

    Raises:
        InputError: if there is nothing, a hub's model has not been fetched, or the source does not
            hold this kind of weights.
    """
    path = Path(location.removeprefix(LOCAL_DIR))
    if is_url(location) or (path.is_dir() and _holds_checkpoint(path)):
        checkpoint = find_checkpoint(location, weights=weights)
        return WeightSource(location, checkpoint=checkpoint, weights=weights)
    if weights != "plain":
        raise InputError(
            f"{where}={location}: expected a run of Isopair with optimizer.ema, because `weights` "
            f"is {weights}; found none; remove `weights`, or name a run"
        )
    if path.is_file():
        return WeightSource(location, (path,))
    if path.is_dir():
        return _in_folder(location, path, where)
    model = model_of_tag(location, where=where) or parse_hub_name(location)
    if model is None:
        raise InputError(
            f"{where}: expected a file, a folder, a run, a model of a hub (owner/name), "
            f"open_clip:<model>/<tag> or timm:<model>.<tag>; found {location!r}, which is none"
        )
    return _in_cache(location, model, where)


def folder_of(location: str) -> Path | None:
    """Returns the folder of a location, also in the hub's cache; None for files and tags."""
    path = Path(location.removeprefix(LOCAL_DIR))
    if path.is_dir():
        return path
    model = None if path.is_file() else parse_hub_name(location)
    return None if model is None else cached_folder(model, needs=(*CONFIG_FILES_OF_HUB, *WEIGHTS))


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / RECORD).exists() or bool(find_locations(str(folder)))


def _in_cache(location: str, model: HubModel, where: str) -> WeightSource:
    needs = (model.weights,) if model.weights else WEIGHTS
    folder = cached_or_refused(model, where=where, needs=needs)
    return _in_folder(location, folder, where, names=needs)


def _in_folder(
    location: str, folder: Path, where: str, *, names: tuple[str, ...] = WEIGHTS
) -> WeightSource:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{where}={location}: expected a run, or a folder with one of {', '.join(names)}; "
            f"found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
        )
    files = (found,)
    if found.name.endswith(".index.json"):
        files = _shards(found)
    config = folder / "config.json"
    settings = _read_json(config) if config.is_file() else None
    return WeightSource(location, files, settings=settings)


def _shards(index: Path) -> tuple[Path, ...]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(each, str) for each in names.values()):
        raise InputError(f"{index}: expected a weight_map of tensors to files, found {names!r:.80}")
    paths = tuple(index.parent / name for name in sorted(set(names.values())))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{index}: {', '.join(missing)}: no such file; copy all files of the model"
        )
    return paths


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object, found {values!r:.80}")
    return values


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: not readable as safetensors: {error}") from None
    if path.suffix not in _PICKLES:
        raise InputError(
            f"{path}: expected weights in {', '.join(('.safetensors', *_PICKLES))}, found "
            f"{path.suffix or 'no suffix'}; convert them, or rename the file if it is one of these"
        )
    content = read_pickle(path)
    for key in _WEIGHTS_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected names and tensors, found a {type(content).__name__}; save the "
            "weights alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        found = ", ".join(map(str, content)) or "nothing"
        raise InputError(f"{path}: expected names and tensors, found {found:.200}")
    return tensors


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefixes that wrappers of a model put before all names."""
    while tensors and (
        prefix := next((w for w in _WRAPPERS if all(k.startswith(w) for k in tensors)), None)
    ):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
