"""Pairs of modalities that a run trained together, as its config tells."""

from eval.models.encoder import _trained_pairs
from tests.support.toy_coca import SMALL_DECODER
from tests.support.toy_views import CLIPS, views_config


def test_pairs_are_those_of_objectives_on_the_shared_embeddings(tmp_path):
    (tmp_path / "clips").mkdir()
    pairs = _trained_pairs(views_config(tmp_path, tmp_path / "run"))
    assert frozenset({"image", "text"}) in pairs and frozenset({"title", "text"}) in pairs
    assert frozenset({"series", "scan"}) in pairs
    assert frozenset({"scan", "text"}) not in pairs and frozenset({"image"}) not in pairs


def test_an_objective_with_a_projection_of_its_own_does_not_count(tmp_path):
    config = views_config(tmp_path, tmp_path / "run")
    values = config.model_dump(mode="json")
    own = CLIPS["image-audio"] | {"projection": "own"}
    values["streams"]["clips"]["objectives"]["image-audio"] = own
    pairs = _trained_pairs(type(config).model_validate(values))
    assert frozenset({"image", "audio"}) not in pairs and frozenset({"audio", "text"}) in pairs


def test_an_objective_that_reads_tokens_does_not_count(tmp_path):
    config = views_config(tmp_path, tmp_path / "run")
    values = config.model_dump(mode="json")
    captions = {"kind": "captioning", "media": "scan", **SMALL_DECODER}
    values["streams"]["clips"]["objectives"]["captions"] = captions
    assert _trained_pairs(type(config).model_validate(values)) == _trained_pairs(config)
