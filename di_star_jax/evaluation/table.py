# SPDX-License-Identifier: Apache-2.0
"""An evaluation as Markdown, in the layout of the papers' tables: generators by metrics."""

import math
from collections.abc import Iterable, Iterator

from di_star_jax.evaluation import papers
from di_star_jax.evaluation.metrics import Metric
from di_star_jax.evaluation.results import Evaluation
from di_star_jax.log import markdown_table
from di_star_jax.rewards import REWARDS

FILE = "table.md"


def table_of(evaluation: Evaluation, baseline: Evaluation | None) -> str:
    """The scores, notes to them, and the scores by category."""
    metrics = evaluation.columns()
    runs = [evaluation] if baseline is None else [evaluation, baseline]
    published = papers.tables_of(
        evaluation.settings["prompts"]["name"], (metric.name for metric in metrics)
    )
    notes = _notes(runs, metrics, published)
    parts = [
        _scores(runs, metrics, published),
        "\n".join(f"- {note}" for note in notes),
        *_by_style(runs, metrics, published),
        *_by_category(evaluation, metrics),
    ]
    return "\n\n".join(parts)


def _scores(
    runs: list[Evaluation],
    metrics: list[Metric],
    published: list[papers.Table],
) -> str:
    headings = [f"{metric.label}{' †' if metric.trained_on else ''}" for metric in metrics]
    rows = [_run(run, metrics) for run in runs]
    if runs[0].results["comparison"]:
        rows.append(_difference(runs[0].results["comparison"], metrics))
    for name, row in _published(published):
        cells = [
            _printed([row.scores[m.name]], m)[0] if m.name in row.scores else "" for m in metrics
        ]
        seconds = "" if math.isnan(row.seconds) else f"{row.seconds:.2f}"
        rows.append([name, str(row.steps or ""), seconds, "", *cells])
    return markdown_table(["generator", "steps", "s per 10 images", "peak GB", *headings], rows)


def _published(tables: list[papers.Table]) -> Iterator[tuple[str, papers.Row]]:
    """Each row with its name, which ends in the number of its table."""
    for number, table in enumerate(tables, 1):
        for row in table.rows:
            name = row.label.replace("*", r"\*")
            yield f"*{name}, published [{number}]*", row


def _printed(values: Iterable[float], metric: Metric) -> list[str]:
    return [f"*{value:.{metric.digits}f}*" for value in values]


def _run(run: Evaluation, metrics: list[Metric]) -> list[str]:
    cost = run.results["cost"]
    seconds = "" if cost["seconds_per_image"] is None else f"{10 * cost['seconds_per_image']:.2f}"
    peak = "" if cost["peak_memory_gb"] is None else f"{cost['peak_memory_gb']:.2f}"
    found = run.results["metrics"]
    means = [
        _mean(found[metric.name], metric) if metric.name in found else "" for metric in metrics
    ]
    return [run.name, str(cost["steps"] or ""), seconds, peak, *means]


def _mean(summary: dict, metric: Metric) -> str:
    if summary["mean"] is None:
        return "-"
    error = "" if summary["stderr"] is None else f" ± {summary['stderr']:.{metric.digits}f}"
    return f"{summary['mean']:.{metric.digits}f}{error}"


def _difference(comparison: dict, metrics: list[Metric]) -> list[str]:
    noise = "same noise" if comparison["same_noise"] else "not the same noise"
    found = comparison["metrics"]
    cells = [
        _change(found[metric.name], metric.digits) if metric.name in found else ""
        for metric in metrics
    ]
    return [f"difference ({noise})", "", "", "", *cells]


def _change(paired: dict, digits: int) -> str:
    if paired["difference"] is None:
        return "-"
    interval = ""
    if paired["low"] is not None:
        interval = f" [{paired['low']:+.{digits}f}, {paired['high']:+.{digits}f}]"
    return f"{paired['difference']:+.{digits}f}{interval}, {100 * paired['win_rate']:.1f} %"


