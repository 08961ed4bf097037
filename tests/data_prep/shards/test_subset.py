import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import DatasetInfo
from data_prep.shards.subset import BLOCK_BYTES, KeptSamples, Subset
from tests.support.toy_modalities import FOUR, SUBSETS, write_subsets


def info_of(num_samples, fingerprint="f" * 64):
    return DatasetInfo(
        media="image",
        fields=["txt", "jpg"],
        num_samples=num_samples,
        num_shards=1,
        tar_bytes=0,
        fingerprint=fingerprint,
    )


def subset_of(bitmap, **preparation):
    bitmap = np.asarray(bitmap, dtype=bool)
    return Subset.from_bitmap(info_of(len(bitmap)), bitmap, preparation=preparation)


def random_bitmap(num_samples, share, seed=0):
    return np.random.default_rng(seed).random(num_samples) < share


@given(
    num_samples=st.integers(0, 3 * BLOCK_BYTES * 8 + 9),
    share=st.sampled_from([0, 0.01, 0.5, 0.99, 1]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_ordinals_and_ranks_are_those_of_a_list_of_kept_samples(num_samples, share, seed):
    bitmap = random_bitmap(num_samples, share, seed)
    subset = subset_of(bitmap)
    kept = np.flatnonzero(bitmap)
    assert subset.num_kept == len(kept)
    assert np.array_equal(subset.bitmap, bitmap)
    assert np.array_equal(subset.ordinals_of(np.arange(len(kept))), kept)
    before = np.concatenate([[0], np.cumsum(bitmap)])
    assert np.array_equal(subset.ranks_of(np.arange(num_samples + 1)), before)


def test_many_queries_are_answered_in_any_order():
    bitmap = random_bitmap(300_000, 0.7)
    subset = subset_of(bitmap)
    ranks = np.random.default_rng(1).permutation(subset.num_kept)
    assert np.array_equal(subset.ordinals_of(ranks), np.flatnonzero(bitmap)[ranks])
    assert np.array_equal(subset.ranks_of(subset.ordinals_of(ranks)), ranks)


@pytest.mark.parametrize("num_samples", [0, 1, 8, 511, 512, 513, 5000])
def test_a_file_holds_what_was_written(tmp_path, num_samples):
    bitmap = random_bitmap(num_samples, 0.3)
    subset = subset_of(bitmap, where="height > 5")
    subset.write(tmp_path / "x.subset")
    found = Subset.read(tmp_path / "x.subset")
    assert np.array_equal(found.bitmap, bitmap)
    assert found.preparation == {"where": "height > 5"}
    assert found.fingerprint == subset.fingerprint
    found.check_belongs_to(info_of(num_samples))
    assert [path.name for path in tmp_path.iterdir()] == ["x.subset"]


def test_the_fingerprint_is_of_what_is_kept_and_not_of_how_it_was_chosen():
    bitmap = random_bitmap(100, 0.5)
    assert subset_of(bitmap, a=1).fingerprint == subset_of(bitmap, b=2).fingerprint
    other = Subset.from_bitmap(info_of(100, "e" * 64), bitmap, preparation={})
    prints = {subset_of(bitmap), subset_of(~bitmap), subset_of([*bitmap, False]), other}
    assert len({each.fingerprint for each in prints}) == 4


@pytest.mark.parametrize("info", [info_of(50, "e" * 64), info_of(51)])
def test_a_subset_of_another_dataset_is_refused_naming_both(tmp_path, info):
    subset_of(random_bitmap(50, 0.5)).write(tmp_path / "x.subset")
    with pytest.raises(InputError) as caught:
        Subset.read(tmp_path / "x.subset").check_belongs_to(info)
    for part in ("x.subset", "f" * 64, info.fingerprint, "50 samples", f"{info.num_samples} sam"):
        assert part in str(caught.value)


def test_every_damage_of_a_file_is_found(tmp_path):
    path = tmp_path / "x.subset"
    subset_of(random_bitmap(200, 0.5)).write(path)
    content = path.read_bytes()
    bits_start = len(content) - 25
    damaged = [b"", b"ISOIDX1\n" + content[8:], content[:-1], content + b"\0", content[:20]]
    for place in [8, 11, 12, *range(bits_start, len(content))]:
        damaged.append(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    damaged.append(content.replace(b'"num_kept"', b'"num_gone"'))
    damaged.append(content.replace(b'"num_samples": 200', b'"num_samples": 201'))
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"x\.subset: (damaged|expected)"):
            Subset.read(path)


def test_a_missing_file_says_what_makes_one(tmp_path):
    with pytest.raises(InputError, match=r"absent\.subset: expected a subset.*make_subset"):
        Subset.read(tmp_path / "absent.subset")


def test_whether_any_kept_sample_has_modalities_is_known_from_the_indexes(tmp_path):
    names = list(FOUR)
    dataset = Dataset(write_subsets(tmp_path))  # sample n has the n-th of SUBSETS
    for seed in range(20):
        bitmap = np.random.default_rng(seed).random(len(dataset)) < 0.2
        kept = KeptSamples(dataset, subset=Subset.from_bitmap(dataset.info, bitmap, preparation={}))
        for wanted in SUBSETS:
            of_kept = [set(wanted) <= set(SUBSETS[n]) for n in np.flatnonzero(bitmap)]
            assert kept.has_any_with(wanted) == any(of_kept)
    assert KeptSamples(dataset, subset=None).has_any_with(names)
    # Complete samples are in the last shard alone, whose index is lost.
    assert [set(names) <= set(subset) for subset in SUBSETS] == [False] * 14 + [True]
    (tmp_path / "00000003.idx").unlink()
    assert not KeptSamples(Dataset(tmp_path), subset=None).has_any_with(names)
