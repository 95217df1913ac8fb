# SPDX-License-Identifier: Apache-2.0
"""The evaluation page: one HTML file with the tables, the pictures and a blind vote; it opens
without a network.
"""

import base64
import hashlib
import io
import json
import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from di_star_jax.errors import UserError

LONGEST_SIDE = 512  # pixels of an embedded picture
TINY = 128  # pixels; up to here pictures are kept without loss, for the page shows them enlarged
SAMPLES = 4  # embedded per prompt
LISTED = 8  # entries of a list of extremes
BINS = 24  # of a histogram of differences, half of them below zero

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACEHOLDER = "__EVALUATION_DATA__"


class Metric(NamedTuple):
    """A column. name: key of the scores; label: heading; unit: as printed, such as "cosine" or "100
    x cosine";
    digits: after the point; higher_is_better: None for what is neither, such as saturation;
    trained_on: a reward that the first run was trained on; per_image: False for one number a set,
    such as FID.
    """

    name: str
    label: str
    unit: str
    digits: int
    higher_is_better: bool | None
    trained_on: bool
    per_image: bool


class Picture(NamedTuple):
    """One sample. file: None or unreadable is shown as a broken image; scores: by metric name,
    missing or NaN where not scored.
    """

    file: Path | None
    scores: dict[str, float]


class Item(NamedTuple):
    """One prompt of a run. row: in the prompt file; categories: column name to value; pictures:
    samples 0 to K-1.
    """

    row: int
    prompt: str
    categories: dict[str, str]
    pictures: list[Picture]


class Summary(NamedTuple):
    """One number over a whole run. stderr: of the mean, None where unknown; count: of what the mean
    is taken over;
    note: printed under the table, such as "1,632 prompts" or the implementation of FID.
    """

    mean: float
    stderr: float | None
    count: int
    note: str


class Run(NamedTuple):
    """A generator. summary: by metric name; details: settings as text (checkpoint, sampler, seconds
    per image).
    """

    name: str
    items: list[Item]
    summary: dict[str, Summary]
    details: dict[str, str]


class Comparison(NamedTuple):
    """First run minus second on the same prompts and noise. low, high: 95 % bootstrap interval of
    the mean;
    win_rate: share in [0, 1] where the first is better (higher, if the metric has no better), ties
      one half.
    """

    mean_difference: float
    low: float
    high: float
    win_rate: float
    count: int


class PublishedRow(NamedTuple):
    """Numbers of a paper. values: by metric name, others than the page's metrics are left out;
    source: such as "arXiv 2410.20898, Table 2".
    """

    name: str
    values: dict[str, float]
    source: str


class _Prompt(NamedTuple):
    row: int
    prompt: str
    categories: dict[str, str]
    pictures: list[list[Picture]]  # [runs][samples]


Scores = dict[tuple[int, int], float]  # by (prompt index, sample)
Lists = dict[
    str, dict[str, list[tuple[int, int]]]
]  # metric name -> "best", ... -> (prompt index, sample)


def write(
    path: str | os.PathLike,
    *,
    title: str,
    runs: list[Run],
    metrics: list[Metric],
    comparison: dict[str, Comparison],
    published: list[PublishedRow],
    same_noise: bool = True,
    max_prompts: int = 200,
) -> None:
    """Writes the page.

    Pictures are embedded for some prompts only: the extremes of each metric and a random draw.

    Args:
      path: of the HTML file.
      title: heading; says what was evaluated.
      runs: the evaluated generator, then what it is compared with on the same prompts, then any
        others. Pictures join by row and sample.
      metrics: columns of the table, in its order.
      comparison: of runs[0] with runs[1], by metric name; empty if there is one run.
      published: rows of papers, shown apart.
      same_noise: whether the runs' pictures were drawn from the same noise.
      max_prompts: prompts whose pictures are embedded, at least 1.
    Raises: UserError for no runs, two prompts or two texts under one row, or max_prompts below 1.
    """
    if not runs:
        raise UserError("got no runs, expected at least one; give the evaluated generator's run")
    if max_prompts < 1:
        raise UserError(
            f"max_prompts={max_prompts}, expected at least 1; give the number of prompts to show"
        )
    data = _page_data(title, runs, metrics, _join(runs), max_prompts)
    data["comparison"] = {
        name: c._asdict() for name, c in comparison.items() if math.isfinite(c.mean_difference)
    }
    data["same_noise"] = same_noise
    data["published"] = [
        {**row._asdict(), "values": _finite(row.values, metrics)} for row in published
    ]
    # "<" is the one character by which text could leave a script element; in JSON it only occurs
    # inside strings.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = _TEMPLATE.read_text(encoding="utf-8")
    Path(path).write_text(template.replace(_PLACEHOLDER, text, 1), encoding="utf-8")


