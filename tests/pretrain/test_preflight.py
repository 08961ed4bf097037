"""Checks of nodes before a run starts: facts, diagnosis, and the nodes that are reported."""

import os
import socket
import subprocess
import sys

import pytest

from data_prep.config_file import to_yaml
from data_prep.errors import RunError
from pretrain.distributed.launcher import hosts_of_slurm_ranks
from pretrain.nodes.bandwidth import Bandwidth, node_pairs
from pretrain.nodes.diagnosis import NodeFacts, Problem, answer_to_script, diagnose, table
from pretrain.nodes.facts import MachineFacts, free_bytes_of, read_shards, wait_for_file
from pretrain.settings.preflight import Preflight
from tests.support.gloo_processes import ProcessGroup, run_in_processes
from tests.support.toy_run import toy_config

GIGABYTE = 10**9


def nodes_of(count, **changes):
    """Builds healthy nodes with changes to the second node or its ranks."""
    nodes = []
    for number in range(count):
        ranks = [
            MachineFacts(
                rank=2 * number + n,
                host=f"node{number + 1}",
                versions={"torch": "2.13", "NCCL": "2.28"},
                config_checksum="abc",
                gpu_free_fraction=0.99,
                shard_megabytes_per_second=500.0 if n == 0 else None,
                free_bytes={"runs/x": 100 * GIGABYTE},
            )
            for n in range(2)
        ]
        nodes.append(NodeFacts(f"node{number + 1}", ranks, 0.01 * number, Bandwidth(20.0, 10.0)))
    for name, value in changes.items():
        for changed in [nodes[1]] if hasattr(nodes[1], name) else nodes[1].ranks:
            try:
                setattr(changed, name, value)
            except AttributeError:
                changed.ranks[1].gpu_free_fraction = value
    return nodes


def problems_of(nodes, *, checkpoint_bytes=GIGABYTE, **settings):
    found = diagnose(nodes, Preflight(**settings), checkpoint_bytes=checkpoint_bytes)
    return [(problem.node, problem.text) for problem in found]


def test_nodes_that_are_well_have_no_problem():
    assert problems_of(nodes_of(4)) == []
    head, *rows = table(nodes_of(2))
    assert head.split("  ")[0] == "node"
    assert rows[0].split() == [
        "node1",
        "2",
        "20",
        "GB/s",
        "10",
        "GB/s",
        "500",
        "MB/s",
        "+0.00",
        "s",
        "99%",
    ]


@pytest.mark.parametrize(
    ("count", "changes", "settings", "expected"),
    [
        (
            3,
            {"bandwidth": Bandwidth(9.0, 10.0)},
            {},
            "all-reduce: 9 GB/s, median of the nodes 20 GB/s",
        ),
        (3, {"bandwidth": Bandwidth(20.0, 4.0)}, {}, "all-gather: 4 GB/s, median of the nodes 10"),
        (
            2,
            {"bandwidth": Bandwidth(9.0, 10.0)},
            {"min_all_reduce_gigabytes_per_second": 15},
            "all-reduce: 9 GB/s, less than 15 GB/s",
        ),
        (3, {"clock_seconds": 60.0}, {}, "its clock differs by +60.0 s from the median"),
        (3, {"gpu_free_fraction": 0.4}, {}, "GPU has 40% of its memory free, less than"),
        (3, {"problems": ["x.tar: No such file"]}, {}, "x.tar: No such file"),
        (
            3,
            {"versions": {"torch": "2.12", "NCCL": "2.28"}},
            {},
            "torch is 2.12, on other nodes 2.13",
        ),
        (3, {"config_checksum": "xyz"}, {}, "config is xyz, on other nodes abc"),
        (
            3,
            {"shard_megabytes_per_second": 5.0},
            {"min_shard_megabytes_per_second": 50},
            "reading shards: 5 MB/s, less than 50 MB/s",
        ),
        (
            3,
            {"bandwidth": None, "bandwidth_errors": ["timed out"]},
            {},
            "exchange with a neighbour failed: timed out",
        ),
    ],
)
def test_the_node_that_is_not_well_is_named(count, changes, settings, expected):
    found = problems_of(nodes_of(count, **changes), **settings)
    assert {node for node, _ in found} == {"node2"}
    assert all(expected in text for _, text in found)


def test_no_node_is_blamed_for_what_all_share():
    [(node, text)] = problems_of(nodes_of(2), checkpoint_bytes=60 * GIGABYTE)
    assert node is None
    assert text.startswith("runs/x: 100.00 GB are free, but 120.00 GB are needed")
    [(node, text)] = problems_of(nodes_of(2, config_checksum="xyz"))
    assert node is None
    assert "config is xyz, on other nodes abc (node2; there is no majority)" in text


