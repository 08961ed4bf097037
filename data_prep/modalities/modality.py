"""The modalities of a dataset: an ordered map of names to kinds.

A modality is stored as members of a sample in a tar:

    kind     plain name (image, audio, text, vector)   any other name, such as `scan`
    image    000123.jpg, .png, .webp                   000123.scan.png
    audio    000123.flac, .wav, .mp3, .ogg, .opus      000123.sound.flac
    vector   000123.npy                                000123.values.npy
    text     000123.txt, or `captions` in 000123.json  `title` in 000123.json, or 000123.title.txt

A *pair dataset* has one image or audio clip and captions in every sample. Its files are the same as
before modalities had names. In other datasets a sample has any subset of the modalities, and a
presence mask in the index: bit k is set if the sample has modality k.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from data_prep.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["image", "audio", "text", "vector"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MEDIA_EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "mp3", "ogg", "opus"),
}
EXTENSIONS = {**MEDIA_EXTENSIONS, "vector": ("npy",), "text": ("txt",)}
NAME = re.compile("[a-z][a-z0-9_]*")
MAX_MODALITIES = 32  # bits of a presence mask
# Keys of a sample's .json with another meaning, and names of its members.
RESERVED_NAMES = frozenset(
    {"captions", "class_name", "class_names", "uid", "labels", "json", "txt"}
)


@dataclass(frozen=True)
class VectorShape:
    """The shape that all vectors of a modality have."""

    width: int  # number of columns
    is_sequence: bool = False  # [time, width] with any length; otherwise [width]

    @classmethod
    def of(cls, vector: np.ndarray) -> VectorShape:
        """Returns the shape of a vector, whose length in time is left open."""
        return cls(vector.shape[-1], is_sequence=vector.ndim == 2)

    def __str__(self) -> str:
        return f"[time, {self.width}]" if self.is_sequence else f"[{self.width}]"


@dataclass(frozen=True)
class Modality:
    """A modality of a dataset: its kind and, for a vector, its shape and statistics."""

    kind: Kind
    num_samples: int | None = None  # samples that have it; None: not recorded
    width: int | None = None  # vector: number of columns
    is_sequence: bool = False  # vector: [time, width] with any length; otherwise [width]
    num_rows: int | None = None  # vector: rows of all samples; equals num_samples unless sequences
    mean: tuple[float, ...] | None = None  # vector: of each column
    std: tuple[float, ...] | None = None  # vector: of each column, over num_rows (population)

    def to_json(self) -> dict[str, Any]:
        """Returns the values that are set."""
        found = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {
            key: value for key, value in found.items() if value is not None and value is not False
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Builds a modality from the result of `to_json`.

        Raises:
            TypeError, ValueError: if a key is unknown or a value has the wrong type.
        """
        if values.get("kind") not in KINDS:
            raise ValueError(f"kind {values.get('kind')!r}: expected one of {', '.join(KINDS)}")
        lists = {key: tuple(map(float, values[key])) for key in ("mean", "std") if key in values}
        return cls(**{**values, **lists})


