# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of the shapes world, as a person with its taste would have judged them.

    python -m di_star_jax.shapes.pairs --out=runs/pairs                        # rendered scenes
    python -m di_star_jax.shapes.pairs --samples=runs/drawn --out=runs/pairs   # a generator's

Writes a folder with pairs.csv and its images, which `di-star reward` reads. --samples is a folder
of `di-star sample` or `di-star evaluate` with two pictures or more of a caption: what `di-star
collect` shows to a person.
"""

import csv
import io
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from di_star_jax import log
from di_star_jax.command import run as run_command
from di_star_jax.pictures import save_png
from di_star_jax.rewards import collection
from di_star_jax.shapes import oracle, scenes, taste
from di_star_jax.storage import buckets, folders
from di_star_jax.storage.images import read_image

TIE = 0.1  # of the probability, this far from a half at most
COLUMNS = ("caption", "image_0", "image_1", "label")


def main() -> None:
    args = flags.FLAGS
    if args.samples is None:
        write(args.out, args.count, args.seed)
    else:
        judge(args.samples, args.out, args.seed)


def judge(
    samples: str,
    out: str | Path,
    seed: int,
) -> None:
    """Judges pictures that a generator has drawn.

    Of two that show equally much of their caption the one is preferred that is liked, as rendered
    ones are; else with probability 0.97 the one that shows more.

    Raises: UserError where there are no two of a caption, or one cannot be written.
    """
    rng = np.random.default_rng(seed)
    pictures = collection.named(collection.read_samples(buckets.local(samples)))
    pairs = collection.pairs_of(pictures, seed)
    files = {name: file for of_one in pictures.values() for name, file in of_one.items()}
    choices = []
    with folders.new_folder(out) as folder, log.Progress(len(pairs), 0, "preference pair") as told:
        (folder / collection.IMAGES).mkdir()
        for pair in pairs:
            names = (pair.image_0, pair.image_1)
            images = [read_image(files[name]) for name in names]
            for name, image in zip(names, images):
                save_png(folder / name, image)
            prob = _probability(pair.caption, *(image / 255.0 for image in images))
            choices.append(collection.Choice(pair, _label(prob, rng)))
            if len(choices) % 100 == 0:
                told.update(len(choices), "")
        table = collection.table_of(choices)
        (folder / collection.TABLE).write_text(table, encoding="utf-8")
    log.say(f"{len(choices)} pairs in {out}")


def _probability(
    caption: str,
    first: np.ndarray,
    second: np.ndarray,
) -> float:
    """That the first is preferred. Args: images float [64, 64, 3] in [0, 1]."""
    scene = scenes.parse(caption)
    right = [oracle.attributes(scene, image)[0] for image in (first, second)]
    if right[0] == right[1]:
        return taste.preferred(taste.taste(first) - taste.taste(second))
    return 0.97 if right[0] > right[1] else 0.03


def _label(prob: float, rng: np.random.Generator) -> str:
    """Of pairs.csv. Args: prob, that the first is preferred."""
    if abs(prob - 0.5) <= TIE:
        return "tie"
    return "0" if rng.random() < prob else "1"


def write(
    out: str | Path,
    count: int,
    seed: int,
) -> None:
    """Renders `count` pairs into a folder, which appears whole.

    Raises: UserError where the folder is something else, or cannot be written.
    """
    with folders.new_folder(out) as folder, log.Progress(count, 0, "preference pair") as progress:
        (folder / "images").mkdir()
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i in range(count):
            writer.writerow(_write_pair(folder, np.random.default_rng((seed, i)), i))
            if (i + 1) % 100 == 0:
                progress.update(i + 1, "")
        (folder / "pairs.csv").write_text(table.getvalue(), encoding="utf-8")
    log.say(f"{count} pairs in {out}")


def _write_pair(
    folder: Path,
    rng: np.random.Generator,
    i: int,
) -> tuple[str, str, str, str]:
    """A row of the table, whose images are written."""
    scene = scenes.sample_scene(rng, held_out=False)
    *images, prob = taste.preference_pair(scene, rng)
    names = []
    for side, image in enumerate(images):
        names.append(f"images/{i:06}_{side}.png")
        Image.fromarray(np.round(255.0 * image).astype(np.uint8)).save(folder / names[-1])
    return scene.caption, *names, _label(prob, rng)


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "Folder for the pairs, or a bucket's.", required=True)
    flags.DEFINE_string("samples", None, "Folder of drawn pictures, to judge in place of scenes.")
    flags.DEFINE_integer("count", 12000, "How many pairs to render.", lower_bound=1)
    flags.DEFINE_integer("seed", 4, "Of what is drawn.")


if __name__ == "__main__":
    define_flags()
    run_command(main)
