# SPDX-License-Identifier: Apache-2.0
"""The results of an evaluation as data: results.json and scores.parquet of its folder."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from di_star_jax.errors import UserError
from di_star_jax.evaluation.metrics import Metric, metric_of
from di_star_jax.evaluation.statistics import Summary, by_group, paired
from di_star_jax.prompts.files import Prompt
from di_star_jax.storage.files import shown, whole, write_text

FILE, SCORES = "results.json", "scores.parquet"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One generator's evaluation. P prompts, K images of each.

    results: what results.json holds:
      name, settings, made, cost, broken (files);
      metrics: {metric: {mean, stderr, prompts, images, left_out, label, trained_on, note,
        over_noise}}, the last None or [low, high], as of `statistics.over_noise`;
      groups: {column: {category: {metric: {mean, stderr, prompts, images, left_out}}}};
      comparison: None, or {baseline, folder, same_noise, metrics: {metric: as of `compare`}}.
    prompts: P. files: [P][K], relative to `folder`.
    values: by metric as printed, float64 [P, K], or [P, 1] where there is one number a prompt; NaN
      where there is none.
    """

    folder: Path
    results: dict
    prompts: list[Prompt]
    files: list[list[Path]]
    values: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """Of the generator."""
        return self.results["name"]

    @property
    def settings(self) -> dict:
        """What the numbers depend on."""
        return self.results["settings"]

    def columns(self) -> list[Metric]:
        """Its metrics in their order, as they are printed for this generator."""
        found = []
        for name, entry in self.results["metrics"].items():
            usual = metric_of(name)
            label = entry["label"] or usual.label
            found.append(dataclasses.replace(usual, label=label, trained_on=entry["trained_on"]))
        return found


def number(x: float | None) -> float | None:
    """As JSON has it: no NaN."""
    return None if x is None or not math.isfinite(x) else float(x)


def plain(found: Summary) -> dict:
    """A summary as results.json holds it."""
    return found._asdict() | {"mean": number(found.mean), "stderr": number(found.stderr)}


def by_categories(
    prompts: list[Prompt],
    values: dict[str, np.ndarray],
    groups: tuple[str, ...],
) -> dict:
    """{column: {category: {metric: summary}}} for the columns that every prompt has."""
    tables = {}
    for group in groups:
        names = [prompt.categories[group] for prompt in prompts if group in prompt.categories]
        if len(names) < len(prompts):
            continue
        found = {metric: by_group(of_metric, names) for metric, of_metric in values.items()}
        tables[group] = {
            name: {metric: plain(summaries[name]) for metric, summaries in found.items()}
            for name in dict.fromkeys(names)
        }
    return tables


def with_earlier(evaluation: Evaluation, earlier: Evaluation) -> Evaluation:
    """An evaluation with what an earlier one of the same images has beside it.

    Args: earlier, of the same prompts and images, whose metrics come first.
    """
    found = evaluation.results
    before = earlier.results
    of_metrics = before["settings"]["metrics"] | found["settings"]["metrics"]
    merged = found | {
        "metrics": before["metrics"] | found["metrics"],
        "settings": found["settings"] | {"metrics": of_metrics},
        "groups": {
            column: {
                name: before["groups"].get(column, {}).get(name, {}) | summaries
                for name, summaries in categories.items()
            }
            for column, categories in found["groups"].items()
        },
    }
    values = earlier.values | evaluation.values
    return dataclasses.replace(evaluation, results=merged, values=values)


def compare(ours: Evaluation, baseline: Evaluation) -> dict:
    """Two comparable evaluations, as results.json holds it: paired, metric by metric of both."""
    found = {}
    for metric, values in ours.values.items():
        if metric in baseline.values:
            numbers = paired(values, baseline.values[metric])._asdict()
            found[metric] = {name: number(value) for name, value in numbers.items()}
    noise = ours.settings["noise"]
    return {
        "baseline": baseline.name,
        "folder": shown(baseline.folder),
        # Drawn by this project, both.
        "same_noise": noise is not None and noise == baseline.settings["noise"],
        "metrics": found,
    }


def write_results(evaluation: Evaluation) -> None:
    """Writes results.json, which marks a finished evaluation."""
    text = json.dumps(evaluation.results, indent=1, allow_nan=False)
    write_text(evaluation.folder / FILE, text + "\n")


def write_scores(evaluation: Evaluation) -> None:
    """Writes scores.parquet: a row an image."""
    samples = len(evaluation.files[0])
    prompts = [prompt for prompt in evaluation.prompts for _ in range(samples)]
    columns = {
        "row": [prompt.row for prompt in prompts],
        "sample": list(range(samples)) * len(evaluation.prompts),
        "prompt": [prompt.text for prompt in prompts],
        "categories": [json.dumps(prompt.categories) for prompt in prompts],
        "file": [str(file) for files in evaluation.files for file in files],
    }
    for name, values in evaluation.values.items():
        columns[name] = np.broadcast_to(values, (len(values), samples)).reshape(-1)
    with whole(evaluation.folder / SCORES) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def check_finished(folder: Path) -> None:
    """Raises: UserError for a folder without a finished evaluation."""
    if not (folder / FILE).is_file():
        raise UserError(
            f"no {FILE} in {folder}; give the --out folder of an evaluation that has come to its "
            "end"
        )


def read(folder: Path) -> Evaluation:
    """A finished evaluation. Raises: UserError for a folder that is none."""
    check_finished(folder)
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder} holds no readable evaluation ({reason}); run it again") from None


def _read(folder: Path) -> Evaluation:
    results = json.loads((folder / FILE).read_text(encoding="utf-8"))
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
    return Evaluation(folder, results, prompts, files, values)
