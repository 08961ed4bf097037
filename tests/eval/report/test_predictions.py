"""Predictions of different evaluations are stored in different files."""

import json
import re

import pytest
from pydantic import ValidationError

from data_prep.errors import InputError
from data_prep.storage.file_names import MAX_NAME_BYTES
from eval.config import EvaluateConfig
from eval.report.predictions import find_predictions, predictions_file

SUFFIXES = ("", ".media_to_text", ".text_to_media")
NAMES = ["a b", "a_b", "a/b", "a", "a.media_to_text", "\u56fe\u50cf", "\u58f0\u97f3", "%", "%25"]


def test_no_two_evaluations_share_a_file(tmp_path):
    files = [predictions_file(tmp_path, name, suffix) for name in NAMES for suffix in SUFFIXES]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {tmp_path / "predictions"}


def test_config_refuses_a_name_that_is_too_long_for_a_file(tmp_path):
    section = {"task": "retrieval", "dataset": str(tmp_path)}
    name = "n" * (MAX_NAME_BYTES + 1)
    with pytest.raises(ValidationError, match="shorten it"):
        EvaluateConfig(checkpoint=tmp_path, output=tmp_path, evaluations={name: section})
    EvaluateConfig(checkpoint=tmp_path, output=tmp_path, evaluations={name[:-1]: section})


def write_results_of_earlier_version(folder, evaluations, suffixes):
    """Writes empty predictions under the names of earlier versions."""
    (folder / "predictions").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"evaluations": dict.fromkeys(evaluations)}))
    for name in evaluations:
        for suffix in suffixes:
            earlier = re.sub(r"[^a-zA-Z0-9_.-]", "_", name)
            (folder / "predictions" / f"{earlier}{suffix}.parquet").touch()


@pytest.mark.parametrize(
    ("evaluations", "found"),
    [
        (["a.b"], {"a.b": "a.b"}),
        (["a.b", "a"], {"a.b": "a.b", "a": "a"}),
        (["a b", "c"], {"a b": "a_b", "c": "c"}),
        (["a b", "a_b"], {"a b": None, "a_b": None}),
        (["a b", "a/b"], {"a b": None, "a/b": None}),
        (["\u56fe\u50cf", "\u58f0\u97f3"], {"\u56fe\u50cf": None, "\u58f0\u97f3": None}),
        (["\u56fe\u50cf"], {"\u56fe\u50cf": "__"}),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".media_to_text"])
def test_predictions_of_earlier_versions_are_found_if_they_are_unambiguous(
    tmp_path, evaluations, found, suffix
):
    write_results_of_earlier_version(tmp_path, evaluations, [suffix])
    for name, earlier in found.items():
        today = predictions_file(tmp_path, name, suffix)
        if earlier is None:
            with pytest.raises(InputError, match="in this file; evaluate again"):
                find_predictions(tmp_path, name, suffix)
        else:
            expected = today.with_name(f"{earlier}{suffix}.parquet")
            assert find_predictions(tmp_path, name, suffix) == expected


def test_a_suffix_in_the_name_of_another_evaluation_is_ambiguous(tmp_path):
    write_results_of_earlier_version(tmp_path, ["a.media_to_text", "a"], [""])
    with pytest.raises(InputError, match=r"'a\.media_to_text' and 'a' in this file"):
        find_predictions(tmp_path, "a.media_to_text", "")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_predictions_of_this_version_are_found_whatever_the_names(tmp_path, suffix):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "results.json").write_text(json.dumps({"evaluations": dict.fromkeys(NAMES)}))
    for name in NAMES:
        for each in SUFFIXES:
            predictions_file(tmp_path, name, each).touch()
    for name in NAMES:
        assert find_predictions(tmp_path, name, suffix) == predictions_file(tmp_path, name, suffix)
    missing = predictions_file(tmp_path, "a%", suffix)
    assert find_predictions(tmp_path, "a%", suffix) == missing
