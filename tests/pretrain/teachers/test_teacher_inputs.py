"""Which inputs of a teacher are made a second time, and which cannot be made."""

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import SampleRandom
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.teachers.teacher_inputs import ModelInputs, teacher_formats

SHAPES = {kind: (kind, None, None) for kind in ("image", "audio")}


def inputs_of(*, shapes=SHAPES, **sections):
    image, audio = ImageTransform(), AudioTransform()
    image = image.model_copy(update=sections.get("image", {}))
    audio = audio.model_copy(update=sections.get("audio", {}))
    return ModelInputs(image, audio, None, shapes)


def formats(view, own, of_teacher):
    return teacher_formats({view: view}, own, of_teacher, where="teacher")


@pytest.mark.parametrize(
    ("own", "of_teacher", "is_own"),
    [
        ({}, {}, False),
        ({"size": 160}, {}, True),
        ({}, {"interpolation": "bilinear"}, True),
        ({}, {"mean": (0.5, 0.5, 0.5), "crop_area": (0.1, 1.0)}, False),  # of the model alone
    ],
)
def test_images_are_made_again_where_size_or_interpolation_differs(own, of_teacher, is_own):
    found = formats("image", inputs_of(image=own), inputs_of(image=of_teacher))
    assert list(found) == (["image"] if is_own else [])
    if is_own:
        config = found["image"].transform.config
        wanted = inputs_of(image=of_teacher).image
        assert (config.size, config.interpolation) == (wanted.size, wanted.interpolation)
        assert config.crop_area == ImageTransform().crop_area


def test_a_run_whose_image_size_changes_makes_those_of_its_teacher_in_every_step():
    image = ImageTransform(size=160, segments=[{"from_step": 5, "size": 224}])
    own = ModelInputs(image, AudioTransform(), None, SHAPES)
    assert list(formats("image", own, inputs_of())) == ["image"]


def test_sounds_are_padded_as_the_teacher_pads_them():
    short = {"clip_seconds": 0.001, "sample_rate_hz": 4000}
    long = short | {"clip_seconds": 0.0025, "padding": "silence"}
    assert not formats("audio", inputs_of(audio=short), inputs_of(audio=short))
    found = formats("audio", inputs_of(audio=short), inputs_of(audio=long))
    row = torch.full((10,), 9.0)
    part = np.arange(1, 5, dtype=np.float32)
    found["audio"].transform.write_row(part, SampleRandom(0), row)
    assert row.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "of_teacher", [{"sample_rate_hz": 16000}, {"clip_seconds": 5.0}], ids=["rate", "seconds"]
)
def test_sounds_that_the_model_does_not_read_are_refused(of_teacher):
    with pytest.raises(InputError, match="teacher and model hear the same samples"):
        formats("audio", inputs_of(), inputs_of(audio=of_teacher))


def test_modalities_that_a_teacher_lacks_are_refused():
    with pytest.raises(InputError, match="a tower for audio, found none"):
        formats("audio", inputs_of(), inputs_of(shapes={}))
