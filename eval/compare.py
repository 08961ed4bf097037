"""Compares results of the same evaluations: paired differences, and samples that changed.

    python -m eval.compare configs/eval/compare.yaml
    python -m eval.compare configs/eval/compare.yaml results='[results/a, results/b]'

The first results are the baseline for all others. Writes compare.json and compare.md.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import CompareConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(CompareConfig, __doc__)

import sys
from dataclasses import asdict
from pathlib import Path

from data_prep.storage.atomic import write_atomically
from eval.comparison import compare, shared_evaluations
from eval.metrics.intervals import Bootstrap
from eval.report.differences import Difference
from eval.report.markdown_table import markdown_table
from eval.report.results import json_text

COLUMNS = (
    "evaluation",
    "metric",
    "first",
    "this",
    "difference",
    "95 % interval",
    "better",
    "worse",
)


def run(config: CompareConfig) -> None:
    """Compares all results with the first, and writes the differences."""
    check_output_folder(config.output, key="output")
    bootstrap = Bootstrap(config.bootstrap_samples, config.seed)
    baseline, *others = config.results
    found = {str(other): compare(baseline, other, bootstrap=bootstrap) for other in others}
    text = "\n".join(comparison_table(baseline, other, found[str(other)]) for other in others)
    record = {
        "baseline": str(baseline),
        "compared": {name: [asdict(each) for each in found[name]] for name in found},
        "bootstrap_samples": config.bootstrap_samples,
        "seed": config.seed,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / "compare.json", json_text(record).encode())
    write_atomically(config.output / "compare.md", text.encode())
    say(text)


def comparison_table(baseline: Path, other: Path, differences: list[Difference]) -> str:
    """Formats the differences between two results as a Markdown table; * marks clear ones."""
    rows = [
        (
            each.evaluation,
            each.metric,
            f"{each.baseline:.4g}",
            f"{each.value:.4g}",
            f"{each.difference:+.4g}{' *' if each.is_clear else ''}",
            each.interval if each.low is None else f"{each.low:+.4g} to {each.high:+.4g}",
            str(each.num_better),
            str(each.num_worse),
        )
        for each in differences
    ]
    num_clear = sum(each.is_clear for each in differences)
    title = (
        f"{other} compared with {baseline}: {num_clear} of {len(differences)} metrics differ (*)\n"
    )
    return "\n".join([title, markdown_table(COLUMNS, rows)]) + "\n"


def dry_run(config: CompareConfig) -> None:
    """Checks that the results have evaluations in common, and prints their names."""
    check_output_folder(config.output, key="output")
    baseline, *others = config.results
    for other in others:
        names = ", ".join(shared_evaluations(baseline, other))
        say(f"{other} with {baseline}: {names}")


def main() -> int:
    """Runs the command."""
    return run_command(CompareConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
