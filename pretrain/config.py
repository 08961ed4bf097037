"""Settings of a pretraining run, one frozen section per concern; YAML mirrors this tree.

Fields marked `free` may differ when a run is resumed: they change speed or bookkeeping, never the
result. All others are part of the run's identity.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    model_validator,
)

from data_prep.config_file import STORED, Location, Section, free
from pretrain.settings.data import Loading, Stream, StreamName, StreamNameKey
from pretrain.settings.model import PLAIN_NAMES, Model
from pretrain.settings.objectives import ModuleUse
from pretrain.settings.old_form import describe_new_form, has_old_form, in_new_form
from pretrain.settings.optimizer import Optimizer, Schedule
from pretrain.settings.optimizers import OPTIMIZERS
from pretrain.settings.preflight import Preflight
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.settings.views import View, own_features

Precision = Literal["fp32", "bf16"]


# ------------------------------------------------------------------------------------ training


# Fraction of a time-out after which a process without a heartbeat is ended. By then the other
# processes have already failed with the time-out of the process group.
END_FRACTION = 1.5


class Engine(Section):
    """Devices and strategy; except the precision, nothing here changes results beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = free("auto")
    # ddp: each process holds everything (also for a single process). DeepSpeed's ZeRO partitions
    # 0: nothing, 1: the optimizer's state, 2: also gradients, 3: also parameters.
    strategy: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = free("ddp")
    deepspeed_config: Path | None = free(None)  # a file like those in configs/deepspeed/
    precision: Precision = "bf16"  # bf16: autocast, parameters stay fp32
    # How the loss is divided among processes: strip1 computes least, strip2 communicates least.
    loss_mode: Literal["auto", "strip1", "strip2"] = free("auto")
    # Time-outs of a collective: until the end of an attempt's first step, and afterwards. The
    # stacks of a hanging step are written before the time-out; the process is ended after 1.5 times
    # the time-out. The longer time-out also applies to waiting for a checkpoint.
    start_timeout_seconds: PositiveFloat = free(1800.0)
    timeout_seconds: PositiveFloat = free(600.0)
    activation_checkpointing: bool = free(False)  # trained towers: less memory, a third slower
    compile: bool = free(False)  # torch.compile for towers: compiles for minutes, then runs faster
    # Bitwise equal results in every run on the same number and kind of GPUs: otherwise, some
    # operators sum in varying order. Slower; an operator without a deterministic form raises
    deterministic: bool = free(False)


class Watch(Section):
    """Handling of non-finite and anomalous steps.

    A step whose loss or gradient is not finite is never applied. So nothing here changes a result,
    only whether a run continues.
    """

    # After a non-finite step: stop the run, or skip the step and continue
    on_non_finite: Literal["stop", "skip"] = free("stop")
    max_skipped_steps: PositiveInt = free(3)  # within skip_window_steps; one more stops the run
    skip_window_steps: PositiveInt = free(1000)
    # Values above this factor times their median over window_steps are reported in the metrics
    loss_spike_factor: float = free(2.0, gt=1)
    grad_norm_spike_factor: float = free(5.0, gt=1)
    window_steps: int = free(100, ge=20)
    slow_step_factor: float = free(2.0, gt=1)  # slow: above this factor times the median duration
    # number of consecutive slow steps after which they are reported with the slowest process
    slow_steps: PositiveInt = free(10)


class ValidationSource(Section):
    """Held-out pairs of one stream."""

    dataset: Location = free()  # folder or URL
    subset: Location | None = free(None)
    batch_size: PositiveInt  # pairs contrasted with one another; affects the metrics


class Validation(Section):
    """Loss and in-batch recall on held-out pairs during training."""

    every_steps: PositiveInt = free(1000)
    # measure the averages of the weights (optimizer.ema), too: metrics `validation_ema`
    ema: bool = free(False)
    streams: dict[StreamName, ValidationSource] = {}


class Fork(Section):
    """How a fork starts; it is recorded in the fork's own config."""

    # Step of the parent's checkpoint that the fork starts from; null: the newest valid checkpoint
    step: int | None = Field(None, ge=0)
    # continue: the parent's steps, optimizer state and sample order go on. restart: as in a new run
    # with the parent's weights, steps, warm-up, decay, optimizer state and sample order begin anew
    schedule: Literal["continue", "restart"] = "continue"


