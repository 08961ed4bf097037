"""Command line shared by all commands: `CONFIG.yaml [section.key=value ...] [--dry-run]`.

Exit status: 0 success, 1 failure, 2 invalid usage or config.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from data_prep.config_file import SectionT, read_config, to_yaml
from data_prep.errors import ConfigError, InputError, RunError

# Loggers shown from level INFO; the loggers of libraries are shown from level WARNING.
OWN_LOGGERS = ("data_prep", "pretrain", "eval")
SECONDS_TO_LET_RANK_0_SPEAK = 3.0


def say(text: object, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Prints a result and flushes it, even if the output is a pipe or a file.

    A reader that has closed the pipe (`| head`) misses the rest; the command still does its work.

    Args:
        text: result to print.
        end: characters after it.
        file: destination (default: standard output).

    Raises:
        RunError: if the output cannot be written for another reason, such as a full disk.
    """
    file = sys.stdout if file is None else file
    try:
        print(text, end=end, file=file, flush=True)
    except BrokenPipeError:
        _discard_output(file)
    except OSError as error:
        _discard_output(file)
        raise RunError(f"standard output cannot be written: {error.strerror}") from None


def _discard_output(file: TextIO) -> None:
    """Discards what is buffered, which Python would write at its end, and all that follows."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, file.fileno())
    os.close(null)


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parses a command line (default: sys.argv); --help and wrong usage end the process."""
    try:
        return parser.parse_intermixed_args(arguments)
    except SystemExit:
        try:
            say("", end="")  # the help, while a closed pipe can still be handled
        except RunError as error:
            print_error(error)
            sys.exit(1)
        raise


def run_command(
    section: type[SectionT],
    *,
    run: Callable[[SectionT], None],
    dry_run: Callable[[SectionT], None],
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command and returns its exit status.

    Args:
        section: type of the command's config.
        run: function that executes the command.
        dry_run: checks config and inputs without doing the work, and prints derived numbers.
        description: docstring of the command's module, shown by --help.
        arguments: command line without the program name; None: sys.argv.
    """
    options = _parse(description, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in OWN_LOGGERS:
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        config = read_config(section, options.config, overrides=options.overrides)
        if options.dry_run:
            say(to_yaml(config))
            dry_run(config)
        else:
            run(config)
    except (InputError, RunError) as error:
        print_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        print_error(InputError(f"{error.filename}: {error.strerror}"))
        return 1
    except KeyboardInterrupt:
        print_error(RunError("interrupted; run the same command again to resume"))
        return 130
    return 0


def check_command_line(section: type[SectionT], description: str) -> None:
    """Exits after --help, and with status 2 on invalid usage or an invalid config.

    Commands call this function before slow imports, so that a misspelled key is reported quickly.
    """
    options = _parse(description, None)
    try:
        read_config(section, options.config, overrides=options.overrides)
    except ConfigError as error:
        print_error(error)
        sys.exit(2)


def _parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="file in configs/, or yours"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the config"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything without doing it; print the config and what would happen",
    )
    return parse_arguments(parser, arguments)


def check_output_folder(folder: Path, *, key: str) -> None:
    """Checks that a folder can be written to or created, without creating it.

    Raises:
        ConfigError: if a file blocks the path, or permission is missing. The message includes the
            key.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{key}={folder}: expected a folder, found a file at {nearest}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: {nearest} cannot be written; choose another")


def print_error(error: Exception) -> None:
    """Prints the message of an error to standard error.

    Ranks other than 0 wait first. If all ranks fail with the same error, the launcher ends them as
    soon as rank 0 has failed, so that the message appears once.
    """
    rank = os.environ.get("RANK")
    if rank not in (None, "0"):
        time.sleep(SECONDS_TO_LET_RANK_0_SPEAK)
    prefix = "" if rank is None else f"rank {rank}: "
    print(f"error: {prefix}{error}", file=sys.stderr, flush=True)  # noqa: T201
