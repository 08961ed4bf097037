"""Writes the embeddings of a dataset's media and captions, by a checkpoint, as Parquet files.

    python -m eval.embed configs/eval/embed.yaml
    python -m eval.embed configs/eval/embed.yaml checkpoint=runs/mine dataset=datasets/mine
    torchrun --nproc-per-node 8 -m eval.embed configs/eval/embed.yaml

data_prep.make_subset scores samples with them; data_prep.find_duplicates looks for equal meanings.
Stopped and started again, it keeps finished shards. What the files hold: eval.embeddings.files.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import EmbedConfig

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(EmbedConfig, __doc__)

import logging
import sys
from typing import TYPE_CHECKING

from data_prep.errors import RunError
from data_prep.shards.dataset import Dataset
from eval.models.model_source import find_model

if TYPE_CHECKING:
    from eval.embeddings.files import Origin
    from eval.models.encoder import Encoder

logger = logging.getLogger("eval.embed")


def run(config: EmbedConfig) -> None:
    """Embeds every shard that is not finished yet, and writes embeddings.json last.

    Raises:
        InputError: the checkpoint or dataset cannot be used, or the output holds other embeddings.
        RunError: too many samples are bad.
    """
    # Imported here: torch and the model libraries take seconds to load, and a dry run needs none.
    from eval.processes import joined_processes

    with joined_processes():
        _embed(config)


def _embed(config: EmbedConfig) -> None:
    from eval.embeddings.files import origin_of, write_summary
    from eval.models.encoder import check_tower, load_encoder
    from eval.processes import wait_for_all
    from pretrain.distributed.collectives import rank

    check_output_folder(config.output, key="output")
    dataset = Dataset(config.dataset)
    encoder = load_encoder(config)
    check_tower(encoder, dataset.info.media, folder=dataset.folder)
    origin = origin_of(dataset, encoder)
    config.output.mkdir(parents=True, exist_ok=True)
    write_missing_shards(config, encoder, dataset, origin)
    wait_for_all()  # every process has made its share
    if rank() > 0:
        return
    record = write_summary(config.output, dataset=dataset, origin=origin, model=encoder.origin)
    say(
        f"{config.output}: {record['num_embedded']:,} of {len(dataset):,} samples in "
        f"{record['num_shards']} shards; {len(record['bad_samples'])} are bad and left out"
    )


def write_missing_shards(
    config: EmbedConfig, encoder: Encoder, dataset: Dataset, origin: Origin
) -> None:
    """Embeds this process's share of what is not finished yet, shard by shard.

    Raises:
        InputError: the output holds other embeddings.
        RunError: too many samples are bad.
    """
    from eval.embeddings.files import bad_samples_of, is_finished, uids_of_shard, write_shard
    from eval.embeddings.shards import embed_shards
    from pretrain.distributed.collectives import rank, world_size

    paths = [config.output / f"{row.name}.parquet" for row in dataset.manifest]
    finished = {path for path in paths if is_finished(path, origin)}
    own = range(rank(), len(paths), world_size())
    missing = [shard for shard in own if paths[shard] not in finished]
    bad_samples = [bad for path in sorted(finished) for bad in bad_samples_of(path)]
    for shard, embeddings in embed_shards(encoder, dataset, missing):
        uids = uids_of_shard(dataset, shard)
        paths[shard].parent.mkdir(parents=True, exist_ok=True)  # a shard's name may hold folders
        write_shard(paths[shard], embeddings, uids=uids, origin=origin)
        for bad in embeddings.bad_samples:
            logger.warning("left out: %s", bad.reason)
        bad_samples += embeddings.bad_samples
        if len(bad_samples) > max(1.0, config.max_bad_fraction * len(dataset)):
            raise RunError(
                f"{len(bad_samples)} of {len(dataset)} samples are bad, above max_bad_fraction="
                f"{config.max_bad_fraction:g}; the last: {bad_samples[-1].reason}; check the "
                "dataset with python -m data_prep.verify_shards"
            )


def dry_run(config: EmbedConfig) -> None:
    """Checks what can be checked without the model, and prints what would be embedded."""
    check_output_folder(config.output, key="output")
    find_model(config.checkpoint, architecture=config.open_clip_architecture)
    dataset = Dataset(config.dataset)
    names = [row.name for row in dataset.manifest]
    num_there = sum((config.output / f"{name}.parquet").exists() for name in names)
    say(
        f"would embed {len(dataset):,} {dataset.info.media} samples and their captions in "
        f"{len(names)} shards, of which {num_there} are there already"
    )


def main() -> int:
    """The command."""
    return run_command(EmbedConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
