"""Names of views, and configs of modalities and objectives that cannot be what was meant."""

import pytest
from pydantic import ValidationError

from pretrain.config import PretrainConfig
from pretrain.settings.views import View
from tests.support.toy_views import views_config


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("image", ("image", "image", 1)),
        ("image.2", ("image", "image", 2)),
        ("text.title", ("text", "title", 1)),
        ("text.title.3", ("text", "title", 3)),
    ],
)
def test_a_view_is_its_name(name, parts):
    view = View.parse(name)
    assert (view.modality, view.member, view.augmentation) == parts
    assert str(view) == name


@pytest.mark.parametrize(
    "name", ["", ".", "image.0", "image.1", "image.02", "image.99", "a.b.c", "a..2", "text.text"]
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected"):
        View.parse(name)


BERT = {"library": "transformers", "name": "bert", "context_length": 12}
CLIPS = ("streams", "clips", "objectives")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ((*CLIPS, "new"), {"left": "image"}, "its name is not that of two views"),
        ((*CLIPS, "new"), {"left": "image", "right": {"image": 0}}, "from 1 to 16"),
        ((*CLIPS, "image-image"), {}, "reads 'image' twice"),
        (
            ("streams", "texts", "objectives", "new"),
            {"left": "values", "right": {"values": 2}},
            "a vector has no second augmentation",
        ),
        ((*CLIPS, "image-words"), {}, "reads 'words': expected a modality of the model"),
        ((*CLIPS, "image-text"), {"temperature": "a.b"}, "should match pattern"),
        ((*CLIPS, "image-text"), {"temperature": ""}, "should match pattern"),
        (("model", "modalities", "scan"), "audio", None),
        (("model", "modalities", "scan"), "front", "found 'front'; to share the tower"),
        (("model", "modalities", "scan"), {"tower": "image"}, "expected a kind .image, audio,"),
        (("model", "modalities", "scan"), None, "expected a kind"),
        (("model", "modalities", "scan"), {"kind": "image", "tower": "text"}, "of kind image that"),
        (("model", "modalities", "image"), "image", "write it as model.image"),
        (("model", "modalities", "vector"), "text", "the name of kind vector"),
        (("model", "modalities", "title", "tower"), BERT, "its tokenizer .that of bert. is not"),
        (
            ("model", "modalities", "title", "tower", "context_length"),
            20,
            "context_length=20: all texts are tokenised alike",
        ),
        (
            ("model", "modalities", "values", "tower", "name"),
            "gru",
            "tower.name=gru with max_rows=null: expected mlp",
        ),
        (
            ("streams", "texts", "objectives"),
            {"values-series": {"projection": "own"}},
            "no objective",
        ),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(tmp_path, place, value, expected):
    config = views_config(tmp_path, tmp_path / "run").model_dump(mode="json")
    section = config
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    if expected is None:
        PretrainConfig.model_validate(config)
        return
    with pytest.raises(ValidationError, match=expected):
        PretrainConfig.model_validate(config)


@pytest.mark.parametrize("pairings", [None, 3, {"image-text": None}])
def test_an_old_config_without_content_is_refused_like_any_other(tmp_path, pairings):
    config = views_config(tmp_path, tmp_path / "run").model_dump(mode="json")
    del config["streams"]
    with pytest.raises(ValidationError):
        PretrainConfig.model_validate(config | {"pairings": pairings})
