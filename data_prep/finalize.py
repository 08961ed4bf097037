"""Finishes a dataset whose shards were written in parts.

    python -m data_prep.finalize configs/data_prep/demo_scenes.yaml

Checks that all shards exist, and writes the manifest. Use the same config as for writing the parts
with python -m data_prep.make_shards.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from data_prep.config import MakeShards

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(MakeShards, __doc__)

import sys

from data_prep.pipeline.dataset_finish import finish_shards, is_shard_finished, shards_of_plan
from data_prep.pipeline.plan import check_origin, describe_origin, read_plan
from data_prep.pipeline.shard import ShardSettings
from data_prep.shards.folder import lock_folder


def finalize(config: MakeShards) -> None:
    """Writes rejected.jsonl, manifest.jsonl and dataset.json.

    Raises:
        InputError: if no run was started in the folder, or it used a different config or input.
            Also if a shard is missing, or too many pairs are bad.
    """
    plan = read_plan(config.output)
    check_origin(config.output, describe_origin(config))
    with lock_folder(config.output):
        finish_shards(
            ShardSettings.from_config(config),
            plan,
            max_rejected_fraction=config.max_rejected_fraction,
        )


def print_plan(config: MakeShards) -> None:
    """Prints the number of finished shards.

    Raises:
        InputError: if no run was started in the folder, or it used a different config or input.
    """
    plan = read_plan(config.output)
    check_origin(config.output, describe_origin(config))
    shards = shards_of_plan(ShardSettings.from_config(config), plan)
    num_finished = sum(map(is_shard_finished, shards))
    say(f"{config.output}: {num_finished:,} of {len(shards):,} shards are finished")


def main() -> int:
    """Runs the command."""
    return run_command(MakeShards, run=finalize, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