# The discriminator limits an error message to the form that was used.
ForkOption = Annotated[
    Annotated[bool, Tag("flag")] | Annotated[Fork, Tag("options")],
    Discriminator(lambda value: "options" if isinstance(value, dict | Fork) else "flag"),
]


class Run(Section):
    """The run folder and its files."""

    folder: Path = free()
    log_every_steps: PositiveInt = free(10)
    checkpoint_every_steps: PositiveInt = free(1000)
    checkpoint_every_minutes: PositiveFloat | None = free(
        None
    )  # additional checkpoints; null: none
    # Folder or URL (s3://, gs://, ...) of the checkpoints; null: checkpoints/ in the run folder
    checkpoint_folder: Location | None = free(None)
    # number of consecutive failed checkpoints at which the run stops
    max_failed_saves: PositiveInt = free(3)
    keep_checkpoints: PositiveInt = free(3)  # number of newest checkpoints; older ones are deleted
    # checkpoints at multiples of this are never deleted; null: all may be
    keep_every_steps: PositiveInt | None = free(None)
    trackers: list[Literal["tensorboard", "wandb"]] = free(["tensorboard"])
    stop_after_step: PositiveInt | None = free(None)  # end this attempt early, with a checkpoint
    # Start a new run from a checkpoint of the run in `folder`, in a folder next to it; true: from
    # the newest one; {step: 4000, schedule: restart}: from another one, or with a new schedule
    fork: ForkOption = free(False)
    # Folder of the run that this one starts from; set by `fork`, or by you to choose `folder`
    parent: Path | None = free(None)

    @property
    def start(self) -> Fork:
        """How the run starts if it is a fork."""
        return self.fork if isinstance(self.fork, Fork) else Fork()

    @property
    def checkpoints(self) -> str:
        """Folder or URL of the checkpoints."""
        return self.checkpoint_folder or str(self.folder / "checkpoints")

    @model_validator(mode="after")
    def _has_one_parent(self) -> Run:
        if self.fork is True and self.parent is not None:
            raise ValueError("fork=true starts from the run in folder; remove fork or parent")
        if self.parent is not None and self.parent.resolve() == self.folder.resolve():
            raise ValueError(f"parent={self.parent} is the run's own folder; use another folder")
        return self

    @model_validator(mode="after")
    def _writes_what_it_keeps(self) -> Run:
        kept, written = self.keep_every_steps, self.checkpoint_every_steps
        if kept is not None and kept % written:
            raise ValueError(
                f"keep_every_steps={kept} is not a multiple of checkpoint_every_steps={written}; "
                f"use {max(1, kept // written) * written}"
            )
        return self


