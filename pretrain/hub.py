"""Names of models on a hub, and their files in its local cache.

Training never downloads: nodes of a cluster often have no internet. `python -m pretrain.fetch`
fills the cache before.

    openai/clip-vit-base-patch32            repository, at the revision that was fetched last
    openai/clip-vit-base-patch32@<commit>   the same at one commit
    hf-hub:openai/clip-vit-base-patch32     the same, where a path could be meant
    open_clip:ViT-B-32/laion2b_s34b_b79k    weights that open_clip knows by a tag
    timm:vit_base_patch16_224.augreg_in1k   weights that timm knows by a tag
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import InputError

HUB_PREFIX = "hf-hub:"
OPEN_CLIP_PREFIX = "open_clip:"
TIMM_PREFIX = "timm:"
# Files that hold weights, in the order in which one is chosen. An index names further files.
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Files with the sizes of a model and its preprocessing; a repository has some of them.
CONFIG_FILES_OF_HUB = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# Files of a tokenizer of transformers; a repository has some of them.
TOKENIZER_FILES_OF_HUB = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REPOSITORY_OR_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")  # old models have no owner
_REVISION = re.compile(r"[\w./-]+")


@dataclass(frozen=True)
class HubModel:
    """A model on a hub.

    Attributes:
        repository: "<owner>/<name>".
        revision: branch, tag or commit; None: main.
        weights: name of the file with weights; None: the first of `WEIGHTS` that exists.
    """

    repository: str
    revision: str | None = None
    weights: str | None = None

    @property
    def name(self) -> str:
        """Name as in a config."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(name: str, *, needs_owner: bool = True) -> HubModel | None:
    """Parses "<owner>/<name>", "<owner>/<name>@<revision>" or the same after "hf-hub:".

    Args:
        name: name in a config.
        needs_owner: whether a name without a slash is none of a hub.

    Returns:
        The model, or None for an existing path and for other names.
    """
    is_explicit = name.startswith(HUB_PREFIX)
    if not is_explicit and Path(name).exists():
        return None
    repository, at, revision = name.removeprefix(HUB_PREFIX).partition("@")
    form = _REPOSITORY if needs_owner else _REPOSITORY_OR_NAME
    if not form.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubModel(repository, revision or None)


def model_of_tag(name: str, *, where: str) -> HubModel | None:
    """Returns the repository behind "open_clip:<model>/<tag>" or "timm:<model>.<tag>".

    Args:
        name: name in the config.
        where: config key of the name, for messages.

    Returns:
        The model, or None for another kind of name.

    Raises:
        InputError: if the library has no such tag, or its weights are in no repository of a hub.
    """
    if name.startswith(OPEN_CLIP_PREFIX):
        return _open_clip_model(name.removeprefix(OPEN_CLIP_PREFIX), where)
    if name.startswith(TIMM_PREFIX):
        return _timm_model(name.removeprefix(TIMM_PREFIX), where)
    return None


def _open_clip_model(name: str, where: str) -> HubModel:
    import open_clip

    model, _, tag = name.partition("/")
    found = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(model)
        known = f"open_clip:{model}/ and one of {', '.join(tags)}" if tags else "open_clip's models"
        raise InputError(f"{where}: expected {known}; found {OPEN_CLIP_PREFIX}{name}")
    repository, _, file = found.get("hf_hub", "").rpartition("/")
    if not repository:
        raise _no_repository(where, f"{OPEN_CLIP_PREFIX}{name}", found.get("url"))
    return HubModel(repository, weights=file or None)


def _timm_model(name: str, where: str) -> HubModel:
    import timm

    try:
        found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:  # an unknown model or tag
        found = None
    if found is None or not found.has_weights:
        architecture = name.partition(".")[0]
        tags = timm.list_pretrained(f"{architecture}*")
        known = f"one of {', '.join(tags[:8])}" if tags else "a model of timm.list_pretrained()"
        raise InputError(f"{where}: expected {TIMM_PREFIX} and {known}; found {TIMM_PREFIX}{name}")
    if not found.hf_hub_id:
        raise _no_repository(where, f"{TIMM_PREFIX}{name}", found.url)
    return HubModel(found.hf_hub_id, weights=found.hf_hub_filename)


def _no_repository(where: str, name: str, url: str | None) -> InputError:
    return InputError(
        f"{where}: the weights of {name} are in no repository of a hub; download {url or 'them'} "
        "and give the path of the file"
    )


def cached_folder(model: HubModel, *, needs: Sequence[str]) -> Path | None:
    """Returns the folder of a model in the hub's local cache, or None; never connects.

    Args:
        model: model on a hub.
        needs: names of files; at least one must be there.
    """
    from huggingface_hub import try_to_load_from_cache

    for name in needs:
        found = try_to_load_from_cache(model.repository, name, revision=model.revision)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def cached_or_refused(model: HubModel, *, where: str, needs: Sequence[str]) -> Path:
    """Returns the folder of a model in the hub's local cache.

    Args:
        model: model on a hub.
        where: config key that names it, for messages.
        needs: names of files; at least one must be there.

    Raises:
        InputError: if the files have not been fetched.
    """
    folder = cached_folder(model, needs=needs)
    if folder is None:
        files = needs[0] if len(needs) == 1 else f"any of {', '.join(needs[:4])}"
        raise InputError(
            f"{where}: expected a path, or {model.name} in the hub's cache on this machine; found "
            f"neither ({files}); fetch it where there is internet: python -m pretrain.fetch "
            "CONFIG.yaml"
        )
    return folder


def local_folder(name: str, *, where: str, needs: Sequence[str]) -> str:
    """Returns the folder of a model on this machine: a path, or one in the hub's cache.

    Args:
        name: path of a folder, or name on a hub.
        where: config key that names it, for messages.
        needs: names of files; at least one must be there, in the cache.

    Raises:
        InputError: if the model is on a hub and has not been fetched.
    """
    model = parse_hub_name(name, needs_owner=False)
    return name if model is None else str(cached_or_refused(model, where=where, needs=needs))
