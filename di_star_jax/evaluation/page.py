# SPDX-License-Identifier: Apache-2.0
"""The evaluation page: one HTML file with the tables, the pictures and a blind vote.

It opens without a network: page.css, votes.js and page.js are written into page.html.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from di_star_jax.errors import UserError
from di_star_jax.evaluation import papers
from di_star_jax.evaluation.metrics import Metric
from di_star_jax.evaluation.picks import Lists, Place, extremes, histogram, pick
from di_star_jax.evaluation.results import Evaluation
from di_star_jax.prompts.files import Prompt
from di_star_jax.storage.files import write_text
from di_star_jax.storage.images import read_image

FILE = "page.html"
LONGEST_SIDE = 512  # pixels of an embedded picture
TINY = 128  # pixels; up to here pictures are kept without loss, for the page shows them enlarged
SAMPLES = 4  # embedded per prompt
_PARTS = {"__STYLE__": ["page.css"], "__PROGRAM__": ["votes.js", "page.js"]}


def write(
    evaluation: Evaluation,
    baseline: Evaluation | None,
    max_prompts: int,
) -> None:
    """Writes the page into the evaluation's folder.

    Args:
      baseline: what it is compared with on the same prompts.
      max_prompts: whose pictures are embedded: the extremes of each metric and a random draw.
    Raises: UserError for a baseline of other prompts.
    """
    data = page_data(evaluation, baseline, max_prompts)
    # "<" is the one character by which text could leave a script element; in JSON it only occurs
    # inside strings.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    folder = Path(__file__).parent
    page = (folder / "page.html").read_text(encoding="utf-8")
    for place, names in _PARTS.items():
        parts = [(folder / name).read_text(encoding="utf-8") for name in names]
        page = page.replace(place, "\n".join(parts), 1)
    write_text(evaluation.folder / FILE, page.replace("__EVALUATION_DATA__", text, 1))


def page_data(
    evaluation: Evaluation,
    baseline: Evaluation | None,
    max_prompts: int,
) -> dict:
    """What the page's program reads. Args: as of `write`."""
    runs = [evaluation] if baseline is None else [evaluation, baseline]
    _check_same_prompts(runs)
    metrics = evaluation.columns()
    scored = [metric for metric in metrics if metric.per_image]
    differences = {metric.name: _difference(runs, metric) for metric in scored}
    lists = {metric.name: _extremes(evaluation, metric, differences) for metric in scored}
    shown, drawn, lists = pick(lists, len(evaluation.prompts), max_prompts)
    files = list(dict.fromkeys(file for i in shown for run in runs for file in _files(run, i)))
    numbers = {file: number for number, file in enumerate(files)}
    prompts = []
    for i in shown:
        pictures = [_pictures(run, i, scored, numbers) for run in runs]
        prompts.append({**_prompt(evaluation.prompts[i]), "random": i in drawn, "runs": pictures})
    samples = evaluation.settings["samples"]
    data = {
        "title": _title(runs),
        "metrics": [dataclasses.asdict(metric) for metric in metrics],
        "runs": [_run(run, metrics) for run in runs],
        **_comparison(evaluation),
        "published": _published(evaluation, metrics),
        "total": len(evaluation.prompts),
        "samples": samples,
        "embedded_samples": min(samples, SAMPLES),
        "prompts": prompts,
        "lists": _renumbered(lists, shown),
        "histograms": {},
        "images": data_uris(files),
    }
    if baseline:
        data["histograms"] = {name: histogram(values) for name, values in differences.items()}
    return data | {"id": _identity(data)}


def _prompt(prompt: Prompt) -> dict:
    return {"row": prompt.row, "prompt": prompt.text, "categories": prompt.categories}


def _pictures(
    run: Evaluation,
    prompt: int,
    metrics: list[Metric],
    numbers: dict[Path, int],
) -> list[dict]:
    """The samples of one prompt: the file's number, and scores where there are some."""
    scores = {metric.name: _scores(run, metric)[prompt] for metric in metrics}
    return [
        {
            "image": numbers[file],
            # In the seven digits that float32 has.
            "scores": {
                name: float(f"{row[k]:.7g}")
                for name, row in scores.items()
                if math.isfinite(row[k])
            },
        }
        for k, file in enumerate(_files(run, prompt))
    ]


def _renumbered(lists: Lists, shown: list[int]) -> Lists:
    """Lists of places among the prompts that are shown."""
    position = {i: n for n, i in enumerate(shown)}
    return {
        metric: {kind: [(position[i], k) for i, k in places] for kind, places in kinds.items()}
        for metric, kinds in lists.items()
    }


