# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation: results.json, scores.parquet, table.md and page.html of one folder."""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from di_star_jax.errors import UserError
from di_star_jax.evaluation import measures, page, papers
from di_star_jax.prompts.files import Prompt
from di_star_jax.rewards import REWARDS
from di_star_jax.storage.files import write_text

FILE, TABLE, SCORES, PAGE = "results.json", "table.md", "scores.parquet", "page.html"
_OTHERS = {  # name: (label, unit, digits, whether higher is better, a number an image)
    "oracle": ("Attributes right", "share that the oracle reads back", 3, True, True),
    "saturation": ("Saturation", "mean HSV saturation", 3, None, True),
    "contrast": ("Contrast", "RMS of luma", 3, None, True),
    "diversity": (
        "Diversity",
        "mean pairwise cosine distance of a prompt's images",
        4,
        None,
        False,
    ),
    "frechet": ("Frechet distance", "of CLIP features", 4, False, False),
    "fid": ("FID", "clean-fid, Inception", 2, False, False),
    "clip_fid": ("CLIP-FID", "clean-fid, CLIP ViT-B/32", 2, False, False),
}


class Evaluation(NamedTuple):
    """One generator's evaluation. P prompts, K images of each.

    results: what results.json holds, see `summarise`.
    prompts: P. files: [P][K], relative to `folder` where they are in it.
    values: by metric as printed, float64 [P, K], or [P, 1] where there is one number a prompt; NaN
      where there is none.
    """

    folder: Path
    results: dict
    prompts: list[Prompt]
    files: list[list[Path]]
    values: dict[str, np.ndarray]


def factor(metric: str) -> float:
    """Printed numbers are this times the score."""
    return REWARDS[metric].factor if metric in REWARDS else 1.0


def column(metric: str, *, label: str, trained_on: bool) -> page.Metric:
    """How a metric is printed. Args: label, its heading, or "" for the usual one."""
    if metric in REWARDS:
        entry = REWARDS[metric]
        unit = "as the model gives it" if entry.factor == 1.0 else f"{entry.factor:g} x cosine"
        return page.Metric(metric, label or entry.title, unit, entry.digits, True, trained_on, True)
    usual, unit, digits, higher, per_image = _OTHERS[metric]
    return page.Metric(metric, label or usual, unit, digits, higher, trained_on, per_image)


def _number(x: float | None) -> float | None:
    """JSON has no NaN."""
    return None if x is None or not math.isfinite(x) else float(x)


def summarise(values: np.ndarray) -> dict:
    """Mean, standard error over prompts, and counts, as results.json holds them."""
    return _plain(measures.summary(values))


def _plain(found: measures.Summary) -> dict:
    return found._asdict() | {"mean": _number(found.mean), "stderr": _number(found.stderr)}


def by_categories(
    prompts: list[Prompt], values: dict[str, np.ndarray], groups: tuple[str, ...]
) -> dict:
    """{column: {category: {metric: summary}}} for the columns that every prompt has."""
    tables = {}
    for group in groups:
        names = [prompt.categories[group] for prompt in prompts if group in prompt.categories]
        if len(names) == len(prompts):
            found = {metric: measures.by_group(table, names) for metric, table in values.items()}
            tables[group] = {
                name: {metric: _plain(summaries[name]) for metric, summaries in found.items()}
                for name in dict.fromkeys(names)
            }
    return tables


def whole(value: float, counts: dict[str, int]) -> dict:
    """As `summarise`, for one number over all images.

    Args: counts, of prompts, images and left_out.
    """
    return {"mean": _number(value), "stderr": None, **counts}


def check_comparable(settings: dict, baseline: Evaluation) -> None:
    """Raises:

    UserError where the baseline is not of these settings' prompts and number of samples.
    """
    theirs = baseline.results["settings"]
    same_prompts = all(
        settings["prompts"][key] == theirs["prompts"][key] for key in ("digest", "count")
    )
    for field, what, same in (
        ("prompts", "prompts", same_prompts),
        ("samples", "images a prompt", settings["samples"] == theirs["samples"]),
    ):
        if not same:
            raise UserError(
                f"{baseline.folder} has other {what} ({short(theirs[field])}) than this evaluation "
                f"({short(settings[field])}); evaluate both with the same flags"
            )