def _page_data(
    title: str, runs: list[Run], metrics: list[Metric], prompts: list[_Prompt], max_prompts: int
) -> dict:
    ranked = [metric for metric in metrics if metric.per_image]
    paired = len(runs) > 1
    lists = {metric.name: _extremes(prompts, metric, paired) for metric in ranked}
    shown, drawn, lists = _pick(lists, len(prompts), max_prompts)
    images = _Images()
    entries = [
        {
            "row": prompts[i].row,
            "prompt": prompts[i].prompt,
            "categories": prompts[i].categories,
            "random": i in drawn,
            "runs": [
                [
                    {"image": images.index(picture.file), "scores": _finite(picture.scores, ranked)}
                    for picture in pictures[:SAMPLES]
                ]
                for pictures in prompts[i].pictures
            ],
        }
        for i in shown
    ]
    position = {i: n for n, i in enumerate(shown)}
    uris = images.data_uris()
    samples = max((len(pictures) for prompt in prompts for pictures in prompt.pictures), default=0)
    parts = [
        title,
        *(run.name for run in runs),
        *(str(entry["row"]) for entry in entries),
        *map(str, uris),
    ]
    identity = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass"))
    return {
        "title": title,
        "id": identity.hexdigest()[
            :16
        ],  # votes are kept under it, so that those on other pictures are not taken up
        "metrics": [metric._asdict() for metric in metrics],
        "runs": [
            {"name": run.name, "details": run.details, "summary": _summary(run, metrics)}
            for run in runs
        ],
        "total": len(prompts),
        "samples": samples,
        "embedded_samples": min(samples, SAMPLES),
        "prompts": entries,
        "lists": {
            name: {
                kind: [(position[i], sample) for i, sample in keys] for kind, keys in kinds.items()
            }
            for name, kinds in lists.items()
        },
        "histograms": {metric.name: _histogram(prompts, metric) for metric in ranked if paired},
        "images": uris,
    }


def _join(runs: list[Run]) -> list[_Prompt]:
    """All prompts of all runs by row."""
    joined: dict[int, _Prompt] = {}
    for r, run in enumerate(runs):
        seen = set()
        for item in run.items:
            known = joined.setdefault(
                item.row, _Prompt(item.row, item.prompt, item.categories, [[] for _ in runs])
            )
            if item.row in seen:
                raise UserError(
                    f"run {run.name!r} has row {item.row} twice, expected each row once; give one item "
                    "a row, with all its samples"
                )
            if item.prompt != known.prompt:
                raise UserError(
                    f"row {item.row} is {item.prompt!r} in run {run.name!r} but {known.prompt!r} before; "
                    "compare runs of one prompt file"
                )
            seen.add(item.row)
            known.pictures[r].extend(item.pictures)
    return [joined[row] for row in sorted(joined)]


def _finite(scores: dict[str, float], metrics: list[Metric]) -> dict[str, float]:
    names = {metric.name for metric in metrics}
    return {
        name: float(f"{value:.7g}")
        for name, value in scores.items()
        if name in names and math.isfinite(value)
    }


def _summary(run: Run, metrics: list[Metric]) -> dict[str, dict]:
    means = _finite({name: summary.mean for name, summary in run.summary.items()}, metrics)
    return {
        name: {
            **run.summary[name]._asdict(),
            "mean": mean,
            "stderr": _known(run.summary[name].stderr),
        }
        for name, mean in means.items()
    }


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _scores(prompts: list[_Prompt], metric: Metric, run: int) -> Scores:
    return {
        (i, k): float(picture.scores[metric.name])
        for i, prompt in enumerate(prompts)
        for k, picture in enumerate(prompt.pictures[run])
        if math.isfinite(picture.scores.get(metric.name, math.nan))
    }