def _check_same_prompts(runs: list[Evaluation]) -> None:
    for ours, theirs in zip(runs[0].prompts, runs[-1].prompts, strict=True):
        if (ours.row, ours.text) != (theirs.row, theirs.text):
            raise UserError(
                f"row {theirs.row} is {theirs.text!r} in run {runs[-1].name!r} but row {ours.row} "
                f"is {ours.text!r} before; compare runs of one prompt file"
            )


# One metric.


def _scores(run: Evaluation, metric: Metric) -> np.ndarray:
    """[P, K], NaN where not scored."""
    missing = np.full((len(run.prompts), run.settings["samples"]), np.nan)
    return run.values.get(metric.name, missing)


def _difference(runs: list[Evaluation], metric: Metric) -> np.ndarray:
    """Of the first run to the second, [P, K]; NaN where there is none."""
    ours = _scores(runs[0], metric)
    if len(runs) == 1:
        return np.full_like(ours, np.nan)
    return ours - _scores(runs[1], metric)


def _extremes(
    run: Evaluation,
    metric: Metric,
    differences: dict[str, np.ndarray],
) -> dict[str, list[Place]]:
    """Among the samples that are embedded."""
    sign = -1.0 if metric.higher_is_better is False else 1.0
    scores = sign * _scores(run, metric)[:, :SAMPLES]
    return extremes(scores, sign * differences[metric.name][:, :SAMPLES])


# The whole.


def _title(runs: list[Evaluation]) -> str:
    title = f"{runs[0].name} on {runs[0].settings['prompts']['name']}"
    return " against ".join([title, *(run.name for run in runs[1:])])


def _run(run: Evaluation, metrics: list[Metric]) -> dict:
    found = run.results["metrics"]
    names = [metric.name for metric in metrics if metric.name in found]
    return {
        "name": run.name,
        "details": _details(run),
        "summary": {name: found[name] for name in names if found[name]["mean"] is not None},
    }


def _details(run: Evaluation) -> dict[str, str]:
    """Settings as text; those of the metrics are in their notes."""
    prompts = run.settings["prompts"]
    text = "; ".join([f"{prompts['name']}, {prompts['count']:,}", *prompts["notes"]])
    details = {"prompts": text}
    for name, value in run.settings.items():
        if value not in (None, {}) and name not in ("prompts", "metrics"):
            is_tree = isinstance(value, (dict, list))
            details[name.replace("_", " ")] = json.dumps(value) if is_tree else str(value)
    cost = run.results["cost"]
    if cost["seconds_per_image"] is not None:
        details["seconds per image"] = f"{cost['seconds_per_image']:.3g} on {cost['device']}"
    if cost["peak_memory_gb"] is not None:
        details["peak memory"] = f"{cost['peak_memory_gb']:.2f} GB ({cost['memory_of']})"
    made = run.results["made"]
    details["made"] = ", ".join(f"{name} {value}" for name, value in made.items())
    return details


def _comparison(evaluation: Evaluation) -> dict:
    """Where there is an interval: one prompt alone has none."""
    found = evaluation.results["comparison"] or {"metrics": {}, "same_noise": True}
    bounded = {
        name: paired for name, paired in found["metrics"].items() if paired["low"] is not None
    }
    return {"comparison": bounded, "same_noise": found["same_noise"]}


def _published(evaluation: Evaluation, metrics: list[Metric]) -> list[dict]:
    names = {metric.name for metric in metrics}
    return [
        {
            "name": row.label,
            "values": {name: score for name, score in row.scores.items() if name in names},
            "steps": _steps(row.steps),
            "source": table.source,
        }
        for table in papers.tables_of(evaluation.settings["prompts"]["name"], names)
        for row in table.rows
    ]


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}" if count else ""


def _identity(data: dict) -> str:
    """Votes are kept under it, so that those on other pictures are not taken up."""
    parts = [data["title"], *(run["name"] for run in data["runs"])]
    parts += [str(entry["row"]) for entry in data["prompts"]]
    parts += [str(uri) for uri in data["images"]]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# Pictures.


def _files(run: Evaluation, prompt: int) -> list[Path]:
    """Those of a prompt that are embedded."""
    folder = run.folder.resolve()
    return [Path(os.path.normpath(folder / file)) for file in run.files[prompt][:SAMPLES]]


def data_uris(files: list[Path]) -> list[str | None]:
    """Pictures as text, None where a file is not readable as one."""
    with ThreadPoolExecutor() as pool:  # Pillow's encoders run outside the interpreter's lock
        return list(pool.map(_data_uri, files))


def _data_uri(file: Path) -> str | None:
    pixels = read_image(file)
    if pixels is None:
        return None
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(image.size) <= TINY:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
