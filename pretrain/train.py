"""Pretrains a contrastive model: shards in, checkpoints out.

    python -m pretrain.train configs/pretrain/demo.yaml schedule.num_steps=100

The same command runs under `accelerate launch`, `torchrun` or `srun`; the number of processes never
changes which result comes. Run again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds, during which a signal would kill
    from pretrain.run import signals

    signals.listen()

from data_prep.command import check_command_line, check_output_folder, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(PretrainConfig, __doc__)

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch

from data_prep.errors import InputError
from pretrain.cache.node import check_room
from pretrain.checkpoint import WholeCheckpoint, files_to_rebuild, newest_checkpoint, restore
from pretrain.checkpoints.store import open_store, store_of_run
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import Engine as EngineSection
from pretrain.config import PairingName
from pretrain.data.batch import StepBatch
from pretrain.data.datasets import build_cache
from pretrain.data.device_prefetch import copy_ahead
from pretrain.data.loaders import LoadSteps, start_loader
from pretrain.data.pairing_reader import open_readers
from pretrain.data.step_loader import StepLoader
from pretrain.data.transforms import build_transforms
from pretrain.distributed.collectives import gather_objects, on_main_process, rank, world_size
from pretrain.distributed.engine import Engine
from pretrain.distributed.launcher import device_type_of
from pretrain.distributed.start import (
    build_engine,
    check_engine,
    start_accelerator,
)
from pretrain.model.activation_checkpointing import checkpoint_blocks, compile_towers
from pretrain.model.contrastive_model import ContrastiveModel, build_model
from pretrain.model.tokenizer import Tokenizer, build_tokenizer
from pretrain.moments import moment
from pretrain.monitoring.hang_watch import HangWatch
from pretrain.run.attempts import machine_name
from pretrain.run.folder import RunFolder, begin_attempt
from pretrain.run.fork import FORK_TAG, config_of_fork, origin_of_checkpoints, record_parent
from pretrain.run.requests import RunRequests
from pretrain.sampling.order import lanes_of_rank
from pretrain.sampling.schedule import build_schedule
from pretrain.training.contrastive_step import ContrastiveStep
from pretrain.training.distillation import PairingTeacher, load_teachers
from pretrain.training.loop import Trainer, TrainerSettings
from pretrain.training.micro_batch_size import choose_num_micro_batches
from pretrain.training.optimizer import build_optimizer
from pretrain.training.plan import describe_plan
from pretrain.training.session import RunSession
from pretrain.training.step_loss import build_pairing_losses
from pretrain.training.validation import ValidationSet, build_validation_sets

logger = logging.getLogger("pretrain.train")


def pretrain(config: PretrainConfig) -> None:
    """Runs a config to its last step, from the newest checkpoint of its run folder if it has one.

    Raises:
        InputError: the config, a dataset or the run folder cannot be used.
        RunError: the run cannot go on.
    """
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    check_engine(config.engine, trackers=config.run.trackers)
    requests = RunRequests(
        config.run.folder, save_every_minutes=config.run.checkpoint_every_minutes
    )
    with requests:  # so that nothing asked for during the start is lost
        tokenizer = build_tokenizer(config.model.text)
        # After the tokenizer, whose imports the loader shares, and before threads and connections.
        with start_loader(config.loading) as load_steps:
            run_attempt(config, tokenizer, load_steps, requests)


def run_attempt(
    config: PretrainConfig, tokenizer: Tokenizer, load_steps: LoadSteps, requests: RunRequests
) -> None:
    """Joins the other processes, builds everything, resumes and trains."""
    moment("start")
    accelerator = start_accelerator(config.engine, run=config.run)
    requests.looks_at_files = rank() == 0
    hosts = gather_objects(machine_name())
    node_ranks = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
    loader = open_step_loader(
        config, tokenizer, rank=rank(), world_size=world_size(), node_ranks=node_ranks
    )
    check_room(loader.node)
    validation_sets = build_validation_sets(config, tokenizer=tokenizer, cache=loader.cache)
    model = build_training_model(config, tokenizer)
    num_micro_batches = choose_num_micro_batches(
        config, model, loader.layouts, device=accelerator.device, hosts=hosts
    )
    if config.engine.compile:  # after its memory was measured, which follows single operators
        compile_towers(model)
    teachers = load_teachers(config, tokenizer=tokenizer, device=accelerator.device)
    fingerprints = fingerprints_of(loader, validation_sets, teachers)
    run = open_run(config, fingerprints, hosts=hosts, num_micro_batches=num_micro_batches)
    with RunSession(run, requests, build_hang_watch(config.engine, run), hosts=hosts) as session:
        optimizer = build_optimizer(config, model)
        engine = build_engine(
            accelerator,
            strategy=config.engine.strategy,
            model=model,
            optimizer=optimizer,
            gradient_clipping=config.optimizer.gradient_clipping,
        )
        with closing(engine):
            resume(config, engine, run)
            engine.init_trackers(
                config.model_dump(), run_folder=config.run.folder, num_steps_done=run.num_steps_done
            )
            settings = build_settings(config)
            batches = load_batches(load_steps, loader, engine, run, last_step=settings.last_step)
            step = build_step(
                config, engine, num_micro_batches=num_micro_batches, teachers=teachers
            )
            session.heartbeat(is_slow=True)
            moment("loaded")
            session.writer = open_writer(config, engine, tokenizer, run)
            trainer = Trainer(engine, step, loader, session, settings)
            if run.num_steps_done and run.last_checkpoint is None:
                trainer.save_first()  # of a fork, which no longer needs its parent then
            trainer.train(batches, validation_sets)


def build_training_model(config: PretrainConfig, tokenizer: Tokenizer) -> ContrastiveModel:
    """The model, which keeps as few activations as the engine's section says.

    Raises:
        InputError: a tower cannot be built, or has nothing that could be computed again.
    """
    model = build_model(
        config.model,
        image=config.image,
        audio=config.audio,
        pairings=config.pairings,
        seed=config.seed,
        tokenizer=tokenizer,
    )
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model)
    return model


def open_step_loader(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    *,
    rank: int,
    world_size: int,
    node_ranks: Sequence[int] | None = None,
) -> StepLoader:
    """Opens the datasets of a run, and puts their samples in order.

    Args:
        config: the whole config.
        tokenizer: tokenizer of captions.
        rank: number of the process that reads.
        world_size: number of processes.
        node_ranks: ranks of its machine; None for this one alone.

    Raises:
        InputError: if a dataset cannot be used, or there are more processes than lanes.
        RunError: if a dataset behind a URL cannot be reached now.
    """
    lanes_of_rank(rank, world_size=world_size, lanes=config.lanes)  # before anything is opened
    cache = build_cache(config.loading)
    readers = open_readers(
        config.pairings,
        config.loading,
        transforms=build_transforms(config),
        tokenizer=tokenizer,
        seed=config.seed,
        cache=cache,
    )
    schedule = build_schedule(
        config.pairings,
        {name: [each.samples for each in reader.sources] for name, reader in readers.items()},
        pairings_per_step=config.pairings_per_step,
        lanes=config.lanes,
        window=config.loading.window,
        seed=config.seed,
        num_steps=config.schedule.num_steps,
    )
    return StepLoader(
        schedule,
        readers,
        cache=cache,
        rank=rank,
        world_size=world_size,
        node_ranks=node_ranks,
    )


def fingerprints_of(
    loader: StepLoader,
    validation_sets: list[ValidationSet],
    teachers: Mapping[PairingName, PairingTeacher],
) -> dict[str, str]:
    """Of everything a run reads: what must be the same when it is resumed."""
    held_out = {
        f"validation/{each.pairing}": each.reader.samples.fingerprint for each in validation_sets
    }
    of_teachers = {f"teacher/{name}": each.fingerprint for name, each in teachers.items()}
    return loader.fingerprints() | held_out | of_teachers


def open_run(
    config: PretrainConfig,
    fingerprints: dict[str, str],
    *,
    hosts: list[str],
    num_micro_batches: int,
) -> RunFolder:
    """This attempt's run folder, refused on every rank if it holds another run."""
    attempt = on_main_process(
        lambda: begin_attempt(
            config, fingerprints=fingerprints, hosts=hosts, num_micro_batches=num_micro_batches
        )
    )
    return RunFolder(config, attempt, is_writer=rank() == 0)


