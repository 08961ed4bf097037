import json

import numpy as np
import pytest
from toy_evaluation import write_dataset

from data_prep.config_file import ConfigError, InputError, read_config
from data_prep.shard_format import read_dataset_files
from data_prep.subset import Subset
from eval.config import EvaluateConfig
from eval.tasks import read_lines, read_tasks


def config_of(folder, **section):
    return EvaluateConfig.model_validate(
        {
            "checkpoint": "run",
            "output": "out",
            "evaluations": {"toy": {"dataset": folder, **section}},
        }
    )


def classification(folder, **changes):
    section = {"class_names": ["cat", "dog"], "prompt_templates": ["a {}"]} | changes
    return config_of(folder, task="zero_shot_classification", **section)


def labelled(name):
    return {"json": json.dumps({"class_name": name}).encode()}


def test_classes_come_from_json_or_an_index(tmp_path):
    write_dataset(tmp_path / "toy", [labelled("dog"), {"cls": b"0\n"}, labelled("cat")])
    (task,) = read_tasks(classification(tmp_path / "toy"))
    np.testing.assert_array_equal(task.targets, [1, 0, 0])
    assert task.description() == (
        "toy: zero-shot classification, 3 image items, 2 classes, 1 templates, 2 prompts "
        f"({tmp_path / 'toy'})"
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (labelled("dgo"), r"00000000\.tar: sample 0001: class 'dgo' .* nearest is 'dog'"),
        ({"cls": b"2"}, r"sample 0001: \.cls: expected an index from 0 to 1, found '2'"),
        ({"cls": b"-1"}, r"found '-1'"),
        ({"txt": b"a dog"}, r"sample 0001: expected \"class_name\" .* members: \['txt'\]"),
        ({"json": b"["}, r"sample 0001: \.json is not JSON"),
    ],
)
def test_sample_without_a_known_class_is_named(tmp_path, members, message):
    write_dataset(tmp_path / "toy", [labelled("dog"), members])
    with pytest.raises(InputError, match=message):
        read_tasks(classification(tmp_path / "toy"))


def test_repeated_class_name_is_refused(tmp_path):
    write_dataset(tmp_path / "toy", [labelled("dog")])
    with pytest.raises(InputError, match=r"evaluations\.toy\.class_names: .*'dog'"):
        read_tasks(classification(tmp_path / "toy", class_names=["dog", "cat", "dog"]))


def test_every_caption_knows_its_item(tmp_path):
    two = {"json": json.dumps({"captions": ["a", "b"]}).encode()}
    write_dataset(tmp_path / "toy", [two, {"txt": b"c"}])
    distractors = tmp_path / "others.txt"
    distractors.write_text("d\n\ne\n")
    (task,) = read_tasks(
        config_of(tmp_path / "toy", task="retrieval", distractor_captions=distractors)
    )
    assert task.captions == ["a", "b", "c"]
    np.testing.assert_array_equal(task.media_of_text, [0, 0, 1])
    assert task.distractor_captions == ["d", "e"]


def test_a_subset_is_measured_as_if_nothing_else_were_there(tmp_path):
    samples = [{"txt": text} for text in (b"a", b" ", b"c", b"d")]
    folder = write_dataset(tmp_path / "toy", samples)
    kept = np.array([True, False, False, True])
    info, _ = read_dataset_files(folder)
    subset = Subset.from_bitmap(info, kept, preparation={})
    subset.write(tmp_path / "some.subset")
    section = {"task": "retrieval", "subset": tmp_path / "some.subset"}
    (task,) = read_tasks(config_of(folder, **section))
    assert task.captions == ["a", "d"]
    np.testing.assert_array_equal(task.media_of_text, [0, 1])
    assert task.dataset.fingerprint == f"{info.fingerprint} subset {subset.fingerprint}"
    assert "2 image items, 2 captions" in task.description()
    other = write_dataset(tmp_path / "other", samples[:2])
    with pytest.raises(InputError, match=r"some\.subset: belongs to a dataset of 4 samples"):
        read_tasks(config_of(other, **section))


def test_sample_without_caption_is_named(tmp_path):
    write_dataset(tmp_path / "toy", [{"txt": b"a"}, {"txt": b" "}])
    with pytest.raises(InputError, match="sample 0001: expected a caption"):
        read_tasks(config_of(tmp_path / "toy", task="retrieval"))


def test_empty_dataset_is_refused(tmp_path):
    write_dataset(tmp_path / "toy", [])
    with pytest.raises(InputError, match="found an empty dataset"):
        read_tasks(config_of(tmp_path / "toy", task="retrieval"))


def test_text_files_may_come_from_any_system(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfcat\r\n\r\n dog \r\n")
    assert read_lines(path) == ["cat", "dog"]
    path.write_text("\n")
    with pytest.raises(InputError, match="found none"):
        read_lines(path)
    with pytest.raises(InputError, match=r"absent\.txt: expected a text file"):
        read_lines(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{task: retrieval, dataset: d, class_names: [a]}", "unknown key 'class_names'"),
        ("{task: retrieve, dataset: d}", "retrieval"),
        ("{task: retrieval, dataset: d, ks: [5, 1]}", "rising numbers"),
        ("{task: zero_shot_classification, dataset: d}", "this key is required"),
    ],
)
def test_config_names_what_is_wrong(tmp_path, lines, message):
    path = tmp_path / "config.yaml"
    path.write_text(f"checkpoint: c\noutput: o\nevaluations:\n  toy: {lines}\n")
    with pytest.raises(ConfigError, match=message):
        read_config(EvaluateConfig, path)
