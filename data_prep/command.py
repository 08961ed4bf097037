"""The command line that all commands share: `CONFIG.yaml [section.key=value ...] [--dry-run]`.

Exit status: 0 done, 1 failed, 2 wrong usage or config.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.config_file import SectionT, read_config, to_yaml
from data_prep.errors import ConfigError, InputError, RunError

# What they say is shown from INFO on, what libraries say from WARNING on.
OWN_LOGGERS = ("data_prep", "pretrain", "eval")
SECONDS_TO_LET_RANK_0_SPEAK = 3.0


def run_command(
    section: type[SectionT],
    *,
    run: Callable[[SectionT], None],
    dry_run: Callable[[SectionT], None],
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs one command of the project and returns its exit status.

    Args:
        section: the type of the command's config.
        run: does the work.
        dry_run: checks what can be checked without doing the work, and prints derived numbers.
        description: the command's module docstring, shown by --help.
        arguments: the command line after the program's name (default: sys.argv).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="resolve and check the config, print it, and exit"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in OWN_LOGGERS:
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        config = read_config(section, options.config, overrides=options.overrides)
        if options.dry_run:
            print(to_yaml(config))  # noqa: T201
            dry_run(config)
        else:
            run(config)
    except (InputError, RunError) as error:
        _print_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(InputError(f"{error.filename}: {error.strerror}"))
        return 1
    except KeyboardInterrupt:
        _print_error(RunError("interrupted; the same command goes on where this one was"))
        return 130
    return 0


def check_output_folder(folder: Path, *, key: str) -> None:
    """Checks that a folder can be written or made, without making it.

    Raises:
        ConfigError: naming the key and what stands in the way.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{key}={folder}: expected a folder, found a file at {nearest}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: {nearest} cannot be written; choose another")


def _print_error(error: Exception) -> None:
    """Prints the message; of several processes that fail alike, mostly the first one's alone.

    The others wait a little, because a launcher ends them as soon as one has failed.
    """
    rank = os.environ.get("RANK")
    if rank not in (None, "0"):
        time.sleep(SECONDS_TO_LET_RANK_0_SPEAK)
    prefix = "" if rank is None else f"rank {rank}: "
    print(f"error: {prefix}{error}", file=sys.stderr, flush=True)  # noqa: T201
