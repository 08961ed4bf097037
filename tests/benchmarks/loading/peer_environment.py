"""A second environment for loaders that conflict with ours, created once and kept."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.loading.photo_shards import CACHE

# Both loaders are measured with the very same versions of these.
SHARED_PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def peer_python(name: str, requirements: list[str]) -> Path:
    """Returns the interpreter of a named environment, which is created if it is missing."""
    pins = [f"{package}=={version(package).partition('+')[0]}" for package in SHARED_PACKAGES]
    folder, wanted = CACHE / name, "\n".join([*requirements, *pins])
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.exists() or done.read_text() != wanted:
        uv = Path(sys.executable).with_name("uv")
        print(f"Making {folder}", flush=True)
        subprocess.run(
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder], check=True
        )
        install = [uv, "pip", "install", "--quiet", "--python", python, *wanted.splitlines()]
        subprocess.run(install, check=True)
        done.write_text(wanted)
    return python
