"""Embeds a dataset's media and captions, or any views, and writes them as Parquet files.

    python -m eval.embed configs/eval/embed.yaml
    python -m eval.embed configs/eval/embed.yaml checkpoint=runs/mine dataset=datasets/mine
    torchrun --nproc-per-node 8 -m eval.embed configs/eval/embed.yaml

data_prep.make_subset uses the embeddings to score samples, and data_prep.find_duplicates to find
semantic duplicates. A restarted command keeps finished shards. eval.embeddings.files describes the
files.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import EmbedConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(EmbedConfig, __doc__)

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import RunError
from data_prep.shards.dataset import Dataset
from eval.models.model_source import find_model
from pretrain.settings.views import View

if TYPE_CHECKING:
    from eval.embeddings.files import FileViews, Origin
    from eval.models.encoder import Encoder

logger = logging.getLogger("eval.embed")


def run(config: EmbedConfig) -> None:
    """Embeds every unfinished shard, and writes embeddings.json last.

    Raises:
        InputError: if the checkpoint or dataset cannot be used, or the output holds embeddings of a
            different origin.
        RunError: if too many samples are corrupt.
    """
    # Imported here because torch and the model libraries load slowly, and a dry run needs neither.
    from eval.processes import joined_processes

    with joined_processes():
        _embed(config)


def _embed(config: EmbedConfig) -> None:
    from eval.models.encoder import check_view, load_encoder

    check_output_folder(config.output, key="output")
    dataset = Dataset(config.dataset)
    parts = _parts_of(config, dataset)
    encoder = load_encoder(config)
    for views, _ in parts:
        for view in filter(None, (views.media, views.text)):
            modality = dataset.modalities[View.parse(view).member]
            check_view(encoder, view, modality, folder=dataset.folder)
    for views, folder in parts:
        _embed_views(config, encoder, dataset, views, folder=folder)


def _parts_of(config: EmbedConfig, dataset: Dataset) -> list[tuple[FileViews, Path]]:
    """Returns the views of each folder of files, and the folder.

    Raises:
        InputError: if the dataset does not have a modality.
    """
    from eval.embeddings.files import FileViews

    if config.views is None and dataset.modalities.is_pair:
        return [(FileViews.pair(dataset.info.media), config.output)]
    names = list(dataset.modalities) if config.views is None else config.views
    members = {name: View.parse(name).member for name in names}
    dataset.modalities.check_known(members.values(), where=str(dataset.folder))
    return [
        (FileViews.single(name, kind=dataset.modalities[member].kind), config.output / name)
        for name, member in members.items()
    ]


def _embed_views(
    config: EmbedConfig, encoder: Encoder, dataset: Dataset, views: FileViews, *, folder: Path
) -> None:
    """Writes the files of one folder."""
    from eval.embeddings.files import origin_of, write_summary
    from eval.processes import wait_for_all
    from pretrain.distributed.collectives import rank

    origin = origin_of(dataset, encoder, views)
    folder.mkdir(parents=True, exist_ok=True)
    fraction = config.max_bad_fraction
    write_missing_shards(folder, encoder, dataset, origin, views=views, max_bad_fraction=fraction)
    wait_for_all()  # the other processes have finished their shards
    if rank() > 0:
        return
    record = write_summary(
        folder, dataset=dataset, origin=origin, model=encoder.origin, views=views
    )
    say(
        f"{folder}: {record['num_embedded']:,} of {len(dataset):,} samples in "
        f"{record['num_shards']} shards; {len(record['bad_samples'])} are corrupt and were skipped"
    )


def write_missing_shards(
    output: Path,
    encoder: Encoder,
    dataset: Dataset,
    origin: Origin,
    *,
    views: FileViews,
    max_bad_fraction: float,
) -> None:
    """Embeds this process's part of the unfinished shards, and writes one file per shard.

    Args:
        output: folder of the Parquet files.
        encoder: encoder of the model.
        dataset: dataset to embed.
        origin: origin of the embeddings.
        views: views in each file.
        max_bad_fraction: fraction of corrupt samples above which the command fails.

    Raises:
        InputError: if the output holds embeddings of a different origin.
        RunError: if too many samples are corrupt.
    """
    from eval.embeddings.files import bad_samples_of, is_finished, uids_of_shard, write_shard
    from eval.embeddings.shards import embed_shards
    from pretrain.distributed.collectives import rank, world_size

    paths = [output / f"{row.name}.parquet" for row in dataset.manifest]
    finished = {path for path in paths if is_finished(path, origin)}
    own = range(rank(), len(paths), world_size())
    missing = [shard for shard in own if paths[shard] not in finished]
    bad_samples = [bad for path in sorted(finished) for bad in bad_samples_of(path)]
    for shard, embeddings in embed_shards(encoder, dataset, missing, views=views):
        uids = uids_of_shard(dataset, shard)
        paths[shard].parent.mkdir(parents=True, exist_ok=True)  # a shard's name may contain folders
        write_shard(paths[shard], embeddings, uids=uids, origin=origin, views=views)
        for bad in embeddings.bad_samples:
            logger.warning("skipped: %s", bad.reason)
        bad_samples += embeddings.bad_samples
        if len(bad_samples) > max(1.0, max_bad_fraction * len(dataset)):
            raise RunError(
                f"{len(bad_samples)} of {len(dataset)} samples are corrupt, above max_bad_fraction="
                f"{max_bad_fraction:g}; the last: {bad_samples[-1].reason}; check the dataset with "
                "python -m data_prep.verify_shards"
            )


def dry_run(config: EmbedConfig) -> None:
    """Checks the paths without loading the model, and prints what would be embedded."""
    check_output_folder(config.output, key="output")
    find_model(
        config.checkpoint, architecture=config.open_clip_architecture, weights=config.weights
    )
    dataset = Dataset(config.dataset)
    names = [row.name for row in dataset.manifest]
    for views, folder in _parts_of(config, dataset):
        num_there = sum((folder / f"{name}.parquet").exists() for name in names)
        what = f"{dataset.info.media} samples and their captions"
        if views.view is not None:
            what = f"samples by {views.view}"
        say(
            f"would embed {len(dataset):,} {what} in {len(names)} shards; {num_there} are already "
            "finished"
        )


def main() -> int:
    """Runs the command."""
    return run_command(EmbedConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
