# SPDX-License-Identifier: Apache-2.0
"""What the numbers of an evaluation depend on; two that differ are not mixed and not compared."""

import json
from pathlib import Path
from typing import Any

from di_star_jax.errors import UserError
from di_star_jax.evaluation.images import listing_digest
from di_star_jax.evaluation.job import STATE, Job
from di_star_jax.storage.buckets import local
from di_star_jax.storage.files import read_json, shown, write_text

# As asked; what has drawn the images says it as it is.
_OF_SAMPLING = ("sampler", "steps", "guidance_scale", "timestep", "resolution")


def asked(job: Job) -> dict:
    """What the images depend on, as given; an evaluation that is continued must have the same."""
    request = job.request
    given = {
        "checkpoint": request.checkpoint,
        "images": request.images,
        "prompts": {
            "name": job.source.name,
            "digest": job.source.digest,
            "count": len(job.prompts),
        },
        "samples": request.samples,
    }
    if request.images:
        base = local(request.images)
        base = base if base.is_dir() else base.parent
        files = [shot.file for shot in job.shots]
        return given | {"images_digest": listing_digest(files, base)}
    if job.metadata:
        given |= {"checkpoint_step": job.metadata["step"], "which": request.which}
    sampler, steps, guidance_scale, timesteps, resolution = request.sampling
    values = (sampler, steps, guidance_scale, list(timesteps) or None, resolution)
    given |= dict(zip(_OF_SAMPLING, values, strict=True))
    return given | {"dtype": request.dtype, "seed": request.seed}


def keep_asked(
    out: Path,
    given: dict,
    started: bool,
) -> None:
    """Writes what is asked for, or compares it with what was, where images or scores are there.

    Args: started, whether anything was made: before that, a mistake may be mended.
    Raises: UserError where they differ.
    """
    kept = read_json(out / STATE) if started else {}
    given = json.loads(json.dumps(given))
    was = kept.get("asked", given)
    if was != given:
        name = _first_difference(was, given)
        raise UserError(
            f"--out={out} holds an evaluation with {name}={short(was.get(name))}, this one has "
            f"{short(given.get(name))}; give another --out"
        )
    _write_state(out, given, kept.get("metrics", {}))


def keep_metrics(out: Path, given: dict[str, dict]) -> None:
    """As `keep_asked`, for what each metric depends on; others may be added."""
    kept = read_json(out / STATE)
    for name, now in given.items():
        was = kept["metrics"].get(name, now)
        if was != now:
            key = _first_difference(was, now)
            raise UserError(
                f"--out={out} holds scores of {name} with {key}={short(was.get(key))}, this "
                f"evaluation has {short(now.get(key))}; give another --out"
            )
    _write_state(out, kept["asked"], kept["metrics"] | given)


def _write_state(
    out: Path,
    given: dict,
    of_metrics: dict[str, dict],
) -> None:
    state = {"asked": given, "metrics": of_metrics}
    write_text(out / STATE, json.dumps(state, indent=1) + "\n")


def _first_difference(was: dict, now: dict) -> str:
    return next(name for name in was | now if was.get(name) != now.get(name))


def settings_of(
    job: Job,
    given: dict,
    of_metrics: dict[str, dict],
    drawn: dict,
) -> dict:
    """What the numbers depend on, with hashes, as results.json holds it.

    Args: as of `asked`, `check_metrics`, and `draw` or {}.
    """
    prompts = {"verified": job.source.verified, "notes": list(job.source.notes)}
    used = given | {"prompts": given["prompts"] | prompts}
    noise = None
    if drawn:
        used = {name: value for name, value in used.items() if name not in _OF_SAMPLING}
        used |= drawn["how"]
        noise = {"seed": given["seed"], "latent_shape": drawn["how"]["latent_shape"]}
    used |= {name: shown(used[name]) for name in ("checkpoint", "images") if used.get(name)}
    of_metrics = {name: _without_paths(of_metric) for name, of_metric in of_metrics.items()}
    return used | {"noise": noise, "metrics": of_metrics, "trained_on": job.trained_on}


def _without_paths(of_metric: dict) -> dict:
    """What a metric depends on, as others may read it."""
    paths = ("weights", "tokenizer", "reference")
    return of_metric | {name: shown(of_metric[name]) for name in paths if of_metric.get(name)}


def check_comparable(
    mine: dict,
    theirs: dict,
    folder: Path,
) -> None:
    """Raises: UserError where a baseline has other prompts or another number of samples.

    Args: settings of both; the baseline's folder.
    """
    same = all(mine["prompts"][key] == theirs["prompts"][key] for key in ("digest", "count"))
    if not same:
        raise _not_comparable(folder, "prompts", theirs["prompts"], mine["prompts"])
    if mine["samples"] != theirs["samples"]:
        raise _not_comparable(folder, "images a prompt", theirs["samples"], mine["samples"])


def _not_comparable(
    folder: Path,
    what: str,
    theirs: Any,
    mine: Any,
) -> UserError:
    return UserError(
        f"{folder} has other {what} ({short(theirs)}) than this evaluation ({short(mine)}); "
        "evaluate both with the same flags"
    )


def check_same_scores(
    mine: dict[str, dict],
    theirs: dict[str, dict],
    folder: Path,
) -> None:
    """Raises: UserError where a baseline was scored by other weights, or against another reference.

    Args: what each metric depends on, of both; the baseline's folder.
    """
    for name, their in theirs.items():
        ours = mine.get(name, their)
        if ours.get("sha256") != their.get("sha256"):
            raise UserError(
                f"{folder} has {name} by other weights ({short(their['weights'])}) than this "
                f"evaluation ({short(ours['weights'])}); score both by the same"
            )
        if ours.get("reference_digest") != their.get("reference_digest"):
            raise UserError(
                f"{folder} has {name} against another reference ({short(their['reference'])}) than "
                f"this evaluation ({short(ours['reference'])}); score both against the same"
            )


def short(value: Any) -> str:
    """A setting as an error prints it."""
    if isinstance(value, dict):
        return f"{value['name']}, {value['count']} of digest {value['digest'][:8]}"
    return repr(value)