def check_same_scores(of_metrics: dict[str, dict], baseline: Evaluation) -> None:
    """Raises:

    UserError where the baseline was scored by other weights. Args: of_metrics, as settings have
    them.
    """
    for name, theirs in baseline.results["settings"]["metrics"].items():
        mine = of_metrics.get(name, theirs)
        if mine.get("sha256") != theirs.get("sha256"):
            raise UserError(
                f"{baseline.folder} has {name} by other weights ({short(theirs['weights'])}) than this "
                f"evaluation ({short(mine['weights'])}); score both by the same"
            )
        if mine.get("reference_digest") != theirs.get("reference_digest"):
            raise UserError(
                f"{baseline.folder} has {name} against another reference ({short(theirs['reference'])}) than "
                f"this evaluation ({short(mine['reference'])}); score both against the same"
            )


def compare(ours: Evaluation, baseline: Evaluation) -> dict[str, dict]:
    """Paired comparison of two evaluations, by metric, for those that both have.

    They must be comparable.
    """
    found = {}
    for metric in ours.values:
        if metric in baseline.values:
            paired = measures.paired(ours.values[metric], baseline.values[metric])
            found[metric] = {name: _number(value) for name, value in paired._asdict().items()}
    return found


def short(value) -> str:
    """A setting as an error prints it."""
    if isinstance(value, dict):
        return f"{value['name']}, {value['count']} of digest {value['digest'][:8]}"
    return repr(value)


def same_noise(ours: Evaluation, baseline: Evaluation) -> bool:
    """Whether both were drawn by this project from the same noise."""
    noise = [e.results["settings"]["noise"] for e in (ours, baseline)]
    return None not in noise and noise[0] == noise[1]


def write(evaluation: Evaluation, baseline: Evaluation | None, *, max_prompts: int) -> None:
    """Writes all four files. results.json is the last, and gone before the others change: it marks
    a finished evaluation.

    Args: baseline, to show beside it; max_prompts, whose pictures the page shows.
    """
    (evaluation.folder / FILE).unlink(missing_ok=True)
    _write_parquet(evaluation)
    write_text(evaluation.folder / TABLE, table(evaluation, baseline) + "\n")
    _write_page(evaluation, baseline, max_prompts)
    write_text(
        evaluation.folder / FILE, json.dumps(evaluation.results, indent=1, allow_nan=False) + "\n"
    )


def _write_parquet(evaluation: Evaluation) -> None:
    samples = len(evaluation.files[0])
    columns = {
        "row": [prompt.row for prompt in evaluation.prompts for _ in range(samples)],
        "sample": [k for _ in evaluation.prompts for k in range(samples)],
        "prompt": [prompt.text for prompt in evaluation.prompts for _ in range(samples)],
        "categories": [
            json.dumps(prompt.categories) for prompt in evaluation.prompts for _ in range(samples)
        ],
        "file": [str(file) for files in evaluation.files for file in files],
    }
    columns |= {
        name: np.broadcast_to(values, (len(values), samples)).reshape(-1)
        for name, values in evaluation.values.items()
    }
    partial = evaluation.folder / (SCORES + ".partial")
    pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, evaluation.folder / SCORES)


def read(folder: Path) -> Evaluation:
    """A finished evaluation. Raises: UserError for a folder that is none."""
    if not (folder / FILE).is_file():
        raise UserError(
            f"no {FILE} in {folder}; give the --out folder of an evaluation that has come to its end"
        )
    try:
        results = json.loads((folder / FILE).read_text())
        table = pyarrow.parquet.read_table(folder / SCORES).to_pydict()
        samples = results["settings"]["samples"]
        firsts = range(0, len(table["row"]), samples)
        prompts = [
            Prompt(table["row"][i], table["prompt"][i], json.loads(table["categories"][i]))
            for i in firsts
        ]
        files = [[Path(file) for file in table["file"][i : i + samples]] for i in firsts]
        values = {}
        for name in results["metrics"]:
            if name in table:
                stored = np.array(table[name], np.float64).reshape(-1, samples)
                values[name] = stored[:, :1] if name == "diversity" else stored
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder} holds no readable evaluation ({reason}); run it again") from None
    return Evaluation(folder, results, prompts, files, values)


def columns(evaluation: Evaluation) -> list[page.Metric]:
    """Its metrics in their order."""
    return [
        column(name, label=found["label"], trained_on=found["trained_on"])
        for name, found in evaluation.results["metrics"].items()
    ]


