"""Describes the model of a config: towers with parameters, FLOPs, tokens, shapes and memory.

    python -m pretrain.describe configs/pretrain/vit_b32.yaml

Needs no dataset, GPU, tokenizer or weights; see docs/planning.md.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(PretrainConfig, __doc__)

import sys

from pretrain.planning.model_sizes import measure_model
from pretrain.planning.planned_model import plan_model
from pretrain.planning.report import describe_model


def describe(config: PretrainConfig) -> None:
    """Prints the description.

    Raises:
        InputError: if a tower cannot be built or planned.
    """
    planned = plan_model(config)
    sizes = measure_model(config, planned, is_gpu=config.engine.device != "cpu")
    say("\n".join(describe_model(config, planned, sizes)))


def main() -> int:
    """Runs the command."""
    return run_command(PretrainConfig, run=describe, dry_run=lambda _: None, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
