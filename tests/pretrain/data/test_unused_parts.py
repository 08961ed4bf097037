"""Warnings of objectives that no sample can serve, and of modalities that no objective reads."""

import logging

from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import Subset
from pretrain.config import PretrainConfig
from pretrain.training.assembly import open_step_loader, warn_of_unused_parts
from tests.support.toy_modalities import FOUR, write_subsets
from tests.support.toy_views import views_config

APART = [("scan", "audio"), ("values", "title"), ("scan", "values"), ("values", "audio")]
OBJECTIVES = {"scan-audio": {}, "values-scan": {}, "values-audio": {"weight": 0.5}}


def config_of(data, run, *, subset=None, objectives=OBJECTIVES):
    values = views_config(data, run).model_dump(mode="json")
    values["model"] |= {
        "text": None,
        "modalities": {
            "scan": "image",
            "sketch": "image",
            "values": values["model"]["modalities"]["values"],
        },
    }
    source = {"name": "apart", "dataset": str(data), "subset": subset and str(subset)}
    stream = values["streams"]["clips"] | {"sources": [source], "objectives": objectives}
    return PretrainConfig.model_validate(values | {"lanes": 2, "streams": {"clips": stream}})


def warnings_of(config, caplog):
    caplog.clear()
    loader = open_step_loader(config, None, rank=0, world_size=1)
    with caplog.at_level(logging.WARNING):
        warn_of_unused_parts(config, loader)
    return [record.message for record in caplog.records]


def test_objectives_without_a_sample_are_named_with_their_counts(tmp_path, caplog):
    data = write_subsets(tmp_path / "data", subsets=APART)
    config = config_of(data, tmp_path / "run")
    [unread] = warnings_of(config, caplog)
    assert unread.startswith("model.modalities.sketch is read by no objective: the tower of image")
    dataset = Dataset(data)
    kept = [not {"values", "scan"} <= set(subset) for subset in APART]
    bitmap = dataset.has_all(0, ["values", "scan"])
    assert (~bitmap).tolist() == kept
    Subset.from_bitmap(dataset.info, ~bitmap, preparation={}).write(tmp_path / "apart.subset")
    config = config_of(data, tmp_path / "run", subset=tmp_path / "apart.subset")
    [unserved, _] = warnings_of(config, caplog)
    assert unserved == (
        "streams.clips.objectives.values-scan: no sample of the stream has values and scan, so its "
        "loss is always 0 (of 4 samples of apart: 3 values, 2 scan); remove it, or add a source"
    )


def test_complete_samples_give_no_warning(tmp_path, caplog):
    data = write_subsets(tmp_path / "data", subsets=[tuple(FOUR)] * 5)
    values = config_of(data, tmp_path / "run").model_dump(mode="json")
    del values["model"]["modalities"]["sketch"]
    assert warnings_of(PretrainConfig.model_validate(values), caplog) == []
