# SPDX-License-Identifier: Apache-2.0
"""An evaluation from its request to its files."""

import dataclasses
import importlib.metadata
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from di_star_jax import log, sharding
from di_star_jax.errors import UserError
from di_star_jax.evaluation import cleanfid, drawn, features, measures, page, results, scores, table
from di_star_jax.evaluation.dependencies import check_metrics
from di_star_jax.evaluation.job import (
    EMBED,
    LOAD,
    WRITE,
    Job,
    Request,
    check,
    check_inputs,
    completed,
    job_of,
)
from di_star_jax.evaluation.metrics import BY_CLEAN_FID, BY_FEATURES, metric_of
from di_star_jax.evaluation.results import Evaluation
from di_star_jax.evaluation.settings import (
    asked,
    check_comparable,
    check_same_scores,
    keep_asked,
    keep_metrics,
    settings_of,
)
from di_star_jax.evaluation.statistics import over_noise, summary
from di_star_jax.evaluation.store import Store
from di_star_jax.prompts.sets import PROMPT_SETS
from di_star_jax.rewards import REWARDS, resolve
from di_star_jax.storage import buckets
from di_star_jax.storage.files import write_text

STORE = "scores.sqlite"


def evaluate(request: Request) -> Evaluation:
    """Draws what is to be drawn, scores it, compares it, writes it.

    Stopped, the same request continues. Finished, one with other metrics adds them.

    Args: request, whose `out` may be in a bucket: then all is there in the end, and before that on
      this machine.
    Raises: UserError.
    """
    request = completed(request)
    check(request)
    check_inputs(request)
    with buckets.continued_folder(request.out) as out:
        return _evaluate_in(dataclasses.replace(request, out=str(out)))


def _evaluate_in(request: Request) -> Evaluation:
    """`evaluate` of a checked request whose results go to a folder on this machine."""
    baseline = results.read(buckets.local(request.baseline)) if request.baseline else None
    job = job_of(request)
    given = asked(job)
    if baseline:
        check_comparable(given, baseline.settings, baseline.folder)
    with Store(job.out / STORE, job.shape) as store:
        evaluation = _evaluate(job, given, store, baseline)
    with log.waiting(job.stage(WRITE)):
        if baseline:
            evaluation.results["comparison"] = results.compare(evaluation, baseline)
        write(evaluation, baseline, request.max_prompts)
    return evaluation


def _evaluate(
    job: Job,
    given: dict,
    store: Store,
    baseline: Evaluation | None,
) -> Evaluation:
    """All but the comparison. Args: given, as of `asked`; baseline, that must be comparable."""
    mesh = sharding.make_mesh(-1, job.request.fsdp)
    started = (job.out / drawn.DRAWN).exists() or store.holds_other_than(scores.READABLE)
    keep_asked(job.out, given, started)
    if not started:
        store.clear()
    earlier = _finished(job.out) if started else None
    broken = scores.find_broken(job, store) if job.request.images else []
    with log.waiting(job.stage(LOAD)):
        of_metrics = check_metrics(job, mesh)
    if baseline:
        of_all = (earlier.settings["metrics"] if earlier else {}) | of_metrics
        check_same_scores(of_all, baseline.settings["metrics"], baseline.folder)
    keep_metrics(job.out, of_metrics)
    record = {}
    if job.request.checkpoint:
        record = drawn.draw(job, mesh)
        broken = scores.find_broken(job, store)
    settings = settings_of(job, given, of_metrics, record)
    evaluation = measure(job, store, mesh, settings, broken)
    evaluation.results["cost"] = drawn.cost_of(record)
    if earlier:
        evaluation = results.with_earlier(evaluation, earlier)
        for name, found in evaluation.results["metrics"].items():
            found["trained_on"] = job.was_trained_on(name)
    return evaluation


def _finished(out: Path) -> Evaluation | None:
    """What a folder holds of a finished evaluation, or None."""
    try:
        return results.read(out)
    except UserError:
        return None


def write(
    evaluation: Evaluation,
    baseline: Evaluation | None,
    max_prompts: int,
) -> None:
    """Writes all four files. results.json is the last, and gone before the others change."""
    (evaluation.folder / results.FILE).unlink(missing_ok=True)
    results.write_scores(evaluation)
    write_text(evaluation.folder / table.FILE, table.table_of(evaluation, baseline) + "\n")
    page.write(evaluation, baseline, max_prompts)
    results.write_results(evaluation)


class Numbers(NamedTuple):
    """By metric, for those asked for.

    values: as printed, [P, K], or [P, 1] of a prompt's images together.
    distances: of all images together. notes: how a number came about.
    """

    values: dict[str, np.ndarray]
    distances: dict[str, float | None]
    notes: dict[str, str]


