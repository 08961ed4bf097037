import os
import stat

import pytest

from data_prep.errors import InputError
from pretrain.distributed import launcher
from pretrain.distributed.launcher import (
    adopt_environment,
    adopt_slurm_environment,
    planned_processes,
    refuse_lone_start,
    refuse_unfit_processes,
)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that expands every node list to two hosts."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nprintf 'node3\\nnode4\\n'\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


SRUN = {
    "SLURM_JOB_ID": "812",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node9",
    "MASTER_PORT": "29500",
}


def test_srun_alone_is_enough(scontrol):
    environment = dict(SRUN)
    adopt_slurm_environment(environment)
    assert {key: environment[key] for key in environment.keys() - SRUN.keys()} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "20812",
    }


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0", **SRUN}, {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}],
    ids=["no Slurm", "a launcher inside srun", "the batch script itself"],
)
def test_otherwise_the_environment_is_left_alone(environment):
    adopted = dict(environment)
    adopt_slurm_environment(adopted)
    assert adopted == environment


def test_accelerate_launch_that_starts_one_process_of_several_is_refused():
    environment = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(InputError, match="configured for several processes but started one"):
        refuse_lone_start(environment)
    refuse_lone_start(environment | {"RANK": "0"})
    refuse_lone_start({"ACCELERATE_USE_CPU": "True"})  # one was asked for


def test_one_process_can_be_a_group_and_one_of_many_is_not_changed():
    environment = {}
    adopt_environment(environment, needs_group=False)
    assert environment == {}
    adopt_environment(environment, needs_group=True)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    launched = TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}
    adopt_environment(launched, needs_group=True)
    assert launched == TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}


FITTING = {
    "strategy": "zero2",
    "device": ("cpu", "cpu"),
    "num_processes": (2, 2),
    "distributed_type": "DEEPSPEED",
    "accumulation_steps": 1,
}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"num_processes": (2, 1)}, "WORLD_SIZE=2 processes, Accelerate detects 1; start with"),
        ({"accumulation_steps": 4}, "gradient_accumulation_steps=4 .*; unset it"),
        (
            {"distributed_type": "MULTI_CPU"},
            "distributed_type=MULTI_CPU; expected one of DEEPSPEED",
        ),
        ({"strategy": "ddp"}, "distributed_type=DEEPSPEED; expected one of NO, MULTI_CPU"),
        ({"device": ("cpu", "cuda")}, "engine.device=cpu .* uses cuda; hide the GPUs"),
    ],
)
def test_processes_that_would_take_another_gradient_are_refused(found, expected):
    refuse_unfit_processes(**FITTING)
    with pytest.raises(InputError, match=expected):
        refuse_unfit_processes(**FITTING | found)


# ------------------------------------------------------- environments that clusters leave behind


@pytest.fixture
def two_hosts(monkeypatch):
    monkeypatch.setattr(launcher, "_hosts_of_step", lambda _: ["node-001", "node-002"])


def adopted(environment, *, needs_group=False):
    adopt_environment(environment, needs_group=needs_group)
    return environment


def test_steps_of_a_job_and_jobs_in_a_row_have_ports_of_their_own(two_hosts):
    def port(job, step):
        ids = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return int(adopted(SRUN | ids)["MASTER_PORT"])

    of_steps = {port(77, step) for step in range(1000)}
    assert len(of_steps) == 1000
    assert 20000 <= min(of_steps) < max(of_steps) < 32768  # below Linux' ephemeral ports
    # Jobs that run at the same time have similar numbers, and a few steps each.
    assert len({port(job, step) for job in range(5000, 5100) for step in range(10)}) == 1000
    assert port(4294967295, 4294967290) == port(4294967295, 4294967290)


def placements(node_tasks, *, is_cyclic):
    """(task, node) of every task, as Slurm's two common distributions place them."""
    if not is_cyclic:
        nodes = [node for node, count in enumerate(node_tasks) for _ in range(count)]
    else:
        rounds = range(max(node_tasks))
        nodes = [n for turn in rounds for n, count in enumerate(node_tasks) if turn < count]
    return list(enumerate(nodes))