class Modalities(Mapping[str, Modality]):
    """The modalities of a dataset, in order.

    Args:
        by_name: modality of each name.
        is_pair: whether this is a pair dataset.

    Raises:
        InputError: if a name is not allowed, or there are too many.
    """

    def __init__(self, by_name: Mapping[str, Modality], *, is_pair: bool = False):
        self._by_name = dict(by_name)
        self.is_pair = is_pair
        for name, modality in self._by_name.items():
            check_name(name, kind=modality.kind)
        if not 1 <= len(self) <= MAX_MODALITIES:
            raise InputError(f"expected 1 to {MAX_MODALITIES} modalities, found {len(self)}")

    @classmethod
    def pair(cls, media_kind: str, *, num_samples: int | None = None) -> Self:
        """Returns the modalities of a pair dataset.

        Args:
            media_kind: "image" or "audio".
            num_samples: number of samples, which all have both modalities.
        """
        kinds: tuple[Any, ...] = (media_kind, "text")
        return cls({kind: Modality(kind, num_samples) for kind in kinds}, is_pair=True)

    def __getitem__(self, name: str) -> Modality:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}: {modality.kind}" for name, modality in self.items())
        return f"Modalities({kinds})"

    def names_of(self, *kinds: str) -> tuple[str, ...]:
        """Returns the names of the modalities of some kinds, in order."""
        return tuple(name for name, modality in self.items() if modality.kind in kinds)

    @property
    def media(self) -> tuple[str, ...]:
        """Names of the images and audio clips."""
        return self.names_of(*MEDIA_EXTENSIONS)

    def check_known(self, names: Iterable[str], *, where: str) -> None:
        """Checks that the dataset has some modalities.

        Args:
            names: names to check.
            where: path of the dataset or config key, for the message.

        Raises:
            InputError: if a name is unknown.
        """
        for name in names:
            if name not in self:
                raise InputError(
                    f"{where}: expected a modality of {', '.join(self)}; found {name!r}"
                )

    def mask_of(self, names: Iterable[str]) -> int:
        """Returns a presence mask with the bits of some modalities."""
        order = list(self)
        return sum(1 << order.index(name) for name in set(names))

    def names_in(self, mask: int) -> tuple[str, ...]:
        """Returns the names of the modalities in a presence mask, in order."""
        return tuple(name for bit, name in enumerate(self) if mask >> bit & 1)

    def extensions_of(self, name: str) -> tuple[str, ...]:
        """Returns the extensions of members that may hold a modality; a text has also `json`."""
        return _extensions_of(name, self._by_name[name].kind)

    def member_of(self, name: str, extensions: Collection[str]) -> str | None:
        """Returns the extension of the member that holds an image, audio clip or vector.

        Args:
            name: name of the modality.
            extensions: extensions of all members of a sample.

        Returns:
            The first in alphabetical order; None if the sample has none.
        """
        wanted = self.extensions_of(name)
        return min((extension for extension in extensions if extension in wanted), default=None)

    def with_shapes(self, shapes: Mapping[str, VectorShape]) -> Modalities:
        """Returns the modalities with the shapes of vectors."""
        changed = {
            name: replace(self[name], width=shape.width, is_sequence=shape.is_sequence)
            for name, shape in shapes.items()
        }
        return Modalities({**self, **changed}, is_pair=self.is_pair)

    def without_counts(self) -> Modalities:
        """Returns the names, kinds and shapes, as an index records them."""
        return Modalities(
            {
                name: Modality(each.kind, width=each.width, is_sequence=each.is_sequence)
                for name, each in self.items()
            },
            is_pair=self.is_pair,
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Returns the modalities as dataset.json records them."""
        return {name: modality.to_json() for name, modality in self.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Any]]) -> Self:
        """Builds modalities from the result of `to_json`.

        Raises:
            TypeError, ValueError: if a value is invalid.
            InputError: if a name is not allowed.
        """
        return cls({name: Modality.from_json(each) for name, each in values.items()})


@cache
def _extensions_of(name: str, kind: Kind) -> tuple[str, ...]:
    prefix = "" if name == kind else f"{name}."
    found = tuple(prefix + extension for extension in EXTENSIONS[kind])
    return ("json", *found) if kind == "text" else found


def check_name(name: str, *, kind: str) -> None:
    """Checks the name of a modality.

    Raises:
        InputError: if the name has other characters, or another meaning.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"modality {name!r}: expected a name of a-z, 0-9 and _ that starts with a letter"
        )
    if name in RESERVED_NAMES or (name in KINDS and name != kind):
        meaning = f"the plain name of kind {name}" if name in KINDS else "reserved"
        raise InputError(
            f"modality {name!r} of kind {kind}: this name is {meaning}; choose another"
        )


def file_extension(member: str) -> str:
    """Returns the extension that tells the format of a member: `png` for `scan.png`."""
    return member.rpartition(".")[2]
