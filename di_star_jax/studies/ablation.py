# SPDX-License-Identifier: Apache-2.0
"""Table 2 of the paper in miniature.

    python -m di_star_jax.studies.ablation --workdir=runs/ablation

Every row trains the same initial generator of the shapes world with a preset of configs/shapes.py,
with several seeds, and is measured on held-out captions and identical noise. Writes
docs/ablation.md and its pictures from what is done; stopped, the same command continues, and
--rows=NAME runs one row alone.
"""

import functools
import json
import pathlib
import shutil
import time

import jax
import numpy as np
from absl import flags

from di_star_jax import assembly, drawing, samplers, sharding, train
from di_star_jax.command import run as run_command
from di_star_jax.config import load_config
from di_star_jax.errors import UserError, suggest
from di_star_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from di_star_jax.log import markdown_table
from di_star_jax.pictures import to_uint8
from di_star_jax.pipelines.folder import load_model, load_pipeline
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import similarity
from di_star_jax.samplers import generator_timesteps
from di_star_jax.shapes import datasets, oracle, pretrain, scenes
from di_star_jax.storage import checkpoint
from di_star_jax.studies.page import conclusion_of

ROWS = {  # preset: the row of the paper's Table 2, or what it stands for here
    "kl_0_0": "KL (0, 0)",
    "diff_instruct": "KL (0, 7.5), Diff-Instruct",
    "di_pp": "KL (100, 7.5), Diff-Instruct++",
    "di_star_outside": "DI* outside (100, 7.5)",
    "inside_0_0": "DI* inside (0, 0)",
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
        self.captions = pathlib.Path(config.eval.prompts).read_text(encoding="utf-8").splitlines()
        reward_config = pathlib.Path(config.weights.pickscore, "config.json").read_text(
            encoding="utf-8"
        )
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
        for start in range(0, len(captions), BATCH):
            key = jax.random.fold_in(jax.random.key(11), start)
            z = jax.random.normal(key, (BATCH, *sampling.latent_shape))
            features.append(self.judge.features(draw(captions[start : start + BATCH], z)))
            print(f"teacher: {start + BATCH} of {len(captions)} pictures", flush=True)
        found = np.concatenate(features)
        np.save(file, found)
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
                z = jax.random.normal(key, (*shape[:1], BATCH, *shape[1:]))
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
        return measured, images[:8, 0]

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
    config.update_from_flattened_dict(
        {
            "eval.prompts": "",
            "train.steps": STEPS,
            "train.save_every": EVERY,
            "train.keep": STEPS // EVERY + 1,
            "assistant.warmup_steps": WARMUP,
            "data.batch_size": TRAIN_BATCH,
        }
    )
    train.run(config, str(folder / "run"))
    store = checkpoint.existing(folder / "run")
    averages = [
        store.restore_item(step, "ema", world.parts.models["unet"].params)
        for step in range(WARMUP + EVERY, WARMUP + STEPS + 1, EVERY)
    ]
    store.close()
    result = _measure(world, folder, averages) | {"seconds": time.time() - began}
    shutil.rmtree(folder / "run")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def run_init(
    world: World,
    folder: pathlib.Path,
    generator: str,
) -> None:
    """Measures the generator that all rows start from."""
    folder.mkdir(parents=True, exist_ok=True)
    params = load_model(pathlib.Path(generator)).params
    result = _measure(world, folder, [params]) | {"seconds": 0.0}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _measure(
    world: World,
    folder: pathlib.Path,
    averages: list,
) -> dict:
    """What generators are worth, the last one in full; its pictures go to `folder`."""
    curve = [world.curve_point(params) for params in averages]
    scores, pictures = world.measure(averages[-1])
    np.save(folder / "pictures.npy", pictures)
    return {"scores": scores, "curve": curve, "device": jax.devices()[0].device_kind}


def results_of(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """What is done, by row in the table's order: one dict per seed."""
    found = {}
    for name in (INIT, *ROWS):
        files = sorted((workdir / "rows" / name).glob("*/result.json"))
        if files:
            found[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return found


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean +- standard error over seeds."""
    rows = []
    for name, runs in results.items():
        cells = [_cell([run["scores"][measure] for run in runs]) for measure in MEASURES]
        preset = "" if name == INIT else f"`{name}`"
        rows.append([ROWS.get(name, name), preset, str(len(runs)), *cells])
    return markdown_table(["row (reward, guidance)", "preset", "seeds", *MEASURES], rows)


def _cell(values: list[float]) -> str:
    mean = f"{np.mean(values):.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def draw_grid(
    workdir: pathlib.Path,
    results: dict[str, list[dict]],
    path: pathlib.Path,
) -> None:
    """A row of pictures per row of the table, the same captions and noise in each."""
    from matplotlib.figure import Figure

    files = {name: next((workdir / "rows" / name).glob("*/pictures.npy")) for name in results}
    fig = Figure(figsize=(10.5, 1.05 * len(files)), layout="constrained")
    axes = fig.subplots(len(files), 8, squeeze=False)
    for row, (name, file) in zip(axes, files.items()):
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

    rewarded = "(100" in ROWS[name] or name == "reward_only"
    axis.plot(
        curve[:, 1],
        curve[:, 0],
        marker="oD"[i // 10],
        markersize=4,
        color=colormaps["tab10"](i % 10),
        linestyle="-" if rewarded else ":",
        label=ROWS[name],
    )


def write_page(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """OUT/ablation.md and its pictures from the rows that are done; its conclusion is kept."""
    results = results_of(workdir)
    out.mkdir(parents=True, exist_ok=True)
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
Mean ± standard error over seeds, 500 held-out captions, 4 pictures each, identical noise in all \
rows. Scales are the
paper's: reward 100 is 10 here, guidance 7.5 is 5 and 4.5 is 3 (`configs/shapes.py`). The prompt \
score is the cosine of a CLIP that no
row trains on; the Frechet distance is to the teacher's 50-step pictures in that CLIP's features.

{table(results)}

![the same captions and noise in every row](ablation.png)

![reward against pixel distance while training](ablation_curves.png)

{conclusion_of(path)}"""
    path.write_text(text, encoding="utf-8")
    draw_grid(workdir, results, out / "ablation.png")
    draw_curves(results, out / "ablation_curves.png")


def main() -> None:
    args = flags.FLAGS
    _check(args)
    workdir, out = pathlib.Path(args.workdir), pathlib.Path(args.out)
    todo = [
        (row, seed)
        for seed in args.seeds
        for row in args.rows or ROWS
        if not _done(workdir, row, seed)
    ]
    if todo or not _done(workdir, INIT, "0"):
        _run(workdir, out, args.config, todo)
    write_page(workdir, out)
    print(table(results_of(workdir)))


def _check(args) -> None:
    for row in args.rows:
        if row not in ROWS:
            raise UserError(
                f"rows={row!r}, expected one of {', '.join(ROWS)}{suggest(row, list(ROWS))}"
            )
    if not args.seeds or not all(seed.isdigit() for seed in args.seeds):
        raise UserError(f"seeds={','.join(args.seeds)}, expected numbers such as 0,1,2")


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
        print(f"{row}, seed {seed}: run {i + 1} of {len(todo)}", flush=True)
        config = load_config(file, row)
        config.seed = int(seed)
        run_row(world, _folder(workdir, row, seed), config)
        write_page(workdir, out)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for what is done.", required=True)
    flags.DEFINE_string("config", "configs/shapes.py", "Config file whose presets are run.")
    flags.DEFINE_list("rows", [], "Presets to run, all if not given.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each row.")
    flags.DEFINE_string("out", "docs", "Folder for ablation.md and its pictures.")
    run_command(main)