@pytest.mark.parametrize(
    ("problems", "options", "expected"),
    [
        ([Problem("b", "slow"), Problem("b", "clock"), Problem("c", "slow")], "", ("2", "b,c")),
        ([Problem("c", "slow")], "--nodes=4 --exclude=a,b", ("3", "a,b,c")),
        ([Problem("b", "slow"), Problem(None, "disk")], "", None),  # no node is to blame
        ([Problem(name, "slow") for name in "abcd"], "", None),  # no node would be left
        ([], "", None),
    ],
)
def test_srun_leaves_out_nodes_that_are_bad_now_or_were_before(problems, options, expected):
    step = {"SLURM_STEP_NUM_NODES": "4", "SRUN_OPTIONS": options}
    answer = answer_to_script(problems, was_stopped=False, environment=step)
    assert answer == ("" if expected is None else "--nodes={} --exclude={}".format(*expected))
    assert answer_to_script(problems, was_stopped=False, environment={}) == ""  # not under Slurm


@pytest.mark.parametrize(("restarts", "is_requeued"), [(0, True), (3, False)])
def test_a_signal_while_nodes_are_checked_is_answered(restarts, is_requeued):
    job = {"SLURM_STEP_NUM_NODES": "4", "SLURM_RESTART_COUNT": str(restarts)}
    for problems in ([], [Problem("b", "slow")]):
        answer = answer_to_script(problems, was_stopped=True, environment=job)
        assert answer == ("requeue" if is_requeued else "")


def test_a_config_of_an_earlier_version_is_read():
    assert Preflight.model_validate({"verdict": None, "shards_read": 3}).shards_read == 3
    with pytest.raises(ValueError, match="unknown key 'verdict'"):
        Preflight.model_validate({"verdict": "file"})


def test_two_nodes_of_which_one_is_slow_cannot_be_told_apart():
    assert problems_of(nodes_of(2, bandwidth=Bandwidth(1.0, 1.0))) == []


@pytest.mark.parametrize("num_nodes", range(1, 9))
def test_every_node_meets_both_of_its_neighbours_and_one_at_a_time(num_nodes):
    rounds = node_pairs(num_nodes)
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    ring = {frozenset((n, (n + 1) % num_nodes)) for n in range(num_nodes)}
    assert met == {pair for pair in ring if len(pair) == 2}
    for pairs in rounds:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))


# ---------------------------------------------------------------------------------- one machine


def test_shards_that_are_missing_or_cut_are_named(toy_data):
    shards = {"first": 0, "num_shards": 2, "max_bytes": 1 << 20}
    speed, problems = read_shards([str(toy_data / "colors")], **shards)
    assert speed > 0
    assert problems == []
    _, [problem] = read_shards([str(toy_data / "nothing")], **shards)
    assert problem == f"{toy_data}/nothing/dataset.json: No such file or directory"


def test_a_cut_shard_is_named(toy_data, tmp_path):
    for path in (toy_data / "colors").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    [tar, *_] = sorted(tmp_path.glob("*.tar"))
    size = tar.stat().st_size
    os.truncate(tar, size - 512)
    _, [problem] = read_shards([str(tmp_path)], first=0, num_shards=9, max_bytes=1 << 20)
    assert problem == f"{tar}: expected {size:,} bytes, found {size - 512:,}"


def test_a_folder_need_not_exist_yet(tmp_path, monkeypatch):
    found = free_bytes_of([tmp_path / "a" / "b", "s3://bucket/x"])
    assert list(found) == [str(tmp_path / "a" / "b")]
    assert found[str(tmp_path / "a" / "b")] > 0
    monkeypatch.setattr("pretrain.nodes.facts.LISTING_TIMEOUT_SECONDS", 0.1)
    (tmp_path / "file").write_text("mine")
    assert wait_for_file(tmp_path / "file", "mine")
    assert not wait_for_file(tmp_path / "file", "yours")
    assert not wait_for_file(tmp_path / "other", "mine")


def test_slurm_says_where_every_rank_starts(monkeypatch):
    monkeypatch.setattr("pretrain.distributed.launcher._hosts_of_step", lambda _: ["a", "b", "c"])
    step = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NUM_TASKS": "5"}
    assert hosts_of_slurm_ranks({"WORLD_SIZE": "5"} | step) == ["a", "a", "b", "b", "c"]
    assert hosts_of_slurm_ranks({"WORLD_SIZE": "5"}) is None
    assert hosts_of_slurm_ranks({"WORLD_SIZE": "8"} | step) is None  # torchrun, within srun


