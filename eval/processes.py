"""Process group of an evaluation that was started by torchrun, accelerate or srun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from data_prep.errors import RunError
from pretrain.distributed.collectives import gather_objects, is_lost_peer_error
from pretrain.distributed.launcher import adopt_environment

# A process may read a slow disk for hours; the end of a process is detected without a timeout.
LONGEST_WAIT = timedelta(days=7)


@contextmanager
def joined_processes() -> Iterator[None]:
    """Creates the launcher's process group for the duration of a `with` block.

    Does nothing for a single process, or if a group exists already.

    Raises:
        InputError: if the launcher's environment variables are incomplete.
        RunError: if another process ended.
    """
    adopt_environment(os.environ, needs_group=False)
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Gloo is enough: processes send no tensors and only wait for one another.
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer_error(error):
            raise RunError("another process ended; see its error message") from None
        raise
    finally:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Waits until every process has reached this call."""
    gather_objects(None)