def resume(config: PretrainConfig, engine: Engine, run: RunFolder) -> None:
    """Loads the newest whole checkpoint, of this run or of the one that it is forked from."""
    own = newest_checkpoint(open_store(config.run.checkpoints), counts=run.counts_checkpoint)
    is_fork = own is None and config.run.parent is not None
    newest = newest_checkpoint_of_parent(config) if is_fork else own
    if newest is None:
        run.begin_from(0, has_checkpoint=False)
        return
    restore(engine, newest)
    state = newest.record.state
    run.skipped_steps = list(state.skipped_steps)
    for tag in (*state.tags, *([FORK_TAG] if is_fork else [])):
        run.add_tag(tag)
    run.begin_from(state.step, has_checkpoint=not is_fork)
    if rank() == 0:
        is_done = state.step >= config.schedule.num_steps
        how = "nothing is left to do" if is_done else "going on"
        logger.info("%s: %s from %s", config.run.folder, how, newest.location)


def newest_checkpoint_of_parent(config: PretrainConfig) -> WholeCheckpoint:
    """What a fork begins from, which is written down in its folder.

    Raises:
        InputError: the parent has no whole checkpoint.
    """
    parent = config.run.parent
    newest = newest_checkpoint(store_of_run(str(parent)))
    if newest is None:
        raise InputError(
            f"{parent}: expected a run with a whole checkpoint to begin from (run.fork, "
            "run.parent), found none; train it further first"
        )
    on_main_process(lambda: record_parent(config, newest))
    return newest


