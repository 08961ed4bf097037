"""Config of a plan: that of the run, and the hardware that it would run on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_prep.config_file import Section, read_config
from data_prep.errors import ConfigError
from pretrain.config import PretrainConfig


class Gpu(Section):
    """A kind of GPU, with the links between the GPUs of a node."""

    device: Literal["cuda", "cpu"] = "cuda"  # cpu: one process on a part of a machine
    memory_gibibytes: PositiveFloat
    bf16_teraflops: PositiveFloat
    fp32_teraflops: PositiveFloat
    link_gigabytes_per_second: PositiveFloat  # in one direction

    @property
    def memory_bytes(self) -> int:
        """Memory of one GPU."""
        return round(self.memory_gibibytes * 2**30)

    def flops_per_second(self, precision: str) -> float:
        """Returns the largest number of FLOPs per second in a precision of the towers."""
        return 1e12 * (self.bf16_teraflops if precision == "bf16" else self.fp32_teraflops)


class Network(Section):
    """Links between nodes."""

    gigabytes_per_second_per_gpu: PositiveFloat  # in one direction
    latency_microseconds: float = Field(ge=0)  # of one message of a collective


class Storage(Section):
    """File system of checkpoints."""

    write_gigabytes_per_second: PositiveFloat  # all processes together


class Hardware(Section):
    """Content of configs/hardware.yaml."""

    gpus: dict[str, Gpu] = Field(min_length=1)
    network: Network
    storage: Storage
    utilization: float = Field(gt=0, le=1)  # fraction of a GPU's FLOPs that a step reaches


class PlanConfig(PretrainConfig):
    """Config of a run, with what it would run on."""

    gpu: str  # row of the file `hardware`
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    hardware: Path = Path("configs/hardware.yaml")
    # Fraction of the GPU's FLOPs that forward and backward reach; null: that of `hardware`
    utilization: float | None = Field(None, gt=0, le=1)
    # Folder of a run on this kind of GPU, of any model: its utilization and the speed of its
    # checkpoints are used. null: the figures of `hardware`
    measured_run: Path | None = None
    # Samples that one process reads and decodes per second; null: reading is never slower than
    # computing
    loading_samples_per_second: PositiveFloat | None = None

    def read_hardware(self) -> tuple[Hardware, Gpu]:
        """Reads the file `hardware` and finds the GPU.

        Raises:
            ConfigError: if the file cannot be used or has no such GPU.
        """
        try:
            hardware = read_config(Hardware, self.hardware)
        except ConfigError as error:
            raise ConfigError(f"hardware={self.hardware}: {error}") from None
        if self.gpu not in hardware.gpus:
            raise ConfigError(
                f"gpu={self.gpu}: expected one of {', '.join(hardware.gpus)} "
                f"({self.hardware}: gpus); add it there"
            )
        return hardware, hardware.gpus[self.gpu]
