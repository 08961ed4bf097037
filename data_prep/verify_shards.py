"""Verifies a dataset against its manifest and indexes, and lists damaged shards and keys.

    python -m data_prep.verify_shards configs/data_prep/verify.yaml dataset=demo/datasets/x

Checks of each shard:

1. sizes and sha256 of the tar and the index
2. all headers of the tar; adjacent members and a unique key for each sample
3. offset and CRC32 of every member, as recorded in the index
4. one row of the Parquet file for each sample

With repair=true, everything that can be rebuilt is rebuilt first. With --dry-run, the repairs are
only printed.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from data_prep.config import VerifyShards

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(VerifyShards, __doc__)

import sys
from collections.abc import Sequence

from tqdm import tqdm

from data_prep.errors import InputError
from data_prep.shards.manifest import (
    DatasetInfo,
    ManifestRow,
    read_dataset_files,
)
from data_prep.verify.dataset_check import (
    DatasetOrigin,
    check_dataset,
    expects_parquet,
    read_origin,
)
from data_prep.verify.dataset_repair import print_repairs, repair_dataset
from data_prep.verify.shard_check import Finding, ShardCheck, verify_shard
from data_prep.workers import run_tasks

NUM_PROBLEMS_SHOWN = 20
VERIFY = "python -m data_prep.verify_shards"


def verify_shards(config: VerifyShards) -> None:
    """Verifies a dataset and prints a summary.

    Raises:
        InputError: if files differ from their recorded state. The message lists shards and keys.
    """
    if config.repair:
        repair_dataset(config.dataset, workers=config.workers)
    info, manifest = read_dataset_files(config.dataset)
    findings = verify_dataset(config, info, manifest)
    if findings:
        raise InputError(_problem_list(config, sorted(findings)))
    decoded = "; all media and captions can be decoded" if config.decode else ""
    say(
        f"{config.dataset}: {info.num_samples:,} samples in {len(manifest)} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB: sizes, checksums, headers and keys are correct"
        f"{decoded}"
    )


def verify_dataset(
    config: VerifyShards, info: DatasetInfo, manifest: Sequence[ManifestRow]
) -> list[Finding]:
    """Finds all differences between a dataset and its recorded state."""
    origin = read_origin(config.dataset)
    has_parquet = expects_parquet(config.dataset, origin, [row.name for row in manifest])
    checks = [
        ShardCheck(
            folder=config.dataset,
            tar_folder=config.dataset / info.tar_folder,
            row=row,
            modalities=info.named_modalities(),
            decode=config.decode,
            has_parquet=has_parquet,
            is_foreign=origin.is_foreign,
        )
        for row in manifest
    ]
    findings: list[Finding] = []
    with tqdm(total=len(checks), unit="shard", desc="verifying", disable=None) as bar:
        for found in run_tasks(verify_shard, checks, workers=config.workers):
            findings += found
            bar.update()
    return findings + check_dataset(config.dataset, info, manifest, origin=origin)


def _problem_list(config: VerifyShards, findings: Sequence[Finding]) -> str:
    shown = "\n".join(f"  {finding.text}" for finding in findings[:NUM_PROBLEMS_SHOWN])
    more = len(findings) - NUM_PROBLEMS_SHOWN
    kinds = {finding.kind for finding in findings}
    advice = _advice(kinds, read_origin(config.dataset))
    plural = "s" * (len(findings) > 1)
    return (
        f"{config.dataset}: {len(findings)} problem{plural}\n{shown}\n"
        + (f"  and {more} more\n" if more > 0 else "")
        + "\n".join(advice)
    )


def _advice(kinds: set[str], origin: DatasetOrigin) -> list[str]:
    """Returns the remedy for each kind of finding, most severe first."""
    remake = (
        "move each listed shard out of the folder and run make_shards again: it recreates only "
        "these"
        if origin.command == "make_shards"
        else "recreate the dataset"
    )
    advice = []
    if kinds & {"tar", "missing tar"} and origin.is_foreign:
        advice.append(
            "these tars were not written by make_shards and are never rewritten: restore them, or "
            "index them again into a new folder with python -m data_prep.index_shards"
        )
    elif "missing tar" in kinds:
        advice.append(f"missing tars: restore them; or {remake}")
    if "tar" in kinds and not origin.is_foreign:
        advice.append(
            "damaged tars: restore them; or put misplaced files in their places and keep intact "
            f"samples: {VERIFY} with repair=true; for samples that it reports as lost, {remake}"
        )
    rebuilt = [kind for kind in ("index", "parquet", "totals") if kind in kinds]
    if rebuilt and not kinds & {"tar", "missing tar"}:
        advice.append(f"all samples are in their tars; rebuild the rest: {VERIFY} with repair=true")
    if "extra shard" in kinds:
        advice.append(
            "shards that manifest.jsonl does not list: move their files out of the folder; or let "
            f"a repair find their places, or add those that have an index: {VERIFY} with "
            "repair=true"
        )
    if "media" in kinds:
        advice.append(
            "media and captions that cannot be decoded, stored as they were in the input: exclude "
            f"them with a subset (python -m data_prep.make_subset), or {remake}"
        )
    return advice


# ------------------------------------------------------------------------------------- command


def print_plan(config: VerifyShards) -> None:
    """Prints the size of the dataset, or with repair=true the plan of the repair.

    Raises:
        InputError: if there is no dataset, or a repair would leave manual work.
    """
    if config.repair:
        print_repairs(config.dataset, workers=config.workers)
        return
    info, manifest = read_dataset_files(config.dataset)
    say(
        f"would verify {len(manifest)} shards with {info.num_samples:,} samples, "
        f"{info.tar_bytes / 1e6:,.1f} MB"
    )


def main() -> int:
    """Runs the command."""
    return run_command(VerifyShards, run=verify_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
