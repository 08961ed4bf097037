"""Config section `preflight`: checks of the nodes before a run starts."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_prep.config_file import Section, free


class Preflight(Section):
    """Settings of `python -m pretrain.preflight`; none affects a run's result."""

    timeout_seconds: PositiveFloat = free(300.0)  # limit for all ranks to join, and per check
    # A node is bad if it is slower than this fraction of the median node; from three nodes on.
    min_share_of_median: float = free(0.5, ge=0, lt=1)
    # A node is also bad below these speeds; null: no limit.
    min_all_reduce_gigabytes_per_second: PositiveFloat | None = free(None)
    min_all_gather_gigabytes_per_second: PositiveFloat | None = free(None)
    min_shard_megabytes_per_second: PositiveFloat | None = free(None)
    exchanged_megabytes: PositiveFloat = free(64.0)  # size of the tensor in each collective
    shards_read: PositiveInt = free(2)  # number of shards of each dataset that each node reads
    megabytes_read: PositiveFloat = free(256.0)  # largest amount that each node reads
    max_clock_difference_seconds: PositiveFloat = free(5.0)  # to the median node's clock
    # Fraction of each GPU's memory that must be free.
    min_free_gpu_share: float = Field(0.9, ge=0, le=1, json_schema_extra={"free": True})
    checkpoints_to_fit: PositiveInt = free(2)  # number of checkpoints that must fit on disk

    @model_validator(mode="before")
    @classmethod
    def _drop_unused_verdict(cls, values: Any) -> Any:
        # Configs of runs created before preflight printed srun's options hold `verdict: null`.
        if isinstance(values, dict) and values.get("verdict", ...) is None:
            return {key: value for key, value in values.items() if key != "verdict"}
        return values
