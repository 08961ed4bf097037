"""Pretrains a contrastive model: shards in, checkpoints out.

    python -m pretrain.train configs/pretrain/demo.yaml schedule.num_steps=100

The same command runs under `accelerate launch`, `torchrun` or `srun`; the number of processes never
changes which result comes. Run again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial

import torch

from data_prep.config_file import RunError, check_output_folder, run_command
from pretrain.activation_checkpointing import checkpoint_blocks
from pretrain.bad_sample_ledger import BadSampleLedger
from pretrain.checkpoint import files_to_rebuild, newest_checkpoint, restore
from pretrain.checkpoint_record import RunState
from pretrain.checkpoint_store import open_store
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.config import PairingName, PretrainConfig
from pretrain.device_copy import copy_ahead
from pretrain.engine import Engine, build_engine, check_engine, start_accelerator
from pretrain.epoch_account import EpochAccount
from pretrain.fetching_ahead import check_room
from pretrain.gather import gather_objects, on_main_process, rank, world_size
from pretrain.gradient_cache import backward_of_step
from pretrain.launcher import device_type_of
from pretrain.loader_runtimes import LoadSteps, start_loader
from pretrain.micro_batch_size import choose_num_pieces
from pretrain.model import ContrastiveModel, build_model
from pretrain.optimizer import build_optimizer, learning_rate_at
from pretrain.pair_batch import StepBatch
from pretrain.pair_loader import StepDataset
from pretrain.run_folder import RunFolder, refuse_other_run
from pretrain.run_plan import describe_plan
from pretrain.run_requests import RunRequests
from pretrain.step_loss import StepLosses
from pretrain.step_metrics import PhaseTimer, StepOutcome, StepReporter, digest_of_step
from pretrain.teacher import PairingTeacher, load_teachers
from pretrain.tokenizer import Tokenizer, build_tokenizer
from pretrain.tower_compilation import compile_towers
from pretrain.validation import ValidationSet, build_validation_sets, validate

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> None:
    """Runs a config to its last step, from the newest checkpoint of its run folder if it has one.

    Raises:
        InputError: the config, a dataset or the run folder cannot be used.
        RunError: the run cannot go on.
    """
    check_output_folder(config.run.folder, key="run.folder")
    check_engine(config)
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
    accelerator = start_accelerator(config)
    requests.looks_at_files = rank() == 0
    hosts = gather_objects(socket.gethostname())
    dataset = open_dataset(config, tokenizer, hosts=hosts)
    validation_sets = build_validation_sets(config, tokenizer=tokenizer, cache=dataset.cache)
    model = build_training_model(config, tokenizer)
    num_pieces = choose_num_pieces(
        config, model, dataset.layouts, device=accelerator.device, hosts=hosts
    )
    if config.engine.compile:  # after its memory was measured, which follows single operators
        compile_towers(model)
    teachers = load_teachers(config, tokenizer=tokenizer, device=accelerator.device)
    fingerprints = fingerprints_of(dataset, validation_sets, teachers)
    run = open_run(config, fingerprints, hosts=hosts, num_pieces=num_pieces)
    optimizer = build_optimizer(config, model)
    engine = build_engine(config, accelerator, model=model, optimizer=optimizer)
    engine.init_trackers(config)
    with closing(engine):
        first_step = resume(config, engine)
        run.last_checkpoint = first_step or None
        with run.attempt_from(first_step):
            batches = load_batches(load_steps, config, engine, dataset, run)
            take_gradient = partial(
                backward_of_step, engine, config=config, num_pieces=num_pieces, teachers=teachers
            )
            writer = open_writer(config, engine, tokenizer, run)
            train_steps(
                config,
                engine,
                dataset,
                batches,
                validation_sets,
                run,
                take_gradient,
                requests,
                writer,
            )


def build_training_model(config: PretrainConfig, tokenizer: Tokenizer) -> ContrastiveModel:
    """The model, which keeps as few activations as the engine's section says.

    Raises:
        InputError: a tower cannot be built, or has nothing that could be computed again.
    """
    model = build_model(config, tokenizer=tokenizer)
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model)
    return model


def open_dataset(config: PretrainConfig, tokenizer: Tokenizer, *, hosts: list[str]) -> StepDataset:
    """What this rank reads, with the machine of every rank."""
    node_ranks = [number for number, host in enumerate(hosts) if host == hosts[rank()]]
    dataset = StepDataset(
        config,
        tokenizer=tokenizer,
        rank=rank(),
        world_size=world_size(),
        node_ranks=node_ranks,
    )
    check_room(dataset)
    return dataset


def fingerprints_of(
    dataset: StepDataset,
    validation_sets: list[ValidationSet],
    teachers: Mapping[PairingName, PairingTeacher],
) -> dict[str, str]:
    """Of everything a run reads: what must be the same when it is resumed."""
    held_out = {
        f"validation/{each.pairing}": each.reader.samples.fingerprint for each in validation_sets
    }
    of_teachers = {f"teacher/{name}": each.fingerprint for name, each in teachers.items()}
    return dataset.fingerprints() | held_out | of_teachers


def open_run(
    config: PretrainConfig, fingerprints: dict[str, str], *, hosts: list[str], num_pieces: int
) -> RunFolder:
    """This attempt's run folder, refused on every rank if it holds another run."""
    on_main_process(lambda: refuse_other_run(config, fingerprints=fingerprints))
    return RunFolder(
        config,
        fingerprints=fingerprints,
        hosts=hosts,
        num_micro_batches=num_pieces,
        is_writer=rank() == 0,
    )


