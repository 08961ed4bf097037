"""Runs of samples with any subset of several modalities, as commands run them."""

from collections import Counter

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import ABSENT, BLOCK_BYTES, ShardIndex
from pretrain.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.model.tokenizer import build_text_tokenizer
from pretrain.training.assembly import open_step_loader
from tests.pretrain.test_train import steps_of
from tests.support.gloo_processes import run_in_processes
from tests.support.killed_runs import Undisturbed, case_of, check_case, run_case, train
from tests.support.random_runs import read_bad_samples
from tests.support.toy_views import SHARD_SIZES, vectors_of, views_config, write_views

NUM_SAMPLES = sum(SHARD_SIZES)
WITHOUT_TEXT = {"image-audio": {}, "values-image": {"loss": "sigmoid"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_views(folder / "clips")
    write_views(folder / "texts", seed=1, always=["title", "text"], never=["image"])
    return folder


def config_of(data, folder, *, until=None, **sections):
    validation = {
        "every_steps": 3,
        "streams": {"clips": {"dataset": data / "clips", "batch_size": 20}},
    }
    config = views_config(data, folder, validation=validation, **sections)
    run = config.run.model_copy(update={"stop_after_step": until})
    return config.model_copy(update={"run": run})


def without_text(data, folder, **sections):
    """Returns a config whose model has no text tower."""
    values = views_config(data, folder).model_dump(mode="json")
    values["model"] |= {"text": None}
    values["model"]["modalities"] = {"values": values["model"]["modalities"]["values"]}
    values["streams"] = {"clips": values["streams"]["clips"] | {"objectives": WITHOUT_TEXT}}
    return PretrainConfig.model_validate(values | sections)


def weights_of(folder):
    model, *_ = load_model(folder)
    return model.state_dict()


def test_a_run_that_stops_and_resumes_on_other_processes_is_the_whole_run(data, tmp_path):
    run_in_processes(1, train, config_of(data, tmp_path / "whole"))
    for num_processes, until in ((2, 2), (3, 4), (1, None)):
        config = config_of(data, tmp_path / "run", until=until)
        run_in_processes(num_processes, train, config)
    whole, rows = steps_of(tmp_path / "whole"), steps_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in whole] == list(range(1, 7))
    for row, expected in zip(rows, whole, strict=True):
        assert row["data_digest"] == expected["data_digest"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-5)
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
    of_data = Dataset(data / "clips").modalities["values"]
    stage = load_model(tmp_path / "run")[0].towers["values"].input_stage
    torch.testing.assert_close(stage.mean, torch.tensor(of_data.mean), rtol=1e-6, atol=0)
    assert stage.std[2] == 1  # of a constant column


# ----------------------------------------------------------------------------------------- kills

PLACES = [(1, "ddp"), (2, "ddp"), (3, "ddp"), (2, "zero1")]
KILLED = {"ways": ("KILL one", "KILL all"), "places": PLACES, "steady_fraction": 0.0}
SEEDS = (2, 34)  # from 2 processes to 1, and from 1 to 3


def write_damaged(folder):
    """Writes samples of which one in eight has a damaged image."""
    write_views(folder / "clips")
    write_views(folder / "texts", seed=1, always=["title", "text"], never=["image"])
    for number in range(0, NUM_SAMPLES, 8):
        damage(folder / "clips", number, "scan.png")


def config_of_kills(data, folder, strategy):
    values = config_of(data, folder).model_dump(mode="json")
    held_out = {"dataset": data / "texts", "batch_size": 20}  # which refuses damaged samples
    values["validation"]["streams"] = {"texts": held_out}
    values["run"] |= {"checkpoint_every_steps": 2, "trackers": []}
    values["engine"] |= {"strategy": strategy}
    values["loading"] |= dict.fromkeys(("max_bad_fraction", "max_bad_fraction_per_shard"), 1.0)
    return PretrainConfig.model_validate(values)


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_never_been_killed(tmp_path):
    undisturbed = Undisturbed(
        tmp_path / "undisturbed", write_data=write_damaged, config_of=config_of_kills
    )
    ledger = read_bad_samples(undisturbed.run_of(1, "ddp"))
    assert len(ledger) > 2
    for seed in SEEDS:
        case, folder = case_of(seed, **KILLED), tmp_path / str(seed) / "run"
        assert run_case(case, undisturbed, folder), str(case)
        check_case(case, undisturbed, folder)
        assert read_bad_samples(folder) == ledger, str(case)


def test_a_model_without_texts_trains_and_is_loaded(data, tmp_path):
    config = without_text(data, tmp_path / "run")
    run_in_processes(2, train, config)
    model, transforms, tokenizer = load_model(tmp_path / "run")
    assert tokenizer is None
    assert sorted(transforms) == ["audio", "image"]
    vectors = torch.from_numpy(np.stack([vectors_of(number)[0] for number in range(3)]))
    with torch.no_grad():
        embeddings = model.encode("values", vectors)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


# ----------------------------------------------------------------------------------------- order


def rows_of(loader, num_steps):
    """Returns {step: rows of every view of the first stream}, in the order of slots."""
    found = []
    for step in range(num_steps):
        batch = loader.load(step).streams["clips"]
        found.append({view: [*each.tensors.values()] for view, each in batch.views.items()})
    return found


def test_rows_are_those_of_one_process_and_two_augmentations_differ(data, tmp_path):
    config = config_of(data, tmp_path / "run")
    tokenizer = build_text_tokenizer(config.model)
    whole = rows_of(open_step_loader(config, tokenizer, rank=0, world_size=1), 4)
    parts = [
        rows_of(open_step_loader(config, tokenizer, rank=rank, world_size=3), 4)
        for rank in range(3)
    ]
    for step, expected in enumerate(whole):
        for view, tensors in expected.items():
            for number, tensor in enumerate(tensors):
                found = torch.cat([part[step][view][number] for part in parts])
                assert torch.equal(found, tensor), (step, view)
    image, again = (whole[0][view] for view in ("image", "image.2"))
    present = image[-1]
    assert torch.equal(present, again[-1])
    same = (image[0] == again[0]).flatten(1).all(dim=1)
    assert not same[present].any()
    assert same[~present].all()


def damage(folder, ordinal, field):
    """Flips a bit of a member, if the sample has it."""
    shard, position = Dataset(folder).locate(ordinal)
    index = ShardIndex.read(folder / f"{shard:08d}.idx")
    block = int(index.table[position, index.fields.index(field), 0])
    if block != ABSENT:
        path = folder / f"{shard:08d}.tar"
        content = bytearray(path.read_bytes())
        content[block * BLOCK_BYTES + 30] ^= 1
        path.write_bytes(content)


def test_bad_bytes_of_one_modality_substitute_the_whole_sample(data, tmp_path):
    write_views(tmp_path / "clips", fraction=1.0)
    damage(tmp_path / "clips", 5, "scan.png")
    write_views(tmp_path / "texts", seed=1, fraction=1.0)
    config = config_of(tmp_path, tmp_path / "run")
    loader = open_step_loader(config, build_text_tokenizer(config.model), rank=0, world_size=1)
    reader = loader.readers["clips"].sources[0]
    sample, good = reader.decode_training(5, epoch=0), reader.decode_training(6, epoch=0)
    assert good.bad_sample is None
    assert sample.bad_sample.ordinal == 5
    assert "scan.png" in sample.bad_sample.reason
    substitute = reader.decode_training(sample.ordinal, epoch=0)
    for view, drawn in substitute.views.items():
        assert np.array_equal(sample.views[view].part, drawn.part), view


def test_required_modalities_select_by_the_index_and_every_sample_comes_once(tmp_path):
    data = tmp_path
    write_views(data / "clips", fraction=0.75)
    streams = views_config(data, tmp_path / "run").model_dump(mode="json")["streams"]
    streams["clips"] |= {"require": "all", "objectives": {"image-audio": {}, "scan-text": {}}}
    del streams["texts"]
    values = views_config(data, tmp_path / "run").model_dump(mode="json")
    for name in ("title", "values", "series"):
        del values["model"]["modalities"][name]
    streams["clips"]["global_batch_size"] = values["lanes"] = 2
    config = PretrainConfig.model_validate(values | {"streams": streams})
    loader = open_step_loader(config, build_text_tokenizer(config.model), rank=0, world_size=1)
    reader = loader.readers["clips"].sources[0]
    dataset = Dataset(data / "clips")
    names = ("image", "audio", "scan", "text")
    kept = [
        ordinal
        for ordinal in range(NUM_SAMPLES)
        if set(names) <= dataset.read_modalities(ordinal).present
    ]
    assert 4 < len(kept) < NUM_SAMPLES
    assert reader.samples.ordinals_of(np.arange(len(reader.samples))).tolist() == kept
    drawn = Counter()
    for step in range(10 * len(kept)):
        samples = loader.schedule.samples_of_step("clips", step, lanes=loader.lanes)
        drawn.update(zip(samples.epochs.tolist(), samples.ordinals.tolist(), strict=True))
    assert set(drawn.values()) == {1}
    assert {ordinal for _, ordinal in drawn} == set(kept)
    views = loader.load(0).streams["clips"].views
    assert all(view.present is None for view in views.values())


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"width": 4}, r"expected vectors 'values' of shape \[4\].*found \[3\]"),
        ({"max_rows": 5, "tower": {}}, r"of shape \[time, 3\].*found \[3\]"),
    ],
)
def test_vectors_of_another_shape_are_refused(data, tmp_path, change, expected):
    config = without_text(data, tmp_path / "run")
    values = config.model_dump(mode="json")
    values["model"]["modalities"]["values"] |= change
    config = PretrainConfig.model_validate(values)
    with pytest.raises(InputError, match=expected):
        open_step_loader(config, None, rank=0, world_size=1)


def test_a_view_that_no_source_has_is_refused(data, tmp_path):
    config = views_config(data, tmp_path / "run")
    values = config.model_dump(mode="json")
    values["streams"]["texts"]["objectives"]["texts"] = {
        "left": {"text": "subtitle"},
        "right": "text",
    }
    config = PretrainConfig.model_validate(values)
    with pytest.raises(
        InputError, match=r"objectives\.texts reads text\.subtitle and text: expected a source"
    ):
        open_step_loader(config, build_text_tokenizer(config.model), rank=0, world_size=1)
