"""Inputs of a teacher that differ from those of the model in training.

A teacher reads what the model reads of a sample. It gets the same crop, mirrored and coloured
alike, the same part of a sound and the same text. Its image size, clip length or tokenizer may
differ. The loader then writes the same content a second time in the teacher's form, as a view of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_prep.errors import InputError
from pretrain.data.transforms import AudioToWaveform, ImageToPixels
from pretrain.data.view_formats import MediaFormat, TextFormat, ViewFormat
from pretrain.model.tokenizer import Tokenizer
from pretrain.settings.model import Model, VectorModality
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.settings.views import View

SAMPLE_CAPTIONS = ("a photo of a dog", "It's 3 o'clock: rain, wind & a BELL.")
Shape = tuple[str, int | None, int | None]  # kind; width and max_rows of vectors


def shape_of(model: Model, modality: str) -> Shape:
    """Returns what two models must have in common to read the same inputs of a modality."""
    section = model.modalities.get(modality)
    if isinstance(section, VectorModality):
        return ("vector", section.width, section.max_rows)
    return (model.kinds[modality], None, None)


@dataclass(frozen=True)
class ModelInputs:
    """Config sections `image` and `audio` and the tokenizer, which define a model's inputs."""

    image: ImageTransform
    audio: AudioTransform
    tokenizer: Tokenizer | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of each modality, by `shape_of`
    is_foreign: bool = False  # a model of another library: its tokenizer is always its own


def teacher_formats(
    views: Mapping[str, str], own: ModelInputs, of_teacher: ModelInputs, *, where: str
) -> dict[str, ViewFormat]:
    """Returns {view: format} of the views that a teacher reads in another form than the model.

    Args:
        views: view -> its kind.
        own: inputs of the model in training.
        of_teacher: inputs of the teacher.
        where: config key of the teacher, for messages.

    Raises:
        InputError: if the teacher's inputs cannot be made of what the model reads.
    """
    found: dict[str, ViewFormat] = {}
    for view, kind in views.items():
        _refuse_other_shapes(View.parse(view).modality, own, of_teacher, where)
        form = _BUILDERS[kind](View.parse(view), own, of_teacher, where)
        if form is not None:
            found[view] = form
    return found


def _image_format(
    view: View, own: ModelInputs, of_teacher: ModelInputs, where: str
) -> ViewFormat | None:
    image, wanted = own.image, of_teacher.image
    sizes = set(image.sizes.values())
    if sizes == {wanted.size} and image.interpolation == wanted.interpolation:
        return None
    if image.scaled_decoding and min(sizes) < wanted.size:
        raise InputError(
            f"{where}: the teacher reads images of {wanted.size} pixels, but image.scaled_decoding "
            f"decodes them for {min(sizes)}; set image.scaled_decoding: false"
        )
    changes = {"size": wanted.size, "interpolation": wanted.interpolation, "segments": []}
    return MediaFormat(view, "image", ImageToPixels(image.model_copy(update=changes)))


def _audio_format(
    view: View, own: ModelInputs, of_teacher: ModelInputs, where: str
) -> ViewFormat | None:
    audio, wanted = own.audio, of_teacher.audio
    if audio.sample_rate_hz != wanted.sample_rate_hz or audio.clip_seconds > wanted.clip_seconds:
        raise InputError(
            f"{where}: the teacher reads clips of audio.sample_rate_hz={wanted.sample_rate_hz} and "
            f"audio.clip_seconds={wanted.clip_seconds:g}, this run those of "
            f"{audio.sample_rate_hz} and {audio.clip_seconds:g}; teacher and model hear the same "
            "samples: use the teacher's rate, and at most its seconds"
        )
    if (audio.clip_samples, audio.padding) == (wanted.clip_samples, wanted.padding):
        return None
    plain = wanted.model_copy(update={"spec_augment": None})
    return MediaFormat(view, "audio", AudioToWaveform(plain))


def _text_format(
    view: View, own: ModelInputs, of_teacher: ModelInputs, where: str
) -> ViewFormat | None:
    if not of_teacher.is_foreign:
        tokens, found = (each.tokenizer(SAMPLE_CAPTIONS) for each in (own, of_teacher))
        if tokens.tolist() == found.tolist():
            return None
    return TextFormat(view, of_teacher.tokenizer, has_lengths=False)


_BUILDERS = {
    "image": _image_format,
    "audio": _audio_format,
    "text": _text_format,
    "vector": lambda *_: None,
}


def _refuse_other_shapes(
    modality: str, own: ModelInputs, of_teacher: ModelInputs, where: str
) -> None:
    shape = of_teacher.shapes.get(modality)
    if shape is None:
        raise InputError(f"{where}: expected a model with a tower for {modality}, found none")
    if own.shapes[modality] != shape:
        raise InputError(
            f"{where}: the teacher's {modality} is of {shape}, this run's of "
            f"{own.shapes[modality]} (kind, and width and max_rows of vectors); teacher and model "
            "read the same samples"
        )
