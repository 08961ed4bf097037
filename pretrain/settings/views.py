"""Names of views: what an objective reads of a sample.

    image          the modality `image`
    image.2        a second augmentation of it; of a text with several captions, another draw
    text.title     the text `title` of the dataset, read and encoded as the modality `text`
    text.title.2   another draw of it

In a config, `{image: 2}` is `image.2`, and `{text: title}` is `text.title`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator

MAX_AUGMENTATIONS = 16
_OF_TEACHER = "~"


@dataclass(frozen=True)
class View:
    """A modality of a sample as one of its augmentations shows it."""

    modality: str  # of the model: decides the tower and the transform
    member: str  # modality of the dataset
    augmentation: int = 1

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parses a name.

        Raises:
            ValueError: if it is not the name of a view.
        """
        modality, *rest = name.split(".")
        augmentation = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        member = rest.pop() if rest else modality
        view = cls(modality, member, augmentation)
        if rest or str(view) != name or not (modality and member):
            raise ValueError(
                f"{name!r}: expected a modality such as image, an augmentation such as image.2, or "
                "another text of the dataset such as text.title"
            )
        if not 1 <= augmentation <= MAX_AUGMENTATIONS:
            raise ValueError(f"{name!r}: expected an augmentation from 1 to {MAX_AUGMENTATIONS}")
        return view

    def __str__(self) -> str:
        parts = [self.modality]
        if self.member != self.modality:
            parts.append(self.member)
        if self.augmentation != 1:
            parts.append(str(self.augmentation))
        return ".".join(parts)


def own_features(view: str, objective: str) -> str:
    """Returns the name of a view's features under the projection of one objective."""
    return f"{view}@{objective}"


def own_outputs(objective: str) -> str:
    """Returns the name of the numbers that the module of an objective computes of each sample."""
    return f"@{objective}"


def view_of_teacher(view: str, objective: str) -> str:
    """Returns the name of a view's content in the form that an objective's teacher reads."""
    return f"{view}{_OF_TEACHER}{objective}"


def is_of_teacher(view: str) -> bool:
    """Returns whether only a teacher reads a view."""
    return _OF_TEACHER in view


def view_of_features(name: str) -> str:
    """Returns the view of features."""
    return name.partition("@")[0]


def _name_of(value: Any) -> Any:
    """The name of a view that a config writes as a mapping, such as {text: title}."""
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"expected one modality, such as {{text: title}}; found {value}")
        ((modality, which),) = value.items()
        value = f"{modality}.{which}"
    if isinstance(value, str):
        return str(View.parse(value))
    return value


ViewName = Annotated[str, BeforeValidator(_name_of)]
