"""Closes a dataset whose shards were written in parts: checks that none is missing, and writes the
manifest.

    python -m data_prep.finalize configs/data_prep/demo_scenes.yaml

It takes the config that the parts were given to python -m data_prep.make_shards with.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from data_prep.config import MakeShards

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(MakeShards, __doc__)

import sys

from data_prep.pipeline.dataset_finish import finish_shards, is_shard_finished, shards_of_plan
from data_prep.pipeline.plan import PLAN_FOLDER, ItemPlan, describe_origin, read_plan
from data_prep.shards.folder import check_plan, lock_folder


def finalize(config: MakeShards) -> None:
    """Writes rejected.jsonl, manifest.jsonl and dataset.json.

    Raises:
        InputError: nothing was begun, or from another config; a shard is missing; too many pairs
            are bad.
    """
    plan = _checked_plan(config)
    with lock_folder(config.output):
        finish_shards(config, plan)


def _checked_plan(config: MakeShards) -> ItemPlan:
    plan = read_plan(config.output)
    check_plan(config.output, describe_origin(config), plan_folder=PLAN_FOLDER)
    return plan


def print_plan(config: MakeShards) -> None:
    """Prints how many shards are finished.

    Raises:
        InputError: nothing was begun, or from another config.
    """
    shards = shards_of_plan(config, _checked_plan(config))
    num_finished = sum(map(is_shard_finished, shards))
    say(f"{config.output}: {num_finished:,} of {len(shards):,} shards are finished")


def main() -> int:
    """The command."""
    return run_command(MakeShards, run=finalize, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
