"""Plans a run on a cluster: memory, traffic, time and checkpoints, and the best number of GPUs.

    python -m pretrain.plan configs/pretrain/vit_b32.yaml nodes=4 gpus_per_node=8 gpu=h200

Needs no dataset, GPU, tokenizer or weights. configs/hardware.yaml has the figures of GPUs and
links; see docs/planning.md.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from pretrain.planning.config import PlanConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(PlanConfig, __doc__)

import sys

from pretrain.planning.checkpoint_size import checkpoint_bytes
from pretrain.planning.measured_run import measure_run
from pretrain.planning.memory import rows_of_process
from pretrain.planning.model_sizes import measure_model
from pretrain.planning.planned_model import plan_model
from pretrain.planning.report import describe_run, describe_table
from pretrain.planning.run_plan import Planner


def plan(config: PlanConfig) -> None:
    """Prints the plan.

    Raises:
        InputError: if the hardware is not known, there are more GPUs than lanes, or a tower cannot
            be planned.
    """
    hardware, gpu = config.read_hardware()
    rows_of_process(config, config.nodes * config.gpus_per_node)  # refuses more GPUs than lanes
    planned = plan_model(config)
    sizes = measure_model(config, planned, is_gpu=gpu.device == "cuda")
    measured = None if config.measured_run is None else measure_run(config.measured_run, gpu)
    planner = Planner(config, hardware, gpu, sizes, measured)
    own = planner.plan(
        nodes=config.nodes, gpus_per_node=config.gpus_per_node, strategy=config.engine.strategy
    )
    lines = describe_run(planner, own, checkpoint_bytes=checkpoint_bytes(config, planned))
    say("\n".join([*lines, "", *describe_table(planner.table())]))


def check(config: PlanConfig) -> None:
    """Checks the hardware without planning.

    Raises:
        ConfigError: if the file of hardware cannot be used, or has no such GPU.
    """
    config.read_hardware()


def main() -> int:
    """Runs the command."""
    return run_command(PlanConfig, run=plan, dry_run=check, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
