# SPDX-License-Identifier: Apache-2.0
"""What the ablation has done, in its workdir: rows/NAME/SEED/result.json, and world.json."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from di_star_jax.config import fields, load_config
from di_star_jax.errors import UserError
from di_star_jax.pipelines.families import family_at
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.storage import files
from di_star_jax.studies import rows
from di_star_jax.studies.world import MEASURES

INIT = "initial generator"
TEACHER = "teacher"
REFERENCES = {INIT: "initial generator", TEACHER: "teacher, 50 steps"}  # label by name
# Of the reward, a cosine, over a run's last EVERY steps: less is not seen as a rise.
RISING = 0.005
_WORLD = "world.json"
_TOLD = 3  # of the differences, in an error
_ELSEWHERE = ("weights.", "data.prompts", "eval", "train.keep")  # by content, or no matter


class Run(NamedTuple):
    """One row with one seed.

    scores: by name of MEASURES. curve: "step" and MEASURES, a value each per point. seconds: of
    training and measuring, 0 for what is not trained.
    """

    seed: int
    scores: dict[str, float]
    curve: dict[str, list[float]]
    seconds: float
    device: str


Results = dict[str, list[Run]]


def folder_of(
    workdir: pathlib.Path,
    name: str,
    seed: int,
) -> pathlib.Path:
    """Of a run."""
    return workdir / "rows" / name / str(seed)


def is_done(
    workdir: pathlib.Path,
    name: str,
    seed: int,
) -> bool:
    """Whether its result, which is written last, is there."""
    return (folder_of(workdir, name, seed) / "result.json").exists()


def results_of(workdir: pathlib.Path) -> Results:
    """What is done, in the tables' order.

    Raises: UserError for a result that cannot be read.
    """
    found = {}
    for name in (*REFERENCES, *rows.ROWS):
        done = [_run(file) for file in (workdir / "rows" / name).glob("*/result.json")]
        if done:
            found[name] = sorted(done, key=lambda run: run.seed)
    return found


def _run(file: pathlib.Path) -> Run:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        curve = {k: [float(v) for v in result["curve"][k]] for k in ("step", *MEASURES)}
        return Run(
            seed=int(file.parent.name),
            scores={measure: float(result["scores"][measure]) for measure in MEASURES},
            curve=curve,
            seconds=float(result["seconds"]),
            device=str(result["device"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged or of another version ({error!r}); delete {file.parent}, and the "
            "run is made again, or give another --workdir"
        ) from None


def label_of(name: str) -> str:
    """What tables and figures call a row, or what it is compared with."""
    return REFERENCES[name] if name in REFERENCES else rows.ROWS[name].label


def mean(runs: list[Run], measure: str) -> float:
    """Of a score, over seeds."""
    return float(np.mean([run.scores[measure] for run in runs]))


def spread(runs: list[Run], measure: str) -> float:
    """Standard deviation of a score over seeds; NaN for one."""
    if len(runs) < 2:
        return np.nan
    return float(np.std([run.scores[measure] for run in runs], ddof=1))


def curve(runs: list[Run], measure: str) -> np.ndarray:
    """[points], the mean over seeds. Args: measure, of MEASURES or "step"."""
    return np.mean([run.curve[measure] for run in runs], axis=0)


def at_reward(
    results: Results,
    method: str,
    reward: float,
) -> dict[str, float] | None:
    """What a method's scores are where it has that reward, linear between two balances.

    Args: method, a key of rows.METHODS. Returns: by name of MEASURES; None beyond its balances.
    """
    names = [rows.balanced_name(method, balance) for balance in rows.BALANCES]
    found = [runs for runs in map(results.get, names) if runs]
    found.sort(key=lambda runs: mean(runs, "reward"))
    rewards = [mean(runs, "reward") for runs in found]
    if not found or not rewards[0] <= reward <= rewards[-1]:
        return None
    return {
        name: float(np.interp(reward, rewards, [mean(runs, name) for runs in found]))
        for name in found[0][0].scores
    }


def ending(runs: list[Run]) -> tuple[int, bool]:
    """Where a row's reward was best, and whether it was rising at the end still.

    It was, where the last point is higher than all before it by more than RISING.
    """
    steps, rewards = curve(runs, "step"), curve(runs, "reward")
    before = rewards[:-1].max(initial=-np.inf)
    return int(steps[rewards.argmax()]), bool(rewards[-1] > before + RISING)


def missing(results: Results, seeds: Sequence[int]) -> list[str]:
    """Runs that a whole page has and these results have not. Args: seeds, () for each row's own."""
    lacking = [name for name in REFERENCES if name not in results]
    for row in rows.ROWS.values():
        done = {run.seed for run in results.get(row.name, [])}
        lacking += [f"{row.name} (seed {s})" for s in seeds or row.seeds if s not in done]
    return lacking


def origin(file: str) -> dict[str, Any]:
    """What the results of a workdir must have in common: fields, and what is in their files.

    Args: file, of the config, as --config.
    """
    config = load_config(file, "di_star")
    reference = pathlib.Path(config.weights.reference)
    parts = family_at(reference).parts
    contents = {
        "the initial generator": config.weights.generator,
        "the teacher": reference / parts[DENOISER].folder,
        "the VAE": reference / parts["vae"].folder,
        "the reward model": config.weights.pickscore,
        "the training prompts": config.data.prompts,
        "the held-out captions": config.eval.prompts,
    }
    found = {what: files.sampled_digest(pathlib.Path(path)) for what, path in contents.items()}
    trained = fields(rows.config_of(rows.ROWS["di_star"], file, 0))
    found |= {name: value for name, value in trained.items() if not name.startswith(_ELSEWHERE)}
    for row in rows.ROWS.values():
        of_row = fields(rows.config_of(row, file, 0))
        found[f"row {row.name}"] = {k: v for k, v in of_row.items() if v != trained[k]}
    return json.loads(json.dumps(found))


def check_origin(workdir: pathlib.Path, config_file: str) -> None:
    """Refuses a workdir that holds another study's results. Raises: UserError."""
    file = workdir / _WORLD
    if not file.exists():
        if any(workdir.glob("rows/*/*/result.json")):
            raise UserError(
                f"--workdir={workdir} holds results and no {_WORLD}: an older version made them; "
                "give another --workdir"
            )
        return
    try:
        kept = files.read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); give another --workdir") from None
    now = origin(config_file)
    differ = [name for name in now if name in kept and kept[name] != now[name]]
    if differ:
        told = ", ".join(_told(kept, now, name) for name in differ[:_TOLD])
        more = f" and {len(differ) - _TOLD} more" if len(differ) > _TOLD else ""
        raise UserError(
            f"--workdir={workdir} holds results of another study: other than now "
            f"{'are' if len(differ) > 1 else 'is'} {told}{more}; give another --workdir"
        )


def _told(
    kept: dict,
    now: dict,
    name: str,
) -> str:
    is_digest = isinstance(now[name], str) and len(now[name]) == 64
    return name if is_digest else f"{name} ({kept[name]!r} there, {now[name]!r} now)"


def note_origin(workdir: pathlib.Path, config_file: str) -> None:
    """Writes what `check_origin` compares."""
    workdir.mkdir(parents=True, exist_ok=True)
    kept = files.read_json(workdir / _WORLD)
    files.write_text(workdir / _WORLD, json.dumps(kept | origin(config_file), indent=1) + "\n")
