# SPDX-License-Identifier: Apache-2.0
"""Table 2 of the paper in miniature.

    di-star ablation --workdir=runs/ablation

Every row trains the same initial generator of the shapes world with a preset of configs/shapes.py,
with several seeds, and is measured on held-out captions and identical noise. Writes ablation.md and
its pictures to the workdir from what is done; stopped, the same command continues, and --rows=NAME
runs one row alone. --out=docs renews the page of the project.
"""

import functools
import json
import pathlib
import re
import shutil
import textwrap
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from di_star_jax import assembly, checks, drawing, log, samplers, sharding, train
from di_star_jax.command import run as run_command
from di_star_jax.config import load_config
from di_star_jax.errors import UserError, check_all, suggest
from di_star_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from di_star_jax.pictures import to_uint8
from di_star_jax.pipelines.folder import load_model, load_pipeline
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import similarity
from di_star_jax.samplers import generator_timesteps
from di_star_jax.shapes import datasets, oracle, pretrain, scenes
from di_star_jax.storage import checkpoint, files
from di_star_jax.studies.page import check_matplotlib, conclusion_of

ROWS = {  # preset: the row of the paper's Table 2, or what it stands for here
    "kl_0_0": "KL (0, 0)",
    "kl_0_0_null": "KL (0, 0), omega = 0",
    "diff_instruct": "KL (0, 7.5), Diff-Instruct",
    "di_pp": "KL (100, 7.5), Diff-Instruct++",
    "di_star_outside": "DI* outside (100, 7.5)",
    "inside_0_0": "DI* inside (0, 0)",
    "inside_0_0_null": "DI* inside (0, 0), omega = 0",
    "sim": "DI* inside (0, 7.5), SIM",
    "inside_1_7.5": "DI* inside (1, 7.5)",
    "inside_10_7.5": "DI* inside (10, 7.5)",
    "inside_100_4.5": "DI* inside (100, 4.5)",
    "di_star": "DI* inside (100, 7.5)",
    "di_star_l2": "L2 (100, 7.5)",
    "sid": "SiD, alpha 1 (0, 7.5)",
    "dmd": "DMD (0, 7.5)",
    "reward_only": "reward only",
}
INIT = "initial generator"
# Half the batch of configs/shapes.py, so that three seeds of all rows take two hours.
TRAIN_BATCH = 16
STEPS = 100
WARMUP = 20  # of the assistant alone, before them
EVERY = 20  # steps, a point of the curve
CURVE_CAPTIONS = 50
PER_CAPTION = 4
BATCH = 50
JUDGE_IMAGES = 20_000
COLUMNS = 8  # of the picture, a caption each
SPREAD = "Mean ± standard deviation over seeds: how far another seed's run lies away."
MEASURES = ("reward", "attributes, pooled", "prompt score", "Frechet distance", "pixel distance")


class Judge:
    """A CLIP that no row trains on: its prompt score, and the features of the Frechet distance."""

    def __init__(
        self,
        workdir: pathlib.Path,
        config: dict,
        tokenizer: pathlib.Path,
    ):
        """Trains it, if `workdir` does not have it yet.

        Args: config of the reward's shape; tokenizer folder.
        """
        images, captions = datasets.render_dataset(workdir / "data", JUDGE_IMAGES)
        self._tokenizer = Tokenizer(tokenizer)
        self._graphdef, self._params = pretrain.train_clip(
            workdir / "judge", pretrain.CLIP, images, self._tokenizer(captions), config, seed=30
        )
        self._image = jax.jit(functools.partial(similarity.image_embeddings, self._graphdef))
        self._text = jax.jit(functools.partial(similarity.text_embeddings, self._graphdef))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Unit vectors [N, 64] of images [N, 64, 64, 3] in [-1, 1]."""
        starts = range(0, len(images), BATCH)
        return np.concatenate([self._image(self._params, images[i : i + BATCH]) for i in starts])

    def texts(self, captions: list[str]) -> np.ndarray:
        """Unit vectors [N, 64]."""
        return np.asarray(self._text(self._params, self._tokenizer(captions)))


def statistics(features: np.ndarray) -> FeatureStatistics:
    """Args: the judge's features [N, 64]."""
    found = FeatureStatistics("the judge of the ablation")
    found.update(features)
    return found