class PretrainConfig(Section):
    """Config of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    lanes: PositiveInt  # divides every stream's global_batch_size; at most this many processes
    # Pairs of a stream that a process encodes at once; auto: as many as fit into memory.
    micro_batch_size: PositiveInt | Literal["auto"] = free("auto")
    run: Run
    model: Model
    image: ImageTransform = ImageTransform()
    audio: AudioTransform = AudioTransform()
    streams: dict[StreamNameKey, Stream] = Field(min_length=1)
    # all: every step takes all streams; one: every step takes one stream, chosen by weight
    streams_per_step: Literal["all", "one"] = "all"
    loading: Loading = Loading()
    optimizer: Optimizer
    schedule: Schedule
    engine: Engine = Engine()
    watch: Watch = Watch()
    validation: Validation = Validation()
    preflight: Preflight = Preflight()

    @model_validator(mode="before")
    @classmethod
    def _replace_old_form(cls, values: Any, info: ValidationInfo) -> Any:
        if not has_old_form(values):
            return values
        if info.context == STORED:
            return in_new_form(values)
        raise ValueError(
            "`pairings` are `streams` with objectives now; write:\n" + describe_new_form(values)
        )

    @model_validator(mode="after")
    def _batches_divide(self) -> PretrainConfig:
        for name, stream in self.streams.items():
            size, lanes = stream.global_batch_size, self.lanes
            if size % lanes:
                fitting = [n for n in (size // lanes * lanes, -(-size // lanes) * lanes) if n]
                raise ValueError(
                    f"streams.{name}.global_batch_size={size} is not a multiple of lanes={lanes}; "
                    f"use {' or '.join(map(str, fitting))}, or lanes={math.gcd(size, lanes)}"
                )
        return self

    @model_validator(mode="after")
    def _towers_exist(self) -> PretrainConfig:
        kinds, used = self.model.kinds, set()
        for key, objective in self.objectives.items():
            for view in map(View.parse, objective.views(key.partition("/")[2])):
                if view.modality not in kinds:
                    raise ValueError(
                        f"streams.{key.replace('/', '.objectives.')} reads {str(view)!r}: expected "
                        f"a modality of the model ({', '.join(kinds)}); set model."
                        f"{view.modality if view.modality in PLAIN_NAMES else 'modalities'}"
                    )
                if kinds[view.modality] == "vector" and view.augmentation > 1:
                    raise ValueError(
                        f"streams.{key.replace('/', '.objectives.')} reads {str(view)!r}: a vector "
                        f"has no second augmentation; expected {view.modality!r} (an embedding "
                        "that eval.embed stored is that of one crop: use the images and a tower)"
                    )
                if not (objective.projects or objective.reads_tokens):
                    used.add(self.model.tower_of(view.modality))
        for tower in self.model.towers:
            if tower not in used:
                raise ValueError(
                    f"{self.model.tower_key(tower)} is used by no objective that trains its "
                    f"projection: add one, such as {tower}-text, to a stream, or remove the tower"
                )
        return self

    @model_validator(mode="after")
    def _modules_agree(self) -> PretrainConfig:
        first: dict[str, ModuleUse] = {}
        for uses in self.modules.values():
            for use in uses:
                other = first.setdefault(use.module, use)
                if use.section.model_copy(update={"weight": other.section.weight}) != other.section:
                    raise ValueError(
                        f"{other.where} and {use.where} share a module, because their names and "
                        "towers are equal: expected the same settings but for their weights; "
                        "rename one of them, or set them alike"
                    )
        return self

    @model_validator(mode="after")
    def _nested_embeddings_are_shorter(self) -> PretrainConfig:
        for key, objective in self.objectives.items():
            longest = max(objective.nested_dims, default=0)
            if longest >= self.model.embed_dim:
                raise ValueError(
                    f"streams.{key.replace('/', '.objectives.')}.matryoshka_dims: expected numbers "
                    f"below model.embed_dim={self.model.embed_dim}, found {longest}; the loss of "
                    "all numbers is always included"
                )
        return self

    @model_validator(mode="after")
    def _validation_streams_exist(self) -> PretrainConfig:
        for name in self.validation.streams:
            if name not in self.streams:
                raise ValueError(f"validation.streams.{name}: expected one of {list(self.streams)}")
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> PretrainConfig:
        reason, strategy = self.optimizer.row.needs_whole, self.engine.strategy
        if reason is not None and strategy in ("zero1", "zero2", "zero3"):
            others = [name for name, row in OPTIMIZERS.items() if row.needs_whole is None]
            raise ValueError(
                f"optimizer.name={self.optimizer.name} with engine.strategy={strategy}: it needs "
                f"whole tensors, because {reason}, and this strategy gives every process parts of "
                f"them; use engine.strategy=ddp or zero0, or one of {', '.join(others)}"
            )
        if self.validation.ema and self.optimizer.ema is None:
            raise ValueError(
                "validation.ema=true measures averages of the weights, which the run does not "
                "keep: set optimizer.ema, such as optimizer.ema.decay=0.9999, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _temperatures_agree(self) -> PretrainConfig:
        first: dict[str, tuple[str, bool]] = {}
        for key, objective in self.objectives.items():
            name = objective.temperature_name(key.partition("/")[2])
            if name is None:
                continue
            other, has_bias = first.setdefault(name, (key, objective.has_bias))
            if has_bias != objective.has_bias:
                raise ValueError(
                    f"{other} and {key} share the temperature {name!r}, but only one of them has a "
                    "bias (loss=sigmoid); set `temperature` of one of them to another name"
                )
        return self

    @model_validator(mode="after")
    def _weights_count(self) -> PretrainConfig:
        for name, stream in self.streams.items():
            if self.streams_per_step == "all" and stream.weight != 1:
                raise ValueError(
                    f"streams.{name}.weight={stream.weight:g} with streams_per_step=all: every "
                    "step takes all streams; set the weight of its objectives instead"
                )
        return self

    @property
    def temperatures(self) -> dict[str, bool]:
        """Name of each learned temperature -> whether it has a bias."""
        return {
            name: section.has_bias
            for key, section in self.objectives.items()
            if (name := section.temperature_name(key.partition("/")[2])) is not None
        }

    @property
    def towers_of_temperatures(self) -> dict[str, list[str]]:
        """Names of the towers whose features each learned temperature scales."""
        towers: dict[str, list[str]] = {name: [] for name in self.temperatures}
        for key, section in self.objectives.items():
            objective = key.partition("/")[2]
            if (name := section.temperature_name(objective)) is not None:
                towers[name] += [
                    self.model.tower_of(View.parse(view).modality)
                    for view in section.views(objective)
                ]
        return {name: list(dict.fromkeys(each)) for name, each in towers.items()}

    @property
    def parts_of_streams(self) -> dict[StreamName, list[str]]:
        """Names of the towers, temperatures, projections and modules that each stream trains."""
        parts = {
            name: [each for _, each, _ in self.heads[name]] + [u.module for u in self.modules[name]]
            for name in self.streams
        }
        for key, section in self.objectives.items():
            stream, _, objective = key.partition("/")
            views = map(View.parse, section.views(objective))
            parts[stream] += [self.model.tower_of(view.modality) for view in views]
            parts[stream] += [section.temperature_name(objective) or ""]
        return {name: [n for n in dict.fromkeys(each) if n] for name, each in parts.items()}

    @property
    def heads(self) -> dict[StreamName, list[tuple[str, str, str]]]:
        """Projections of objectives: (name of the features, of the projection, of its tower).

        Objectives of the same name share them.
        """
        heads: dict[StreamName, list[tuple[str, str, str]]] = {name: [] for name in self.streams}
        for key, section in self.objectives.items():
            stream, _, objective = key.partition("/")
            for view in section.views(objective) if section.projects else ():
                tower = self.model.tower_of(View.parse(view).modality)
                heads[stream].append((own_features(view, objective), f"{objective}:{tower}", tower))
        return heads

    @property
    def modules(self) -> dict[StreamName, list[ModuleUse]]:
        """Modules of objectives that read tokens; those of the same name and towers share one."""
        uses: dict[StreamName, list[ModuleUse]] = {name: [] for name in self.streams}
        for key, section in self.objectives.items():
            stream, _, objective = key.partition("/")
            if section.reads_tokens:
                views = section.views(objective)
                towers = tuple(self.model.tower_of(View.parse(view).modality) for view in views)
                where = f"streams.{stream}.objectives.{objective}"
                module = f"{objective}:{'-'.join(towers)}"
                uses[stream].append(ModuleUse(objective, module, views, towers, section, where))
        return uses

    @property
    def matryoshka_dims(self) -> list[int]:
        """Numbers of first elements that some objective trains of embeddings, in rising order.

        Objectives with projections of their own train other features than embeddings.
        """
        sections = [each for each in self.objectives.values() if not each.projects]
        return sorted({dim for each in sections for dim in each.nested_dims})

    @property
    def contrasted_width(self) -> int:
        """Most numbers per sample and view that a stream's losses read, with nested embeddings."""
        nested = (
            sum(sum(each.nested_dims) for each in stream.objectives.values())
            for stream in self.streams.values()
        )
        return self.model.embed_dim + max(nested)

    @property
    def objectives(self) -> dict[str, Any]:
        """All objectives, by "<stream>/<objective>"."""
        return {
            f"{name}/{objective}": section
            for name, stream in self.streams.items()
            for objective, section in stream.objectives.items()
        }
