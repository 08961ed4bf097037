import psutil
import torch

from pretrain.training.memory_budget import (
    free_bytes,
    free_bytes_of_cgroups,
)


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_a_job_has_what_the_tightest_group_around_it_leaves(tmp_path):
    root = tmp_path / "cgroup"
    used = {"memory__current": 700, "memory__stat": "anon 500\ninactive_file 200\nfile 250"}
    write_group(root / "slurm/job_7", memory__max=1000, memory__high=900, **used)
    write_group(root / "slurm/job_7/step_0", memory__max="max", **used)
    write_group(root / "slurm", memory__max=600, **used)
    (tmp_path / "own").write_text("0::/slurm/job_7/step_0\n")
    # 1000 and 900 less the 500 that are not cached files, then 600 less the same
    assert free_bytes_of_cgroups(root=root, own=tmp_path / "own") == [500, 400, 100]


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    root = tmp_path / "cgroup"
    write_group(
        root / "memory",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=1200,
        memory__stat="inactive_file 5\ntotal_inactive_file 100",
    )
    (tmp_path / "own").write_text("5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    assert free_bytes_of_cgroups(root=root, own=tmp_path / "own") == [0]  # never below


def test_without_groups_the_machine_is_the_limit(tmp_path):
    assert free_bytes_of_cgroups(root=tmp_path, own=tmp_path / "missing") == []
    free = free_bytes(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().total


def test_a_gpu_says_what_it_has_left(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 80))
    assert free_bytes(torch.device("cuda", 0)) == 7
    assert calls == ["empty_cache"]  # first: what was measured with is free again
