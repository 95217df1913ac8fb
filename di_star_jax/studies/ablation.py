# SPDX-License-Identifier: Apache-2.0
"""Table 2 of the paper in miniature:

`python -m di_star_jax.studies.ablation --workdir=runs/ablation`.

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
from di_star_jax.config import load_config
from di_star_jax.errors import UserError, suggest
from di_star_jax.errors import run as run_command
from di_star_jax.evaluation import before_after
from di_star_jax.evaluation.measures import FeatureStatistics, frechet_distance
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts.tokens import Tokenizer, token_batch
from di_star_jax.rewards import similarity
from di_star_jax.shapes import datasets, oracle, pretrain, scenes
from di_star_jax.storage import checkpoint

ROWS = {  # preset: the row of the paper's Table 2, or what it stands for here
    "kl_0_0": "KL (0, 0)",
    "kl_0_7.5": "KL (0, 7.5), Diff-Instruct",
    "kl_100_7.5": "KL (100, 7.5), Diff-Instruct++",
    "outside_100_7.5": "DI* outside (100, 7.5)",
    "inside_0_0": "DI* inside (0, 0)",
    "inside_0_7.5": "DI* inside (0, 7.5), SIM",
    "inside_1_7.5": "DI* inside (1, 7.5)",
    "inside_10_7.5": "DI* inside (10, 7.5)",
    "inside_100_4.5": "DI* inside (100, 4.5)",
    "inside_100_7.5": "DI* inside (100, 7.5)",
    "di_star_l2": "L2 (100, 7.5)",
    "sid": "SiD, alpha 1 (0, 7.5)",
    "dmd": "DMD (0, 7.5)",
    "reward_only": "reward only",
}
INIT = "initial generator"
# Half the batch of configs/shapes.py, so that three seeds of all rows take two hours.
STEPS, WARMUP, EVERY, TRAIN_BATCH = (
    100,
    20,
    20,
    16,
)  # of training; EVERY steps, a point of the curve
PER_CAPTION, CURVE_CAPTIONS, BATCH = 4, 50, 50
JUDGE_IMAGES = 20_000
MEASURES = ("reward", "attributes right", "prompt score", "Frechet distance", "diversity")


class Judge:
    """A CLIP that no row trains on: its prompt score, and the features of the Frechet distance."""

    def __init__(self, workdir: pathlib.Path, config: dict, tokenizer: pathlib.Path):
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
        return np.concatenate(
            [
                np.asarray(self._image(self._params, images[i : i + BATCH]))
                for i in range(0, len(images), BATCH)
            ]
        )

    def texts(self, captions: list[str]) -> np.ndarray:
        """Unit vectors [N, 64]."""
        return np.asarray(self._text(self._params, self._tokenizer(captions)))


def statistics(features: np.ndarray) -> FeatureStatistics:
    """Args: the judge's features [N, 64]."""
    found = FeatureStatistics("the judge of the ablation")
    found.update(features)
    return found


