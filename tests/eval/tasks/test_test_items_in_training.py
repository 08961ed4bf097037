"""Classifiers never learn from the items they are measured on, in whichever way these are given."""

import json
import shutil

import numpy as np
import pytest

from data_prep.errors import InputError
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.subset import Subset
from eval.tasks.runner import check_fingerprints
from tests.eval.datasets.test_file_dataset import task_of
from tests.eval.datasets.test_tar_dataset import write_set
from tests.support.toy_evaluation import write_dataset
from tests.support.toy_shards import jpeg

CLASSES = ["cat", "dog"]
TASKS = {"linear_probe": {}, "nearest_neighbours": {}, "few_shot": {"shots": [1]}}
NUM_ITEMS = 12


def write_class_folders(folder, *, first=0):
    for number in range(first, first + NUM_ITEMS):
        path = folder / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return folder


def write_table(path, folder, numbers=range(NUM_ITEMS)):
    lines = [f"{folder}/{CLASSES[n % 2]}/{n}.jpg,{CLASSES[n % 2]}" for n in numbers]
    path.write_text("\n".join(["file,class_name", *lines]) + "\n")
    return path


def write_tars(folder, *, first=0):
    samples = [
        {"jpg": jpeg(first + n), "cls": str(n % 2).encode(), "__key__": f"s{first + n:07d}"}
        for n in range(NUM_ITEMS)
    ]
    return write_set(folder, samples, samples_per_tar=5)


def write_shards(folder, *, first=0):
    samples = [
        {"jpg": jpeg(first + n), "json": json.dumps({"class_name": CLASSES[n % 2]}).encode()}
        for n in range(NUM_ITEMS)
    ]
    return write_dataset(folder, samples)


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def linked(folder, target):
    target.symlink_to(folder)
    return target


def same_items(tmp_path, form):
    """Returns (test dataset, settings) that name the same items for training and test."""
    folders = write_class_folders(tmp_path / "folders")
    tars, shards = write_tars(tmp_path / "tars"), write_shards(tmp_path / "shards")
    table = write_table(tmp_path / "table.csv", "folders")
    return {
        "class folders without splits": (folders, {}),
        "table": (table, {}),
        "tars without splits": (tars / "test", {}),
        "shards": (shards, {}),
        "one split twice": (tars, {"train_split": "test"}),
        "another table of the same files": (
            table,
            {"train": str(write_table(tmp_path / "other.csv", "folders", range(3, NUM_ITEMS)))},
        ),
        "class folders and their table": (folders, {"train": str(table)}),
        "link to class folders": (folders, {"train": str(linked(folders, tmp_path / "link"))}),
        "link to tars": (tars, {"train": str(linked(tars / "test", tmp_path / "link2"))}),
        "copy of shards": (shards, {"train": str(copied(shards, tmp_path / "copy"))}),
    }[form]


FORMS = [
    "class folders without splits",
    "table",
    "tars without splits",
    "shards",
    "one split twice",
    "another table of the same files",
    "class folders and their table",
    "link to class folders",
    "link to tars",
    "copy of shards",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_items_for_training_and_test_are_refused(tmp_path, form):
    dataset, settings = same_items(tmp_path, form)
    for task, own in TASKS.items():
        with pytest.raises(InputError) as caught:
            task_of(task, dataset, class_names=CLASSES, **own, **settings)
        message = str(caught.value)
        num_train = NUM_ITEMS - 3 if "another table" in form else NUM_ITEMS
        assert "expected training items other than the test items, found" in message
        assert f"found {num_train} of {num_train} training items among the test items" in message
        assert "set train, train_split, or a subset" in message


def test_subsets_with_common_samples_are_refused_and_disjoint_ones_accepted(tmp_path):
    shards = write_shards(tmp_path / "shards")
    copy = copied(shards, tmp_path / "copy")
    info, _ = read_dataset_files(shards)
    number = np.arange(NUM_ITEMS)
    for name, kept in (("low", number < 8), ("high", number >= 8), ("even", number // 2 % 2 == 0)):
        Subset.from_bitmap(info, kept, preparation={}).write(tmp_path / f"{name}.subset")
    for train in (shards, copy):
        settings = {"class_names": CLASSES, "train": str(train), "subset": tmp_path / "low.subset"}
        for task, own in TASKS.items():
            for name in ("even", "low"):
                num_train, num_shared = {"even": (6, 4), "low": (8, 8)}[name]
                with pytest.raises(InputError, match=f"found {num_shared} of {num_train} training"):
                    task_of(
                        task, shards, train_subset=tmp_path / f"{name}.subset", **settings, **own
                    )
            found = task_of(
                "nearest_neighbours", shards, train_subset=tmp_path / "high.subset", **settings
            )
            assert len(found.train.indices) == 4
            check_fingerprints([found])


@pytest.mark.parametrize("form", ["folders", "tars"])
def test_a_copy_of_the_test_set_is_refused_by_its_fingerprint(tmp_path, form):
    write = {"folders": write_class_folders, "tars": write_tars}[form]
    dataset, other = write(tmp_path / "set"), write(tmp_path / "other", first=100)
    copy = copied(dataset, tmp_path / "copy")
    names = {"class_names": CLASSES, "train_split": "test", "validation_split": "test"}
    task = task_of("linear_probe", dataset, train=str(copy), **names)
    with pytest.raises(InputError, match=r"found equal contents in .*set and .*copy"):
        check_fingerprints([task])
    task = task_of("linear_probe", dataset, train=str(other), validation=str(copy), **names)
    with pytest.raises(InputError, match=r"found equal contents in .*set and .*copy"):
        check_fingerprints([task])
    other_copy = copied(other, tmp_path / "other_copy")
    task = task_of("linear_probe", dataset, train=str(other), validation=str(other_copy), **names)
    with pytest.raises(InputError, match=r"found equal contents in .*other and .*other_copy"):
        check_fingerprints([task])
    check_fingerprints([task_of("linear_probe", dataset, train=str(other), **names)])


@pytest.mark.parametrize("role", ["test", "training"])
def test_validation_items_are_neither_test_nor_training_items(tmp_path, role):
    test, train = (write_tars(tmp_path / name, first=n) for n, name in ((0, "a"), (50, "b")))
    names = {"class_names": CLASSES, "train_split": "test", "validation_split": "test"}
    validation = {"test": test, "training": train}[role]
    with pytest.raises(InputError, match=f"expected validation items other than the {role} items"):
        task_of("linear_probe", test, train=str(train), validation=str(validation), **names)