def _as_run(evaluation: Evaluation) -> page.Run:
    items = []
    for p, (prompt, files) in enumerate(zip(evaluation.prompts, evaluation.files)):
        scores = [
            {
                name: float(values[p, k])
                for name, values in evaluation.values.items()
                if values.shape[1] > k
            }
            for k in range(len(files))
        ]
        items.append(
            page.Item(
                prompt.row,
                prompt.text,
                prompt.categories,
                [
                    page.Picture(evaluation.folder / file, found)
                    for file, found in zip(files, scores)
                ],
            )
        )
    summary = {
        name: page.Summary(found["mean"], found["stderr"], found["prompts"], found["note"])
        for name, found in evaluation.results["metrics"].items()
        if found["mean"] is not None
    }
    return page.Run(evaluation.results["name"], items, summary, _details(evaluation.results))


def _details(results: dict) -> dict[str, str]:
    """Settings as text; those of the metrics are in their notes."""
    shown = {
        name: value
        for name, value in results["settings"].items()
        if value not in (None, {}) and name not in ("prompts", "metrics")
    }
    prompts = results["settings"]["prompts"]
    details = {
        "prompts": f"{prompts['name']}, {prompts['count']:,}; {'; '.join(prompts['notes'])}".rstrip(
            "; "
        )
    }
    details |= {
        name.replace("_", " "): json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        for name, value in shown.items()
    }
    cost = results["cost"]
    if cost["seconds_per_image"] is not None:
        details["seconds per image"] = f"{cost['seconds_per_image']:.3g} on {cost['device']}"
    if cost["peak_memory_gb"] is not None:
        details["peak memory"] = f"{cost['peak_memory_gb']:.2f} GB ({cost['memory_of']})"
    details["made"] = ", ".join(f"{name} {value}" for name, value in results["made"].items())
    return details


def _write_page(evaluation: Evaluation, baseline: Evaluation | None, max_prompts: int) -> None:
    metrics = columns(evaluation)
    runs = [evaluation] if baseline is None else [evaluation, baseline]
    found = evaluation.results["comparison"]
    comparison = {
        name: page.Comparison(
            c["difference"], c["low"], c["high"], c["win_rate"], int(c["prompts"])
        )
        for name, c in (found["metrics"] if found else {}).items()
        if c["low"] is not None
    }  # of one prompt
    prompts = evaluation.results["settings"]["prompts"]
    published = papers.TABLES.get(prompts["name"])
    rows = (
        [page.PublishedRow(row.name, row.scores, published.source) for row in published.rows]
        if published
        else []
    )
    title = f"{evaluation.results['name']} on {prompts['name']}"
    title += f" against {baseline.results['name']}" if baseline else ""
    page.write(
        evaluation.folder / PAGE,
        title=title,
        runs=[_as_run(run) for run in runs],
        metrics=metrics,
        comparison=comparison,
        published=rows,
        same_noise=not found or found["same_noise"],
        max_prompts=max_prompts,
    )


def table(evaluation: Evaluation, baseline: Evaluation | None) -> str:
    """Markdown in the layout of the papers' tables: generators by metrics, then what papers print,
    then categories.
    """
    metrics, runs = columns(evaluation), [run for run in (evaluation, baseline) if run]
    head = ["generator", "steps", "s per 10 images", "peak GB", *(_heading(m) for m in metrics)]
    lines = [_line(head), "|---" * len(head) + "|", *(_line(_cells(run, metrics)) for run in runs)]
    found = evaluation.results["comparison"]
    if found:
        cells = [
            _difference(found["metrics"][m.name], m) if m.name in found["metrics"] else ""
            for m in metrics
        ]
        noise = "same noise" if found["same_noise"] else "not the same noise"
        lines.append(_line([f"difference ({noise})", "", "", "", *cells]))
    published = papers.TABLES.get(evaluation.results["settings"]["prompts"]["name"])
    for row in published.rows if published else ():
        cells = [
            f"*{row.scores[m.name]:.{m.digits}f}*" if m.name in row.scores else "" for m in metrics
        ]
        lines.append(
            _line([_published(row.name), str(row.steps), f"{row.seconds:.2f}", "", *cells])
        )
    return "\n".join(
        [
            *lines,
            "",
            *(f"- {note}" for note in _notes(runs, metrics, published)),
            *_style_tables(runs, metrics),
            *_category_tables(evaluation, metrics),
        ]
    )


