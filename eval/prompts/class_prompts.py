"""Class names and prompts, and class embeddings as in CLIP's prompt ensembles.

Names and prompts are read from the config, a file, the dataset's own text files, or open_clip.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet
from eval.datasets.file_dataset import FileDataset
from eval.datasets.tar_dataset import CLASS_NAMES, TEMPLATES, TarDataset

if TYPE_CHECKING:
    from torch import Tensor

    from eval.tasks.task import EvaluationSection

PLACEHOLDER = re.compile(r"\{c?\}")
FILE_OF_KEY = {"class_names": CLASS_NAMES, "prompt_templates": TEMPLATES}
OPEN_CLIP = "open_clip:"
# (config key, name after "open_clip:") -> name in open_clip
NAMES_OF_OPEN_CLIP = {
    ("class_names", "imagenet"): "IMAGENET_CLASSNAMES",
    ("prompt_templates", "imagenet"): "OPENAI_IMAGENET_TEMPLATES",
    ("prompt_templates", "simple"): "SIMPLE_IMAGENET_TEMPLATES",
}


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of K classes."""

    templates: list[str]  # empty if each class has its own prompts
    of_class: list[list[str]]  # [K]

    @property
    def texts(self) -> list[str]:
        """All prompts, class by class."""
        return list(chain.from_iterable(self.of_class))

    def class_embeddings(self, prompt_embeddings: Tensor) -> Tensor:
        """Averages the embeddings of `texts`, [prompts, D], into class embeddings, [K, D]."""
        return average_prompts(
            prompt_embeddings, num_prompts=[len(prompts) for prompts in self.of_class]
        )

    def record(self) -> dict[str, Any]:
        """Returns the fields of results.json that describe the prompts."""
        from eval.embeddings.store import checksum_of_texts

        return {
            "num_prompts": len(self.texts),
            "prompts_sha256": checksum_of_texts(self.texts),
            "prompt_templates": self.templates,
        }