def build_hang_watch(config: EngineSection, run: RunFolder) -> HangWatch:
    """Builds the hang watch of this rank, not yet running."""
    return HangWatch(
        run.folder,
        run.attempt.attempt,
        timeout_seconds=config.timeout_seconds,
        start_timeout_seconds=config.start_timeout_seconds,
    )


def build_settings(config: PretrainConfig) -> TrainerSettings:
    """Collects the config sections that the training loop reads."""
    return TrainerSettings(
        config.run,
        config.schedule,
        config.optimizer,
        config.watch,
        config.loading,
        config.validation,
        timeout_seconds=config.engine.timeout_seconds,
    )


def load_batches(
    load_steps: LoadSteps, loader: StepLoader, engine: Engine, run: RunFolder, *, last_step: int
) -> Iterator[StepBatch]:
    """Yields this rank's part of every remaining step, on the device."""
    batches = load_steps(
        loader,
        first_step=run.num_steps_done,
        last_step=last_step,
        is_pinned=engine.device.type == "cuda",
    )
    return copy_ahead(batches, device=engine.device)


def build_step(
    config: PretrainConfig,
    engine: Engine,
    *,
    num_micro_batches: int,
    teachers: Mapping[PairingName, PairingTeacher] | None = None,
) -> ContrastiveStep:
    """Builds the gradient of a step's contrastive losses."""
    losses = build_pairing_losses(
        config.pairings,
        lanes=config.lanes,
        takes_all=config.pairings_per_step == "all",
        mode=config.engine.loss_mode,
        precision=config.engine.precision,
    )
    return ContrastiveStep(engine, losses, num_micro_batches=num_micro_batches, teachers=teachers)


def open_writer(
    config: PretrainConfig, engine: Engine, tokenizer: Tokenizer, run: RunFolder
) -> CheckpointWriter:
    """What writes this attempt's checkpoints."""
    return CheckpointWriter(
        config.run,
        engine,
        store=open_store(config.run.checkpoints),
        attempt=run.attempt.attempt,
        origin=on_main_process(lambda: origin_of_checkpoints(config)),
        model_files=files_to_rebuild(config, engine.model, tokenizer),
        refuse_if_superseded=run.refuse_if_superseded,
    )


def dry_run(config: PretrainConfig) -> None:
    """Builds everything but the process group, and prints the derived numbers."""
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    check_engine(config.engine, trackers=config.run.trackers)
    num_processes, num_processes_here = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    tokenizer = build_tokenizer(config.model.text)
    loader = open_step_loader(config, tokenizer, rank=0, world_size=num_processes)
    build_validation_sets(config, tokenizer=tokenizer, cache=loader.cache)
    model = build_training_model(config, tokenizer)
    lines = describe_plan(
        config,
        loader=loader,
        model=model,
        device=torch.device(device_type_of(config.engine.device)),
        world_size=num_processes,
        num_processes_here=num_processes_here,
    )
    say("\n".join(lines))


def main() -> int:
    """The command."""
    return run_command(PretrainConfig, run=pretrain, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    status = main()
    signals.ignore()
    sys.exit(status)
