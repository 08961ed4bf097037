import errno
import hashlib
import os
import resource
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.shards.index import (
    ABSENT,
    ShardIndex,
)
from data_prep.shards.writer import ShardWriter, ustar_header
from data_prep.storage.atomic import (
    temporary_name,
    write_atomically,
)


def write(folder, samples, name="0", **counts):
    writer = ShardWriter(folder, name)
    for key, members in samples:
        writer.add(key, members=members)
    return writer.finish(**counts)


def test_bytes_are_those_of_the_first_release(tmp_path):
    """Compares with sums of the first writer, which wrote headers field by field."""
    samples = [
        (
            f"{n:012d}",
            {"txt": b"caption %d" % n, "jpg": bytes(range(256)) * 40 * n, "json": b"{}"},
        )
        for n in range(5)
    ]
    samples.append(("k" * 90, {"jpg": b"", "txt": b"x" * 512}))
    index = write(tmp_path, samples, rejected={"empty_caption": 2})
    tar = hashlib.sha256((tmp_path / "0.tar").read_bytes()).hexdigest()
    assert tar == "9a9020d4972532f4c91afd3ad0ceecf9b62af76aca069a25b37fbec8b06cdfc4"
    assert index.tar_sha256 == tar
    sidecar = hashlib.sha256((tmp_path / "0.idx").read_bytes()).hexdigest()
    assert sidecar == "96893f60258c8986a2460e0800e2207b35b364adcf990ceab1c18c085d774a05"


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["jpg", "json", "txt"]), st.binary(max_size=1500)),
        max_size=6,
    )
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_index_is_where_python_tarfile_finds_the_members(tmp_path, samples):
    index = write(tmp_path, [(f"k{n}", members) for n, members in enumerate(samples)])
    found = np.zeros_like(index.table)
    found[:, :, 0] = ABSENT
    with tarfile.open(tmp_path / "0.tar", "r:") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            content = samples[int(key[1:])][extension]
            assert tar.extractfile(info).read() == content
            place = int(key[1:]), index.fields.index(extension)
            found[place][:2] = info.offset_data // 512, info.size
    assert (found[:, :, :2] == index.table[:, :, :2]).all()
    assert index.tar_bytes == (tmp_path / "0.tar").stat().st_size
    assert ShardIndex.read(tmp_path / "0.idx").to_bytes() == index.to_bytes()


@pytest.mark.parametrize("name", ["a/b.jpg", "f" * 96 + ".jpg", "d" * 155 + "/" + "f" * 100])
def test_headers_are_those_of_python_tarfile(name):
    info = tarfile.TarInfo(name)
    info.size, info.mtime = 1234, 0
    ours = ustar_header(name, 1234)
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    # tarfile writes zeros as numbers of the device; their checksums differ with them.
    skipped = {*range(148, 156), *range(329, 345)}
    assert [ours[n] for n in range(512) if n not in skipped] == [
        theirs[n] for n in range(512) if n not in skipped
    ]
    assert tarfile.TarInfo.frombuf(ours, "utf-8", "strict").name == name


@pytest.mark.parametrize("name", ["f" * 101, "d" * 156 + "/f", "d/" + "f" * 101, "/" + "f" * 100])
def test_names_that_ustar_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match=rf"name of {len(name)} bytes: ustar allows at most"):
        ustar_header(name, 0)


def test_temporary_names_hold_host_and_process(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node_7.example.org")
    assert temporary_name("0.tar") == f".0.tar.node-7-example-org.{os.getpid()}.tmp"


@pytest.fixture
def small_disk():
    """Files may grow to 100 kB only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("num_bytes", [90_000, 3_000_000], ids=["on finish", "on add"])
def test_a_full_disk_leaves_no_temporary_file(tmp_path, small_disk, num_bytes):
    write(tmp_path, [("a", {"jpg": b"x" * 1000})], name="finished")
    writer = ShardWriter(tmp_path, "0")
    with pytest.raises(OSError, match=r"0\.tar") as caught:
        for key in "abc":
            writer.add(key, members={"jpg": bytes(num_bytes)})
        writer.finish()
    writer.discard()
    assert caught.value.filename == str(tmp_path / "0.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished.idx", "finished.tar"]


def test_a_sidecar_for_which_there_is_no_room_leaves_the_old_one(tmp_path, small_disk):
    write_atomically(tmp_path / "x", b"old")
    with pytest.raises(OSError, match=r"/x'") as caught:
        write_atomically(tmp_path / "x", bytes(200_000))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