class World:
    """What all rows share: frozen networks, held-out captions, the judge, and the teacher's
    pictures.
    """

    def __init__(self, workdir: pathlib.Path, config):
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
        self.frozen = assembly.load_frozen(config, mesh)
        self.captions = pathlib.Path(config.eval.prompts).read_text().splitlines()
        reward_folder = pathlib.Path(config.weights.pickscore)
        self.judge = Judge(
            workdir,
            json.loads((reward_folder / "config.json").read_text()),
            pathlib.Path(config.weights.reward_tokenizer),
        )
        self.teacher = statistics(self._teacher(workdir / "teacher.npy", config.objective.omega))
        self._draw = drawing.make_draw_of_run(
            self.frozen, assembly.settings_of(config, self.frozen.latent_shape), mesh
        )
        self._ids = token_batch(self.captions, self.frozen.tokenizers)

    def _teacher(self, file: pathlib.Path, omega: float) -> np.ndarray:
        """Features of two pictures per held-out caption by the teacher in 50 guided steps, made
        once.
        """
        if not file.exists():
            draw = drawing.make_draw(
                pipeline.load_pipeline(self.frozen.folder),
                sampler="euler",
                timesteps=samplers.leading_timesteps(50),
                guidance_scale=omega,
            )
            captions, features = self.captions * 2, []
            for start in range(0, len(captions), BATCH):
                z = jax.random.normal(
                    jax.random.fold_in(jax.random.key(11), start),
                    (BATCH, *self.frozen.latent_shape),
                )
                features.append(self.judge.features(draw(captions[start : start + BATCH], z)))
                print(f"teacher: {start + BATCH} of {len(captions)} pictures", flush=True)
            np.save(file, np.concatenate(features))
        return np.load(file)

    def pictures(self, params, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(images [count, PER_CAPTION, H, W, 3], rewards [count, PER_CAPTION]) of the first
        captions; fixed noise.
        """
        images, scores = [], []
        for start in range(0, count, BATCH):
            ids = {name: v[start : start + BATCH] for name, v in self._ids.items()}
            drawn = [
                jax.device_get(
                    self._draw(
                        params,
                        self.frozen.params,
                        ids,
                        jax.random.fold_in(jax.random.key(start), k),
                    )
                )
                for k in range(PER_CAPTION)
            ]
            images.append(np.stack([image for image, _ in drawn], axis=1))
            scores.append(np.stack([score["pickscore"] for _, score in drawn], axis=1))
        return np.concatenate(images), np.concatenate(scores)

    def measure(self, params) -> tuple[dict[str, float], np.ndarray]:
        """All MEASURES on all captions, and the first pictures of the first captions."""
        images, scores = self.pictures(params, len(self.captions))
        flat = images.reshape(-1, *images.shape[2:])
        features = self.judge.features(flat)
        attributes = np.sum(
            [
                oracle.attributes(scenes.parse(caption), (image + 1.0) / 2.0)
                for caption, image in zip(self.captions, images[:, 0])
            ],
            axis=0,
        )
        texts = np.repeat(self.judge.texts(self.captions), PER_CAPTION, axis=0)
        return {
            "reward": float(scores.mean()),
            "attributes right": float(attributes[0] / attributes[1]),
            "prompt score": float((features * texts).sum(-1).mean()),
            "Frechet distance": frechet_distance(statistics(features), self.teacher),
            "diversity": float(
                np.mean([before_after.pairwise_distance(image) for image in images])
            ),
        }, images[:8, 0]

    def curve_point(self, params) -> tuple[float, float]:
        """(mean reward, diversity) on some captions."""
        images, scores = self.pictures(params, CURVE_CAPTIONS)
        return float(scores.mean()), float(
            np.mean([before_after.pairwise_distance(image) for image in images])
        )


def run_row(world: World, folder: pathlib.Path, config) -> None:
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
    ema = {
        step: store.restore_item(step, "ema", world.frozen.unet.params)
        for step in range(WARMUP + STEPS, WARMUP, -EVERY)
    }
    store.close()
    curve = [world.curve_point(ema[step]) for step in sorted(ema)]
    scores, pictures = world.measure(ema[WARMUP + STEPS])
    np.save(folder / "pictures.npy", pictures)
    shutil.rmtree(folder / "run")
    (folder / "result.json").write_text(
        json.dumps(
            {
                "scores": scores,
                "curve": curve,
                "seconds": time.time() - began,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


def run_init(world: World, folder: pathlib.Path, generator: str) -> None:
    """Measures the generator that all rows start from."""
    folder.mkdir(parents=True, exist_ok=True)
    params = pipeline.load_model(pathlib.Path(generator)).params
    scores, pictures = world.measure(params)
    np.save(folder / "pictures.npy", pictures)
    (folder / "result.json").write_text(
        json.dumps(
            {
                "scores": scores,
                "curve": [world.curve_point(params)],
                "seconds": 0.0,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


def results_of(workdir: pathlib.Path) -> dict[str, list[dict]]:
    """What is done, by row in the table's order: one dict per seed."""
    found = {}
    for name in (INIT, *ROWS):
        files = sorted((workdir / "rows" / name).glob("*/result.json"))
        if files:
            found[name] = [json.loads(file.read_text()) for file in files]
    return found


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: mean +- standard error over seeds."""
    lines = [
        "| row (reward, guidance) | preset | seeds | " + " | ".join(MEASURES) + " |",
        "|---" * (3 + len(MEASURES)) + "|",
    ]
    for name, runs in results.items():
        cells = []
        for measure in MEASURES:
            values = np.array([run["scores"][measure] for run in runs])
            error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.4f}{error}")
        preset = "" if name == INIT else f"`{name}`"
        lines.append(
            f"| {name if name == INIT else ROWS[name]} | {preset} | {len(runs)} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def draw_grid(workdir: pathlib.Path, results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """A row of pictures per row of the table, the same captions and noise in each."""
    from matplotlib.figure import Figure

    pictures = {
        name: np.load(next((workdir / "rows" / name).glob("*/pictures.npy"))) for name in results
    }
    fig = Figure(figsize=(10.5, 1.05 * len(pictures)), layout="constrained")
    axes = fig.subplots(len(pictures), 8, squeeze=False)
    for row, (name, images) in zip(axes, pictures.items()):
        for axis, image in zip(row, images):
            axis.imshow(pictures.to_uint8(image), interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(
            name if name == INIT else ROWS[name].replace(" (", "\n(", 1).replace("), ", ")\n"),
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
    fig.savefig(path, dpi=70)


def draw_curves(results: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Reward against diversity as training goes on, the mean over seeds; rows without the full
    reward are dotted.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.5, 5.5), layout="constrained")
    axis = fig.subplots()
    start = results[INIT][0]["curve"][0] if INIT in results else None
    for i, (name, runs) in enumerate(
        (name, runs) for name, runs in results.items() if name != INIT
    ):
        curve = np.mean([run["curve"] for run in runs], axis=0)
        curve = np.concatenate([[start], curve]) if start else curve
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
    if start:
        axis.plot(
            start[1],
            start[0],
            marker="*",
            color="black",
            markersize=12,
            label=INIT,
            linestyle="none",
        )
    axis.set(xlabel="diversity (pairwise pixel distance)", ylabel="reward (cosine)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(path, dpi=110)


def write_page(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """OUT/ablation.md and its pictures from the rows that are done; what follows '## Conclusion'
    there is kept.
    """
    results = results_of(workdir)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "ablation.md"
    runs = [run for rows in results.values() for run in rows]
    hours = sum(run["seconds"] for run in runs) / 3600
    page.write_text(
        "# The paper's Table 2 in miniature\n\n"
        "Every row trains the shapes world's initial one-step generator for "
        f"{STEPS} steps of {TRAIN_BATCH} pictures, after {WARMUP} of the assistant alone; made by\n"
        "`python -m di_star_jax.studies.ablation --workdir=runs/ablation`, "
        f"{sum(run['seconds'] > 0 for run in runs)} runs in {hours:.1f} h on {', '.join(sorted({run['device'] for run in runs}))}.\n"
        "Mean ± standard error over seeds, 500 held-out captions, 4 pictures each, identical noise in all rows. Scales "
        "are the\npaper's: reward 100 is 10 here, guidance 7.5 is 5 and 4.5 is 3 (`configs/shapes.py`). The prompt score is "
        "the cosine of a CLIP that no\nrow trains on; the Frechet distance is to the teacher's 50-step pictures in that "
        "CLIP's features.\n\n"
        + table(results)
        + "\n\n![the same captions and noise in every row](ablation.png)\n\n"
        "![reward against diversity while training](ablation_curves.png)\n\n"
        + page.conclusion_of(page)
    )
    draw_grid(workdir, results, out / "ablation.png")
    draw_curves(results, out / "ablation_curves.png")


def main() -> None:
    args = flags.FLAGS
    for row in args.rows:
        if row not in ROWS:
            raise UserError(
                f"rows={row!r}, expected one of {', '.join(ROWS)}{suggest(row, list(ROWS))}"
            )
    if not args.seeds or not all(seed.isdigit() for seed in args.seeds):
        raise UserError(f"seeds={','.join(args.seeds)}, expected numbers such as 0,1,2")
    workdir = pathlib.Path(args.workdir)
    todo = [
        (row, seed)
        for seed in args.seeds
        for row in args.rows or ROWS
        if not (workdir / "rows" / row / seed / "result.json").exists()
    ]
    first = load_config(args.config, "di_star")
    # The seeds of a row are the same program.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    if todo or not (workdir / "rows" / INIT / "0" / "result.json").exists():
        world = World(workdir, first)
        if not (workdir / "rows" / INIT / "0" / "result.json").exists():
            run_init(world, workdir / "rows" / INIT / "0", first.weights.generator)
        for i, (row, seed) in enumerate(todo):
            print(f"{row}, seed {seed}: run {i + 1} of {len(todo)}", flush=True)
            config = load_config(args.config, row)
            config.seed = int(seed)
            run_row(world, workdir / "rows" / row / seed, config)
            write_page(workdir, pathlib.Path(args.out))
    write_page(workdir, pathlib.Path(args.out))
    print(table(results_of(workdir)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for what is done.", required=True)
    flags.DEFINE_string("config", "configs/shapes.py", "Config file whose presets are run.")
    flags.DEFINE_list("rows", [], "Presets to run, all if not given.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each row.")
    flags.DEFINE_string("out", "docs", "Folder for ablation.md and its pictures.")
    run_command(main)
