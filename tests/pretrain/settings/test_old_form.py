import pytest
import yaml
from pydantic import ValidationError

from data_prep.config_file import read_config, read_stored_config
from data_prep.errors import ConfigError
from pretrain.config import PretrainConfig
from tests.support.toy_run import toy_config


@pytest.fixture
def old_values(toy_data, tmp_path):
    """Returns the values of a config in the form of version 0.1."""
    values = toy_config(toy_data, tmp_path / "run").model_dump(mode="json")
    streams, validation = values.pop("streams"), values.pop("validation")
    del values["streams_per_step"], validation["streams"]
    for stream in streams.values():
        del stream["objectives"]
    streams["image-text"] |= {"loss": "sigmoid", "weight": 2.0}
    streams["audio-text"] |= {"label_smoothing": 0.1, "duplicates": "masked"}
    held_out = {"image-text": {"dataset": "held_out", "batch_size": 4}}
    return values | {"pairings": streams, "validation": validation | {"pairings": held_out}}


def written(folder, values):
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_pairings_are_refused_with_streams_that_are_accepted_instead(tmp_path, old_values):
    with pytest.raises(ConfigError, match="`pairings` are `streams`") as refused:
        read_config(PretrainConfig, written(tmp_path, old_values))
    _, _, shown = str(refused.value).partition("write:\n")
    new = {key: value for key, value in old_values.items() if key != "pairings"}
    config = PretrainConfig.model_validate(new | yaml.safe_load(shown))
    assert config == read_stored_config(PretrainConfig, written(tmp_path, old_values))
    images, sounds = (config.streams[name].objectives[name] for name in config.streams)
    assert (images.loss, images.weight) == ("sigmoid", 2.0)
    assert (sounds.label_smoothing, sounds.duplicates) == (0.1, "masked")
    assert config.validation.streams["image-text"].batch_size == 4


def test_the_weight_of_a_pairing_stays_a_fraction_of_the_steps(tmp_path, old_values):
    old_values["pairings_per_step"] = "one"
    config = read_stored_config(PretrainConfig, written(tmp_path, old_values))
    assert config.streams_per_step == "one"
    assert config.streams["image-text"].weight == 2.0
    assert config.streams["image-text"].objectives["image-text"].weight == 1.0


def test_settings_of_an_objective_in_a_stream_are_refused_with_their_place(toy_data, tmp_path):
    values = toy_config(toy_data, tmp_path / "run").model_dump(mode="json")
    values["streams"]["image-text"]["loss"] = "sigmoid"
    with pytest.raises(ValidationError, match="loss: settings of an objective, which stand under"):
        PretrainConfig.model_validate(values)
