# SPDX-License-Identifier: Apache-2.0
"""Table 2 of the paper in miniature, the methods at equal balance, and reward hacking.

    di-star ablation --workdir=runs/ablation

Every row of studies/rows.py trains the same initial generator of the shapes world, and is measured
on held-out captions and identical noise. Writes ablation.md and its pictures to the workdir from
what is done; stopped, the same command continues, and --rows=NAME runs a row or a group alone.
--out=docs renews the page of the project, when all is done.
"""

import functools
import json
import pathlib
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from di_star_jax import checks, log, sharding, train
from di_star_jax.command import run as run_command
from di_star_jax.config import load_config
from di_star_jax.errors import UserError, check_all, suggest
from di_star_jax.pipelines import trained
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import Options, load_model
from di_star_jax.storage import checkpoint, files
from di_star_jax.studies import rows
from di_star_jax.studies.ablation_page import SPREAD, table, told, write_page
from di_star_jax.studies.figures import COLUMNS
from di_star_jax.studies.page import check_matplotlib
from di_star_jax.studies.results import (
    INIT,
    TEACHER,
    Results,
    check_origin,
    folder_of,
    is_done,
    missing,
    note_origin,
    results_of,
)
from di_star_jax.studies.rows import Row
from di_star_jax.studies.world import (
    BATCH,
    CURVE_CAPTIONS,
    Drawn,
    World,
    captions_of,
    measured,
)

SECONDS = 150.0  # of a run of STEPS on two cores, before one is done
Todo = list[tuple[Row, int]]  # with the seed


def run_row(
    world: World,
    folder: pathlib.Path,
    config,
) -> None:
    """Trains one row with one seed and measures it.

    Writes result.json (last) and pictures.npy in `folder`.
    """
    began = time.time()
    train.run(config, str(folder / "run"))
    warmup = config.assistant.warmup_steps
    with checkpoint.existing(folder / "run") as store:
        averages = {k: _average(world, store, warmup + k) for k in rows.points_of(config)}
    with log.waiting("measuring"):
        result, drawn = measured(world, averages)
    _write(folder, result, drawn, time.time() - began)
    shutil.rmtree(folder / "run")


def _average(
    world: World,
    store: checkpoint.Checkpoints,
    step: int,
) -> Any:
    """A generator's average after so many steps, whole also where its adapters alone learnt."""
    parts = world.parts
    like = jax.tree.leaves(parts.models[DENOISER].params)[0]
    shardings = functools.partial(sharding.params_sharding, world.mesh)
    options = Options(param_dtype=like.dtype, shardings=shardings)
    metadata = checkpoint.located(store.metadata(step))
    return trained.restored(store, step, "ema", metadata, parts.pipeline.folder, options)


def _run_references(
    world: World,
    workdir: pathlib.Path,
    generator: str,
) -> None:
    """Measures what rows are compared with. Args: generator, the folder all of them start from."""
    if not is_done(workdir, INIT, 0):
        params = load_model(pathlib.Path(generator)).params
        _write(folder_of(workdir, INIT, 0), *measured(world, {0: params}), 0.0)
    if not is_done(workdir, TEACHER, 0):
        few = world.measure(world.teacher.first(CURVE_CAPTIONS))
        curve = {"step": [0]} | {name: [value] for name, value in few.items()}
        result = {"scores": world.measure(world.teacher), "curve": curve}
        _write(folder_of(workdir, TEACHER, 0), result, world.teacher, 0.0)


