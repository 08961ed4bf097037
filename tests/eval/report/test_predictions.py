"""Predictions of different evaluations are stored in different files."""

import pytest
from pydantic import ValidationError

from data_prep.storage.file_names import MAX_NAME_BYTES
from eval.config import EvaluateConfig
from eval.report.predictions import predictions_file

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
