"""Class names and prompt templates to class embeddings, as in CLIP's prompt ensembles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.config_file import InputError

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDER = re.compile(r"\{c?\}")


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates themselves.

    Raises:
        InputError: one has no place for the class name.
    """
    for template in templates:
        if not PLACEHOLDER.search(template):
            raise InputError(f"prompt template {template!r}: expected {{}} or {{c}} in it")
    return list(templates)


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class name: all prompts of the first class come first."""
    return [
        PLACEHOLDER.sub(lambda _, name=name: name, template)
        for name in class_names
        for template in templates
    ]


def average_prompts(prompt_embeddings: Tensor, *, num_classes: int) -> Tensor:
    """Class embeddings: the normalised mean of the normalised prompts of each class.

    Normalising before averaging gives each prompt the same say (Radford et al. 2021, section
    3.1.4, and its code).

    Args:
        prompt_embeddings: [K * prompts per class, D], in the order of `class_prompts`.
        num_classes: K.

    Returns:
        [K, D], L2-normalised float32.
    """
    prompts = _normalize_rows(prompt_embeddings.float())
    means = prompts.unflatten(0, (num_classes, -1)).mean(dim=1)  # -> [K, D]
    return _normalize_rows(means)


def _normalize_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
