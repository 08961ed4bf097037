"""What nodes must be able to do before a run begins: the config's section `preflight`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from data_prep.config_file import Section, free


class Preflight(Section):
    """Of `python -m pretrain.preflight`; nothing here has a part in a run's result."""

    timeout_seconds: PositiveFloat = free(300.0)  # for all ranks to come, and again for each check
    # A node is bad below this share of the median node's figure, where there are three or more.
    min_share_of_median: float = free(0.5, ge=0, lt=1)
    # And below these; null: no such floor.
    min_all_reduce_gigabytes_per_second: PositiveFloat | None = free(None)
    min_all_gather_gigabytes_per_second: PositiveFloat | None = free(None)
    min_shard_megabytes_per_second: PositiveFloat | None = free(None)
    exchanged_megabytes: PositiveFloat = free(64.0)  # in each exchange of numbers
    shards_read: PositiveInt = free(2)  # of each dataset, by each node
    megabytes_read: PositiveFloat = free(256.0)  # at most, by each node
    max_clock_difference_seconds: PositiveFloat = free(5.0)  # from the nodes' median
    min_free_gpu_share: float = Field(0.9, ge=0, le=1, json_schema_extra={"free": True})
    checkpoints_to_fit: PositiveInt = free(2)  # in the free space of the checkpoints' disk
    # File for a line that says what to do, which slurm/pretrain.sbatch does: well, stop (a signal
    # came meanwhile), refuse, or leave_out and the names of bad nodes
    verdict: Path | None = free(None)
