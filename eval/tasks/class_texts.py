"""The class names and prompts of an evaluation: its own, those of a file, those that come with the
dataset, or those of open_clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from eval.config import EvaluationSection
from eval.datasets.datasets import EvaluationSet
from eval.datasets.file_dataset import FileDataset
from eval.datasets.tar_dataset import CLASS_NAMES, TEMPLATES, TarDataset
from eval.tasks.class_prompts import check_templates, class_prompts

FILE_OF_KEY = {"class_names": CLASS_NAMES, "prompt_templates": TEMPLATES}
OPEN_CLIP = "open_clip:"
# What open_clip ships, by the key and the name after "open_clip:".
NAMES_OF_OPEN_CLIP = {
    ("class_names", "imagenet"): "IMAGENET_CLASSNAMES",
    ("prompt_templates", "imagenet"): "OPENAI_IMAGENET_TEMPLATES",
    ("prompt_templates", "simple"): "SIMPLE_IMAGENET_TEMPLATES",
}


def read_class_names(name: str, section: EvaluationSection, dataset: EvaluationSet) -> list[str]:
    """The class names of an evaluation; two classes may share a name, as two of ImageNet's do.

    Raises:
        InputError: see `read_lines`; or there are none.
    """
    return _own_or_beside("class_names", name, section, dataset)


def read_prompts(
    name: str, section: EvaluationSection, dataset: EvaluationSet, class_names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """(templates, or none where each class has prompts of its own; [K] prompts of each class)

    Raises:
        InputError: see `read_lines`; or there are none, a template has no place for the class, or
            a class has no prompts.
    """
    if section.class_prompts is None:
        templates = check_templates(_own_or_beside("prompt_templates", name, section, dataset))
        return templates, class_prompts(class_names, templates)
    path = section.class_prompts
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a .json of class -> prompts: {error}") from None
    prompts = [_prompts_of(found, known, path) for known in class_names]
    return [], prompts


def _prompts_of(found: Any, class_name: str, path: Path) -> list[str]:
    prompts = found.get(class_name) if isinstance(found, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"{path}: expected a list of prompts for the class {class_name!r}")
    return prompts


def _own_or_beside(
    key: str, name: str, section: EvaluationSection, dataset: EvaluationSet
) -> list[str]:
    """The texts that a key of a section names, or else those that come with the dataset."""
    found = getattr(section, key)
    if isinstance(found, str) and found.startswith(OPEN_CLIP):
        return _texts_of_open_clip(key, name, found.removeprefix(OPEN_CLIP))
    if found is None and isinstance(dataset, TarDataset):
        found = dataset.beside(FILE_OF_KEY[key])
    if found is None and key == "class_names" and isinstance(dataset, FileDataset):
        found = [known.replace("_", " ") for known in dataset.class_folders] or None
    if found is None:
        raise InputError(
            f"evaluations.{name}.{key}: expected a list, or a text file with one per line; found "
            f"none, and no {FILE_OF_KEY[key]} in {dataset.folder}"
        )
    return read_lines(found if isinstance(found, list) else Path(found))


def _texts_of_open_clip(key: str, name: str, wanted: str) -> list[str]:
    if (key, wanted) not in NAMES_OF_OPEN_CLIP:
        known = [f"{OPEN_CLIP}{each}" for of_key, each in NAMES_OF_OPEN_CLIP if of_key == key]
        raise InputError(
            f"evaluations.{name}.{key}: expected {' or '.join(known)}, found {OPEN_CLIP}{wanted}"
        )
    # Imported here: it imports torch.
    from open_clip import zero_shot_metadata

    texts = getattr(zero_shot_metadata, NAMES_OF_OPEN_CLIP[key, wanted])
    return [text("{}") if callable(text) else text for text in texts]


def place_of_classes(class_names: Sequence[str], dataset: EvaluationSet) -> dict[str, int]:
    """Class as samples name it -> place in class_names.

    Names count with underscores for spaces as well. Folders whose names are not all known, such as
    ImageNet's, are the classes in their order, if there are as many.

    Raises:
        InputError: there are not as many.
    """
    indices = {known.replace(" ", "_"): place for place, known in enumerate(class_names)}
    indices |= {known: place for place, known in enumerate(class_names)}
    folders = dataset.class_folders if isinstance(dataset, FileDataset) else []
    unknown = [folder for folder in folders if folder not in indices]
    if not unknown:
        return indices
    if len(folders) != len(class_names):
        raise InputError(
            f"{dataset.folder}: expected folders named as the {len(class_names)} classes, or one "
            f"for each of them in their order; found {len(folders)} folders, and the class "
            f"{unknown[0]!r} is unknown"
        )
    return {folder: place for place, folder in enumerate(folders)}


def read_lines(source: list[str] | Path) -> list[str]:
    """The texts of a list, or of a text file with one per line; blank lines do not count.

    Raises:
        InputError: the file is missing or not UTF-8, or nothing is left.
    """
    lines, place = source, "the list"
    if isinstance(source, Path):
        place = str(source)
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source}: expected a text file with one entry per line: {error}"
            ) from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{place}: expected at least one entry, found none")
    return texts