class World:
    """What all rows share: frozen networks, held-out captions, judge and teacher's pictures."""

    def __init__(self, workdir: pathlib.Path, config):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
        self.parts = assembly.load_parts(config, mesh)
        self.captions = _captions(config)
        reward_file = pathlib.Path(config.weights.pickscore, "config.json")
        reward_config = reward_file.read_text(encoding="utf-8")
        tokenizer = pathlib.Path(config.weights.reward_tokenizer)
        self.judge = Judge(workdir, json.loads(reward_config), tokenizer)
        timesteps = np.array(generator_timesteps(config.generator, SDXL.one_step))
        shape = self.parts.latent_shape(config.data.resolution)
        self._sampling = drawing.Sampling("few_step", timesteps, 1.0, shape)
        drawer = drawing.Drawer(self.parts.pipeline, self._sampling)
        self._draw = drawing.make_scored_draw(drawer, self.parts.rewards, mesh)
        self._ids = self.parts.tokenize(self.captions)
        self.teacher = statistics(self._teacher(workdir / "teacher.npy", config.objective.omega))

    def _teacher(self, file: pathlib.Path, omega: float) -> np.ndarray:
        """Features of the teacher's two pictures a held-out caption, made once.

        Drawn in 50 guided steps.
        """
        if file.exists():
            return np.load(file)
        sampling = drawing.Sampling(
            "euler", samplers.leading_timesteps(50), omega, self._sampling.latent_shape
        )
        draw = drawing.draw_prompts(load_pipeline(self.parts.pipeline.folder), sampling)
        captions, features = self.captions * 2, []
        with log.Progress(len(captions), 0, "teacher: picture") as progress:
            for start in range(0, len(captions), BATCH):
                batch = captions[start : start + BATCH]
                key = jax.random.fold_in(jax.random.key(11), start)
                z = jax.random.normal(key, (len(batch), *sampling.latent_shape))
                features.append(self.judge.features(draw(batch, z)))
                progress.update(start + len(batch), "")
        found = np.concatenate(features)
        with files.whole(file) as partial, partial.open("wb") as opened:
            np.save(opened, found)
        return found

    def pictures(self, params, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the first captions, PER_CAPTION each; the noise is fixed.

        Returns: (images [count, PER_CAPTION, H, W, 3], rewards [count, PER_CAPTION]).
        """
        images, scores = [], []
        frozen = self.parts.frozen()
        shape = self._sampling.noise_shape
        for start in range(0, count, BATCH):
            ids = {name: v[start : start + BATCH] for name, v in self._ids.items()}
            for k in range(PER_CAPTION):
                key = jax.random.fold_in(jax.random.key(start), k)
                count_here = len(self.captions[start : start + BATCH])
                z = jax.random.normal(key, (*shape[:1], count_here, *shape[1:]))
                drawn = jax.device_get(self._draw(frozen | {"unet": params}, ids, z))
                images.append(drawn.images)
                scores.append(drawn.rewards["pickscore"])
        return _by_caption(images), _by_caption(scores)

    def measure(self, params) -> tuple[dict[str, float], np.ndarray]:
        """All MEASURES on all captions, and the first pictures of the first captions."""
        images, scores = self.pictures(params, len(self.captions))
        features = self.judge.features(images.reshape(-1, *images.shape[2:]))
        texts = np.repeat(self.judge.texts(self.captions), PER_CAPTION, axis=0)
        measured = {
            "reward": float(scores.mean()),
            "attributes, pooled": _attributes_right(self.captions, images[:, 0]),
            "prompt score": float((features * texts).sum(-1).mean()),
            "Frechet distance": frechet_distance(statistics(features), self.teacher),
            "pixel distance": _pixel_distance(images),
        }
        return measured, images[:COLUMNS, 0]

    def curve_point(self, params) -> tuple[float, float]:
        """(mean reward, pixel distance) on some captions."""
        images, scores = self.pictures(params, CURVE_CAPTIONS)
        return float(scores.mean()), _pixel_distance(images)


def _by_caption(drawn: list[np.ndarray]) -> np.ndarray:
    """[captions, PER_CAPTION, ...] of batches [BATCH, ...], PER_CAPTION of each captions."""
    batches = [drawn[i : i + PER_CAPTION] for i in range(0, len(drawn), PER_CAPTION)]
    return np.concatenate([np.stack(batch, axis=1) for batch in batches])


def _attributes_right(captions: list[str], images: np.ndarray) -> float:
    """The share of all that the captions state; images [N, H, W, 3] in [-1, 1]."""
    right, stated = np.sum(
        [
            oracle.attributes(scenes.parse(caption), (image + 1.0) / 2.0)
            for caption, image in zip(captions, images)
        ],
        axis=0,
    )
    return float(right / stated)


def _pixel_distance(images: np.ndarray) -> float:
    """Between pictures of one caption, [N, PER_CAPTION, H, W, 3]."""
    return float(np.mean([pairwise_distance(pictures) for pictures in images]))


def pairwise_distance(images: np.ndarray) -> float:
    """Mean root-mean-square pixel distance over all pairs.

    Args: images [K, H, W, 3] in [-1, 1], K >= 2.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    i, j = np.triu_indices(len(flat), 1)
    return float(np.sqrt(((flat[i] - flat[j]) ** 2).mean(axis=1)).mean())


def run_row(
    world: World,
    folder: pathlib.Path,
    config,
) -> None:
    """Trains one row with one seed and measures it.

    Writes result.json (last) and pictures.npy in `folder`.
    """
    began = time.time()
    train.run(_shortened(config), str(folder / "run"))
    store = checkpoint.existing(folder / "run")
    averages = [
        store.restore_item(step, "ema", world.parts.models["unet"].params)
        for step in range(WARMUP + EVERY, WARMUP + STEPS + 1, EVERY)
    ]
    store.close()
    result = _measure(world, folder, averages) | {"seconds": time.time() - began}
    files.write_text(folder / "result.json", json.dumps(result))
    shutil.rmtree(folder / "run")


def _shortened(config) -> Any:
    """A preset's config, as long as a row is trained here."""
    config.update_from_flattened_dict(
        {
            "eval.prompts": "",
            "train.steps": STEPS,
            "train.save_every": EVERY,
            "train.keep": STEPS + WARMUP,  # a stop leaves one more
            "assistant.warmup_steps": WARMUP,
            "data.batch_size": TRAIN_BATCH,
        }
    )
    return config


def run_init(
    world: World,
    folder: pathlib.Path,
    generator: str,
) -> None:
    """Measures the generator that all rows start from."""
    folder.mkdir(parents=True, exist_ok=True)
    params = load_model(pathlib.Path(generator)).params
    result = _measure(world, folder, [params]) | {"seconds": 0.0}
    files.write_text(folder / "result.json", json.dumps(result))


def _measure(
    world: World,
    folder: pathlib.Path,
    averages: list,
) -> dict:
    """What generators are worth, the last one in full; its pictures go to `folder`."""
    with log.waiting("measuring"):
        curve = [world.curve_point(params) for params in averages]
        scores, pictures = world.measure(averages[-1])
    np.save(folder / "pictures.npy", pictures)
    return {"scores": scores, "curve": curve, "device": jax.devices()[0].device_kind}


def results_of(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """What is done, by row in the table's order: one dict per seed.

    Raises: UserError for a result that cannot be read.
    """
    found = {}
    for name in (INIT, *ROWS):
        done = sorted((workdir / "rows" / name).glob("*/result.json"))
        if done:
            found[name] = [_result(file) for file in done]
    return found


def _result(file: pathlib.Path) -> dict:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        scores = {measure: float(result["scores"][measure]) for measure in MEASURES}
        return {
            "scores": scores,
            "curve": [[float(reward), float(distance)] for reward, distance in result["curve"]],
            "seconds": float(result["seconds"]),
            "device": str(result["device"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged or of another version ({error!r}); delete {file.parent}, and the "
            "run is made again"
        ) from None


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    rows = []
    for name, runs in results.items():
        cells = [_cell([run["scores"][measure] for run in runs]) for measure in MEASURES]
        preset = "" if name == INIT else f"`{name}`"
        rows.append([ROWS.get(name, name), preset, str(len(runs)), *cells])
    return log.markdown_table(["row (reward, guidance)", "preset", "seeds", *MEASURES], rows)


def _cell(values: list[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.4f}"


def draw_grid(
    workdir: pathlib.Path,
    results: dict[str, list[dict]],
    captions: list[str],
    path: pathlib.Path,
) -> None:
    """A row of pictures per row of the table, the same captions and noise in each.

    Args: captions, of the columns.
    """
    from matplotlib.figure import Figure

    drawn = {name: min((workdir / "rows" / name).glob("*/pictures.npy")) for name in results}
    fig = Figure(figsize=(10.5, 1.05 * len(drawn) + 0.6), layout="constrained")
    axes = fig.subplots(len(drawn), COLUMNS, squeeze=False)
    for axis, caption in zip(axes[0], captions):
        axis.set_title(textwrap.fill(caption, 20), fontsize=6)
    for row, (name, file) in zip(axes, drawn.items()):
        for axis, image in zip(row, np.load(file)):
            axis.imshow(to_uint8(image), interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        label = ROWS.get(name, name).replace(" (", "\n(", 1).replace("), ", ")\n")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    fig.savefig(path, dpi=70)


def draw_curves(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Reward against pixel distance as training goes on, the mean over seeds.

    Rows without the full reward are dotted.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.5, 5.5), layout="constrained")
    axis = fig.subplots()
    start = [run["curve"][0] for run in results.get(INIT, [])[:1]]
    trained = [name for name in results if name != INIT]
    for i, name in enumerate(trained):
        curve = np.mean([run["curve"] for run in results[name]], axis=0)
        _draw_curve(axis, i, name, np.array([*start, *curve]))
    for reward, distance in start:
        style = {"marker": "*", "color": "black", "markersize": 12, "linestyle": "none"}
        axis.plot(distance, reward, label=INIT, **style)
    axis.set(xlabel="pixel distance between pictures of one caption", ylabel="reward (cosine)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(path, dpi=110)


def _draw_curve(
    axis,
    i: int,
    name: str,
    curve: np.ndarray,
) -> None:
    """Args: i, of the row; curve [N, 2] of (reward, pixel distance)."""
    from matplotlib import colormaps

    # tab20 has ten colours and a lighter one beside each: the ten first, so that none comes twice.
    color = colormaps["tab20"](2 * (i % 10) + i // 10)
    rewarded = "(100" in ROWS[name] or name == "reward_only"
    axis.plot(
        curve[:, 1],
        curve[:, 0],
        marker="oD"[i // 10],
        markersize=4,
        color=color,
        linestyle="-" if rewarded else ":",
        label=ROWS[name],
    )


def write_page(
    workdir: pathlib.Path,
    captions: list[str],
    out: pathlib.Path,
) -> None:
    """OUT/ablation.md and its pictures from the rows that are done; its conclusion is kept.

    Args: captions, held-out ones.
    """
    results = results_of(workdir)
    path = out / "ablation.md"
    runs = [run for rows in results.values() for run in rows]
    count = sum(run["seconds"] > 0 for run in runs)
    hours = sum(run["seconds"] for run in runs) / 3600
    devices = ", ".join(sorted({run["device"] for run in runs}))
    text = f"""# The paper's Table 2 in miniature

Every row trains the shapes world's initial one-step generator for {STEPS} steps of {TRAIN_BATCH} \
pictures, after {WARMUP} of the assistant alone; made by
`python -m di_star_jax.studies.ablation --workdir=runs/ablation`, {count} runs in {hours:.1f} h \
on {devices}.
{SPREAD} {len(captions)} held-out captions, 4 pictures each, identical noise in all rows.
Scales are the paper's: reward 100 is 10 here, guidance 7.5 is 5 and 4.5 is 3 \
(`configs/shapes.py`). The prompt score is the cosine of a CLIP that no
row trains on; the Frechet distance is to the teacher's 50-step pictures in that CLIP's features.

{table(results)}

![the same captions and noise in every row](ablation.png)

![reward against pixel distance while training](ablation_curves.png)

{conclusion_of(path)}"""
    files.write_text(path, text)
    draw_grid(workdir, results, captions, out / "ablation.png")
    draw_curves(results, out / "ablation_curves.png")


def main() -> None:
    args = flags.FLAGS
    workdir, out = map(files.expand, (args.workdir, _out(args)))
    check_all(
        check_matplotlib,
        lambda: _check_rows(args),
        lambda: _check_seeds(args.seeds),
        _check_devices,
        lambda: checks.check_workdir(args.workdir),
        lambda: files.writable_folder(args.workdir, "--workdir"),
        lambda: files.writable_folder(_out(args), "--out"),
    )
    captions = _captions(load_config(args.config, "di_star"))
    todo = [
        (row, str(seed))
        for seed in dict.fromkeys(map(int, args.seeds))
        for row in dict.fromkeys(args.rows or ROWS)
        if not _done(workdir, row, str(seed))
    ]
    if todo or not _done(workdir, INIT, "0"):
        _run(workdir, out, args.config, todo)
    write_page(workdir, captions, out)
    log.say(f"{table(results_of(workdir))}\n{SPREAD}\nwrote {out / 'ablation.md'}")


def _out(args) -> str:
    return args.out or args.workdir


def _check_rows(args) -> None:
    """Refuses rows that are not known, and presets that could not run."""
    for row in args.rows:
        if row not in ROWS:
            raise UserError(
                f"--rows={row}{suggest(row, list(ROWS))}, expected presets of {', '.join(ROWS)}"
            )
    for row in dict.fromkeys(["di_star", *(args.rows or ROWS)]):
        config = load_config(args.config, row)
        if config.eval.oracle != "shapes" or not config.eval.prompts:
            raise UserError(
                f"--config={args.config}, expected one of the shapes world, with eval.oracle="
                "'shapes' and eval.prompts; use shapes, or a copy of configs/shapes.py"
            )
        captions = pathlib.Path(config.eval.prompts)
        if not captions.is_file():
            raise UserError(f"eval.prompts={captions}: no such file; give one with captions")
        checks.check(_shortened(config), jax.device_count())


def _check_devices() -> None:
    count = jax.device_count()
    if BATCH % count:
        raise UserError(
            f"{count} devices do not divide the {BATCH} pictures that are measured at a time; "
            "let it see one, e.g. with CUDA_VISIBLE_DEVICES=0"
        )


def _check_seeds(seeds: list[str]) -> None:
    if not seeds or not all(re.fullmatch("[0-9]{1,9}", seed) for seed in seeds):
        raise UserError(f"--seeds={','.join(seeds)}, expected numbers such as 0,1,2")


def _captions(config) -> list[str]:
    """The held-out captions. Raises: UserError for one that the oracle cannot read."""
    captions = pathlib.Path(config.eval.prompts).read_text(encoding="utf-8").splitlines()
    for caption in captions:
        scenes.parse(caption)
    return captions


def _folder(
    workdir: pathlib.Path,
    row: str,
    seed: str,
) -> pathlib.Path:
    return workdir / "rows" / row / seed


def _done(
    workdir: pathlib.Path,
    row: str,
    seed: str,
) -> bool:
    return (_folder(workdir, row, seed) / "result.json").exists()


def _run(
    workdir: pathlib.Path,
    out: pathlib.Path,
    file: str,
    todo: list[tuple[str, str]],
) -> None:
    """Runs what is left to do. Args: file, of the config; todo, rows and seeds."""
    first = load_config(file, "di_star")
    world = World(workdir, first)
    if not _done(workdir, INIT, "0"):
        run_init(world, _folder(workdir, INIT, "0"), first.weights.generator)
    for i, (row, seed) in enumerate(todo):
        left = _estimate(results_of(workdir), len(todo) - i)
        go_on = "" if i else "; stopped, the same command goes on"
        log.say(f"{row}, seed {seed}: run {i + 1} of {len(todo)}, {left}{go_on}")
        config = load_config(file, row)
        config.seed = int(seed)
        run_row(world, _folder(workdir, row, seed), config)
        write_page(workdir, world.captions, out)


def _estimate(results: dict[str, list[dict]], count: int) -> str:
    """What `count` runs take, by those that are done."""
    seconds = [run["seconds"] for runs in results.values() for run in runs if run["seconds"]]
    if not seconds:
        return f"about {log.duration(150.0 * count)} left in all on two cores"
    return f"{log.duration(float(np.mean(seconds)) * count)} left in all"


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "Folder for what is done.", required=True)
    flags.DEFINE_string("config", "shapes", "Config whose presets are run, by name or path.")
    flags.DEFINE_list("rows", [], f"Presets to run, all if not given: {', '.join(ROWS)}.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each row.")
    flags.DEFINE_string(
        "out", None, "Folder for ablation.md and its pictures; the workdir if not given."
    )


if __name__ == "__main__":
    define_flags()
    run_command(main)
