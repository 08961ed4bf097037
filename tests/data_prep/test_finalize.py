import itertools

import pytest

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.finalize import finalize
from data_prep.pipeline import plan
from data_prep.pipeline.plan import PlanSettings, describe_origin, open_plan
from data_prep.shards.folder import lock_folder
from tests.support.toy_pairs import contents, shard, write_pictures


def parts_of(manifest, output, *, parts, workers=1):
    for part in parts:
        shard(manifest, output, part=part, workers=workers)


def config_of(manifest, output, **fields):
    return MakeShards(
        input=str(manifest), output=output, media="image", samples_per_shard=3, **fields
    )


def without_locks(files):
    return {name: content for name, content in files.items() if not name.endswith(".lock")}


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_parts_in_any_order_give_the_bytes_of_one_job(tmp_path, num_parts):
    manifest = write_pictures(tmp_path / "media", 16)  # 6 shards: of 7 parts, one has nothing
    whole = shard(manifest, tmp_path / "whole")
    parts = [f"{number}/{num_parts}" for number in reversed(range(num_parts))]
    dataset = tmp_path / "parts"
    parts_of(manifest, dataset, parts=parts)
    assert not (dataset / "dataset.json").exists()
    finalize(config_of(manifest, dataset))
    assert without_locks(contents(dataset)) == contents(whole)


def test_finalize_names_the_shards_that_are_missing(tmp_path):
    manifest = write_pictures(tmp_path / "media", 16)
    dataset = tmp_path / "dataset"
    parts_of(manifest, dataset, parts=["0/3", "2/3"])
    with pytest.raises(
        InputError, match="6 finished shards, found 2 unfinished: 00000001, 00000004;"
    ):
        finalize(config_of(manifest, dataset))
    parts_of(manifest, dataset, parts=["1/3"])
    finalize(config_of(manifest, dataset))
    assert (dataset / "dataset.json").exists()


def test_finalize_takes_the_settings_that_the_parts_had(tmp_path):
    manifest = write_pictures(tmp_path / "media", 4)
    with pytest.raises(InputError, match=r"start it with python -m data_prep\.make_shards"):
        finalize(config_of(manifest, tmp_path / "nothing"))
    dataset = tmp_path / "dataset"
    parts_of(manifest, dataset, parts=["0/1"])
    with pytest.raises(InputError, match=r"config\.captions_per_item: 'group', now 'row'"):
        finalize(config_of(manifest, dataset, captions_per_item="row"))


def test_jobs_exclude_only_those_that_would_write_the_same_files(tmp_path):
    manifest = write_pictures(tmp_path / "media", 4)
    dataset = tmp_path / "dataset"
    with lock_folder(dataset, part="0/2"):
        shard(manifest, dataset, part="1/2")
        with pytest.raises(InputError, match="another command is writing"):
            shard(manifest, dataset, part="0/2")
        with pytest.raises(InputError, match="another command is writing"):
            shard(manifest, dataset)
        with pytest.raises(InputError, match="another command is writing"):
            finalize(config_of(manifest, dataset))


def test_a_job_that_is_second_with_the_plan_takes_the_first_ones(tmp_path, monkeypatch):
    manifest = write_pictures(tmp_path / "media", 4)
    config = config_of(manifest, tmp_path / "dataset", part="0/2")
    settings, made_from = PlanSettings.from_config(config), describe_origin(config)
    build, calls = plan.build_plan, itertools.count()

    def build_while_another_does(folder, settings, *, made_from):
        if next(calls) == 0:
            open_plan(config.output, settings, made_from=made_from)
        build(folder, settings, made_from=made_from)

    monkeypatch.setattr(plan, "build_plan", build_while_another_does)
    assert open_plan(config.output, settings, made_from=made_from).num_items == 4
    assert next(calls) == 2
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["plan"]


@pytest.mark.parametrize("part", ["3/3", "1/0", "one"])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="part"):
        config_of("pairs.tsv", tmp_path, part=part)


def test_parts_of_another_number_are_refused_as_they_share_shards(tmp_path):
    manifest = write_pictures(tmp_path / "media", 4)
    dataset = tmp_path / "dataset"
    with lock_folder(dataset, part="0/2"), pytest.raises(InputError, match=r"0-of-2.*another"):
        shard(manifest, dataset, part="1/3")
    shard(manifest, dataset, part="0/1")
    finalize(config_of(manifest, dataset))
    assert not list(dataset.glob(".*"))  # no lock is left
