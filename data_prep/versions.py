"""Versions of installed packages, from their metadata.

A broken installation or an interrupted uninstall leaves folders without readable metadata
(`ghost-1.0.dist-info/`), which importlib.metadata returns with a name of None, or fails on.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, distributions


def package_versions() -> dict[str, str]:
    """Returns {name: version} of all installed packages, sorted; the first on sys.path counts."""
    versions: dict[str, str] = {}
    for distribution in distributions():
        for name, version in _readable(distribution):
            versions.setdefault(name, version)
    return dict(sorted(versions.items()))


def package_version(name: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    for distribution in distributions(name=name):
        for _, version in _readable(distribution):
            return version
    return None


def _readable(distribution: Distribution) -> Iterator[tuple[str, str]]:
    """Yields (name, version), or nothing if the metadata lacks them."""
    try:
        metadata = distribution.metadata
        name, version = metadata["Name"], metadata["Version"]
    except (OSError, LookupError, TypeError, ValueError):
        # By version of Python: an unreadable file, no file, or a file that is not UTF-8
        return
    if isinstance(name, str) and isinstance(version, str):
        yield name, version
