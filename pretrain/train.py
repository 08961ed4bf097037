"""Pretrains a contrastive model: shards in, checkpoints out.

    python -m pretrain.train configs/pretrain/demo.yaml schedule.num_steps=100

The same command runs under `accelerate launch`, `torchrun` or `srun`; the number of processes never
changes the result. When run again, it resumes from the newest checkpoint.
"""

from __future__ import annotations

if __name__ == "__main__":  # before slow imports, during which a signal would end the process
    from pretrain.run import signals

    signals.listen()

from data_prep.command import check_command_line, check_output_folder, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(PretrainConfig, __doc__)

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing

import torch

from pretrain.cache.node import check_room
from pretrain.data.batch import StepBatch
from pretrain.data.device_prefetch import prefetch_to_device
from pretrain.data.loaders import LoadSteps, start_loader
from pretrain.data.step_loader import StepLoader
from pretrain.distributed.collectives import (
    gather_objects,
    on_main_process,
    rank,
    world_size,
)
from pretrain.distributed.engine import Engine
from pretrain.distributed.launcher import device_type_of, planned_processes
from pretrain.distributed.start import build_engine, check_engine, start_accelerator
from pretrain.fail_points import fail_point
from pretrain.model.activation_checkpointing import compile_towers
from pretrain.model.tokenizer import Tokenizer
from pretrain.run.attempts import machine_name
from pretrain.run.compatibility import RunIdentity
from pretrain.run.computed_on import describe_computation, kept_num_micro_batches
from pretrain.run.folder import RunFolder
from pretrain.run.fork import check_start, config_of_fork
from pretrain.run.model_sources import ModelSources
from pretrain.run.requests import RunRequests
from pretrain.run.resume import open_run, resume
from pretrain.training.assembly import (
    build_run_objectives,
    build_session,
    build_settings,
    build_step,
    build_training_model,
    build_training_optimizer,
    build_training_tokenizer,
    check_repeated_samples,
    describe_parameter_groups,
    fingerprints_of,
    measure_batch_norms,
    open_step_loader,
    open_teachers,
    open_validation_sets,
    open_writer,
    standardize_inputs,
    warn_of_unused_parts,
)
from pretrain.training.distillation import ObjectiveTeacher
from pretrain.training.loop import Trainer
from pretrain.training.micro_batch_size import StepSizes, choose_num_micro_batches
from pretrain.training.plan import describe_plan
from pretrain.warm_start.model_start import all_starts, start_fingerprints


def pretrain(config: PretrainConfig) -> None:
    """Trains to the last step of a config, from the newest checkpoint of its run folder if any.

    Raises:
        InputError: if the config, a dataset or the run folder cannot be used.
        RunError: if the run cannot continue.
    """
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    check_engine(config.engine, trackers=config.run.trackers)
    requests = RunRequests(
        config.run.folder, save_every_minutes=config.run.checkpoint_every_minutes
    )
    # `requests` first, so that no request made during start-up is lost
    with requests, ModelSources(config) as sources:
        tokenizer = build_training_tokenizer(sources)
        # After the tokenizer, whose imports the loader shares; before any threads or connections.
        with start_loader(config.loading) as load_steps:
            run_attempt(sources, tokenizer, load_steps, requests)


