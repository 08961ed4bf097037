"""A toy engine of a few tensors, for fast tests of checkpoints."""

import json
import time

import torch

from data_prep.config_file import to_yaml
from pretrain.checkpoints.store import open_store
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import Run
from pretrain.distributed.collectives import rank, world_size
from pretrain.distributed.tensor_slice import HeldSlice, TensorSlice


class ToyEngine:
    """Replicated parameters and partitioned moments, as at ZeRO stage 1.

    Every value is a function of (name, element, seed).
    """

    device = torch.device("cpu")

    def __init__(self, *, seed=0, sizes=(30, 1, 1000)):
        self.model = torch.nn.Module()
        self.num_updates = 0
        self._moments = {}
        for number, size in enumerate(sizes):
            generator = torch.Generator().manual_seed(100 * seed + number)
            whole = torch.randn(size, generator=generator)
            self.model.register_parameter(f"w{number}", torch.nn.Parameter(whole))
            first, stop = (size * each // world_size() for each in (rank(), rank() + 1))
            self._moments[f"w{number}"] = (first, 10 * whole[first:stop])

    def slices(self):
        for name, parameter in self.model.named_parameters():
            values = parameter.detach().view(-1)
            held = TensorSlice(f"parameter/{name}", 0, len(values))
            yield HeldSlice(held, values, is_replicated=True)
            first, moment = self._moments[name]
            if len(moment):
                held = TensorSlice(f"exp_avg/{name}", first, len(moment))
                yield HeldSlice(held, moment, is_replicated=False)

    def open_groups(self, num_steps_done, *, updates_before):
        pass

    def scalars(self):
        return {}

    def after_load(self, *, num_updates, scalars=None):
        self.num_updates = num_updates

    def begin_averages(self):
        pass

    def values(self):
        return [held.values.clone() for held in self.slices()]


def writer_of(
    engine,
    folder,
    *,
    attempt="0001",
    store=None,
    fence=lambda: None,
    clock=time.perf_counter,
    origin=None,
    config=None,
    **settings,
):
    return CheckpointWriter(
        Run(folder=folder, **settings),
        engine,
        store=store or open_store(folder),
        attempt=attempt,
        origin=origin or {"strategy": "toy"},
        model_files={"config.yaml": to_yaml(config).encode() if config else b"seed: 0\n"},
        refuse_if_superseded=fence,
        clock=clock,
    )


def as_version_2(record):
    """Returns the content of a checkpoint.json as versions before the checksum wrote it."""
    values = json.loads(record) | {"format_version": 2}
    del values["sha256"]
    return json.dumps(values, indent=1).encode() + b"\n"
