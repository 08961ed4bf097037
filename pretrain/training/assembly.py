"""The parts of a training run, each built from the config sections that it needs.

Only these functions and the command itself take the whole config.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from data_prep.errors import InputError
from pretrain.cache.shard_cache import ShardCache
from pretrain.checkpoint import build_model_of, files_to_rebuild
from pretrain.checkpoints.store import open_store
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.config import Engine as EngineSection
from pretrain.config import PretrainConfig
from pretrain.data.datasets import build_cache
from pretrain.data.first_samples import first_samples
from pretrain.data.step_loader import StepLoader
from pretrain.data.stream_reader import open_readers, with_transforms
from pretrain.data.transforms import build_transforms_by_step
from pretrain.data.unused_parts import warn_of_unread_modalities, warn_of_unserved_objectives
from pretrain.distributed.backward_scale import backward_scale, divide_gradients
from pretrain.distributed.collectives import on_main_process, world_size
from pretrain.distributed.engine import Engine
from pretrain.model.activation_checkpointing import checkpoint_blocks
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.model.sample_dropout import patch_dropouts
from pretrain.model.source_files import tokenizer_files, tower_files
from pretrain.model.tokenizer import Tokenizer, build_text_tokenizer
from pretrain.model.vector_inputs import standardize_vectors
from pretrain.monitoring.hang_watch import HangWatch
from pretrain.optimization.optimizer import RunOptimizer, build_optimizer
from pretrain.optimization.parameter_groups import describe_groups
from pretrain.optimization.parameter_traits import refuse_untrained_streams, set_traits
from pretrain.probe.towers import ProbeSettings, probe_model
from pretrain.run.compatibility import DRAWS, RunIdentity, holds_run
from pretrain.run.folder import RunFolder
from pretrain.run.fork import origin_of_checkpoints
from pretrain.run.model_sources import ModelSources
from pretrain.run.requests import RunRequests
from pretrain.sampling.keyed_random import DRAWS_VERSION
from pretrain.sampling.mixing import MIXING_VERSION
from pretrain.sampling.order import lanes_of_rank
from pretrain.sampling.repeats import check_repeats
from pretrain.sampling.schedule import build_schedule
from pretrain.settings.data import StreamName
from pretrain.settings.model import MediaTower
from pretrain.settings.views import View
from pretrain.teachers.loaded_teacher import shapes_of
from pretrain.teachers.teacher_inputs import ModelInputs
from pretrain.towers.image_sizes import refuse_deterministic_sizes
from pretrain.towers.measured_statistics import measure_statistics
from pretrain.towers.own_preprocessing import refuse_other_preprocessing
from pretrain.training.distillation import ObjectiveTeacher, formats_of_teachers, load_teachers
from pretrain.training.loop import TrainerSettings
from pretrain.training.objective_step import ObjectiveStep
from pretrain.training.session import RunSession
from pretrain.training.step_loss import StreamObjectives, build_objectives
from pretrain.training.validation import ValidationSet, build_validation_sets
from pretrain.warm_start.model_start import all_starts, start_key, start_model
from pretrain.warm_start.needs import module_starts, refuse_unfetched
from pretrain.warm_start.source import folder_of

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def open_step_loader(
    config: PretrainConfig,
    tokenizer: Tokenizer | None,
    *,
    rank: int,
    world_size: int,
    node_ranks: Sequence[int] | None = None,
    teachers: Mapping[str, ObjectiveTeacher] | None = None,
) -> StepLoader:
    """Opens the datasets of a run and builds the schedule of their samples.

    Args:
        config: the whole config.
        tokenizer: tokenizer of texts; None without a text tower.
        rank: rank that reads.
        world_size: number of processes.
        node_ranks: all ranks on the same machine; None if `rank` is the only one.
        teachers: teachers, which may read images and texts in a form of their own.

    Raises:
        InputError: if a dataset cannot be used, or there are more processes than lanes.
        RunError: if a dataset behind a URL cannot be reached.
    """
    lanes_of_rank(rank, world_size=world_size, lanes=config.lanes)  # before anything is opened
    cache = build_cache(config.loading)
    transforms = build_transforms_by_step(config.model, image=config.image, audio=config.audio)
    readers = open_readers(
        config.streams,
        config.loading,
        model=config.model,
        transforms=transforms.pop(0),
        tokenizer=tokenizer,
        seed=config.seed,
        cache=cache,
        teacher_formats=formats_of_teachers(teachers or {}),
    )
    schedule = build_schedule(
        config.streams,
        {name: [each.samples for each in reader.sources] for name, reader in readers.items()},
        streams_per_step=config.streams_per_step,
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
        later_readers={
            step: with_transforms(
                readers, config.streams, model=config.model, transforms=each, tokenizer=tokenizer
            )
            for step, each in transforms.items()
        },
    )


def check_repeated_samples(config: PretrainConfig, loader: StepLoader) -> None:
    """Warns of samples that a step holds more than once; for the main process.

    Raises:
        InputError: if the run is new, and too many pairs of its steps are repeats.
    """
    check_repeats(
        config.streams,
        loader.schedule,
        datasets={
            name: [each.dataset.info.fingerprint for each in reader.sources]
            for name, reader in loader.readers.items()
        },
        is_new_run=not holds_run(config.run.folder),
    )


def warn_of_unused_parts(config: PretrainConfig, loader: StepLoader) -> None:
    """Warns of objectives without samples and modalities without objectives; main process only."""
    warn_of_unserved_objectives(loader.readers)
    warn_of_unread_modalities(config.model, config.streams)


def open_validation_sets(
    config: PretrainConfig, tokenizer: Tokenizer | None, *, cache: ShardCache | None = None
) -> list[ValidationSet]:
    """Opens the held-out pairs of a run.

    Args:
        config: the whole config.
        tokenizer: tokenizer of texts; None without a text tower.
        cache: this machine's cache, for datasets behind URLs.

    Raises:
        InputError: if a dataset is missing, empty, or of the wrong kind.
    """
    return build_validation_sets(
        config.validation,
        streams=config.streams,
        engine=config.engine,
        model=config.model,
        transforms=build_transforms_by_step(config.model, image=config.image, audio=config.audio),
        tokenizer=tokenizer,
        retries=config.loading.retries,
        cache=cache,
    )


def build_training_tokenizer(sources: ModelSources) -> Tokenizer | None:
    """Builds the tokenizer of texts; None if the model has no text tower.

    Raises:
        InputError: if it cannot be loaded.
    """
    config = sources.config.model
    return sources.build(
        tokenizer_files(config.text).keys(),
        lambda assets: build_text_tokenizer(config, assets=assets),
    )


def build_training_model(
    sources: ModelSources, tokenizer: Tokenizer | None, *, device: torch.device = CPU
) -> ContrastiveModel:
    """Builds the model, with activation checkpointing if the config enables it.

    Every rank must call it: the main process probes the towers as training will run them.

    Args:
        sources: sources of the towers, with the whole config.
        tokenizer: tokenizer of texts; None without a text tower.
        device: device of the probe; the model stays on the CPU.

    Raises:
        InputError: if a tower cannot be built, has no blocks to recompute, or fails the probe.
        ConfigError: if the preprocessing of media differs from that of a tower's weights, or a
            setting of parameters does not fit the model.
    """
    config = sources.config

    def build(assets: Path | None) -> ContrastiveModel:
        if assets is None:
            refuse_unfetched(config.model, module_starts(config))
            refuse_other_preprocessing(
                config.model, image=config.image, audio=config.audio, folder_of=folder_of
            )
        model = build_model_of(config, tokenizer, assets=assets)
        if assets is None:  # otherwise, resuming loads all weights
            towers = config.towers_of_temperatures
            sources.warm_start = start_model(
                model, config.model, towers=towers, modules=config.modules
            )
        set_traits(model, config.optimizer, sections=config.model)
        refuse_untrained_streams(model, config.parts_of_streams)
        return model

    keys = [*tower_files(config.model), *map(start_key, all_starts(config))]
    model = sources.build(keys, build)
    if config.image.patch_dropouts and not patch_dropouts(model):
        raise InputError(
            "image.segments set patch_dropout: expected an image tower that drops patches from the "
            "first step on, found none; set its options: {patch_drop_rate: 0.5} (timm) or "
            "{force_patch_dropout: 0.5} (open_clip)"
        )
    if config.engine.deterministic and device.type == "cuda" and len(config.image.sizes) > 1:
        for name in config.model.towers:
            if config.model.kinds[name] == "image":
                refuse_deterministic_sizes(
                    model.towers[name].backbone, where=config.model.tower_key(name)
                )
    settings = ProbeSettings(
        device,
        is_bf16=config.engine.precision == "bf16",
        is_checkpointed=config.engine.activation_checkpointing,
    )
    model.takes_trimmed_captions = on_main_process(
        lambda: probe_model(
            model, tokenizer=tokenizer, image=config.image, audio=config.audio, settings=settings
        )
    )
    if config.engine.activation_checkpointing:
        checkpoint_blocks(model)
    return model


def measure_batch_norms(
    config: PretrainConfig, model: ContrastiveModel, loader: StepLoader
) -> None:
    """Sets the statistics of frozen batch norms in towers that begin without weights.

    The main process measures them on the first samples of the run; every rank must call it. A run
    with a checkpoint, or with a parent, loads them instead.

    Raises:
        InputError: if a dataset cannot be read.
    """
    names = [
        name
        for name, tower in config.model.towers.items()
        if isinstance(tower, MediaTower)
        and tower.batch_norm == "frozen"
        and not (tower.pretrained or tower.start)
    ]
    if not names or config.run.parent is not None:
        return
    if on_main_process(lambda: bool(open_store(config.run.checkpoints).checkpoints())):
        return
    for name in names:
        buffers = on_main_process(lambda: _measured(config, model, loader, name))  # noqa: B023
        model.towers[name].backbone.load_state_dict(buffers, strict=False)


def _measured(
    config: PretrainConfig, model: ContrastiveModel, loader: StepLoader, name: str
) -> dict[str, torch.Tensor]:
    tower, section = model.towers[name], config.model.towers[name]
    views = [view for stream in config.streams.values() for view in stream.views]
    samples = first_samples(
        loader,
        next(v for v in views if config.model.tower_of(View.parse(v).modality) == name),
        num_samples=section.batch_norm_samples,
        num_steps=config.schedule.num_steps,
    )
    buffers = measure_statistics(tower.backbone, map(tower.input_stage, samples))
    if not buffers:
        raise InputError(
            f"{config.model.tower_key(name)}.batch_norm: none of the run's first "
            f"{section.batch_norm_samples} samples has its modality; raise batch_norm_samples, or "
            "start from weights"
        )
    num_samples = max((int(each) for each in buffers.values() if each.ndim == 0), default=0)
    logger.info(
        "%s: statistics of batch norm measured on the run's first %d samples",
        config.model.tower_key(name),
        num_samples,
    )
    return buffers


def standardize_inputs(config: PretrainConfig, model: ContrastiveModel, loader: StepLoader) -> None:
    """Sets the statistics of the vector towers to those of the data that the run starts with.

    Raises:
        InputError: if a dataset does not record them, or only a later segment has the vectors.
    """
    first = {
        name: {each.name for each in stream.sources} for name, stream in config.streams.items()
    }
    sources = [
        source
        for name, reader in loader.readers.items()
        for source in reader.sources
        if source.source in first[name]
    ]
    standardize_vectors(model, config.model, sources)


def open_teachers(
    config: PretrainConfig, tokenizer: Tokenizer | None, *, device: torch.device
) -> dict[str, ObjectiveTeacher]:
    """Loads the teachers of the objectives with distillation.

    Raises:
        InputError: if a model is missing, or cannot read what the model in training reads.
    """
    return load_teachers(
        config.streams,
        inputs=ModelInputs(config.image, config.audio, tokenizer, shapes_of(config.model)),
        device=device,
        is_autocast=config.engine.precision == "bf16",
    )


def fingerprints_of(
    loader: StepLoader,
    validation_sets: Sequence[ValidationSet],
    teachers: Mapping[str, ObjectiveTeacher],
    sources: ModelSources,
) -> dict[str, str]:
    """Returns the fingerprints of everything that a run reads: a resumed run must have the same.

    Every rank must call it.
    """
    held_out = {
        f"validation/{each.stream}": each.reader.samples.fingerprint for each in validation_sets
    }
    teachers_by_key = {f"teacher/{name}": each.fingerprint for name, each in teachers.items()}
    mixing = {
        f"mixing/{name}": f"version {MIXING_VERSION}"
        for name, order in loader.schedule.orders.items()
        if len(order.sources) > 1
    }
    of_model = on_main_process(sources.fingerprints)
    draws = {DRAWS: f"version {DRAWS_VERSION}"}
    return loader.fingerprints() | held_out | teachers_by_key | mixing | draws | of_model


def build_training_optimizer(config: PretrainConfig, model: ContrastiveModel) -> RunOptimizer:
    """Builds the optimizer of all parameters that are trained at any step."""
    return build_optimizer(
        config.optimizer,
        model,
        max_scale=config.model.logit_scale.maximum,
        traits=set_traits(model, config.optimizer, sections=config.model),
    )


def describe_parameter_groups(config: PretrainConfig, model: ContrastiveModel) -> list[str]:
    """Describes learning rate, weight decay and first step of all parameters, line by line."""
    optimizer = config.optimizer
    lines = describe_groups(
        model,
        weight_decay=optimizer.weight_decay,
        learning_rate=optimizer.learning_rate,
        traits=set_traits(model, optimizer, sections=config.model),
    )
    return list(lines)


def build_run_objectives(
    config: PretrainConfig, *, world_size: int
) -> dict[StreamName, StreamObjectives]:
    """Builds the objectives of every stream, for a number of processes."""
    return build_objectives(
        config.streams,
        lanes=config.lanes,
        mode=config.engine.loss_mode,
        precision=config.engine.precision,
        world_size=world_size,
    )


def build_step(
    config: PretrainConfig,
    engine: Engine,
    *,
    num_micro_batches: int,
    teachers: Mapping[str, ObjectiveTeacher] | None = None,
) -> ObjectiveStep:
    """Builds the training step for all processes of the group."""
    objectives = build_run_objectives(config, world_size=world_size())
    scale = backward_scale(config.engine.precision, num_processes=world_size())
    divide_gradients(engine.model, scale)
    return ObjectiveStep(
        engine,
        objectives,
        num_micro_batches=num_micro_batches,
        teachers=teachers,
        patch_dropouts=config.image.patch_dropouts,
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


def build_session(
    config: EngineSection, run: RunFolder, requests: RunRequests, *, hosts: Sequence[str]
) -> RunSession:
    """Builds the session of this attempt, with the hang watch of this rank.

    Args:
        config: config section `engine`.
        run: run folder.
        requests: signals and files that ask the run to save or stop.
        hosts: [ranks] machine names.
    """
    hang_watch = HangWatch(
        run.folder,
        run.attempt.attempt,
        timeout_seconds=config.timeout_seconds,
        start_timeout_seconds=config.start_timeout_seconds,
    )
    return RunSession(run, requests, hang_watch, hosts=hosts)


def open_writer(
    identity: RunIdentity, engine: Engine, tokenizer: Tokenizer | None, run: RunFolder
) -> CheckpointWriter:
    """Opens the writer of this attempt's checkpoints; every rank must call it."""
    config = identity.config
    origin = partial(
        origin_of_checkpoints,
        run.folder,
        strategy=config.engine.strategy,
        fingerprints=identity.fingerprints,
    )
    return CheckpointWriter(
        config.run,
        engine,
        store=open_store(config.run.checkpoints),
        attempt=run.attempt.attempt,
        origin=on_main_process(origin),
        model_files=files_to_rebuild(config, engine.model, tokenizer),
        refuse_if_superseded=run.refuse_if_superseded,
    )