def _write(
    folder: pathlib.Path,
    result: dict,
    drawn: Drawn,
    seconds: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", drawn.images[:COLUMNS, 0])
    device = jax.devices()[0].device_kind
    files.write_text(
        folder / "result.json", json.dumps(result | {"seconds": seconds, "device": device})
    )


def main() -> None:
    args = flags.FLAGS
    workdir = files.expand(args.workdir)
    check_all(
        check_matplotlib,
        lambda: _check_rows(args),
        lambda: _check_seeds(args.seeds),
        _check_devices,
        lambda: checks.check_workdir(args.workdir),
        lambda: files.writable_folder(args.workdir, "--workdir"),
        lambda: args.out and files.writable_folder(args.out, "--out"),
    )
    check_origin(workdir, args.config)
    results_of(workdir)  # refuses what is of another version before anything is trained
    captions = captions_of(load_config(args.config, "di_star"))
    seeds = list(dict.fromkeys(map(int, args.seeds)))
    todo = _todo(workdir, args.rows, seeds)
    if todo or not all(is_done(workdir, name, 0) for name in (INIT, TEACHER)):
        _run(workdir, args.config, todo, seeds)
    write_page(workdir, captions, seeds, workdir)
    results = results_of(workdir)
    for group in dict.fromkeys(row.group for row in rows.ROWS.values() if row.name in results):
        log.say(f"{rows.GROUPS[group]}\n{table(results, group)}")
    log.say(f"{SPREAD}\nwrote {workdir / 'ablation.md'}")
    if args.out:
        _publish(workdir, captions, seeds, files.expand(args.out))


def _publish(
    workdir: pathlib.Path,
    captions: list[str],
    seeds: Sequence[int],
    out: pathlib.Path,
) -> None:
    """Writes the page where others read it, if it is whole."""
    lacking = missing(results_of(workdir), seeds)
    if lacking:
        log.say(
            f"--out={out} is left as it is, for {told(lacking)}; leave --rows out, and the same "
            "command makes them"
        )
        return
    write_page(workdir, captions, seeds, out)
    log.say(f"wrote {out / 'ablation.md'}")


def _todo(
    workdir: pathlib.Path,
    names: list[str],
    seeds: Sequence[int],
) -> Todo:
    """Runs that are left to do, the first seed of all rows first."""
    asked = rows.rows_of(names)
    numbers = seeds or dict.fromkeys(seed for row in asked for seed in row.seeds)
    return [
        (row, seed)
        for seed in numbers
        for row in asked
        if seed in (seeds or row.seeds) and not is_done(workdir, row.name, seed)
    ]


def _check_rows(args) -> None:
    """Refuses rows that are not known, and presets that could not run."""
    known = [*rows.GROUPS, *rows.ROWS]
    for name in args.rows:
        if name not in known:
            raise UserError(
                f"--rows={name}{suggest(name, known)}, expected groups ({', '.join(rows.GROUPS)}) "
                f"or rows ({', '.join(rows.ROWS)})"
            )
    config = load_config(args.config, "di_star")
    if config.eval.oracle != "shapes" or not config.eval.prompts:
        raise UserError(
            f"--config={args.config}, expected one of the shapes world, with eval.oracle='shapes' "
            "and eval.prompts; use shapes, or a copy of configs/shapes.py"
        )
    captions = pathlib.Path(config.eval.prompts)
    if not captions.is_file():
        raise UserError(f"eval.prompts={captions}: no such file; give one with captions")
    for row in rows.rows_of(args.rows):
        checks.check(rows.config_of(row, args.config, 0), jax.device_count())


def _check_devices() -> None:
    count = jax.device_count()
    if BATCH % count:
        raise UserError(
            f"{count} devices do not divide the {BATCH} pictures that are measured at a time; "
            "let it see one, e.g. with CUDA_VISIBLE_DEVICES=0"
        )


def _check_seeds(seeds: list[str]) -> None:
    if not all(re.fullmatch("[0-9]{1,9}", seed) for seed in seeds):
        raise UserError(f"--seeds={','.join(seeds)}, expected numbers such as 0,1,2")


def _run(
    workdir: pathlib.Path,
    file: str,
    todo: Todo,
    seeds: Sequence[int],
) -> None:
    """Runs what is left to do. Args: file, of the config; seeds, as the page's."""
    note_origin(workdir, file)
    log.say(f"{len(todo)} runs, {_estimate(results_of(workdir), todo)}, judge and teacher aside")
    first = load_config(file, "di_star")
    world = World(workdir, first)
    _run_references(world, workdir, first.weights.generator)
    for i, (row, seed) in enumerate(todo):
        left = _estimate(results_of(workdir), todo[i:])
        go_on = "" if i else "; stopped, the same command goes on"
        log.say(f"{row.name}, seed {seed}: run {i + 1} of {len(todo)}, {left}{go_on}")
        run_row(world, folder_of(workdir, row.name, seed), rows.config_of(row, file, seed))
        write_page(workdir, world.captions, seeds, workdir)


def _estimate(results: Results, todo: Todo) -> str:
    """What runs take, by the steps of those that are done."""
    done = [
        (run, rows.ROWS[name]) for name in results if name in rows.ROWS for run in results[name]
    ]
    count = sum(row.length for row, _ in todo)
    if not done:
        return f"about {log.duration(SECONDS * count)} left in all on two cores"
    each = sum(run.seconds for run, _ in done) / sum(row.length for _, row in done)
    return f"{log.duration(each * count)} left in all"


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "Folder for what is done.", required=True)
    flags.DEFINE_string("config", "shapes", "Config whose presets are run, by name or path.")
    flags.DEFINE_list(
        "rows",
        [],
        f"Rows to run, or groups of them ({', '.join(rows.GROUPS)}); all if not given: "
        f"{', '.join(rows.ROWS)}.",
    )
    flags.DEFINE_list("seeds", [], "Seeds of each row; if not given, three of what concludes.")
    flags.DEFINE_string(
        "out", None, "Folder for ablation.md and its pictures too, written when no run is missing."
    )


if __name__ == "__main__":
    define_flags()
    run_command(main)
