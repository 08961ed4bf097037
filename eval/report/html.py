"""The HTML report of an evaluation: metrics, a section per task, training curves, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from data_prep.report.html import Section, fact_list, interval_bar, render_page, table
from data_prep.storage.atomic import write_atomically
from eval.metrics.intervals import Score
from eval.report.charts import training_charts
from eval.report.results import is_fraction, score_cells
from pretrain.run.attempts import read_metrics

if TYPE_CHECKING:
    from eval.tasks.task import Outcome, Task

# These limits keep the page smaller than about 5 MB.
# Browsers play at most 75 sounds per page; a query shows up to seven.
MAX_QUERIES_IN_ALL = {"image": 24, "audio": 8}
MAX_QUERIES_PER_DIRECTION = 8


def write_report(folder: Path, outcomes: Sequence[Outcome], *, record: dict[str, Any]) -> Path:
    """Writes report.html and returns its path.

    Args:
        folder: output folder.
        outcomes: outcomes of all tasks.
        record: content of results.json.
    """
    sections = [
        headline_section(outcomes, record),
        *(
            each.task.report_section(each, num_queries=_num_queries(each.task, outcomes))
            for each in outcomes
        ),
        *training_sections(Path(record["checkpoint"]["folder"])),
        provenance_section(record),
    ]
    page = render_page(
        "Evaluation of a contrastive model",
        subtitle=_subtitle(record["checkpoint"]),
        sections=sections,
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _subtitle(checkpoint: dict[str, Any]) -> str:
    subtitle = f"{checkpoint['folder']}"
    if checkpoint["step"] is not None:
        subtitle += f", step {checkpoint['step']}"
    if checkpoint["weights"] != "plain":
        subtitle += f", weights {checkpoint['weights']}"
    if checkpoint["marks"]:
        subtitle += f". Depends on more than its config: {', '.join(checkpoint['marks'])}"
    return subtitle


def headline_section(outcomes: Sequence[Outcome], record: dict[str, Any]) -> Section:
    """Builds the table of all metrics and averages, with intervals and chance levels."""
    rows = []
    for name, values in record["averages"].items():
        score = Score(**values)
        rows.append((f"average: {name}", "main metrics", _bar(score), *score_cells("", score)))
    for outcome in outcomes:
        name = outcome.task.row_name(outcome)
        for metric, score in outcome.scores.items():
            value, interval, chance, num_queries = score_cells(metric, score)
            bar = _bar(score) if is_fraction(metric) else Markup("")
            label = metric.replace("_", " ")
            rows.append((name, label, bar, value, interval, chance, num_queries))
            name = ""
    header = ("evaluation", "metric", "", "value", "95 % interval", "chance", "n")
    return Section(
        "Metrics",
        [table(header, rows, numeric={3, 4, 5, 6})],
        note="Dark line: 95 % interval. Orange mark: chance level. Retrieval recall@k is the "
        "fraction of queries with a relevant answer among the first k, true recall@k the "
        "fraction of relevant answers among the first k.",
    )


def _bar(score: Score) -> Markup:
    return interval_bar(score.value, low=score.low, high=score.high, reference=score.chance)


def _num_queries(task: Task, outcomes: Sequence[Outcome]) -> int:
    """Returns the number of queries to show for a task, so that all tasks fit on one page."""
    kinds = [_kind_shown(each.task) for each in outcomes if each.task.shows_queries]
    own = _kind_shown(task)
    limit = MAX_QUERIES_IN_ALL[own] // max(1, kinds.count(own))
    return min(MAX_QUERIES_PER_DIRECTION, max(1, limit))


def _kind_shown(task: Task) -> str:
    kinds = set().union(*(source.kinds for source in task.media_sets))
    return "audio" if "audio" in kinds else "image"


def training_sections(checkpoint: Path) -> list[Section]:
    """Draws the curves of the checkpoint's run; returns no section if it is not in a run."""
    if checkpoint.parent.name != "checkpoints":
        return []
    rows = read_metrics(checkpoint.parent.parent)
    if not rows:
        return []
    return [Section("Training", [training_charts(rows)], note=f"Run {checkpoint.parent.parent}")]


def provenance_section(record: dict[str, Any]) -> Section:
    """Lists everything that the metrics depend on."""
    environment, method = record["environment"], record["method"]
    facts = {
        "checkpoint": record["checkpoint"]["folder"],
        "library": record["checkpoint"]["library"],
        "step": record["checkpoint"]["step"],
        "sha256 of the model": record["checkpoint"]["model_sha256"],
    }
    if record["checkpoint"]["weights"] != "plain":
        facts["weights"] = record["checkpoint"]["weights"]
    for name, evaluation in record["evaluations"].items():
        dataset = evaluation["dataset"]
        counts = {key: value for key, value in evaluation.items() if key.startswith("num_")}
        facts[f"{name}: data"] = (
            f"{dataset['folder']}, {dataset['num_samples']} {dataset['media']} samples, "
            f"fingerprint {dataset['fingerprint']}"
        )
        facts[f"{name}: counts"] = ", ".join(
            f"{key[4:].replace('_', ' ')} {counts[key]}" for key in counts
        )
        if "prompt_templates" in evaluation:
            facts[f"{name}: prompts"] = "; ".join(evaluation["prompt_templates"])
    facts |= {
        "scores": f"{method['tower_dtype']} towers, {method['embedding_dtype']} embeddings, "
        f"{method['score_dtype']}, ties {method['ties']}",
        "intervals": f"95 %; random orders of ties with seed {method['seed']}",
        "device": environment["device"],
        "code": environment["git_commit"] or "not in a git checkout",
        "finished": f"{record['finished']}, after {record['seconds']} s",
    }
    return Section("Provenance", [fact_list(facts)])