def check_templates(templates: Sequence[str]) -> list[str]:
    """Checks prompt templates, and returns them.

    Raises:
        InputError: if a template has no placeholder for the class name.
    """
    for template in templates:
        if not PLACEHOLDER.search(template):
            raise InputError(f"prompt template {template!r}: expected a placeholder {{}} or {{c}}")
    return list(templates)


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Returns the prompts of each class, [K]: all templates filled in with its name."""
    return [
        [PLACEHOLDER.sub(lambda _, name=name: name, template) for template in templates]
        for name in class_names
    ]


def average_prompts(prompt_embeddings: Tensor, *, num_prompts: Sequence[int]) -> Tensor:
    """Computes class embeddings: the normalised mean of the normalised prompts of each class.

    Normalising before averaging gives each prompt the same weight (Radford et al. 2021, section
    3.1.4, and its code).

    Args:
        prompt_embeddings: [all prompts, D], class by class.
        num_prompts: [K] number of prompts of each class.

    Returns:
        [K, D], L2-normalised float32.
    """
    import torch

    from eval.models.loaded_model import normalized

    prompts = normalized(prompt_embeddings).split(list(num_prompts))
    means = [of_class.mean(dim=0, keepdim=True) for of_class in prompts]
    return normalized(torch.cat(means))  # -> [K, D]


# ------------------------------------------------------------------------------------ reading


def read_class_names(name: str, section: EvaluationSection, dataset: EvaluationSet) -> list[str]:
    """Reads the class names of an evaluation; two classes may share a name, as in ImageNet.

    Raises:
        InputError: if there are no class names; also see `read_lines`.
    """
    return _configured_or_shipped("class_names", name, section, dataset)


def read_prompts(
    name: str, section: EvaluationSection, dataset: EvaluationSet, class_names: Sequence[str]
) -> ClassPrompts:
    """Reads the prompts of an evaluation's classes.

    Raises:
        InputError: if there are no prompts, a template has no placeholder, or a class has no
            prompts; also see `read_lines`.
    """
    if section.class_prompts is None:
        templates = check_templates(
            _configured_or_shipped("prompt_templates", name, section, dataset)
        )
        return ClassPrompts(templates, class_prompts(class_names, templates))
    path = section.class_prompts
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a .json of class -> prompts: {error}") from None
    return ClassPrompts([], [_prompts_of(found, known, path) for known in class_names])


def _prompts_of(found: Any, class_name: str, path: Path) -> list[str]:
    prompts = found.get(class_name) if isinstance(found, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"{path}: expected a list of prompts for the class {class_name!r}")
    return prompts


def _configured_or_shipped(
    key: str, name: str, section: EvaluationSection, dataset: EvaluationSet
) -> list[str]:
    """Returns the texts of a config key, or else those that come with the dataset."""
    found = getattr(section, key)
    if isinstance(found, str) and found.startswith(OPEN_CLIP):
        return _texts_of_open_clip(key, name, found.removeprefix(OPEN_CLIP))
    if found is None and isinstance(dataset, TarDataset):
        found = dataset.find_text_file(FILE_OF_KEY[key])
    if found is None and key == "class_names" and isinstance(dataset, FileDataset):
        found = [known.replace("_", " ") for known in dataset.class_folders] or None
    if found is None:
        raise InputError(
            f"evaluations.{name}.{key}: expected a list, or a text file with one per line; found "
            f"none, and no {FILE_OF_KEY[key]} in {dataset.folder}"
        )
    source = found if isinstance(found, list) else Path(found)
    return read_lines(source, are_numbered=key == "class_names")


def _texts_of_open_clip(key: str, name: str, wanted: str) -> list[str]:
    if (key, wanted) not in NAMES_OF_OPEN_CLIP:
        known = [f"{OPEN_CLIP}{each}" for of_key, each in NAMES_OF_OPEN_CLIP if of_key == key]
        raise InputError(
            f"evaluations.{name}.{key}: expected {' or '.join(known)}, found {OPEN_CLIP}{wanted}"
        )
    from open_clip import zero_shot_metadata  # imports torch

    texts = getattr(zero_shot_metadata, NAMES_OF_OPEN_CLIP[key, wanted])
    return [text("{}") if callable(text) else text for text in texts]


def index_of_classes(class_names: Sequence[str], dataset: EvaluationSet) -> dict[str, int]:
    """Maps the class names used by samples to indices into class_names.

    Names may have underscores in place of spaces. If some class folders have unknown names, as in
    ImageNet, and there is one folder per class, the sorted folders are the classes in order.

    Raises:
        InputError: if folders have unknown names, and their number differs from that of classes.
    """
    index_of = {known.replace(" ", "_"): index for index, known in enumerate(class_names)}
    index_of |= {known: index for index, known in enumerate(class_names)}
    folders = dataset.class_folders if isinstance(dataset, FileDataset) else []
    unknown = [folder for folder in folders if folder not in index_of]
    if not unknown:
        return index_of
    if len(folders) != len(class_names):
        raise InputError(
            f"{dataset.folder}: expected folders named after the {len(class_names)} classes, or "
            f"one folder per class in class order; found {len(folders)} folders, and the class "
            f"{unknown[0]!r} is unknown"
        )
    return {folder: index for index, folder in enumerate(folders)}


def read_lines(source: list[str] | Path, *, are_numbered: bool = False) -> list[str]:
    """Reads texts from a list, or from a text file with one per line; skips blank lines.

    Args:
        source: list of texts, or path of the text file.
        are_numbered: True if the number of a line is a class index. A blank line is then skipped
            only at the end; before another line, it would shift the indices of all later classes.

    Raises:
        InputError: if the file is missing or not UTF-8, there are no texts, or a line before
            another one is blank although lines are numbered.
    """
    lines, where = source, "the list"
    if isinstance(source, Path):
        where = str(source)
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source}: expected a text file with one entry per line: {error}"
            ) from None
    numbers = [number for number, line in enumerate(lines) if line.strip()]
    if not numbers:
        raise InputError(f"{where}: expected at least one entry, found none")
    if are_numbered and len(numbers) != numbers[-1] + 1:
        blank = next(number for number, line in enumerate(lines) if not line.strip())
        raise InputError(
            f"{where}: line {blank + 1} is blank, and {numbers[-1] - blank} lines follow; the "
            "number of a line is a class index (.cls, .npy), so the line must neither be skipped "
            "nor be a class without a name: write the name of the class, or remove the line if "
            "the labels do not count it"
        )
    return [lines[number].strip() for number in numbers]
