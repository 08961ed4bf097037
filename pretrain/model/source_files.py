"""Files outside the config that determine a model: those of its tokenizer and pretrained towers.

    model.text.tokenizer        files of the tokenizer, also if model.text.name names it
    model.<kind>.pretrained     weights and, for transformers and timm folders, the model's config
    model.<kind>.name           the model's config in a folder of timm ("local-dir:")
    model.<kind>.options.<key>  a file or folder that an option of the library names

Towers of further modalities have the keys model.modalities.<name>.tower.<...>.

Names of a hub are looked up in its local cache, where the libraries download them to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.storage.atomic import sha256_of
from pretrain.hub import parse_hub_name
from pretrain.settings.model import MediaTower, Model, TextTower, VectorTower

SourceFiles = dict[str, list[Path]]  # config key -> files, none if they are not found

TOKENIZER_KEY = "model.text.tokenizer"
# A folder's files that transformers may read a tokenizer from, as patterns.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",  # its model type may decide which class is used
    "vocab*",
    "merges*.txt",
    "bpe.codes",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
# The same for a hub's cache, which may hold more files than those that were read.
CACHED_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# The first that exists is read; an index names the files that hold the weights.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TIMM_FOLDER, TIMM_HUB = "local-dir:", "hf-hub:"  # prefixes of names


def fingerprint_of_files(paths: Sequence[Path]) -> str:
    """Computes a sha256 over the names and contents of files; folders do not affect it."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(f"{path.name} {sha256_of(path)}\n".encode())
    return total.hexdigest()


def tokenizer_files(config: TextTower | None) -> SourceFiles:
    """Returns the files that the tokenizer is built from; nothing for CLIP's own."""
    if config is None:
        return {}
    if config.library != "transformers" and config.tokenizer is None:
        has_words = config.library == "torch" and config.pretrained
        return {TOKENIZER_KEY: _as_files(str(config.pretrained))} if has_words else {}
    name = config.tokenizer or config.name
    if not Path(name).is_dir():
        return {TOKENIZER_KEY: _existing(name, CACHED_TOKENIZER_FILES)}
    found = {path for pattern in TOKENIZER_FILES for path in Path(name).glob(pattern)}
    return {TOKENIZER_KEY: [path for path in found if path.is_file()]}


def tower_files(config: Model) -> SourceFiles:
    """Returns the files that the towers are built from: weights, configs, and those of options."""
    found: SourceFiles = {}
    for tower_name, tower in config.towers.items():
        if isinstance(tower, VectorTower):
            continue
        key = config.tower_key(tower_name)
        if tower.pretrained:
            found[f"{key}.pretrained"] = _WEIGHT_FILES[tower.library](tower)
        if tower.name.startswith(TIMM_FOLDER):
            name = tower.name.removeprefix(TIMM_FOLDER)
            found[f"{key}.name"] = _existing(name, ("config.json",))
        found |= _files_in_options(tower.options, f"{key}.options")
    return found


# ------------------------------------------------------------------------------ weights by library


def _timm_files(config: MediaTower | TextTower) -> list[Path]:
    import timm

    if isinstance(config.pretrained, str):
        return _as_files(config.pretrained)
    for prefix in (TIMM_FOLDER, TIMM_HUB):
        if config.name.startswith(prefix):
            return _first_existing(config.name.removeprefix(prefix), WEIGHTS)
    pretrained = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if pretrained is None:
        return []
    if pretrained.file:
        return _as_files(pretrained.file)
    names = (pretrained.hf_hub_filename,) if pretrained.hf_hub_filename else WEIGHTS
    return _first_existing(pretrained.hf_hub_id or "", names)


def _open_clip_files(config: MediaTower | TextTower) -> list[Path]:
    import open_clip

    tag = open_clip.get_pretrained_cfg(config.name, str(config.pretrained))
    if not tag:
        return _as_files(str(config.pretrained))
    if "file" in tag:
        return _as_files(tag["file"])
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    return _first_existing(repository, (name,) if name else OPEN_CLIP_WEIGHTS)


def _transformers_files(config: MediaTower | TextTower) -> list[Path]:
    name = config.name if config.pretrained is True else str(config.pretrained)
    weights = _first_existing(name, WEIGHTS)
    shards = [each for path in weights for each in _shards_in_index(path)]
    return _existing(name, ("config.json", *ADAPTER_FILES, *shards)) + weights


def _shards_in_index(path: Path) -> list[str]:
    """The files that an index names; none if the file is no index, or a damaged one"""
    if not path.name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


_WEIGHT_FILES: dict[str, Callable[[MediaTower | TextTower], list[Path]]] = {
    "timm": _timm_files,
    "open_clip": _open_clip_files,
    "transformers": _transformers_files,
    "torch": lambda config: _as_files(str(config.pretrained)),
}


# ------------------------------------------------------------------------------------------ search


def _files_in_options(value: Any, key: str) -> SourceFiles:
    """{key: files} of all texts that are the path of an existing file or folder"""
    if isinstance(value, dict):
        parts: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list | tuple):
        parts = iter(enumerate(value))
    else:
        # Without a separator, it is rather the name of an activation or a layer.
        is_path = isinstance(value, str) and "/" in value and Path(value).exists()
        return {key: _as_files(value)} if is_path else {}
    found: SourceFiles = {}
    for name, part in parts:
        found |= _files_in_options(part, f"{key}.{name}")
    return found


def _as_files(path: str) -> list[Path]:
    """The file, or all files of the folder"""
    return sorted(each for each in (Path(path), *Path(path).rglob("*")) if each.is_file())


def _first_existing(name: str, file_names: Sequence[str]) -> list[Path]:
    return _existing(name, file_names)[:1]


def _existing(name: str, file_names: Sequence[str]) -> list[Path]:
    """The files that are in a folder or, if it is none, in the cache of a hub's repository"""
    found = (_find(name, file_name) for file_name in file_names)
    return [path for path in found if path is not None]


def _find(name: str, file_name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not name:  # Path("") is the working directory
        return None
    if Path(name).is_dir():
        path = Path(name) / file_name
        return path if path.is_file() else None
    model = parse_hub_name(name, needs_owner=False)
    if model is None:
        return None
    found = try_to_load_from_cache(model.repository, file_name, revision=model.revision)
    return Path(found) if isinstance(found, str) else None
