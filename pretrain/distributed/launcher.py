"""Environment variables of launchers (torchrun, accelerate, deepspeed, srun), or of none."""

from __future__ import annotations

import bisect
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from itertools import accumulate

from data_prep.errors import InputError

PLAIN_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")  # Accelerate's names
OF_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NEEDED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by each of several processes
# Below the ports that Linux gives to outgoing connections, 32768 to 60999
FIRST_PORT, NUM_PORTS = 20000, 12000
PORTS_APART = 7919  # of consecutive steps of a Slurm job; coprime to NUM_PORTS

WITHOUT_SLURM = (
    "set MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK in the batch script, or use "
    "torchrun"
)


def adopt_environment(environment: MutableMapping[str, str], *, needs_group: bool) -> None:
    """Converts the environment of any launcher into that of torchrun.

    Args:
        environment: environment variables, changed in place.
        needs_group: whether a single process also needs a process group.

    Raises:
        InputError: if the launcher's variables are insufficient or contradict one another, or it
            started too few processes.
    """
    drop_empty_variables(environment)
    adopt_slurm_environment(environment)
    refuse_lone_start(environment)
    refuse_partial_environment(environment)
    if "RANK" not in environment:  # leftovers, which Accelerate would take for a launcher's
        for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.pop(name, None)
    if needs_group or "RANK" in environment:
        become_group_of_one(environment)


def drop_empty_variables(environment: MutableMapping[str, str]) -> None:
    """Removes empty variables of launchers, which scripts leave (`export RANK=$UNKNOWN`)."""
    for name in list(environment):
        if environment[name] == "" and (name in OF_PROCESS or name.startswith("SLURM_")):
            del environment[name]


def planned_processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns the number of processes, in total and on this machine, to plan for.

    Raises:
        InputError: if WORLD_SIZE or LOCAL_WORLD_SIZE is not a number of processes.
    """
    total = _whole_number(environment, "WORLD_SIZE", least=1)
    here = _whole_number(environment, "LOCAL_WORLD_SIZE", least=1)
    return total or 1, here or 1


def _whole_number(
    environment: Mapping[str, str], name: str, *, least: int = 0, most: int | None = None
) -> int | None:
    """Value of a variable; None if it is unset or empty."""
    text = environment.get(name, "")
    if not text:
        return None
    number = int(text) if re.fullmatch(r"[0-9]+", text) else -1
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(
            f"environment variable {name}={text!r}: expected a whole number {bounds}; unset it, or "
            "start with torchrun, accelerate launch or srun"
        )
    return number


# ----------------------------------------------------------------------------------------- Slurm


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that torchrun would set, if srun started the processes directly.

    Raises:
        InputError: if a variable of the step is missing, or Slurm cannot list the hosts.
    """
    num_tasks = _whole_number(environment, "SLURM_STEP_NUM_TASKS", least=1) or 1
    if "RANK" in environment or num_tasks == 1:
        return
    task = _of_step(environment, "SLURM_PROCID", most=num_tasks - 1)
    node_tasks = _tasks_per_node(environment)
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _hosts_of_step(environment)[0]
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_port_of_step(environment))
    environment["RANK"] = str(task)
    environment["WORLD_SIZE"] = str(num_tasks)
    environment["LOCAL_RANK"] = str(_of_step(environment, "SLURM_LOCALID"))
    environment["LOCAL_WORLD_SIZE"] = str(_num_local_tasks(environment, node_tasks, task))


def _of_step(environment: Mapping[str, str], name: str, *, most: int | None = None) -> int:
    number = _whole_number(environment, name, most=most)
    if number is None:
        raise InputError(_missing_in_step(name))
    return number


def _missing_in_step(name: str) -> str:
    return f"started by srun, but the environment variable {name} is not set; {WITHOUT_SLURM}"


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """[nodes] number of tasks of the step on each node."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):  # such as 8(x3),4
        counts += [int(count)] * int(times or 1)
    if not counts:
        raise InputError(_missing_in_step("SLURM_STEP_TASKS_PER_NODE"))
    return counts


def _num_local_tasks(environment: Mapping[str, str], node_tasks: list[int], task: int) -> int:
    """Number of tasks on this task's node."""
    node = _whole_number(environment, "SLURM_NODEID")
    if node is None or node >= len(node_tasks):
        # Slurm's default distribution fills one node after the other.
        node = bisect.bisect_right(list(accumulate(node_tasks)), task)
    return node_tasks[min(node, len(node_tasks) - 1)]


def _port_of_step(environment: Mapping[str, str]) -> int:
    """A port that the steps of a job do not share, nor jobs submitted in a row."""
    job = _of_step(environment, "SLURM_JOB_ID")
    step = _whole_number(environment, "SLURM_STEP_ID") or 0
    return FIRST_PORT + (job + PORTS_APART * step) % NUM_PORTS