def _notes(
    runs: list[Evaluation],
    metrics: list[Metric],
    published: list[papers.Table],
) -> list[str]:
    """What is under the table."""
    results = runs[0].results
    prompts = runs[0].settings["prompts"]
    notes = [
        f"{prompts['name']}: {prompts['count']:,} prompts, {runs[0].settings['samples']} images of "
        "each; mean ± standard error over prompts, in which the spread of reruns of a training is "
        "not."
    ]
    spread = [
        f"{metric.label} {low:.{metric.digits}f} to {high:.{metric.digits}f}"
        for metric in metrics
        for low, high in [results["metrics"][metric.name].get("over_noise") or (None, None)]
        if low is not None
    ]
    if spread:
        notes.append(f"Means of one image of each prompt, over noise: {', '.join(spread)}.")
    notes += [f"{note}." for note in prompts["notes"]]
    broken = results["broken"]
    if broken:
        notes.append(
            f"{len(broken)} images cannot be read and are left out, the first is {broken[0]}."
        )
    for run in runs:
        trained = ", ".join(run.settings["trained_on"])
        if trained:
            notes.append(
                f"{run.name} was trained on {trained} (†): a rise there alone proves nothing."
            )
    if results["comparison"]:
        notes.append("Difference: 95 % bootstrap interval over prompts; share of prompts won.")
    notes += [
        f"*Published* [{number}]: {table.source}; another protocol."
        for number, table in enumerate(published, 1)
    ]
    for metric in metrics:
        note = results["metrics"][metric.name]["note"]
        if note:
            notes.append(f"{metric.label}: {note}.")
    return notes


def _by_style(
    runs: list[Evaluation],
    metrics: list[Metric],
    published: list[papers.Table],
) -> list[str]:
    """HPSv2 as its papers print it: generators by styles, and their average."""
    if "style" not in runs[0].results["groups"]:
        return []
    styles = list(runs[0].results["groups"]["style"])
    tables = []
    for metric in metrics:
        if metric.name not in REWARDS or "style" not in REWARDS[metric.name].groups:
            continue
        rows = [
            _run_by_style(run, metric, styles)
            for run in runs
            if metric.name in run.results["metrics"]
        ]
        if tuple(styles) == papers.HPSV2_STYLES:
            rows += _published_by_style(published, metric)
        tables.append(markdown_table([metric.label, *styles, "average"], rows))
    return tables


def _run_by_style(
    run: Evaluation,
    metric: Metric,
    styles: list[str],
) -> list[str]:
    found = run.results["groups"]["style"]
    summaries = [found[style][metric.name] for style in styles]
    summaries.append(run.results["metrics"][metric.name])
    return [run.name, *(_mean(summary, metric) for summary in summaries)]


def _published_by_style(tables: list[papers.Table], metric: Metric) -> list[list[str]]:
    """Of the rows that have the metric; some give its average alone."""
    rows = []
    for name, row in _published(tables):
        if metric.name in row.scores:
            styles = _printed(row.by_style.get(metric.name, ()), metric)
            average = _printed([row.scores[metric.name]], metric)
            rows.append([name, *(styles or [""] * len(papers.HPSV2_STYLES)), *average])
    return rows


def _by_category(evaluation: Evaluation, metrics: list[Metric]) -> list[str]:
    """A table a column of categories."""
    tables = []
    for group, found in evaluation.results["groups"].items():
        shown = [
            metric
            for metric in metrics
            if any(metric.name in summaries for summaries in found.values())
        ]
        rows = []
        for name, summaries in found.items():
            count = max((summary["prompts"] for summary in summaries.values()), default=0)
            means = [_mean(summaries[metric.name], metric) for metric in shown]
            rows.append([name, str(count), *means])
        labels = [metric.label for metric in shown]
        tables.append(markdown_table([group, "prompts", *labels], rows))
    return tables
