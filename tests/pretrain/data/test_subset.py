"""Training on a subset of a dataset: order, substitutes, and resumption."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from data_prep.errors import (
    ConfigError,
    InputError,
)
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    read_dataset_files,
    write_dataset_files,
)
from data_prep.shards.subset import KeptSamples, Subset
from data_prep.shards.writer import ShardWriter
from pretrain.data.batch import StreamBuffers
from pretrain.model.tokenizer import build_tokenizer
from pretrain.run.attempts import read_metrics
from pretrain.sampling.order import Segment, SourceOrder, StreamOrder
from pretrain.train import pretrain
from pretrain.training.assembly import open_step_loader, open_validation_sets
from tests.support.toy_run import toy_config, toy_members

SIZES = (40, 13, 30)  # of toy_data / "colors"


def write_subset(path, dataset, bitmap):
    info, _ = read_dataset_files(dataset)
    Subset.from_bitmap(info, np.asarray(bitmap, dtype=bool), preparation={}).write(path)
    return path


def half_of(num_samples, seed=0):
    return np.random.default_rng(seed).random(num_samples) < 0.5


def write_kept_samples(folder, bitmap):
    """Writes a dataset that holds only what `bitmap` keeps of colors, shard by shard."""
    folder.mkdir()
    for shard, start in enumerate(np.cumsum((0, *SIZES[:-1]))):
        writer = ShardWriter(folder, f"{shard:08d}")
        for ordinal in range(start, start + SIZES[shard]):
            if bitmap[ordinal]:
                writer.add(f"{ordinal:06d}", members=toy_members("image", ordinal))
        writer.finish()
    rows = [manifest_row(folder, f"{shard:08d}") for shard in range(len(SIZES))]
    info = DatasetInfo(
        media="image",
        fields=["json", "png", "txt"],
        num_samples=int(bitmap.sum()),
        num_shards=len(rows),
        tar_bytes=sum(row.tar_bytes for row in rows),
        fingerprint=fingerprint_of(rows),
    )
    write_dataset_files(folder, info, manifest=rows)
    return folder


def order_of(samples, *, window, seed=3):
    source = SourceOrder(
        "a", shard_sizes=samples.shard_sizes, lanes=4, window=window, seed=seed, samples=samples
    )
    return StreamOrder(
        "image-text", sources=[source], segments=[Segment(0, [1])], global_batch_size=8, seed=seed
    )


@pytest.mark.parametrize("window", [1, 5, 1000])
@pytest.mark.parametrize("emptied_shard", [None, 1])
def test_the_order_is_that_of_a_dataset_which_holds_only_what_is_kept(
    toy_data, tmp_path, window, emptied_shard
):
    bitmap = half_of(sum(SIZES))
    if emptied_shard is not None:
        bitmap[40:53] = False
    subset = write_subset(tmp_path / "half.subset", toy_data / "colors", bitmap)
    of_subset = KeptSamples(toy_data / "colors", subset=subset)
    physical = KeptSamples(write_kept_samples(tmp_path / "kept", bitmap), subset=None)
    assert of_subset.shard_sizes.tolist() == physical.shard_sizes.tolist()
    kept = np.flatnonzero(bitmap)
    orders = [order_of(samples, window=window) for samples in (of_subset, physical)]
    for step in range(20):
        found, expected = (order.samples_of_step(step, lanes=range(4)) for order in orders)
        assert np.array_equal(found.epochs, expected.epochs)
        assert np.array_equal(found.ordinals, kept[expected.ordinals])
    for rank in range(len(kept)):
        assert of_subset.read_sample(rank).members == physical.read_sample(rank).members


def test_a_subset_of_everything_is_the_whole_dataset_but_for_its_fingerprint(toy_data, tmp_path):
    everything = np.ones(sum(SIZES), dtype=bool)
    subset = write_subset(tmp_path / "all.subset", toy_data / "colors", everything)
    whole = order_of(KeptSamples(toy_data / "colors", subset=None), window=7)
    same = order_of(KeptSamples(toy_data / "colors", subset=subset), window=7)
    for step in (0, 1, 50):
        expected = whole.samples_of_step(step, lanes=range(4)).ordinals
        assert np.array_equal(same.samples_of_step(step, lanes=range(4)).ordinals, expected)


def config_with_subset(toy_data, folder, subset, **sections):
    config = toy_config(toy_data, folder, **({"schedule": {"num_steps": 2}} | sections))
    values = config.model_dump()
    values["streams"]["image-text"]["sources"][0]["subset"] = subset
    return type(config).model_validate(values)


def step_loader(config):
    tokenizer = build_tokenizer(config.model.text)
    return open_step_loader(config, tokenizer, rank=0, world_size=1)


def test_a_sample_is_augmented_as_without_the_subset(toy_data, tmp_path):
    """Checks that a sample's ordinal in the whole dataset is the key of its randomness."""
    bitmap = np.zeros(sum(SIZES), dtype=bool)
    bitmap[-9:] = True
    subset = write_subset(tmp_path / "last.subset", toy_data / "colors", bitmap)
    config = config_with_subset(toy_data, tmp_path / "run", subset)
    loader = pickle.loads(pickle.dumps(step_loader(config)))
    reader = loader.readers["image-text"]
    samples = loader.schedule.orders["image-text"].samples_of_step(1, lanes=range(8))
    assert {o for s, o in zip(samples.sources, samples.ordinals, strict=True) if s == 0} <= set(
        range(74, 83)
    )
    whole = step_loader(toy_config(toy_data, tmp_path / "run")).readers["image-text"]
    batches = []
    for each in (reader, whole):
        buffers = StreamBuffers.new(each.layout, num_rows=len(samples))
        each.fill(buffers, samples, range(len(samples)))
        batches.append(buffers)
    for view in ("image", "text"):
        assert torch.equal(batches[0].views[view].values, batches[1].views[view].values)
    assert loader.schedule.num_samples == 9 + 25 + 50


