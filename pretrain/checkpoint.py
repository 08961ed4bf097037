"""Checkpoints: written whole or not at all, and enough by themselves to rebuild the model.

    step_00001000/
      model.safetensors        parameters and saved buffers, fp32, by name
      optimizer.safetensors    "<moment>/<parameter>" -> flat tensor
      config.yaml              the run's resolved config
      assets/                  tokenizer and tower configs that the libraries do not ship
      checkpoint.json          format version, step, marks of the run, sha256 of every other file;
                               written last

A folder counts only if checkpoint.json is there and every sum agrees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.config_file import InputError, read_config, to_yaml
from data_prep.shard_format import write_atomically
from pretrain.config import MediaKind, PretrainConfig
from pretrain.engine import Engine
from pretrain.gather import on_main_process
from pretrain.media_transforms import MediaTransform, build_transforms
from pretrain.model import ContrastiveModel, build_model
from pretrain.tokenizer import Tokenizer, build_tokenizer

FORMAT_VERSION = 1
logger = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is incomplete or its files have other sums than recorded."""


# ------------------------------------------------------------------------------------- writing


def save_checkpoint(
    config: PretrainConfig,
    *,
    engine: Engine,
    tokenizer: Tokenizer,
    step: int,
    marks: Sequence[str] = (),
) -> Path:
    """Writes the state after `step` steps and deletes all but the newest keep_checkpoints and
    every multiple of keep_every_steps.

    Every rank must call it: together they hold the state. The main process writes.

    Args:
        config: of the run.
        engine: whose state is written.
        tokenizer: of the text tower.
        step: steps done.
        marks: why the result is not a function of the config alone.
    """
    state, moments = engine.full_state_dict(), engine.full_moments()
    return on_main_process(
        lambda: _write(
            config,
            state=state,
            moments=moments,
            tokenizer=tokenizer,
            save_assets=engine.model.save_assets,
            step=step,
            marks=marks,
        )
    )


def _write(
    config: PretrainConfig,
    *,
    state: dict[str, Tensor],
    moments: dict[str, Tensor],
    tokenizer: Tokenizer,
    save_assets: Callable[[Path], None],
    step: int,
    marks: Sequence[str],
) -> Path:
    parent = config.run.folder / "checkpoints"
    final = parent / f"step_{step:08d}"
    temporary = parent / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "assets").mkdir(parents=True)
    for values, file in [(state, "model.safetensors"), (moments, "optimizer.safetensors")]:
        save_file({name: value.contiguous() for name, value in values.items()}, temporary / file)
    (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    tokenizer.save(temporary / "assets")
    save_assets(temporary / "assets")
    record = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "marks": list(marks),
        "sha256": _sums(temporary),
    }
    write_atomically(temporary / "checkpoint.json", json.dumps(record, indent=2).encode())
    if final.exists():  # only a damaged one: complete ones are resumed from, never rewritten
        shutil.rmtree(final)
    temporary.replace(final)
    delete_other_checkpoints(
        final, keep=config.run.keep_checkpoints, keep_every_steps=config.run.keep_every_steps
    )
    return final


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def delete_other_checkpoints(
    final: Path, *, keep: int, keep_every_steps: int | None = None
) -> None:
    """Deletes what is older than the newest `keep`, but for multiples of `keep_every_steps`, and
    what is of a later step than the one just written: the run has gone back behind it because it
    was damaged."""
    folders = sorted(final.parent.glob("step_*"))
    num_kept = folders.index(final) + 1
    older = [
        folder
        for folder in folders[: max(0, num_kept - keep)]
        if keep_every_steps is None or int(folder.name.removeprefix("step_")) % keep_every_steps
    ]
    for folder in [*older, *folders[num_kept:]]:
        shutil.rmtree(folder)
    for leftover in final.parent.glob(".step_*.tmp"):
        shutil.rmtree(leftover)


# ------------------------------------------------------------------------------------- reading


def verify_checkpoint(folder: Path, *, skipping: tuple[str, ...] = ()) -> dict[str, Any]:
    """What checkpoint.json records, after checking every file (but for `skipping`) against it.

    Raises:
        DamagedCheckpointError: naming the file that is missing or differs.
    """
    try:
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder}: no readable checkpoint.json: {error}") from None
    for name, expected in record["sha256"].items():
        if name in skipping:
            continue
        try:
            with (folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DamagedCheckpointError(f"{folder / name}: {error.strerror}") from None
        if found != expected:
            raise DamagedCheckpointError(f"{folder / name}: sha256 is {found}, not {expected}")
    return record


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run whose sums agree; damaged ones are named in the log."""
    folders = sorted((run_folder / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        try:
            verify_checkpoint(folder)
        except DamagedCheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        return folder
    if folders:
        logger.warning("%s: none of %d checkpoints is whole", run_folder, len(folders))
    return None


def restore(engine: Engine, folder: Path) -> int:
    """Loads a checkpoint into the engine; returns the number of steps it holds."""
    step = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["step"]
    state = load_file(folder / "model.safetensors")
    whole = {f"parameter/{name}": values for name, values in state.items()}
    whole |= load_file(folder / "optimizer.safetensors")
    for fragment in engine.fragments():
        values = whole[f"{fragment.key}/{fragment.name}"].view(fragment.total)
        fragment.values.copy_(values.narrow(0, fragment.offset, len(fragment.values)))
    buffers = {name: state[name] for name, _ in engine.model.named_buffers() if name in state}
    engine.model.load_state_dict(buffers, strict=False)
    engine.after_load(num_steps_done=step)
    return step


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint a person means by a checkpoint folder, or by a run folder: its newest.

    Raises:
        InputError: there is none, or it is damaged. (What is measured is never silently an older
            one; the optimizer's state is not looked at.)
    """
    found = [folder] if (folder / "checkpoint.json").exists() else []
    found = found or sorted((folder / "checkpoints").glob("step_*"))
    if not found:
        raise InputError(
            f"{folder}: expected a run folder with a checkpoint, or a checkpoint; found neither; "
            "train one with python -m pretrain.train"
        )
    try:
        verify_checkpoint(found[-1], skipping=("optimizer.safetensors",))
    except DamagedCheckpointError as error:
        others = ", ".join(str(each) for each in found[:-1]) or "there is none"
        raise InputError(f"damaged checkpoint: {error}; name an older one: {others}") from None
    return found[-1]


def load_model(
    folder: str | Path, *, device: str = "cpu"
) -> tuple[ContrastiveModel, dict[MediaKind, MediaTransform], Tokenizer]:
    """A trained model in evaluation mode, its transforms by kind of media, and its tokenizer.

    Args:
        folder: a run folder (its newest checkpoint is taken) or one checkpoint.
        device: where the model goes.

    Raises:
        InputError: there is no whole checkpoint.
    """
    checkpoint = find_checkpoint(Path(folder))
    config = read_config(PretrainConfig, checkpoint / "config.yaml")
    assets = checkpoint / "assets"
    tokenizer = build_tokenizer(config.model.text, assets=assets)
    model = build_model(config, tokenizer=tokenizer, assets=assets)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model = model.to(torch.device(device)).eval().requires_grad_(False)
    return model, build_transforms(config), tokenizer