def measure(
    job: Job,
    store: Store,
    mesh: Mesh,
    settings: dict,
    broken: list[Path],
) -> Evaluation:
    """Scores what is missing. Returns: the evaluation, without its cost and comparison."""
    numbers = Numbers(scores.score_images(job, store, mesh), {}, {})
    if set(BY_FEATURES) & set(job.metrics):
        _add_by_features(numbers, job, store, mesh)
    for name in BY_CLEAN_FID:
        if name in job.metrics:
            numbers.distances[name], numbers.notes[name] = _by_clean_fid(job, name, store, broken)
    unreadable = set(broken)
    left_out = sum(shot.file in unreadable for shot in job.shots)
    named = PROMPT_SETS.get(job.source.name)
    groups = named.groups if named else _own_groups(job)
    found = {
        "name": job.request.name or _name(job, settings),
        "settings": settings,
        "made": _made(),
        "comparison": None,
        "metrics": {
            name: _summary(name, numbers, job, left_out)
            | {
                "label": _label(name, job),
                "trained_on": job.was_trained_on(name),
                "note": numbers.notes.get(name, _note_of_weights(settings["metrics"][name])),
            }
            for name in job.metrics
        },
        "groups": results.by_categories(job.prompts, numbers.values, groups),
        "broken": [_below(file, job) for file in broken],
    }
    return Evaluation(job.out, found, job.prompts, _files(job), numbers.values)


def _summary(
    name: str,
    numbers: Numbers,
    job: Job,
    left_out: int,
) -> dict:
    """Mean, error and counts of one metric. Args: left_out, images that cannot be read."""
    counts = {"images": len(job.shots) - left_out, "left_out": left_out}
    if name in numbers.distances:
        mean = results.number(numbers.distances[name])
        return {"mean": mean, "stderr": None, "prompts": len(job.prompts), **counts}
    values = numbers.values[name]
    found = results.plain(summary(values)) | {"over_noise": over_noise(values)}
    # Of diversity, which has one number a prompt, all its images are counted.
    return found if metric_of(name).per_image else found | counts


def _add_by_features(
    numbers: Numbers,
    job: Job,
    store: Store,
    mesh: Mesh,
) -> None:
    """Diversity and Frechet distance."""
    log.say(job.stage(EMBED))
    with log.waiting(f"loading the CLIP of {job.request.features}"):
        model = features.load_features(job, mesh)
    found = features.features_of(job.shots, store, model)
    if "diversity" in job.metrics:
        of_prompts = [measures.diversity(rows) for rows in found]
        numbers.values["diversity"] = np.array(of_prompts)[:, None]
        numbers.notes["diversity"] = f"over {job.request.samples} images a prompt; {model.name}"
    if "frechet" in job.metrics:
        kept = job.out / f"reference_{model.digest[:8]}.npz"
        reference = buckets.local(job.request.reference)
        distance, note = features.distance_to_reference(found, model, reference, kept)
        numbers.distances["frechet"] = distance
        numbers.notes["frechet"] = note


def _by_clean_fid(
    job: Job,
    name: str,
    store: Store,
    broken: list[Path],
) -> tuple[float | None, str]:
    """FID or CLIP-FID, and a note. Kept, for it takes long."""
    kept = store.distance(name)
    if kept is None:
        left_out = set(broken)
        files = [shot.file for shot in job.shots if shot.file not in left_out]
        with log.waiting(job.stage(name)):
            found = cleanfid.distance(name, files, job.request.reference, job.out)
        store.add_distance(name, *found)
        kept = store.distance(name)
    return kept


def _made() -> dict[str, str]:
    try:
        version = importlib.metadata.version("di_star_jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "not installed"
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"di_star_jax": version, "jax": jax.__version__, "date": date}


def _own_groups(job: Job) -> tuple[str, ...]:
    """Columns of a user's file with at most 100 categories, and fewer than there are prompts."""
    categories: dict[str, set[str]] = {}
    for prompt in job.prompts:
        for name, category in prompt.categories.items():
            categories.setdefault(name, set()).add(category)
    most = min(100, len(job.prompts) - 1)
    return tuple(name for name, found in categories.items() if len(found) <= most)


def _below(file: Path, job: Job) -> str:
    """A file's place in the folder of images."""
    given = buckets.local(job.request.images or str(job.out))
    base = given if given.is_dir() else given.parent
    return str(file.relative_to(base)) if file.is_relative_to(base) else file.name


def _files(job: Job) -> list[list[Path]]:
    """[P][K], relative to the evaluation's folder."""
    out = job.out.resolve()
    folders = {folder: folder.resolve() for folder in {shot.file.parent for shot in job.shots}}
    files = [
        Path(os.path.relpath(folders[shot.file.parent] / shot.file.name, out)) for shot in job.shots
    ]
    samples = job.request.samples
    return [files[i : i + samples] for i in range(0, len(files), samples)]


def _name(job: Job, settings: dict) -> str:
    name = Path(job.request.images or job.request.checkpoint).absolute().name
    return f"{name} ({job.request.which})" if "which" in settings else name


def _label(name: str, job: Job) -> str:
    """With its model's name, where the title means little without; "" for the usual one."""
    entry = REWARDS.get(name)
    if entry is None or entry.model_name is None:
        return ""
    config = entry.read_config(resolve(name, job.sources[name]))
    return f"{entry.title} ({entry.model_name(config)})"


def _note_of_weights(of_metric: dict) -> str:
    if "weights" not in of_metric:
        return ""
    return f"weights {of_metric['weights']} (sha256 {of_metric['sha256'][:8]})"