def _hosts_of_step(environment: Mapping[str, str]) -> list[str]:
    names = environment.get("SLURM_STEP_NODELIST", "")
    if not names:
        raise InputError(_missing_in_step("SLURM_STEP_NODELIST"))
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", names], check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(error)
    else:
        if hosts:
            return hosts
        reason = "it printed none"
    raise InputError(
        f"started by srun, but scontrol cannot list the hosts ({reason}); {WITHOUT_SLURM}"
    )


def hosts_of_slurm_ranks(environment: Mapping[str, str]) -> list[str] | None:
    """Lists the host assigned to each rank, including ranks that never started.

    Returns:
        [ranks] host names; None if srun did not start the ranks.

    Raises:
        InputError: if Slurm cannot list the hosts.
    """
    num_tasks = _whole_number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    if num_tasks is None or num_tasks != _whole_number(environment, "WORLD_SIZE"):
        return None
    counts = _tasks_per_node(environment)
    hosts = _hosts_of_step(environment)
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


# ------------------------------------------------------------------------------- other launchers


def refuse_lone_start(environment: Mapping[str, str]) -> None:
    """Refuses `accelerate launch --cpu --num_processes 2`, which starts only one process.

    It sets the address of the other processes, but does not start them.

    Raises:
        InputError: if only one of several processes was started.
    """
    is_alone = "RANK" not in environment
    if is_alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "accelerate launch --cpu was configured for several processes but started one; use "
            "configs/accelerate/two_processes.yaml or torchrun, or remove --num_processes"
        )


def refuse_partial_environment(environment: Mapping[str, str]) -> None:
    """Refuses several processes whose variables do not suffice to find one another.

    Raises:
        InputError: if variables are missing or invalid; the message lists them.
    """
    world_size = _whole_number(environment, "WORLD_SIZE", least=1)
    rank = _whole_number(environment, "RANK", most=(world_size or 1) - 1)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        _whole_number(environment, name)
    if (world_size or 1) == 1:
        return
    missing = [name for name in NEEDED if name not in environment]
    if rank is None:
        missing = ["RANK"]  # WORLD_SIZE alone is a leftover, or meant for a launcher
    if missing:
        raise InputError(
            f"environment variable WORLD_SIZE={world_size} says that {world_size} processes were "
            f"started, but {', '.join(missing)} is not set; start with torchrun, accelerate launch "
            "or srun, or unset WORLD_SIZE to run one process"
        )


def become_group_of_one(environment: MutableMapping[str, str]) -> None:
    """Sets the missing variables of a group of one process, which DeepSpeed needs."""
    if environment.get("WORLD_SIZE", "1") != "1":
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # An address without RANK is another program's.
    environment |= alone | dict(environment) if "RANK" in environment else alone


def device_type_of(setting: str) -> str:
    """Returns the device type, "cuda" or "cpu", for a value of engine.device.

    Raises:
        InputError: if the device does not exist on this machine.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if setting == "cuda" and not has_gpu:
        raise InputError("engine.device=cuda: torch finds no GPU on this machine; use cpu or auto")
    return "cuda" if has_gpu and setting != "cpu" else "cpu"


def refuse_unfit_processes(
    *,
    strategy: str,
    device: tuple[str, str],
    num_processes: tuple[int, int],
    distributed_type: str,
    accumulation_steps: int,
) -> None:
    """Refuses processes that are not connected, and settings that would change the gradient.

    Such settings come from a launcher's config or environment.

    Args:
        strategy: engine.strategy.
        device: (requested device type, device type that Accelerate uses).
        num_processes: (number that the launcher started, number that Accelerate detects).
        distributed_type: distributed type of Accelerate.
        accumulation_steps: gradient accumulation steps of Accelerate.

    Raises:
        InputError: if processes or settings are incompatible; the message says what to change.
    """
    if num_processes[0] != num_processes[1]:
        raise InputError(
            f"the launcher started WORLD_SIZE={num_processes[0]} processes, Accelerate detects "
            f"{num_processes[1]}; start with torchrun or accelerate launch --multi_gpu"
        )
    if accumulation_steps != 1:
        raise InputError(
            f"Accelerate has gradient_accumulation_steps={accumulation_steps} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); unset it and use "
            "micro_batch_size, which does not change the gradient"
        )
    allowed = PLAIN_TYPES if strategy == "ddp" else ("DEEPSPEED",)
    if distributed_type not in allowed:
        raise InputError(
            f"Accelerate has distributed_type={distributed_type}; expected one of "
            f"{', '.join(allowed)} with engine.strategy={strategy}: use "
            "configs/accelerate/two_processes.yaml, or torchrun"
        )
    if device[0] != device[1]:
        raise InputError(
            f"engine.device={device[0]} with engine.strategy={strategy}: Accelerate uses "
            f"{device[1]}; hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU"
        )