@pytest.mark.parametrize(
    ("text", "node_tasks"),
    [
        ("4,1", [4, 1]),
        ("1,4", [1, 4]),
        ("2(x2)", [2, 2]),
        ("8(x3),4", [8, 8, 8, 4]),
        ("1(x2),3,2(x2)", [1, 1, 3, 2, 2]),
        ("5", [5]),
    ],
)
@pytest.mark.parametrize("is_cyclic", [False, True], ids=["block", "cyclic"])
def test_every_task_knows_the_number_of_tasks_on_its_node(two_hosts, text, node_tasks, is_cyclic):
    for task, node in placements(node_tasks, is_cyclic=is_cyclic):
        step = {
            "SLURM_STEP_NUM_TASKS": str(sum(node_tasks)),
            "SLURM_STEP_TASKS_PER_NODE": text,
            "SLURM_PROCID": str(task),
            "SLURM_NODEID": str(node),
        }
        assert adopted(SRUN | step)["LOCAL_WORLD_SIZE"] == str(node_tasks[node])
        if not is_cyclic:  # the default distribution is known without the node's number
            del step["SLURM_NODEID"]
            assert adopted(SRUN | step)["LOCAL_WORLD_SIZE"] == str(node_tasks[node])


@pytest.mark.parametrize("name", [*TORCHRUN, *SRUN, "SLURM_STEP_ID", "SLURM_NODEID"])
def test_an_empty_variable_is_as_good_as_none(two_hosts, name):
    def outcome(environment):
        try:
            environment = adopted(environment)
        except InputError as error:
            return str(error)
        return {key: value for key, value in environment.items() if value}

    for environment in ({}, TORCHRUN, SRUN, SRUN | TORCHRUN, SRUN | {"MASTER_PORT": "4000"}):
        without = {key: value for key, value in environment.items() if key != name}
        assert outcome(without | {name: ""}) == outcome(without)


@pytest.mark.parametrize(
    "leftover",
    [
        {"WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_WORLD_SIZE": "8"},
        {"MASTER_ADDR": "head", "MASTER_PORT": "1234"},
        {"SLURM_STEP_NUM_TASKS": ""},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=str,
)
def test_leftovers_of_other_programs_do_not_keep_one_process_from_running(leftover):
    environment = adopted(dict(leftover))
    assert not environment.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
    grouped = adopted(dict(leftover), needs_group=True)
    assert [grouped[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
    assert grouped["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=str)
def test_a_lone_rank_0_is_a_group_of_one(given):
    environment = adopted(dict(given))
    assert set(environment) == set(TORCHRUN)
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("1", "127.0.0.1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {name: None for name in TORCHRUN if name != "WORLD_SIZE"},
            "WORLD_SIZE=2 says .* but RANK is not set",
        ),
        ({"RANK": None}, "WORLD_SIZE=2 says that 2 processes were started, but RANK is not set"),
        ({"LOCAL_RANK": None}, "but LOCAL_RANK is not set; start with torchrun"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "but MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": None, "RANK": "1"}, "RANK='1': expected a whole number from 0 to 0"),
        ({"RANK": "2"}, "RANK='2': expected a whole number from 0 to 1; unset it"),
        ({"RANK": "-1"}, "RANK='-1': expected a whole number from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two': expected a whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0': expected a whole number"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK='gpu0': expected a whole number"),
        ({"LOCAL_WORLD_SIZE": "-"}, "LOCAL_WORLD_SIZE='-': expected a whole number"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT='auto': expected a whole number"),
    ],
    ids=str,
)
def test_variables_that_do_not_suffice_are_named(changes, expected):
    environment = {key: value for key, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(InputError, match=expected):
        adopt_environment(environment, needs_group=False)


@pytest.mark.parametrize("name", sorted(SRUN))
def test_a_step_that_lacks_a_variable_is_refused_by_its_name(name):
    environment = {key: value for key, value in SRUN.items() if key != name}
    if name == "SLURM_STEP_NUM_TASKS":  # no step: a single process
        assert adopted(environment) == environment
        return
    if name != "SLURM_STEP_NODELIST":
        environment["MASTER_ADDR"] = "node3"
    with pytest.raises(InputError, match=f"started by srun, but .* {name} is not set; set MASTER"):
        adopt_environment(environment, needs_group=False)


def test_a_dry_run_plans_for_the_processes_that_it_is_given():
    assert planned_processes({}) == (1, 1)
    assert planned_processes({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == (16, 8)
    assert planned_processes({"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": ""}) == (1, 1)
    with pytest.raises(InputError, match="WORLD_SIZE='many': expected a whole number"):
        planned_processes({"WORLD_SIZE": "many"})
