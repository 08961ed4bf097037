"""Writes report.html: metrics against chance, confusions, retrieved items, training, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from data_prep.report.html import (
    Section,
    columns,
    fact_list,
    heading,
    interval_bar,
    paragraph,
    render_page,
    table,
)
from data_prep.storage.atomic import write_atomically
from eval.config import EvaluateConfig
from eval.metrics.intervals import Score, wilson_interval
from eval.report.charts import confusion_chart, training_charts
from eval.report.gallery import (
    caption_choice_gallery,
    classification_gallery,
    hubs_gallery,
    media_retrieval_gallery,
    retrieval_gallery,
)
from eval.report.results import is_rank, repeated_captions_note, score_cells
from eval.tasks.runner import Outcome
from eval.tasks.task import (
    AssociationTask,
    CaptionChoiceTask,
    FewShotTask,
    MediaRetrievalTask,
    MultiLabelTask,
    RetrievalTask,
    SingleLabelTask,
)
from pretrain.run.attempts import read_metrics

# Bounds on what is shown keep the page below about 5 MB.
# Browsers refuse to play more than 75 sounds of a page; a query shows up to seven.
MAX_QUERIES_IN_ALL = {"image": 24, "audio": 8}
MAX_QUERIES_PER_DIRECTION = 8
MAX_CLASSIFIED_ITEMS = 10
MAX_CLASS_ROWS = 60
MAX_CONFUSIONS = 10
MAX_HUBS = 5


def write_report(
    config: EvaluateConfig,
    outcomes: Sequence[Outcome],
    *,
    record: dict[str, Any],
) -> Path:
    """Writes report.html into the output folder and returns its path.

    Args:
        config: the evaluation's config.
        outcomes: of its tasks.
        record: what results.json holds.
    """
    sections = [
        headline_section(outcomes, record),
        *(_outcome_section(outcome, outcomes) for outcome in outcomes),
        *training_sections(Path(record["checkpoint"]["folder"])),
        provenance_section(record),
    ]
    page = render_page(
        "Evaluation of a contrastive model",
        subtitle=_subtitle(record["checkpoint"]),
        sections=sections,
    )
    path = config.output / "report.html"
    write_atomically(path, page.encode())
    return path


def _subtitle(checkpoint: dict[str, Any]) -> str:
    subtitle = f"{checkpoint['folder']}"
    if checkpoint["step"] is not None:
        subtitle += f", step {checkpoint['step']}"
    if checkpoint["marks"]:
        subtitle += f". Not a function of its config alone: {', '.join(checkpoint['marks'])}"
    return subtitle


def headline_section(outcomes: Sequence[Outcome], record: dict[str, Any]) -> Section:
    """All metrics and averages with their intervals, against chance."""
    rows = []
    for name, values in record["averages"].items():
        score = Score(**values)
        bar = interval_bar(score.value, low=score.low, high=score.high, reference=score.chance)
        rows.append((f"average: {name}", "main metrics", bar, *score_cells("", score)))
    for outcome in outcomes:
        name = outcome.task.name
        for metric, score in outcome.result.scores.items():
            value, interval, chance, num_queries = score_cells(metric, score)
            bar = Markup("")
            if not is_rank(metric):
                bar = interval_bar(
                    score.value, low=score.low, high=score.high, reference=score.chance
                )
            label = metric.replace("_", " ")
            rows.append((name, label, bar, value, interval, chance, num_queries))
            name = ""
    header = ("evaluation", "metric", "", "value", "95 % interval", "chance", "n")
    return Section(
        "Metrics",
        [table(header, rows, numeric={3, 4, 5, 6})],
        note="Dark line: 95 % interval. Orange mark: what a model that knows nothing scores. "
        "Retrieval recall@k is the share of queries with a right answer among the first k, true "
        "recall@k the share of right answers that are.",
    )


def _outcome_section(outcome: Outcome, outcomes: Sequence[Outcome]) -> Section:
    task = outcome.task
    if isinstance(task, MultiLabelTask):
        return multi_label_section(outcome)
    if isinstance(task, (FewShotTask, AssociationTask)):
        return Section(task.name, [], note=task.description())
    if isinstance(task, SingleLabelTask):
        return classification_section(outcome)
    num_queries = _num_queries(outcome, outcomes)
    if isinstance(task, CaptionChoiceTask):
        gallery = caption_choice_gallery(outcome, num_items=num_queries)
        return Section(task.name, [gallery], note=task.description())
    if isinstance(task, MediaRetrievalTask):
        gallery = media_retrieval_gallery(outcome, num_queries=num_queries)
        return Section(task.name, [*gallery, *_space_blocks(outcome)], note=task.description())
    return Section(
        task.name,
        [*retrieval_gallery(outcome, num_queries=num_queries), *_space_blocks(outcome)],
        note=" ".join(_retrieval_notes(task)),
    )


def _num_queries(outcome: Outcome, outcomes: Sequence[Outcome]) -> int:
    """Shown of a task, so that all of them together stay within what a page can hold."""
    kinds = [_kind_shown(each) for each in outcomes if not isinstance(each.task, SingleLabelTask)]
    share = MAX_QUERIES_IN_ALL[_kind_shown(outcome)] // kinds.count(_kind_shown(outcome))
    return min(MAX_QUERIES_PER_DIRECTION, max(1, share))


def _kind_shown(outcome: Outcome) -> str:
    kinds = {source.dataset.info.media for source in outcome.task.media_sets}
    return "audio" if "audio" in kinds else "image"


def _space_blocks(outcome: Outcome) -> list[Markup]:
    """What the shared space looks like, and the items that are found most."""
    rows = [
        (name.replace("_", " "), f"{value:.3f}") for name, value in outcome.space.record().items()
    ]
    note = (
        "Modality gap: distance between the means of both kinds. Alignment: mean squared distance "
        "of right pairs. Uniformity: lower is more evenly spread. Hubness: skewness of how often "
        "an item is among the ten nearest of a query; above about 1, a few are found by everything."
    )
    return [
        heading("The shared space"),
        paragraph(note),
        table(("metric", "value"), rows, numeric={1}),
        heading("Found by most queries"),
        hubs_gallery(outcome, num_items=MAX_HUBS),
    ]


def _retrieval_notes(task: RetrievalTask) -> list[str]:
    notes = [
        f"{task.description()}.",
        "In each direction the hardest queries come first, then some from all over the set.",
    ]
    if repeated := repeated_captions_note(task):
        notes.append(repeated)
    return notes


def classification_section(outcome: Outcome) -> Section:
    """Confusion matrix, the worst classes, the commonest confusions, and some items."""
    task, result = outcome.task, outcome.result
    matrix = [
        heading("Confusion matrix"),
        confusion_chart(result.confusion, task.class_labels),
        heading("Commonest confusions"),
        _confusion_table(result.confusion, task.class_labels),
    ]
    classes = [heading("Recall by class, worst first"), _class_table(outcome)]
    if result.group_accuracies:
        classes += [heading("Accuracy by group, worst first"), _group_table(outcome)]
    return Section(
        task.name,
        [
            columns([Markup("").join(matrix), Markup("").join(classes)]),
            heading("Some items, mistakes first"),
            classification_gallery(outcome, num_items=MAX_CLASSIFIED_ITEMS),
        ],
        note=task.description(),
    )


def multi_label_section(outcome: Outcome) -> Section:
    """The average precision of every class, worst first."""
    task, precisions = outcome.task, outcome.result.average_precisions
    num_items = task.is_of_class.sum(axis=0)
    rows = [
        (
            task.class_names[place],
            f"{100 * precisions[place]:.1f} %",
            f"{100 * num_items[place] / len(task.is_of_class):.1f} %",
            str(num_items[place]),
        )
        for place in np.argsort(precisions, kind="stable").tolist()
        if num_items[place]
    ]
    header = ("class", "average precision", "share of the items", "n")
    heading_of_table = heading("Average precision by class, worst first")
    return Section(
        task.name,
        [heading_of_table, table(header, rows[:MAX_CLASS_ROWS], numeric={1, 2, 3})],
        note=task.description(),
    )


def _class_table(outcome: Outcome) -> Markup:
    result, names = outcome.result, outcome.task.class_labels
    sizes = result.confusion.sum(axis=1)
    present = np.flatnonzero(sizes)
    worst_first = present[np.argsort(result.class_recalls[present], kind="stable")]
    rows = [
        (
            names[place],
            interval_bar_of_class(result.class_recalls[place], int(sizes[place]), len(names)),
            f"{100 * result.class_recalls[place]:.1f} %",
            str(sizes[place]),
        )
        for place in worst_first[:MAX_CLASS_ROWS].tolist()
    ]
    return table(("class", "", "recall", "n"), rows, numeric={2, 3})


def _group_table(outcome: Outcome) -> Markup:
    groups, by_group = outcome.task.groups, outcome.result.group_accuracies
    worst_first = sorted(by_group, key=by_group.get)
    rows = [
        (name, f"{100 * by_group[name]:.1f} %", str(groups.count(name)))
        for name in worst_first[:MAX_CLASS_ROWS]
    ]
    return table(("group", "top-1 accuracy", "n"), rows, numeric={1, 2})


def interval_bar_of_class(recall: float, num_items: int, num_classes: int) -> Markup:
    """The recall of one class with its Wilson interval, against chance."""
    low, high = wilson_interval(recall * num_items, num_items)
    return interval_bar(recall, low=low, high=high, reference=1 / num_classes)


def _confusion_table(confusion: np.ndarray, class_names: Sequence[str]) -> Markup:
    wrong = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    commonest = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows = []
    for true, predicted in zip(*np.unravel_index(commonest, wrong.shape), strict=True):
        if wrong[true, predicted]:
            share = wrong[true, predicted] / confusion[true].sum()
            cells = (class_names[true], class_names[predicted], str(wrong[true, predicted]))
            rows.append((*cells, f"{100 * share:.1f} %"))
    header = ("true class", "taken for", "items", "share of the class")
    return table(header, rows, numeric={2, 3})


def training_sections(checkpoint: Path) -> list[Section]:
    """The curves of the run that the checkpoint lies in; nothing if it lies elsewhere."""
    if checkpoint.parent.name != "checkpoints":
        return []
    rows = read_metrics(checkpoint.parent.parent)
    if not rows:
        return []
    return [Section("Training", [training_charts(rows)], note=f"Run {checkpoint.parent.parent}")]


def provenance_section(record: dict[str, Any]) -> Section:
    """Everything that the metrics are a function of."""
    environment, method = record["environment"], record["method"]
    facts = {
        "checkpoint": record["checkpoint"]["folder"],
        "library": record["checkpoint"]["library"],
        "step": record["checkpoint"]["step"],
        "sha256 of the model": record["checkpoint"]["model_sha256"],
    }
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
        "intervals": f"95 %, {method['bootstrap_samples']} resamples, seed {method['seed']}",
        "device": environment["device"],
        "code": environment["git_commit"] or "not in a git checkout",
        "finished": f"{record['finished']}, after {record['seconds']} s",
    }
    return Section("Provenance", [fact_list(facts)])
