"""Environment variables that launchers set: torchrun, accelerate, deepspeed, srun, or none."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from data_prep.errors import InputError

PLAIN_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")  # Accelerate's names


def adopt_environment(environment: MutableMapping[str, str], *, needs_group: bool) -> None:
    """Converts the environment of any launcher into that of torchrun.

    Args:
        environment: environment variables, changed in place.
        needs_group: whether a single process also needs a process group.

    Raises:
        InputError: if the launcher's variables are insufficient, or it started too few processes.
    """
    adopt_slurm_environment(environment)
    refuse_lone_start(environment)
    if needs_group:
        become_group_of_one(environment)


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Sets the variables that torchrun would set, if srun alone started the processes.

    Raises:
        InputError: if Slurm cannot list the hosts.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    hosts = _hosts_of_step(environment)
    tasks_per_node = re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])
    environment.setdefault("MASTER_ADDR", hosts[0])
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = tasks_per_node.group() if tasks_per_node else "1"


def _hosts_of_step(environment: Mapping[str, str]) -> list[str]:
    try:
        return subprocess.run(
            ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"started by srun, but scontrol cannot list the hosts ({error}); set MASTER_ADDR, "
            "MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK in the batch script, or use torchrun"
        ) from None


def hosts_of_slurm_ranks(environment: Mapping[str, str]) -> list[str] | None:
    """Lists the host assigned to each rank, including ranks that never started.

    Returns:
        [ranks] host names; None if srun did not start the ranks.

    Raises:
        InputError: if Slurm cannot list the hosts.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if tasks is None or int(environment["WORLD_SIZE"]) != int(environment["SLURM_STEP_NUM_TASKS"]):
        return None
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):  # such as 8(x3),4
        counts += [int(count)] * int(times or 1)
    hosts = _hosts_of_step(environment)
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


def refuse_lone_start(environment: Mapping[str, str]) -> None:
    """Refuses `accelerate launch --cpu --num_processes 2`, which starts only one process.

    It sets the address of the other processes, but does not start them.

    Raises:
        InputError: if only one of several processes was started.
    """
    is_alone = "RANK" not in environment
    if is_alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "accelerate launch --cpu was asked for several processes and has started one; use "
            "configs/accelerate/two_processes.yaml or torchrun, or remove --num_processes"
        )


def become_group_of_one(environment: MutableMapping[str, str]) -> None:
    """Makes a process without launcher the only member of a group, which DeepSpeed needs."""
    if "RANK" in environment:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def device_type_of(asked: str) -> str:
    """Returns the device type, "cuda" or "cpu", for a value of engine.device.

    Raises:
        InputError: if the device does not exist on this machine.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise InputError("engine.device=cuda: torch sees no GPU on this machine; use cpu or auto")
    return "cuda" if has_gpu and asked != "cpu" else "cpu"


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
        num_processes: (processes that the launcher started, processes that Accelerate sees).
        distributed_type: distributed type of Accelerate.
        accumulation_steps: gradient accumulation steps of Accelerate.

    Raises:
        InputError: if processes or settings do not fit; the message says what to change.
    """
    if num_processes[0] != num_processes[1]:
        raise InputError(
            f"the launcher started WORLD_SIZE={num_processes[0]} processes, Accelerate sees "
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