# --------------------------------------------------------------------------- several processes


def check_as_nodes(config, hosts, changes_of_last, answer_file=None):
    """Runs the preflight of ranks on machines of these names; returns what it printed."""
    import contextlib
    import io

    from pretrain import preflight
    from pretrain.nodes import facts

    rank = int(os.environ["RANK"])
    socket.gethostname = lambda: hosts[rank]
    preflight.SECONDS_TO_PART = 600
    if rank == len(hosts) - 1:
        for name, value in changes_of_last.items():
            setattr(facts, name, value)
    printed = io.StringIO()
    answer = None
    if rank == 0 and answer_file is not None:
        answer = answer_file.open("w")
        os.environ["SLURM_STEP_NUM_NODES"] = str(len(hosts))
    with contextlib.redirect_stdout(printed):
        preflight.preflight(config, answer=answer)
    return printed.getvalue()


def broken_versions(device):
    return {"torch": "0.1"}


def test_all_ranks_of_two_nodes_are_well(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path / "run", preflight={"exchanged_megabytes": 1})
    first, *others = run_in_processes(4, check_as_nodes, config, ["a", "a", "b", "b"], {})
    assert "2 nodes, 4 ranks: all-reduce " in first
    rows = [line.split() for line in first.splitlines()]
    assert [row[:2] for row in rows[2:4]] == [["a", "2"], ["b", "2"]]
    assert first.endswith("preflight: no problems found\n")
    assert others == ["", "", ""]
    assert not list((tmp_path / "run").iterdir())


def test_srun_is_given_options_without_the_bad_one_of_three_nodes(toy_data, tmp_path):
    settings = {"exchanged_megabytes": 1}
    settings |= {"min_share_of_median": 0}  # the speed of three busy processes is left to chance
    config = toy_config(toy_data, tmp_path / "run", preflight=settings)
    changes = {"versions_here": broken_versions}
    hosts, answer = ["a", "b", "c"], tmp_path / "answer"
    group = ProcessGroup(3, check_as_nodes, config, hosts, changes, answer)
    outcomes = group.outcomes()
    assert not any(is_done for is_done, _ in outcomes)
    assert "c: torch is 0.1, on other nodes" in outcomes[0][1]
    assert "exclude c" in outcomes[0][1]
    assert "see the error of rank 0" in outcomes[1][1]
    assert answer.read_text() == "--nodes=2 --exclude=c\n"


def check_unless_last(config, hosts):
    """Runs the preflight without the last rank; the time for it to come passes at once."""
    from pretrain.nodes.rendezvous import Rendezvous

    last, wait = len(hosts) - 1, Rendezvous._wait

    def wait_unless_last(rendezvous, key, *, seconds):
        return wait(rendezvous, key, seconds=0 if key.endswith(f"/{last}") else seconds)

    Rendezvous._wait = wait_unless_last
    if int(os.environ["RANK"]) < last:
        check_as_nodes(config, hosts, {})


def test_a_rank_that_does_not_come_is_named(toy_data, tmp_path):
    config = toy_config(toy_data, tmp_path / "run", preflight={"timeout_seconds": 500})
    first, second, third = ProcessGroup(3, check_unless_last, config, ["a", "b", "c"]).outcomes()
    assert third[0]
    assert "rank 2 did not join within preflight.timeout_seconds=500" in first[1]
    assert "see the error of rank 0" in second[1]


def test_alone_it_checks_what_needs_no_other(toy_data, tmp_path, monkeypatch, capsys):
    from pretrain.preflight import preflight

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    preflight(toy_config(toy_data, tmp_path / "run"))
    assert "preflight: no problems found" in capsys.readouterr().out
    lacking = toy_config(toy_data, tmp_path / "run", preflight={"checkpoints_to_fit": 10**9})
    with pytest.raises(RunError, match=r"GB are free, but .* GB are needed"):
        preflight(lacking)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)


def test_the_command_keeps_standard_output_for_the_batch_script(toy_data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(toy_config(toy_data, tmp_path / "run")))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    for override, status, words in (
        ("preflight.checkpoints_to_fit=1", 0, "preflight: no problems found"),
        (f"preflight.checkpoints_to_fit={10**9}", 1, "the run should not start on these nodes"),
    ):
        finished = subprocess.run(
            [sys.executable, "-m", "pretrain.preflight", config, override],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == status, finished.stderr
        assert finished.stdout == ""
        assert words in finished.stderr
