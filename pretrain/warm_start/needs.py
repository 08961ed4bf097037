"""Everything of a config that is on a hub: weights, configs of models, and tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.checkpoints.store import find_locations
from pretrain.config import PretrainConfig
from pretrain.hub import (
    CONFIG_FILES_OF_HUB,
    HUB_PREFIX,
    OPEN_CLIP_PREFIX,
    TIMM_PREFIX,
    TOKENIZER_FILES_OF_HUB,
    WEIGHTS,
    HubModel,
    cached_or_refused,
    model_of_tag,
    parse_hub_name,
)
from pretrain.settings.model import MediaTower, Model, TextTower, VectorTower
from pretrain.settings.objectives import starts_of_modules
from pretrain.settings.warm_start import Start


@dataclass(frozen=True)
class Need:
    """A model of a hub that a setting names.

    Attributes:
        key: config key of the setting.
        model: model on the hub.
        with_weights: whether its weights are needed.
        files: further files that are needed if they exist.
    """

    key: str
    model: HubModel
    with_weights: bool
    files: tuple[str, ...] = CONFIG_FILES_OF_HUB


def find_needs(config: Model, starts: Mapping[str, Start] | None = None) -> list[Need]:
    """Returns what a config needs from a hub; paths that exist need nothing.

    Args:
        config: config section `model`.
        starts: config key -> warm start of modules of objectives.

    Raises:
        InputError: if a library has no weights of the name that a setting gives.
    """
    needs = []
    for name, tower in config.towers.items():
        if not isinstance(tower, VectorTower):
            if tower.start is not None:
                needs += _start_needs(tower.start, f"{config.tower_key(name)}.start")
            needs += _model_needs(tower, config.tower_key(name))
    for where, start in (starts or {}).items():
        needs += _start_needs(start, where)
    return needs if config.text is None else [*needs, *_tokenizer_needs(config.text)]


def module_starts(config: PretrainConfig) -> dict[str, Start]:
    """Returns {config key: warm start} of the modules of objectives."""
    found = starts_of_modules(config.modules).values()
    return {f"{use.where}.start": use.section.module_start for use in found}


def find_teacher_needs(objectives: Mapping[str, Any]) -> list[Need]:
    """Returns what the teachers of a config's objectives need from a hub.

    Args:
        objectives: sections by "<stream>/<objective>".

    Raises:
        InputError: if a library has no weights of the name that a setting gives.
    """
    needs = []
    for name, section in objectives.items():
        teacher = getattr(section, "teacher", None)
        if teacher is None or find_locations(teacher.checkpoint):
            continue
        key = f"streams.{name.replace('/', '.objectives.')}.teacher.checkpoint"
        model = model_of_tag(teacher.checkpoint, where=key) or parse_hub_name(teacher.checkpoint)
        if model is not None:
            files = (*CONFIG_FILES_OF_HUB, *TOKENIZER_FILES_OF_HUB)
            needs.append(Need(key, model, with_weights=True, files=files))
    return needs


def refuse_unfetched(config: Model, starts: Mapping[str, Start] | None = None) -> None:
    """Checks that everything on a hub has been fetched, before a library tries to download it.

    Args:
        config: config section `model`.
        starts: see `find_needs`.

    Raises:
        InputError: if it has not, with the command that fetches it.
    """
    for need in find_needs(config, starts):
        files = need.files
        if need.with_weights:
            files = (need.model.weights,) if need.model.weights else WEIGHTS
        cached_or_refused(need.model, where=need.key, needs=files)


def _start_needs(start: Start, where: str) -> Iterator[Need]:
    key, location = f"{where}.from", start.location
    model = model_of_tag(location, where=key) or parse_hub_name(location)
    if model is not None:
        yield Need(key, model, with_weights=True)


def _model_needs(tower: MediaTower | TextTower, where: str) -> Iterator[Need]:
    """The model that a tower is built as, with the weights of `pretrained`"""
    key = f"{where}.pretrained"
    is_named = isinstance(tower.pretrained, str)
    if tower.library == "transformers":
        if is_named and (model := parse_hub_name(tower.pretrained, needs_owner=False)):
            yield Need(key, model, with_weights=True)
        elif model := parse_hub_name(tower.name, needs_owner=tower.pretrained is not True):
            yield Need(f"{where}.name", model, with_weights=tower.pretrained is True)
    elif tower.name.startswith(HUB_PREFIX):
        if model := parse_hub_name(tower.name):
            yield Need(f"{where}.name", model, with_weights=tower.pretrained is True)
    elif tower.pretrained is True and ":" not in tower.name:
        if model := model_of_tag(f"{TIMM_PREFIX}{tower.name}", where=key):
            yield Need(key, model, with_weights=True)
    elif tower.library == "open_clip" and is_named:
        import open_clip

        if open_clip.get_pretrained_cfg(tower.name, tower.pretrained):
            tag = f"{OPEN_CLIP_PREFIX}{tower.name}/{tower.pretrained}"
            yield Need(key, model_of_tag(tag, where=key), with_weights=True)


def _tokenizer_needs(text: TextTower) -> Iterator[Need]:
    if text.library != "transformers" and text.tokenizer is None:
        return
    key = "model.text.tokenizer" if text.tokenizer else "model.text.name"
    if model := parse_hub_name(text.tokenizer or text.name, needs_owner=False):
        files = (*TOKENIZER_FILES_OF_HUB, "config.json")
        yield Need(key, model, with_weights=False, files=files)
