import itertools

import numpy as np
import pytest

from data_prep.config import DemoData
from data_prep.demo.images import ATTRIBUTES, digit_splits, scene_caption, scene_combinations
from data_prep.demo.objects import DISTANCES, OBJECTS, Pen, draw_object, sound_of_object
from data_prep.demo.sounds import SAMPLE_RATE_HZ, SOUNDS, synthesise
from data_prep.make_demo_data import make_demo_data
from tests.support.toy_pairs import contents


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(write_config(folder))
    return folder


def write_config(folder):
    sizes = {"scenes_per_combination": 1, "clips_per_sound": 2, "pairs_per_object": 1}
    return DemoData(output=folder, workers=1, **sizes)


def rows_of(manifest):
    return [line.split("\t") for line in manifest.read_text().splitlines()[1:]]


def attributes_of(caption):
    """Reads the value of every attribute that a caption names."""
    return tuple(
        next(value for value, words in known.items() if any(word in caption for word in words))
        for known in ATTRIBUTES
    )


def test_no_held_out_combination_occurs_in_training(demo):
    known, held_out = scene_combinations(0)
    assert len(held_out) >= 108
    trained = {attributes_of(caption) for _, caption in rows_of(demo / "scenes" / "train.tsv")}
    tested = [attributes_of(caption) for _, caption in rows_of(demo / "scenes" / "test.tsv")]
    assert trained == set(known)
    assert sorted(tested) == sorted(held_out)
    assert not trained & set(tested)
    others = (demo / "scenes" / "other_captions.txt").read_text().splitlines()
    assert {attributes_of(caption) for caption in others} == trained
    assert len({caption for _, caption in rows_of(demo / "scenes" / "test.tsv")}) == len(held_out)


def test_every_pair_of_values_occurs_in_training():
    for seed in (0, 1):
        known, _ = scene_combinations(seed)
        seen = {pair for scene in known for pair in itertools.combinations(scene, 2)}
        for first, second in itertools.combinations(ATTRIBUTES, 2):
            assert seen.issuperset(itertools.product(first, second))


def test_captions_name_all_attributes_and_use_the_right_article():
    rng = np.random.default_rng(0)
    scene = ("circle", "cyan", "small", "centre", "outlined")
    captions = {scene_caption(scene, rng) for _ in range(100)}
    assert len(captions) > 30
    assert {attributes_of(caption) for caption in captions} == {scene}
    assert not any("a outlined" in caption for caption in captions)


@pytest.mark.parametrize("name", ["digits", "scenes", "sounds", "objects"])
def test_no_file_of_evaluation_is_in_training(demo, name):
    media = {
        split: set(contents(demo / name / split).values())
        for split in ("train", "validation", "test")
    }
    for first, second in itertools.combinations(media.values(), 2):
        assert not first & second
    for split, files in media.items():
        rows = rows_of(demo / name / f"{split}.tsv")
        paths = {cell for row in rows for cell in row if cell.startswith(f"{split}/")}
        assert len(paths) == len(files)
        assert all((demo / name / path).is_file() for path in paths)


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    make_demo_data(write_config(tmp_path))
    assert contents(tmp_path) == contents(demo)


def test_every_class_is_tested_equally_often(demo):
    digits = digit_splits(0)
    assert {split: len(items) for split, items in digits.items()} == {
        "train": 1400,
        "validation": 100,
        "test": 297,
    }
    for name, counts in (("digits", {58, 60}), ("sounds", {25})):
        labels = [row[2] for row in rows_of(demo / name / "test.tsv")]
        names = (demo / name / "class_names.txt").read_text().splitlines()
        assert set(labels) == set(names)
        assert {labels.count(label) for label in names} == counts
    labels = [row[3] for row in rows_of(demo / "objects" / "test.tsv")]
    assert {labels.count(label) for label in labels} == {10}
    assert set(labels) == {f"{kind}, {each}" for kind in OBJECTS for each in DISTANCES}


def test_an_object_makes_its_own_sound():
    assert set(OBJECTS) == set(SOUNDS)


@pytest.mark.parametrize("kind", OBJECTS)
def test_near_objects_are_large_and_loud(kind):
    painted, peaks = ([] for _ in range(2))
    for distance, ranges in DISTANCES.items():
        for radius in ranges.radius:
            pen = Pen((16, 16), radius)
            OBJECTS[kind][0](pen, np.random.default_rng(0))
            painted.append(pen.coverage().sum())
        clips = [sound_of_object(kind, distance, np.random.default_rng(n)) for n in range(2)]
        peaks += [np.abs(clip).max() for clip in clips]
        image = draw_object(kind, distance, np.random.default_rng(0))
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert min(painted[:2]) > 2 * max(painted[2:])
    assert min(peaks[:2]) > 3 * max(peaks[2:])


def test_captions_of_objects_do_not_tell_the_distance(demo):
    words = {
        word
        for split in ("train", "validation", "test")
        for row in rows_of(demo / "objects" / f"{split}.tsv")
        for word in row[2].split()
    }
    assert not words & {"near", "far", "close", "distant", "small", "large", "loud", "quiet"}


def test_every_sound_is_finite_and_within_range():
    for kind in SOUNDS:
        clip = synthesise(kind, np.random.default_rng(3))
        assert 1.5 * SAMPLE_RATE_HZ <= len(clip) <= 2 * SAMPLE_RATE_HZ
        assert 0.1 < np.abs(clip).max() < 1  # peaks are drawn between -18 and -1 dB
