"""Pickles that would run code when they are loaded."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from data_prep.errors import InputError
from pretrain.warm_start.inert_pickle import read_pickle


class Calls:
    """Unpickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def weights():
    return OrderedDict(
        a=torch.randn(3, 2),
        half=torch.ones(2, dtype=torch.bfloat16),
        count=torch.arange(3),
        view=torch.arange(6.0).view(2, 3).T,
    )


def hostile_objects(flag):
    """Builds objects whose unpickling would write a file, by several ways of reaching code."""
    write = f"open({str(flag)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {flag}"),
        "eval": [Calls(eval, write)],
        "exec": {"inner": Calls(exec, write)},
        "open": Calls(open, str(flag), "w"),
        "nested": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {flag}"))),
    }


# What training loops store next to the weights.
HARMLESS = {
    "epoch": np.float64(3.0),
    "args": argparse.Namespace(rate=0.1),
    "optimizer": defaultdict(list, {"state": [torch.ones(2)]}),
    "array": np.ones(3),
    "dtype": torch.float16,
    "names": {"a", "b"},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_tensors_are_read_and_nothing_is_executed(tmp_path, protocol, is_zip):
    flag = tmp_path / "flag"
    expected = weights()
    content = {"state_dict": expected, "p": torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / "weights.pt"
    torch.save(
        content | HARMLESS | hostile_objects(flag),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=is_zip,
    )
    found = read_pickle(path)
    assert not flag.exists()
    assert found["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert found["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(found["state_dict"][name], tensor)
    assert torch.equal(found["p"].detach(), torch.ones(2))
    # The test itself would notice: the file's own functions are called by Python's unpickler.
    torch.load(path, weights_only=False)
    assert flag.exists()


def test_a_pickle_alone_is_refused_and_not_executed(tmp_path):
    path, flag = tmp_path / "weights.pt", tmp_path / "flag"
    for content in (
        pickle.dumps(Calls(os.system, f"touch {flag}")),
        pickle.dumps(hostile_objects(flag)),
        b"hello",
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pt: expected weights that torch\.save"):
            read_pickle(path)
        assert not flag.exists()


def test_a_pickle_cannot_change_what_it_names(tmp_path):
    """Uses the opcode BUILD, which sets attributes of any object that a pickle names."""
    build = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    )
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(1)}, path)
    path.write_bytes(_with_pickle(path.read_bytes(), build))
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__
    read_pickle(path)
    assert function.__defaults__ == before
    pickle.loads(build)
    assert function.__defaults__ == (1,)  # Python's unpickler does change it
    function.__defaults__ = before


def _with_pickle(archive, program):
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(output, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("/data.pkl") else old.read(name))
    return output.getvalue()


def test_torchscript_and_tar_archives_are_refused_by_name(tmp_path):
    path = tmp_path / "weights.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(InputError, match="found a TorchScript archive, which holds code"):
        read_pickle(path)
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")
    with pytest.raises(InputError, match="found a tar archive"):
        read_pickle(path)


@pytest.mark.slow
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_damaged_files_are_refused_or_read(tmp_path, is_zip):
    """Flips one bit of every third byte, and cuts the file at as many places."""
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        flipped = content[place] ^ (1 << place % 8)
        for damaged in (
            content[:place] + bytes([flipped]) + content[place + 1 :],
            content[:place],
        ):
            path.write_bytes(damaged)
            try:
                read_pickle(path)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{path}: expected weights")
    assert refused > len(content) // 3
