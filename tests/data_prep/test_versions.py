import importlib.metadata
import sys

import pytest

from data_prep.versions import package_version, package_versions


def install(folder, name, *, metadata=None):
    path = folder / f"{name}.dist-info"
    path.mkdir(parents=True)
    if metadata is not None:
        (path / "METADATA").write_bytes(metadata)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that comes first on sys.path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path


@pytest.mark.parametrize(
    "metadata",
    [None, b"", b"Name: torch\n", b"Version: 9\n", b"Name: torch\nVersion: \xff\xfe\n", b"\0\0"],
    ids=["empty folder", "empty file", "no version", "no name", "not UTF-8", "zeros"],
)
def test_remains_of_a_package_are_left_out(site, metadata):
    complete = package_versions()
    install(site, "torch-0.1", metadata=metadata)
    importlib.invalidate_caches()
    assert package_versions() == complete
    assert package_version("torch") == complete["torch"]


def test_versions_equal_those_of_importlib_and_the_first_on_the_path_counts(site):
    assert package_version("torch") == importlib.metadata.version("torch")
    assert package_version("no-such-package") is None
    install(site, "pytest-0.1", metadata=b"Metadata-Version: 2.1\nName: pytest\nVersion: 0.1\n")
    importlib.invalidate_caches()
    assert package_version("pytest") == package_versions()["pytest"] == "0.1"
