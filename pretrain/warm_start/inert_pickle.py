"""PyTorch's pickled weights, read without executing what the pickle asks for.

A pickle may name any function of any module, and unpickling calls it. This unpickler knows the few
names that rebuild tensors; every other name becomes an inert object that accepts anything and does
nothing. `torch.load(weights_only=True)` is as safe, but refuses files that hold a numpy number, an
argparse.Namespace or protocol 4, which many published checkpoints do.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_prep.errors import InputError
from pretrain.model.library_errors import describe_library_error

# Types that containers around tensors consist of; none can be changed by a pickle.
_TYPES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
}
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")  # of torch._utils


class Inert:
    """Stands in for an object that is not rebuilt."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignores an element of a list."""

    def extend(self, values: Any) -> None:
        """Ignores elements of a list."""

    def add(self, value: Any) -> None:
        """Ignores an element of a set."""

    def __hash__(self) -> int:
        return id(self)


class _InertUnpickler(pickle.Unpickler):
    # torch.load itself replaces the types of storages before it asks this class.
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _TYPES:
            return _TYPES[module, name]
        if module == "torch._utils" and name in _REBUILDERS:
            rebuild = getattr(torch._utils, name)
            # A pickle can set attributes of what it names, so it gets a function of its own.
            return lambda *args: rebuild(*args)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Inert,), {})


class _InertPickle:
    """The interface of the module `pickle` that torch.load uses."""

    __name__ = "inert_pickle"
    Unpickler = _InertUnpickler
    UnpicklingError = pickle.UnpicklingError
    HIGHEST_PROTOCOL = pickle.HIGHEST_PROTOCOL

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        """Loads the next object of a file."""
        return _InertUnpickler(file, **options).load()


def read_pickle(path: Path) -> Any:
    """Reads what torch.save wrote, with tensors on the CPU; nothing in the file is executed.

    Objects that are no tensors, containers, texts or numbers become inert.

    Raises:
        InputError: if the file is a TorchScript archive, or torch.save did not write it.
    """
    load: Callable[..., Any] = torch.load
    try:
        _refuse_torchscript(path)
        _refuse_tar(path)
        return load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle)
    except InputError:
        raise
    except Exception as error:  # damaged files raise errors of any type
        raise InputError(
            f"{path}: expected weights that torch.save wrote, which cannot be read: "
            f"{describe_library_error(error)}"
        ) from None


def _refuse_torchscript(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise InputError(
            f"{path}: expected weights, found a TorchScript archive, which holds code; save the "
            "weights alone: torch.save(model.state_dict(), 'weights.pt'), or use a .safetensors "
            "file of the same model"
        )


def _refuse_tar(path: Path) -> None:
    if tarfile.is_tarfile(path):  # torch.load would unpack files of any kind from it
        raise InputError(
            f"{path}: expected weights that torch.save wrote, found a tar archive; unpack it, or "
            "save the weights anew with a current version of PyTorch"
        )