def test_substitutes_are_kept_samples(toy_data, tmp_path):
    folder = shutil.copytree(toy_data / "colors", tmp_path / "colors")
    bitmap = half_of(sum(SIZES), seed=1)
    bitmap[:40] = np.arange(40) % 4 == 0
    index = ShardIndex.read(folder / "00000000.idx")
    content = bytearray((folder / "00000000.tar").read_bytes())
    for ordinal in (0, 8, 20):
        block = int(index.table[ordinal, index.fields.index("png"), 0])
        content[block * BLOCK_BYTES + 30] ^= 1
    (folder / "00000000.tar").write_bytes(content)
    subset = write_subset(tmp_path / "some.subset", folder, bitmap)
    for name in ("more_colors", "tones"):
        shutil.copytree(toy_data / name, tmp_path / name)
    config = config_with_subset(tmp_path, tmp_path / "run", subset)
    reader = step_loader(config).readers["image-text"].sources[0]
    for ordinal in (0, 8, 20):
        pair = reader.decode_training(ordinal, epoch=0)
        bad = pair.bad_sample
        assert bad.ordinal == ordinal
        assert bad.substitute == pair.ordinal
        assert bitmap[pair.ordinal]
        assert pair.ordinal not in (0, 8, 20)
    assert reader.decode_training(4, epoch=0).bad_sample is None


def test_a_run_on_a_subset_resumes_with_the_same_subset_only(toy_data, tmp_path):
    folder = tmp_path / "run"
    subset = write_subset(tmp_path / "half.subset", toy_data / "colors", half_of(sum(SIZES)))
    validation = {
        "every_steps": 2,
        "streams": {
            "image-text": {"dataset": toy_data / "colors", "subset": subset, "batch_size": 20}
        },
    }

    def run(subset, num_steps):
        config = config_with_subset(toy_data, folder, subset, validation=validation)
        stopping = config.run.model_copy(update={"stop_after_step": num_steps})
        pretrain(config.model_copy(update={"run": stopping}))

    run(subset, 1)
    moved = subset.rename(tmp_path / "moved.subset")
    validation["streams"]["image-text"]["subset"] = moved
    run(moved, 2)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    recorded = json.loads((folder / "environment.json").read_text())["dataset_fingerprints"]
    dataset = Dataset(toy_data / "colors").info.fingerprint
    expected = f"{dataset} subset {Subset.read(moved).fingerprint}"
    assert recorded["image-text/colors"] == recorded["validation/image-text"] == expected
    assert recorded["image-text/more_colors"] == Dataset(toy_data / "more_colors").info.fingerprint

    other = write_subset(tmp_path / "b.subset", toy_data / "colors", half_of(sum(SIZES), seed=5))
    for changed in (other, None):
        with pytest.raises(ConfigError, match=r"fingerprint\.image-text/colors: .* subset "):
            run(changed, 2)


def test_validation_reads_what_the_subset_keeps(toy_data, tmp_path):
    kept = [3, 24]
    bitmap = np.isin(np.arange(25), kept)
    subset = write_subset(tmp_path / "two.subset", toy_data / "more_colors", bitmap)
    source = {"dataset": toy_data / "more_colors", "subset": subset, "batch_size": 5}
    config = toy_config(toy_data, tmp_path / "run", validation={"streams": {"image-text": source}})
    tokenizer = build_tokenizer(config.model.text)
    [held_out] = open_validation_sets(config, tokenizer)
    [batch] = held_out.batches()
    samples = [held_out.reader.read_exactly(ordinal) for ordinal in kept]
    for view in ("image", "text"):
        expected = torch.stack([sample[view][0] for sample in samples])
        assert torch.equal(batch.inputs[view][0], expected)


def test_a_subset_of_another_dataset_and_one_smaller_than_the_lanes_are_refused(toy_data, tmp_path):
    other = write_subset(tmp_path / "x.subset", toy_data / "more_colors", np.ones(25))
    with pytest.raises(InputError, match=r"x\.subset: belongs to a dataset of 25 samples"):
        step_loader(config_with_subset(toy_data, tmp_path / "run", other))
    few = write_subset(tmp_path / "few.subset", toy_data / "colors", np.arange(83) < 5)
    with pytest.raises(InputError, match="'colors' has 5 samples, fewer than lanes=8"):
        step_loader(config_with_subset(toy_data, tmp_path / "run", few))
