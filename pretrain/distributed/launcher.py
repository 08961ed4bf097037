"""What launchers leave in the environment: torchrun, accelerate, deepspeed, srun, or nothing."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from data_prep.errors import InputError

PLAIN_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")  # Accelerate's names


def adopt_environment(environment: MutableMapping[str, str], *, needs_group: bool) -> None:
    """Makes of any launcher's environment the one that torchrun would have made.

    Args:
        environment: changed in place.
        needs_group: whether a process that is alone must have a process group as well.

    Raises:
        InputError: the launcher's word is not enough, or it started fewer than it was asked for.
    """
    adopt_slurm_environment(environment)
    refuse_lone_start(environment)
    if needs_group:
        become_group_of_one(environment)


def adopt_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Under plain srun, fills in what torchrun would have set.

    Raises:
        InputError: Slurm does not say which hosts take part.
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
            f"started by srun, but scontrol cannot name the hosts ({error}); set MASTER_ADDR, "
            "MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK in the batch script, or use torchrun"
        ) from None


def hosts_of_slurm_ranks(environment: Mapping[str, str]) -> list[str] | None:
    """[ranks] the machine that each was to start on, also of those that never did; None where srun
    did not start them.

    Raises:
        InputError: Slurm does not name the machines.
    """
    told = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if told is None or int(environment["WORLD_SIZE"]) != int(environment["SLURM_STEP_NUM_TASKS"]):
        return None
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", told):  # such as 8(x3),4
        counts += [int(count)] * int(times or 1)
    hosts = _hosts_of_step(environment)
    return [host for host, count in zip(hosts, counts, strict=True) for _ in range(count)]


def refuse_lone_start(environment: Mapping[str, str]) -> None:
    """Notices `accelerate launch --cpu --num_processes 2`, which starts one process: it names the
    address at which the others would be met, but starts none.

    Raises:
        InputError: with how to start several.
    """
    is_alone = "RANK" not in environment
    if is_alone and "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "accelerate launch --cpu was asked for several processes and has started one; use "
            "configs/accelerate/two_processes.yaml or torchrun, or leave --num_processes out"
        )


def become_group_of_one(environment: MutableMapping[str, str]) -> None:
    """Without a launcher, makes this process the only member of a group: DeepSpeed needs one."""
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
    """ "cuda" or "cpu", as engine.device asks for.

    Raises:
        InputError: there is no such device here.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise InputError("engine.device=cuda: torch sees no GPU here; use cpu or auto")
    return "cuda" if has_gpu and asked != "cpu" else "cpu"


def refuse_unfit_processes(
    *,
    strategy: str,
    device: tuple[str, str],
    num_processes: tuple[int, int],
    distributed_type: str,
    accumulation_steps: int,
) -> None:
    """Refuses processes that do not know of one another, and whatever a launcher's config or
    environment asks of Accelerate that would change the gradient.

    Args:
        strategy: engine.strategy.
        device: (asked for, taken by Accelerate).
        num_processes: (started by the launcher, seen by Accelerate).
        distributed_type: Accelerate's name for what it does.
        accumulation_steps: Accelerate's.

    Raises:
        InputError: with what to change.
    """
    if num_processes[0] != num_processes[1]:
        raise InputError(
            f"the launcher started WORLD_SIZE={num_processes[0]} processes, Accelerate sees "
            f"{num_processes[1]}; start with torchrun or accelerate launch --multi_gpu"
        )
    if accumulation_steps != 1:
        raise InputError(
            f"Accelerate was told gradient_accumulation_steps={accumulation_steps} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); unset it: micro_batch_size does this "
            "without changing the gradient"
        )
    fitting = PLAIN_TYPES if strategy == "ddp" else ("DEEPSPEED",)
    if distributed_type not in fitting:
        raise InputError(
            f"Accelerate was told distributed_type={distributed_type}; expected one of "
            f"{', '.join(fitting)} with engine.strategy={strategy}: use "
            "configs/accelerate/two_processes.yaml, or torchrun"
        )
    if device[0] != device[1]:
        raise InputError(
            f"engine.device={device[0]} with engine.strategy={strategy}: Accelerate takes "
            f"{device[1]}; hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU"
        )
