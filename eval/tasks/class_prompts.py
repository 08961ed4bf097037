"""Class names and prompt templates to class embeddings, as in CLIP's prompt ensembles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.errors import InputError

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


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """[K] of each class, every template filled with its name."""
    return [
        [PLACEHOLDER.sub(lambda _, name=name: name, template) for template in templates]
        for name in class_names
    ]


def average_prompts(prompt_embeddings: Tensor, *, num_prompts: Sequence[int]) -> Tensor:
    """Class embeddings: the normalised mean of the normalised prompts of each class.

    Normalising before averaging gives each prompt the same say (Radford et al. 2021, section
    3.1.4, and its code).

    Args:
        prompt_embeddings: [all prompts, D], those of the first class, then of the second, ...
        num_prompts: [K] of each class.

    Returns:
        [K, D], L2-normalised float32.
    """
    # Slow, and the prompts alone do without.
    import torch

    from eval.models.loaded_model import normalized

    prompts = normalized(prompt_embeddings).split(list(num_prompts))
    means = [of_class.mean(dim=0, keepdim=True) for of_class in prompts]
    return normalized(torch.cat(means))  # -> [K, D]