def run_attempt(
    sources: ModelSources, tokenizer: Tokenizer | None, load_steps: LoadSteps, requests: RunRequests
) -> None:
    """Joins the other processes, builds everything, resumes and trains."""
    config = sources.config
    fail_point("start")
    accelerator = start_accelerator(config.engine, run=config.run)
    requests.polls_files = rank() == 0
    hosts = gather_objects(machine_name())
    teachers = open_teachers(config, tokenizer, device=accelerator.device)
    loader = open_loader_of_rank(config, tokenizer, hosts=hosts, teachers=teachers)
    validation_sets = open_validation_sets(config, tokenizer, cache=loader.cache)
    model = build_training_model(sources, tokenizer, device=accelerator.device)
    standardize_inputs(config, model, loader)
    measure_batch_norms(config, model, loader)
    computed_on = describe_computation(config, accelerator.device)
    num_micro_batches = choose_num_micro_batches(
        StepSizes.of_config(config),
        model,
        loader.layouts,
        device=accelerator.device,
        hosts=hosts,
        kept=on_main_process(lambda: kept_num_micro_batches(config, computed_on)),
    )
    if config.engine.compile:  # after the memory measurement, which traces uncompiled operators
        compile_towers(model)
    fingerprints = fingerprints_of(loader, validation_sets, teachers, sources)
    identity = RunIdentity(config, fingerprints, copied_sources=sources.copied)
    run = open_run(
        identity, hosts=hosts, num_micro_batches=num_micro_batches, computed_on=computed_on
    )
    if config.run.parent is None:  # a fork has the weights of its parent
        on_main_process(lambda: sources.warm_start.write(run.folder, fingerprints))
    with build_session(config.engine, run, requests, hosts=hosts) as session:
        optimizer = build_training_optimizer(config, model)
        engine = build_engine(
            accelerator,
            strategy=config.engine.strategy,
            model=model,
            optimizer=optimizer,
            gradient_clipping=config.optimizer.gradient_clipping,
        )
        with closing(engine):
            is_new_fork = resume(identity, engine, run)
            engine.init_trackers(
                config.model_dump(), run_folder=run.folder, num_steps_done=run.num_steps_done
            )
            step = build_step(
                config, engine, num_micro_batches=num_micro_batches, teachers=teachers
            )
            settings = build_settings(config)
            batches = load_batches(load_steps, loader, engine, run, last_step=settings.last_step)
            session.heartbeat(is_slow=True)
            fail_point("loaded")
            session.writer = open_writer(identity, engine, tokenizer, run)
            trainer = Trainer(engine, step, loader, session, settings)
            if is_new_fork:
                trainer.save_first()  # a fork: from here on it no longer needs its parent
            trainer.train(batches, validation_sets)


def open_loader_of_rank(
    config: PretrainConfig,
    tokenizer: Tokenizer | None,
    *,
    hosts: list[str],
    teachers: Mapping[str, ObjectiveTeacher],
) -> StepLoader:
    """Opens the datasets on this rank; every rank must call it.

    Args:
        config: the whole config.
        tokenizer: tokenizer of captions.
        hosts: [ranks] machine names.
        teachers: teachers of the objectives with distillation.
    """
    node_ranks = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
    loader = open_step_loader(
        config,
        tokenizer,
        rank=rank(),
        world_size=world_size(),
        node_ranks=node_ranks,
        teachers=teachers,
    )
    on_main_process(lambda: check_repeated_samples(config, loader))
    on_main_process(lambda: warn_of_unused_parts(config, loader))
    check_room(loader.node)
    return loader


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
    return prefetch_to_device(batches, device=engine.device)


def dry_run(config: PretrainConfig) -> None:
    """Builds everything except the process group, and prints the derived numbers."""
    config = config_of_fork(config)
    check_output_folder(config.run.folder, key="run.folder")
    check_start(config)
    check_engine(config.engine, trackers=config.run.trackers)
    num_processes, num_processes_here = planned_processes(os.environ)
    device = torch.device(device_type_of(config.engine.device))
    with ModelSources(config) as sources:
        tokenizer = build_training_tokenizer(sources)
        teachers = open_teachers(config, tokenizer, device=device)
        loader = open_step_loader(
            config, tokenizer, rank=0, world_size=num_processes, teachers=teachers
        )
        check_repeated_samples(config, loader)
        warn_of_unused_parts(config, loader)
        open_validation_sets(config, tokenizer, cache=loader.cache)
        model = build_training_model(sources, tokenizer, device=device)
        standardize_inputs(config, model, loader)
        start_lines = sources.warm_start.describe(start_fingerprints(all_starts(config)))
    group_lines = describe_parameter_groups(config, model)
    lines = describe_plan(
        StepSizes.of_config(config),
        build_run_objectives(config, world_size=num_processes),
        loader=loader,
        model=model,
        device=device,
        num_processes_here=num_processes_here,
    )
    say("\n".join([*start_lines, *group_lines, *lines]))


def main() -> int:
    """Runs the command."""
    return run_command(PretrainConfig, run=pretrain, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    status = main()
    signals.ignore()
    sys.exit(status)
