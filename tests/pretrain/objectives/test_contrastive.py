import pytest
from pydantic import ValidationError

from tests.support.toy_run import toy_config


def config_with(toy_data, folder, objectives, **sections):
    """Returns the toy config with other objectives of its streams."""
    streams = toy_config(toy_data, folder).model_dump(mode="json")["streams"]
    for name, of_stream in objectives.items():
        streams[name]["objectives"] = of_stream
    return toy_config(toy_data, folder, streams=streams, **sections)


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ({"image-text": {"image-words": {}}}, "reads 'words': expected a modality of the model"),
        ({"image-text": {"image-image": {}}}, "reads 'image' twice"),
        ({"image-text": {"image-text": {"kind": "generation"}}}, "expected one of .*contrastive"),
        ({"image-text": {}}, "at least 1 item"),
        (
            {
                "image-text": {
                    "image-text": {},
                    "second": {
                        "left": "image",
                        "right": "text",
                        "loss": "sigmoid",
                        "temperature": "image-text",
                    },
                }
            },
            "share the temperature 'image-text', but only one of them has a bias",
        ),
    ],
)
def test_objectives_that_cannot_be_computed_are_refused(toy_data, tmp_path, objectives, words):
    with pytest.raises(ValidationError, match=words):
        config_with(toy_data, tmp_path, objectives)


def test_a_stream_weight_has_no_effect_if_every_step_takes_all_streams(toy_data, tmp_path):
    streams = toy_config(toy_data, tmp_path).model_dump(mode="json")["streams"]
    streams["image-text"]["weight"] = 2.0
    with pytest.raises(ValidationError, match="set the weight of its objectives instead"):
        toy_config(toy_data, tmp_path, streams=streams)
    toy_config(toy_data, tmp_path, streams=streams, streams_per_step="one")


def test_objectives_of_one_name_share_a_temperature(toy_data, tmp_path):
    shared = {"left": "audio", "right": "text", "temperature": "image-text"}
    config = config_with(toy_data, tmp_path, {"audio-text": {"sounds": shared, "audio-text": {}}})
    assert config.temperatures == {"image-text": False, "audio-text": False}
