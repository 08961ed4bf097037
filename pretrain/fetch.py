"""Fetches the weights, configs and tokenizers that a config names on a hub, for nodes without one.

    python -m pretrain.fetch configs/pretrain/demo.yaml

Run it where there is internet, such as a login node. Files go into the hub's cache (HF_HOME), which
the nodes of the job must see. Training itself never downloads. The command prints the commit of
every model: a name with it, such as openai/clip-vit-base-patch32@<commit>, always means the same
files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_prep.command import run_command, say
from data_prep.errors import InputError, RunError
from pretrain.config import PretrainConfig
from pretrain.hub import WEIGHTS
from pretrain.model.library_errors import describe_library_error
from pretrain.warm_start.needs import Need, find_needs, find_teacher_needs, module_starts

MAIN = "main"  # revision of a name without one
NOTHING = "the config names nothing on a hub"


def _needs_of(config: PretrainConfig) -> list[Need]:
    return [
        *find_needs(config.model, module_starts(config)),
        *find_teacher_needs(config.objectives),
    ]


def fetch(config: PretrainConfig) -> None:
    """Downloads everything that the config needs from a hub, and prints commits and folders.

    Raises:
        InputError: if the hub has no such model or revision, or the model has no weights.
        RunError: if the hub cannot be reached.
    """
    needs = _needs_of(config)
    if not needs:
        say(NOTHING)
    for need in needs:
        commit, folder = fetch_need(need)
        pinned = f"{need.model.repository}@{commit}"
        say(f"{need.key}: {need.model.name} is {pinned}, in {folder}")


def fetch_need(need: Need) -> tuple[str, Path]:
    """Downloads the files of one model, of a single commit.

    Returns:
        (commit, folder in the hub's cache)

    Raises:
        InputError: if the hub has no such model or revision, or the model has no weights.
        RunError: if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repository, revision = need.model.repository, need.model.revision or MAIN
    try:
        info = HfApi().model_info(repository, revision=revision)
        names = {each.rfilename for each in info.siblings or ()}
        patterns = [name for name in need.files if name in names]
        if need.with_weights:
            patterns += _weights_among(names, need)
        # The name of the revision, so that it is found in the cache without a connection.
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"{need.key}: the hub has no model {need.model.name}, or it needs a login "
            f"(HF_TOKEN): {type(error).__name__}"
        ) from None
    except InputError:
        raise
    except Exception as error:  # errors of several libraries of http
        raise RunError(
            f"{need.key}: {need.model.name} cannot be fetched now: "
            f"{describe_library_error(error)}; run the command again where there is internet"
        ) from error
    return Path(folder).name, Path(folder)


def _weights_among(names: set[str], need: Need) -> list[str]:
    """Patterns of the files that hold the weights; of several forms, the one that is read"""
    wanted = (need.model.weights,) if need.model.weights else WEIGHTS
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise InputError(
            f"{need.key}: expected weights in {need.model.name} ({', '.join(wanted)}), found "
            f"{', '.join(sorted(names)[:8]) or 'nothing'}"
        )
    if not found.endswith(".index.json"):
        return [found]
    base, suffix = found.removesuffix(".index.json").rsplit(".", 1)
    return [found, f"{base}-*.{suffix}"]


def describe_needs(config: PretrainConfig) -> None:
    """Prints what would be fetched, without a connection."""
    needs = _needs_of(config)
    if not needs:
        say(NOTHING)
    for need in needs:
        what = "weights and configs" if need.with_weights else "configs or tokenizer"
        say(f"{need.key}: {what} of {need.model.name}")


def main() -> int:
    """Runs the command."""
    return run_command(PretrainConfig, run=fetch, dry_run=describe_needs, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