def _differences(prompts: list[_Prompt], metric: Metric) -> Scores:
    ours, theirs = (_scores(prompts, metric, run) for run in (0, 1))
    return {key: ours[key] - theirs[key] for key in ours if key in theirs}


def _histogram(prompts: list[_Prompt], metric: Metric) -> dict:
    """Differences over all prompts and samples; zero is an edge, so that no bar holds gains and
    losses.
    """
    values = np.array(list(_differences(prompts, metric).values()))
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    return {"limit": limit, "counts": np.histogram(values, BINS, (-limit, limit))[0].tolist()}


def _extremes(
    prompts: list[_Prompt], metric: Metric, paired: bool
) -> dict[str, list[tuple[int, int]]]:
    """The first run's best and worst pictures and its largest gains and losses, as many of the one
    as of the other.
    """
    sign = -1.0 if metric.higher_is_better is False else 1.0
    shown = {
        key: sign * score for key, score in _scores(prompts, metric, 0).items() if key[1] < SAMPLES
    }
    changes = (
        {key: sign * d for key, d in _differences(prompts, metric).items() if key[1] < SAMPLES}
        if paired
        else {}
    )
    kinds = {
        "best": _ranked(shown),
        "worst": _ranked({key: -score for key, score in shown.items()}),
        "gains": _ranked({key: d for key, d in changes.items() if d > 0}),
        "losses": _ranked({key: -d for key, d in changes.items() if d < 0}),
    }
    length = min(
        LISTED, max(1, len(prompts) // 2)
    )  # so that few prompts are not best and worst at once
    return {kind: keys[:length] for kind, keys in kinds.items()}


def _ranked(values: Scores) -> list[tuple[int, int]]:
    """Keys by falling value; of each prompt only its first sample in that order."""
    first = {}
    for key in sorted(values, key=lambda key: (-values[key], key)):
        first.setdefault(key[0], key)
    return list(first.values())


def _pick(lists: Lists, count: int, max_prompts: int) -> tuple[list[int], set[int], Lists]:
    """Chooses the prompts to show: extremes, rank by rank of all lists, for at most half the room;
    then a random draw.

    Returns: prompt indices, those of the random draw, and the lists cut to the ranks that all lists
      got.
    """
    picked: dict[int, None] = {}
    depth, room = 0, max_prompts // 2 if count > max_prompts else count
    for rank in range(LISTED):
        wider = picked | dict.fromkeys(_at_rank(lists, rank))
        if rank and len(wider) > room:
            break
        picked, depth = dict.fromkeys(list(wider)[:room]), rank + 1
    order = random.Random(0).sample(range(count), count)
    drawn = set()
    for i in order:  # out of all prompts, the extremes too: so the draw alone is a fair sample
        if len(picked.keys() | drawn) >= max_prompts:
            break
        drawn.add(i)
    shown = sorted(picked.keys() | drawn)
    kept = set(shown)
    cut = {
        name: {
            kind: [key for key in keys[:depth] if key[0] in kept] for kind, keys in kinds.items()
        }
        for name, kinds in lists.items()
    }
    return shown, drawn if len(shown) < count else kept, cut


def _at_rank(lists: Lists, rank: int) -> Iterator[int]:
    for kinds in lists.values():
        for keys in kinds.values():
            if rank < len(keys):
                yield keys[rank][0]


class _Images:
    """Files to embed, each once."""

    def __init__(self):
        self._files: dict[Path, int] = {}

    def index(self, file: Path | None) -> int | None:
        return None if file is None else self._files.setdefault(Path(file), len(self._files))

    def data_uris(self) -> list[str | None]:
        with ThreadPoolExecutor() as pool:  # Pillow's encoders run outside the interpreter's lock
            return list(pool.map(_data_uri, self._files))


def _data_uri(file: Path) -> str | None:
    """A picture as text, or None where the file is not readable as a picture."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ):  # what Pillow's readers raise
        return None
    buffer = io.BytesIO()
    if max(image.size) <= TINY:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