def _heading(metric: page.Metric) -> str:
    return f"{metric.label}{' †' if metric.trained_on else ''}"


def _published(name: str) -> str:
    return f"*{name}, published*"


def _notes(
    runs: list[Evaluation], metrics: list[page.Metric], published: papers.Table | None
) -> list[str]:
    """What is under the table."""
    found, settings = runs[0].results, runs[0].results["settings"]
    prompts, broken = settings["prompts"], found["broken"]
    what = f"{prompts['count']:,} prompts, {settings['samples']} images of each; mean ± standard error over prompts"
    notes = [f"{prompts['name']}: {what}.", *(f"{note}." for note in prompts["notes"])]
    if broken:
        notes.append(
            f"{len(broken)} images cannot be read and are left out, the first is {broken[0]}."
        )
    for run in runs:
        trained = ", ".join(run.results["settings"]["trained_on"])
        if trained:
            notes.append(
                f"{run.results['name']} was trained on {trained} (†): a rise there alone proves nothing."
            )
    if found["comparison"]:
        notes.append("Difference: 95 % bootstrap interval over prompts; share of prompts won.")
    if published:
        notes.append(f"*Published*: {published.source}; another protocol.")
    texts = [(m.label, found["metrics"][m.name]["note"]) for m in metrics]
    return notes + [f"{label}: {note}." for label, note in texts if note]


def _style_tables(runs: list[Evaluation], metrics: list[page.Metric]) -> list[str]:
    """HPSv2 as its papers print it: generators by styles, and their average."""
    lines = []
    for metric in metrics:
        if (
            metric.name not in REWARDS
            or "style" not in REWARDS[metric.name].groups
            or "style" not in runs[0].results["groups"]
        ):
            continue
        styles = list(runs[0].results["groups"]["style"])
        lines += ["", _line([metric.label, *styles, "average"]), "|---" * (len(styles) + 2) + "|"]
        for run in runs:
            if metric.name in run.results["metrics"]:
                found = [run.results["groups"]["style"][style][metric.name] for style in styles]
                cells = [
                    _mean(one, metric) for one in (*found, run.results["metrics"][metric.name])
                ]
                lines.append(_line([run.results["name"], *cells]))
        if metric.name == "hpsv21" and tuple(styles) == papers.HPSV2_STYLES:
            lines += [
                _line(
                    [
                        _published(row.name),
                        *(
                            f"*{value:.{metric.digits}f}*"
                            for value in (*papers.HPSV21_BY_STYLE[row.name], row.scores["hpsv21"])
                        ),
                    ]
                )
                for row in papers.TABLES["hpsv2"].rows
            ]
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(found: dict, metric: page.Metric) -> str:
    if found["mean"] is None:
        return "-"
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.{metric.digits}f}"
    return f"{found['mean']:.{metric.digits}f}{error}"


def _cells(run: Evaluation, metrics: list[page.Metric]) -> list[str]:
    cost, found = run.results["cost"], run.results["metrics"]
    seconds = "" if cost["seconds_per_image"] is None else f"{10 * cost['seconds_per_image']:.2f}"
    peak = "" if cost["peak_memory_gb"] is None else f"{cost['peak_memory_gb']:.2f}"
    return [
        run.results["name"],
        str(cost["steps"] or ""),
        seconds,
        peak,
        *(_mean(found[m.name], m) if m.name in found else "" for m in metrics),
    ]


def _difference(found: dict, metric: page.Metric) -> str:
    if found["difference"] is None:
        return "-"
    d = metric.digits
    interval = "" if found["low"] is None else f" [{found['low']:+.{d}f}, {found['high']:+.{d}f}]"
    return f"{found['difference']:+.{d}f}{interval}, {100 * found['win_rate']:.1f} %"


def _category_tables(evaluation: Evaluation, metrics: list[page.Metric]) -> list[str]:
    lines = []
    for group, found in evaluation.results["groups"].items():
        shown = [m for m in metrics if any(m.name in scores for scores in found.values())]
        lines += [
            "",
            _line([group, "prompts", *(m.label for m in shown)]),
            "|---" * (2 + len(shown)) + "|",
        ]
        for name, scores in found.items():
            count = max((s["prompts"] for s in scores.values()), default=0)
            lines.append(_line([name, str(count), *(_mean(scores[m.name], m) for m in shown)]))
    return lines
