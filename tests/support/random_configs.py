"""Random configs of small runs that the checks of pretraining accept, and attempts at these runs.

A run is a function of its seed. Its fixed settings decide its result. Each attempt has settings of
its own for the fields marked `free`, which must not change the result. LEFT_OUT lists the settings
that are never drawn, with the reasons.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig
from tests.support.killed_runs import HOW, MOMENTS, OF_MAIN_PROCESS, TIMEOUT_SECONDS, Kill
from tests.support.random_towers import draw_audio, draw_image, draw_model
from tests.support.random_views import (
    agree_on_temperatures,
    draw_modalities,
    draw_view_objectives,
    modalities_of,
)
from tests.support.toy_material import DATASETS, TEACHER_TEXTS, ToyMaterial

OF_CAPTIONS = "captions need a causal text tower; tests/pretrain/objectives/test_captioning.py"
OF_PREPROCESSING = "it is a function of one sample; tests/pretrain/towers compare it"
OF_OPTIMIZERS = "tests/pretrain/distributed/test_optimizers.py compares all strategies"
# Settings of towers that are never drawn.
OF_TOWERS = {
    "start": "only step 0 depends on it; tests/pretrain/warm_start compare it",
    "attention_dropout": "it only sets options of the library",
    "pooling": "tests/pretrain/towers compare poolings",
    "batch_norm": "tests/pretrain/towers train HTSAT with it",
    "batch_norm_samples": "tests/pretrain/towers train HTSAT with it",
    "cleaning": OF_PREPROCESSING,
}
NOT_OF_TOWERS = {
    ("text", "pooling"),  # drawn
    *(("text", name) for name in ("batch_norm", "batch_norm_samples")),  # these do not exist
    *((kind, "cleaning") for kind in ("image", "audio")),
}
# Field, or section, of PretrainConfig -> the reason why it is never drawn.
LEFT_OUT = {
    "run.folder": "the folder of the comparison",
    "run.fork": "a fork's result is not a function of its config",
    "run.parent": "a fork's result is not a function of its config",
    "preflight": "only pretrain.preflight reads it",
    "optimizer.eps": "1e-4: with less, AdamW turns the rounding noise of key biases into steps",
    "optimizer.name": OF_OPTIMIZERS,
    "optimizer.options": OF_OPTIMIZERS,
    "optimizer.ema": OF_OPTIMIZERS,
    "validation.ema": OF_OPTIMIZERS,
    "engine.precision": "bf16 amplifies rounding above the tolerances of the comparison",
    "engine.device": "tests run on the CPU",
    "engine.compile": "it compiles for minutes",
    "engine.timeout_seconds": "the result of a time-out depends on how busy the machine is",
    "engine.start_timeout_seconds": "the result of a time-out depends on how busy the machine is",
    "streams.*.objectives.*.kind": OF_CAPTIONS,
    **{
        f"streams.*.objectives.*.{name}": OF_CAPTIONS
        for name in (
            *("media", "text", "name", "layers", "heads", "num_queries", "pooler_heads"),
            "start",
        )
    },
    "image.segments": "tests/pretrain/training/test_image_segments.py has them",
    "image.longer_side": OF_PREPROCESSING,
    "image.crop_fraction": OF_PREPROCESSING,
    "audio.log_mel.frontend": OF_PREPROCESSING,
    "audio.log_mel.num_frames": OF_PREPROCESSING,
    "audio.log_mel.window_samples": OF_PREPROCESSING,
    **{
        f"model.{kind}.{name}": reason
        for kind in ("image", "audio", "text")
        for name, reason in OF_TOWERS.items()
        if (kind, name) not in NOT_OF_TOWERS
    },
    **{
        f"model.modalities.*.tower.{name}": reason
        for name, reason in OF_TOWERS.items()
        if name != "pooling"
    },
    "model.modalities.*.tower.pretrained": "the plain towers draw it",
    "model.modalities.*.tower.tokenizer": "all texts have the tokenizer of model.text",
}
# Field -> choices that are never drawn.
LEFT_OUT_VALUES = {
    "run.trackers": ["wandb"],  # it needs an account
    "model.audio.library": ["open_clip"],  # it has no audio towers
    # the towers of torch are those of tests/pretrain/towers
    "model.text.library": ["torch"],
    "model.modalities.*.tower.library": ["torch"],
    "model.text.pooling": ["own", "last", "max"],  # not every text tower has them
    "model.modalities.*.tower.pooling": ["own", "first", "last", "max"],  # the plain towers draw it
    "audio.log_mel.mel_scale": ["kaldi"],  # of a front end that is left out
    **{
        f"model.{tower}.projection": ["open_clip_mlp", "none"]  # mlp is alike; none needs a width
        for tower in ("image", "audio", "text", "modalities.*.tower")
    },
}
# zero3 takes several times as long: it is drawn more rarely, and with few processes.
STRATEGIES = ("zero0", "zero1", "zero1", "zero2", "zero2", "zero3")
# "any" is a moment by the clock, which no seed repeats.
REPEATABLE_MOMENTS = tuple(moment for moment in MOMENTS if moment != "any")
LARGEST_BATCH = 24


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    world_size: int
    free: dict[str, Any]  # values of sections, without those that the fixed settings hold
    cached: tuple[str, ...]  # datasets that are read from a URL through the cache
    kill: Kill | None

    def __str__(self):
        engine, size = self.free["engine"], self.free["micro_batch_size"]
        end = self.free["run"].get("stop_after_step")
        end = self.kill or (f"stop after step {end}" if end else "to the end")
        return f"{self.world_size} x {engine['strategy']}, micro-batches of {size}: {end}"


@dataclass(frozen=True)
class RandomRun:
    """A run and the attempts at it; the last attempt is not killed."""

    seed: int
    fixed: dict[str, Any]
    attempts: tuple[Attempt, ...]

    def config_alone(self, folder: Path) -> PretrainConfig:
        """Returns the config for one process that is not killed and has one micro-batch a step."""
        free = {
            "micro_batch_size": LARGEST_BATCH,
            "run": {"log_every_steps": 1, "trackers": []},
            "loading": {"num_workers": 0}
            | dict.fromkeys(("max_bad_fraction", "max_bad_fraction_per_shard"), 1.0),
            "engine": {"strategy": "ddp"},
            "validation": {"every_steps": 1},
        }
        return self._config(folder, free)

    def config_of(self, attempt: Attempt, folder: Path) -> PretrainConfig:
        """Returns the config of an attempt."""
        return self._config(folder, attempt.free, cached=attempt.cached)

    def _config(self, folder, free, *, cached=()):
        values = merged(self.fixed, free)
        values["run"]["folder"] = folder
        if (elsewhere := values["run"]["checkpoint_folder"]) is not None:
            values["run"]["checkpoint_folder"] = folder.with_name(elsewhere.format(folder.name))
        if cached:
            values["loading"]["cache"]["folder"] = folder.parent / "cache"
        values["engine"] |= dict.fromkeys(
            ("timeout_seconds", "start_timeout_seconds"), TIMEOUT_SECONDS
        )
        for source in _sources_in(values):
            if Path(source["dataset"]).name in cached:
                for key in ("dataset", "subset"):
                    source[key] = None if source[key] is None else f"file://{source[key]}"
        return PretrainConfig.model_validate(values)

    def __str__(self):
        return f"seed {self.seed}: " + "; ".join(map(str, self.attempts))


def draw_run(seed: int, material: ToyMaterial, *, redraw: int = 0) -> RandomRun:
    """Returns the run of a seed; those of other values of `redraw` replace it if it is refused."""
    rng = random.Random(f"{seed}/{redraw}")
    fixed = _draw_fixed(rng, material)
    attempts = []
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        attempts.append(_draw_attempt(rng, fixed, material, is_last=False))
    attempts.append(_draw_attempt(rng, fixed, material, is_last=True))
    return RandomRun(seed, fixed, tuple(attempts))


# ------------------------------------------------------------------------------ what decides


def _draw_fixed(rng, material):
    lanes = rng.choice((2, 3, 4, 5, 6, 7, 8))
    names = rng.choice(
        (
            ["image-text"],
            ["image-text", "audio-text"],
            ["audio-text", "image-text"],
            ["audio-text"],
            ["clips"],
            ["image-text", "clips"],
        )
    )
    # A teacher reads the same inputs and tokens as the model that it teaches.
    teacher = rng.choice(list(TEACHER_TEXTS)) if rng.random() < 0.3 else None
    kinds = ["views" if name == "clips" else name.removesuffix("-text") for name in names]
    image = draw_image(rng, is_plain=teacher is not None)
    audio = draw_audio(rng, is_plain=teacher is not None)
    num_steps = rng.randint(8, 12)
    streams = {
        name: _draw_stream(rng, kind, material, lanes=lanes, num_steps=num_steps, teacher=teacher)
        for name, kind in zip(names, kinds, strict=True)
    }
    agree_on_temperatures(streams)
    read = {"text", *kinds} - {"views"}
    if "clips" in streams:
        read = ({*kinds} - {"views"}) | modalities_of(streams["clips"]["objectives"])
        read |= {"image"} if "scan" in read else set()  # whose tower it may share
        read |= {"text"} if "title" in read or len(streams) > 1 else set()
    model, audio = draw_model(
        rng, read, image, audio, material=material, has_teacher=teacher is not None
    )
    if modalities := draw_modalities(rng, read, model.get("text")):
        model["modalities"] = modalities
    per_step = rng.choice(("all", "all", "one"))
    for stream in streams.values():
        stream["weight"] = rng.choice((1, 0.5)) if per_step == "one" else 1
    lost = any("lost" in str(source["dataset"]) for source in _sources_in({"streams": streams}))
    return {
        "seed": rng.randrange(2**63),
        "lanes": lanes,
        "model": model,
        "image": image,
        "audio": audio,
        "streams": streams,
        "streams_per_step": per_step,
        "loading": {
            "window": rng.choice((1, 2, 3, 5, 16, 1000)),
            "on_bad_shard": "substitute" if lost else "stop",
        },
        "optimizer": _draw_optimizer(rng, num_steps),
        "schedule": _draw_schedule(rng, num_steps),
        "engine": {"device": "cpu", "precision": "fp32"},
        "validation": _draw_validation(rng, names, material),
        # relative to the folder of the runs
        "run": {"checkpoint_folder": rng.choice((None, None, "checkpoints of {}"))},
    }


def _draw_stream(rng, kind, material, *, lanes, num_steps, teacher):
    names = DATASETS[kind]
    locations = {
        name: {
            "name": name.replace("_", " " if rng.random() < 0.5 else "_"),
            "dataset": material.dataset(name),
            "subset": material.subset(name) if rng.random() < 0.3 else None,
        }
        for name in names
    }

    def draw_sources():
        chosen = rng.sample(names, rng.choice((1, 2, 2, 3)))
        return [locations[name] | {"weight": rng.choice((1, 0.3, 2.5))} for name in chosen]

    steps = sorted(rng.sample(range(1, num_steps + 2), rng.choice((0, 0, 1, 2))))
    return {
        "global_batch_size": lanes * rng.randint(1, LARGEST_BATCH // lanes),
        "max_repeated_fraction": rng.choice((0.9, 1)),
        "sources": draw_sources(),
        "segments": [{"from_step": step, "sources": draw_sources()} for step in steps],
    } | _draw_objectives(rng, kind, material, teacher=teacher)


def _draw_objectives(rng, kind, material, *, teacher):
    if kind == "views":
        objectives, require = draw_view_objectives(
            rng, lambda: _draw_objective(rng, material, teacher=None)
        )
        return {"objectives": objectives, "require": require}
    objectives = {f"{kind}-text": _draw_objective(rng, material, teacher=teacher)}
    if rng.random() < 0.3:
        views = {"left": "text", "right": kind, "temperature": rng.choice((None, f"{kind}_2"))}
        objectives[f"second_{kind}"] = views | _draw_objective(rng, material, teacher=None)
    return {"objectives": objectives}


def _draw_objective(rng, material, *, teacher):
    return {
        "duplicates": rng.choice(("negatives", "positives", "masked")),
        "weight": rng.choice((1, 0.5)),
        **_draw_nested_dims(rng),
    } | _draw_loss(rng, material, teacher=teacher)


def _draw_nested_dims(rng):
    if rng.random() < 0.7:
        return {}
    dims = sorted(rng.sample((2, 3, 5), rng.randint(1, 2)))
    weights = [rng.choice((0.5, 1.0)) for _ in dims]
    return {"matryoshka_dims": dims, "matryoshka_weights": rng.choice((None, weights))}


def _draw_loss(rng, material, *, teacher):
    if teacher is None and rng.random() < 0.3:
        return {"loss": "sigmoid"}
    values = {"loss": "softmax", "label_smoothing": rng.choice((0, 0.1))}
    if teacher is not None and rng.random() < 0.8:
        checkpoint = material.teacher(teacher)
        values["teacher"] = {"checkpoint": checkpoint, "weight": rng.choice((0.3, 1))}
    elif rng.random() < 0.3:
        return values | {"negatives": "all_pairs"}
    return values | {"direction": rng.choice(("both", "both", "forward"))}


def _draw_optimizer(rng, num_steps):
    frozen = rng.choice(([], [], ["towers.text.*"], ["log_logit_scale.*", "*.text.projection.*"]))
    opened = {"from_step": rng.randint(1, num_steps), "parameters": frozen}
    return {
        "no_decay": rng.choice(([], [], ["*.projection.*"])),
        "frozen": frozen,
        "unfreeze": [opened] if frozen and rng.random() < 0.7 else [],
        "learning_rate": 10 ** rng.uniform(-4, -3),
        "betas": (rng.uniform(0.5, 0.95), rng.uniform(0.9, 0.99)),
        "eps": 1e-4,
        "weight_decay": rng.choice((0, 0.2)),
        "gradient_clipping": rng.choice((None, 0.05, 1.0)),
    }


def _draw_schedule(rng, num_steps):
    shape = rng.choice(("cosine", "constant", "constant_with_cooldown"))
    return {
        "num_steps": num_steps,
        "warmup_steps": rng.randint(0, 4),
        "shape": shape,
        "cooldown_steps": rng.randint(1, 4) if shape == "constant_with_cooldown" else 0,
    }


def _draw_validation(rng, names, material):
    streams = {}
    for name in rng.sample(names, rng.randint(0, len(names))):
        dataset = {"image-text": "more_colors", "audio-text": "bells"}.get(name, name)
        streams[name] = {
            "dataset": material.dataset(dataset),
            "subset": material.subset(dataset) if rng.random() < 0.5 else None,
            "batch_size": rng.choice((3, 10)),
        }
    return {"streams": streams}


# --------------------------------------------------------------------- what must not decide


def _draw_attempt(rng, fixed, material, *, is_last):
    world_size = rng.choice([n for n in (1, 2, 2, 2, 3, 3, 4) if n <= fixed["lanes"]])
    strategy = rng.choice(("ddp", rng.choice(STRATEGIES)))
    if strategy == "zero3":
        world_size = min(world_size, 3)
    stops = not is_last and rng.random() < 0.25
    free = {
        "micro_batch_size": rng.choice(("auto", *range(1, LARGEST_BATCH // world_size + 1))),
        "run": _draw_run_section(rng, fixed["schedule"]["num_steps"], stops=stops),
        "loading": {
            "num_workers": rng.choice((0, 1, 2)),
            "batches_ahead": rng.choice((1, 2, 3)),
            "retries": rng.choice((0, 1)),
            "cache": {
                "max_gigabytes": rng.choice((None, 0.01)),
                "num_downloads": rng.choice((1, 4)),
            },
            # so tolerant that the bad samples of a small dataset do not stop the run
            "max_bad_fraction": rng.choice((0.9, 1.0)),
            "max_bad_fraction_per_shard": rng.choice((0.9, 1.0)),
        },
        "engine": {
            "strategy": strategy,
            "deepspeed_config": _draw_deepspeed_file(rng, strategy, material),
            "loss_mode": rng.choice(("auto", "strip1", "strip2")),
            "activation_checkpointing": rng.random() < 0.25,
            "deterministic": rng.random() < 0.25,
        },
        "watch": {
            "on_non_finite": rng.choice(("stop", "skip")),
            "max_skipped_steps": rng.choice((1, 3)),
            "skip_window_steps": rng.choice((5, 1000)),
            "loss_spike_factor": rng.choice((1.5, 2)),
            "grad_norm_spike_factor": rng.choice((1.5, 5)),
            "window_steps": rng.choice((20, 100)),
            "slow_step_factor": rng.choice((1.2, 2)),
            "slow_steps": rng.choice((1, 10)),
        },
        "validation": {"every_steps": rng.randint(2, 6)},
    }
    # Of a damaged tar, the cache refuses the whole shard.
    names = {Path(source["dataset"]).name for source in _sources_in(fixed)}
    names -= {"bad_colors", "bad_clips"}
    cached = rng.sample(sorted(names), rng.randint(0, len(names))) if rng.random() < 0.4 else ()
    kill = None if is_last or stops else _draw_kill(rng, world_size)
    return Attempt(world_size, free, tuple(cached), kill)


def _draw_run_section(rng, num_steps, *, stops):
    every = rng.choice((1, 2, 3, 5))
    return {
        "log_every_steps": rng.choice((1, 1, 1, 2)),
        "checkpoint_every_steps": every,
        "checkpoint_every_minutes": rng.choice((None, None, 0.005)),
        "max_failed_saves": rng.choice((1, 3)),
        "keep_checkpoints": rng.choice((1, 2, 3)),
        "keep_every_steps": rng.choice((None, 2 * every)),
        "trackers": rng.choice(([], [], [], ["tensorboard"])),
        "stop_after_step": rng.randint(1, num_steps - 1) if stops else None,
    }


def _draw_deepspeed_file(rng, strategy, material):
    if strategy in ("ddp", "zero0") or rng.random() < 0.5:
        return None
    return material.folder / "deepspeed" / f"zero{3 if strategy == 'zero3' else 2}.json"


def _draw_kill(rng, world_size):
    moment = rng.choice(REPEATABLE_MOMENTS)
    count = rng.randint(1, 7) if moment in ("step", "update", "writing", "commit") else 1
    rank = 0 if moment in OF_MAIN_PROCESS else rng.randrange(world_size)
    return Kill(rng.choice(HOW), moment, count, rank, seconds=0.0)


# ------------------------------------------------------------------------------------ values


def merged(values, changes):
    """Returns a copy of nested dictionaries with the values of others."""
    values = copy.deepcopy(values)
    for key, change in changes.items():
        is_section = isinstance(change, dict) and isinstance(values.get(key), dict)
        values[key] = merged(values[key], change) if is_section else copy.deepcopy(change)
    return values


def _sources_in(values):
    for stream in values["streams"].values():
        yield from stream["sources"]
        for segment in stream["segments"]:
            yield from segment["sources"]
    yield from values.get("validation", {}).get("streams", {}).values()
