"""The English of docstrings, comments, messages and documentation, as far as it can be checked."""

from inspect import cleandoc

import pytest

from tests.support.language import faults_of, files_of, sentences

PLACES = ["data_prep", "pretrain", "eval", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


@pytest.mark.parametrize("place", PLACES)
def test_the_language_has_no_faults(place):
    faults = [fault for path in files_of([place]) for fault in faults_of(path)]
    assert not faults, "\n".join(faults)


def test_faults_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.support.language.ROOT", tmp_path)
    path = tmp_path / "module.py"
    long = " ".join(["word"] * 26)
    path.write_text(
        f'"""What this does. {long}."""\n\n'
        "# tests beside the code\n"
        'def loss():\n    """The loss."""\n    raise ValueError(f"the key {0} stands twice")\n'
    )
    found = "\n".join(faults_of(path))
    for fault in ("26 words", "opens with What", "'beside'", "'stands twice'", "loss: starts with"):
        assert fault in found


def test_sentences_leave_out_code_tables_and_argument_names():
    docstring = cleandoc("""Returns the sum.

        python -m x CONFIG.yaml

    a    first
    b    second

    Args:
        x: [N], the first. Of any kind.
        y: the second.
    """)
    found = list(sentences(docstring))
    assert found[0] == "Returns the sum."
    assert not any("CONFIG" in sentence for sentence in found)
    assert "y: the second." in [sentence.strip() for sentence in found]