def resume(config: PretrainConfig, engine: Engine) -> int:
    """Steps already done: those of the newest whole checkpoint, which is loaded."""
    newest = newest_checkpoint(open_store(config.run.checkpoints))
    if newest is None:
        return 0
    restore(engine, newest)
    step = newest.record.state.step
    if engine.is_main_process:
        is_done = step >= config.schedule.num_steps
        how = "nothing is left to do" if is_done else "going on"
        logger.info("%s from %s", how, newest.location)
    return step


def last_step_of(config: PretrainConfig) -> int:
    """Steps done when this attempt ends."""
    return min(config.schedule.num_steps, config.run.stop_after_step or sys.maxsize)


def load_batches(
    load_steps: LoadSteps,
    config: PretrainConfig,
    engine: Engine,
    dataset: StepDataset,
    run: RunFolder,
) -> Iterator[StepBatch]:
    """This rank's share of every step to come, on the device."""
    batches = load_steps(
        dataset,
        first_step=run.num_steps_done,
        last_step=last_step_of(config),
        is_pinned=engine.device.type == "cuda",
    )
    return copy_ahead(batches, device=engine.device)


def open_writer(
    config: PretrainConfig, engine: Engine, tokenizer: Tokenizer, run: RunFolder
) -> CheckpointWriter:
    """What writes this attempt's checkpoints."""
    return CheckpointWriter(
        config.run,
        engine,
        store=open_store(config.run.checkpoints),
        # Only the main process knows it: its row may be there before others count the earlier ones.
        attempt=on_main_process(lambda: run.attempt),
        origin={"strategy": config.engine.strategy},
        model_files=files_to_rebuild(config, engine.model, tokenizer),
        refuse_if_superseded=lambda: None,
    )


def train_steps(
    config: PretrainConfig,
    engine: Engine,
    dataset: StepDataset,
    batches: Iterator[StepBatch],
    validation_sets: list[ValidationSet],
    run: RunFolder,
    take_gradient: Callable[[StepBatch], StepLosses],
    requests: RunRequests,
    writer: CheckpointWriter,
) -> None:
    """The training loop; `step` counts the steps done."""
    first_step, last_step = run.num_steps_done, last_step_of(config)
    timer = PhaseTimer()
    reporter = StepReporter(run, engine, dataset, timer=timer)
    ledger = BadSampleLedger(run, dataset, loading=config.loading)
    account = EpochAccount(dataset, ledger, first_step=first_step)
    engine.train_mode(True)
    request = requests.agreed(device=engine.device)  # during the start
    for step in range(first_step + 1, last_step + 1):
        if request.stops:
            break
        with timer.phase("data"):
            batch = next(batches)
        outcome = train_step(config, engine, batch, timer, take_gradient)
        run.num_steps_done = step
        ledger.enter(batch, device=engine.device)
        reporter.report_epochs(account.enter(batch, device=engine.device))
        reporter.advance()
        request = requests.agreed(device=engine.device)
        is_last = step == last_step
        if is_last or request.stops or step % config.run.log_every_steps == 0:
            reporter.report_step(outcome, digest=digest_of_step(batch, device=engine.device))
        if validation_sets and (is_last or step % config.validation.every_steps == 0):
            with timer.phase("validation"):
                figures = {each.pairing: validate(engine, each) for each in validation_sets}
            reporter.report_validation(figures)
        is_due = step % config.run.checkpoint_every_steps == 0
        if is_last or is_due or request.saves or request.stops:
            with timer.phase("save"):
                writer.save(state_of(run, engine))
            requests.heeded(request)
        with timer.phase("save"):
            writer.advance()
        reporter.report_saves(writer.take_reports())
    writer.finish()
    reporter.report_saves(writer.take_reports())
    writer.refuse_failure()
    if request.stops:
        requests.heeded(request)
        run.stop_cause = request.stop_cause
    reporter.close()


def train_step(
    config: PretrainConfig,
    engine: Engine,
    batch: StepBatch,
    timer: PhaseTimer,
    take_gradient: Callable[[StepBatch], StepLosses],
) -> StepOutcome:
    """One optimizer step.

    Raises:
        RunError: loss or gradient is not finite; the step was not applied.
    """
    learning_rate = learning_rate_at(
        batch.step, peak=config.optimizer.learning_rate, schedule=config.schedule
    )
    try:
        with timer.phase("forward and backward"):
            losses = take_gradient(batch)
        with timer.phase("optimizer"):
            grad_norm = engine.step(learning_rate=learning_rate)
    except FloatingPointError as error:
        raise RunError(
            f"step {batch.step + 1}: {error}; the step was not applied. Lower "
            f"optimizer.learning_rate={config.optimizer.learning_rate:g} or raise "
            f"schedule.warmup_steps={config.schedule.warmup_steps} in a new run folder"
        ) from None
    return StepOutcome(losses, learning_rate, grad_norm)


def state_of(run: RunFolder, engine: Engine) -> RunState:
    """Where the run stands."""
    return RunState(run.num_steps_done, num_updates=engine.num_updates, marks=tuple(run.marks))


def dry_run(config: PretrainConfig) -> None:
    """Builds everything but the process group, and prints the derived numbers."""
    check_output_folder(config.run.folder, key="run.folder")
    check_engine(config)
    num_processes, num_processes_here = (
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    tokenizer = build_tokenizer(config.model.text)
    dataset = StepDataset(config, tokenizer=tokenizer, rank=0, world_size=num_processes)
    build_validation_sets(config, tokenizer=tokenizer, cache=dataset.cache)
    model = build_training_model(config, tokenizer)
    lines = describe_plan(
        config,
        dataset=dataset,
        model=model,
        device=torch.device(device_type_of(config.engine.device)),
        world_size=num_processes,
        num_processes_here=num_processes_here,
    )
    print("\n".join(lines))  # noqa: T201


def main() -> int:
    """The command."""
    return run_command(PretrainConfig, run=pretrain, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
