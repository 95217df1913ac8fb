# SPDX-License-Identifier: Apache-2.0
"""Makes the shapes checkpoint from nothing:

`di-star pretrain --workdir=runs/pretrain`, and `di-star pretrain --family=pixart --workdir=...`.

Eight stages, a good hour on two cores, each resumed where it stopped when the same command runs
again (at most 100 steps are lost):
  data       renders captioned scenes
  vae        autoencoder, 64x64x3 <-> 16x16x4
  text       two text encoders, trained to predict the mean image of a caption
  teacher    SDXL-shaped UNet, trained on eps-prediction together with the text encoders
  clip       CLIP, contrastive: what the reward begins with
  reward     `di-star reward --config=reward:shapes` on rendered preference pairs
  generator  `di-star train --config=shapes:distill`: one-step generator from the teacher alone
  teacher's scores, on held-out captions, which every run shows beside its own
Writes `WORKDIR/checkpoint`, a diffusers pipeline folder with `generator/`, `clip/`, `reward/` and
`teacher/` beside the usual parts.

--family=pixart makes the twin: a PixArt with a T5 of its own in the same world. Its VAE is that of
the package, copied; its reward and its captions are the package's, where they lie. The twin that is
shipped is of an earlier course of the same stages: 600 steps of the teacher by AdamW and 3,500 by
Muon, whose rate was changed on the way, and 400 steps of the generator.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from di_star_jax import assembly, checks, drawing, log, train
from di_star_jax.command import run as run_command
from di_star_jax.config import load_config
from di_star_jax.evaluation import held_out
from di_star_jax.evaluation.held_out import TEACHER, HeldOut
from di_star_jax.pipelines.export import denoiser_in
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import load_model
from di_star_jax.preference import checks as reward_checks
from di_star_jax.preference import run as reward_run
from di_star_jax.prompts.files import Prompt
from di_star_jax.shapes import datasets, pairs, pretrain
from di_star_jax.shapes.networks import LATENT_SHAPE
from di_star_jax.shapes.pretrain import SHIPPED, Stage
from di_star_jax.shapes.worlds import WORLDS, Captions, World, tokenized
from di_star_jax.storage import folders, weights


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is made and trained in all.

    Args: images, pairs, how many; reward, generator, fields of their configs that differ.
    """

    images: int = 40_000
    pairs: int = 12_000
    vae: Stage = pretrain.VAE
    text: Stage = pretrain.TEXT
    teacher: Stage = pretrain.TEACHER
    clip: Stage = pretrain.CLIP
    reward: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generator: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SIZES = {
    "sdxl": Sizes(),
    "pixart": Sizes(text=pretrain.PIXART_TEXT, teacher=pretrain.PIXART_TEACHER),
}


def main() -> None:
    checks.check_workdir(flags.FLAGS.workdir)
    workdir = checks.make_workdir(flags.FLAGS.workdir)
    world = flags.FLAGS.family
    shared = MAKE[world](workdir, SIZES[world], WORLDS[world])
    scores = score_all(workdir / "checkpoint", shared)
    names = list(next(iter(scores.values())))
    rows = [[name, *(f"{of[name]:.4f}" for of in scores.values())] for name in names]
    print(log.markdown_table(["500 held-out captions, 2 pictures each", *scores], rows))


def make(
    workdir: Path,
    sizes: Sizes,
    world: World,
) -> Path:
    """All stages, each continued where it stopped; writes WORKDIR/checkpoint.

    Returns: the folder of the reward and the captions.
    """
    out = workdir / "checkpoint"
    images, captions, vocab_size = make_data(workdir, sizes, world)
    latents = pretrain.make_latents(workdir, sizes.vae, images)
    pretrain.make_teacher(workdir, sizes.text, sizes.teacher, latents, captions, vocab_size)
    pretrain.make_clip(workdir, sizes.clip, images, captions.ids["tokenizer"], vocab_size)
    make_reward(workdir, sizes)
    datasets.write_captions(out)
    pretrain.write_index(out, world)
    make_generator(workdir, sizes, world, out / "prompts.txt")
    return out


def make_twin(
    workdir: Path,
    sizes: Sizes,
    world: World,
) -> Path:
    """As `make`, of a world that has VAE, reward and captions in common with the package's."""
    out = workdir / "checkpoint"
    images, captions, vocab_size = make_data(workdir, sizes, world)
    latents = pretrain.shipped_latents(workdir, images)
    pretrain.make_teacher(workdir, sizes.text, sizes.teacher, latents, captions, vocab_size)
    pretrain.write_index(out, world)
    make_generator(workdir, sizes, world, SHIPPED / "prompts.txt")
    return SHIPPED


MAKE = {"sdxl": make, "pixart": make_twin}


def make_data(
    workdir: Path,
    sizes: Sizes,
    world: World,
) -> tuple[np.ndarray, Captions, int]:
    """Images uint8 [N, 64, 64, 3], their captions, and the size of the tokenizers' vocabulary."""
    out = workdir / "checkpoint"
    images, texts = datasets.render_dataset(workdir / "data", sizes.images)
    vocab_size = world.make_tokenizers(out)
    with log.waiting("tokenising the captions"):
        captions = tokenized(world, out, texts)
    return images, captions, vocab_size


def make_reward(workdir: Path, sizes: Sizes) -> None:
    """Renders pairs, trains on them as `di-star reward` does, and writes reward/."""
    out = workdir / "checkpoint"
    if not (workdir / "pairs").exists():  # it appears whole
        pairs.write(workdir / "pairs", sizes.pairs, seed=4)
    config = load_config("reward", "shapes")
    paths = {
        "weights.model": out / "clip",
        "weights.tokenizer": out / "tokenizer",
        "data.pairs": workdir / "pairs",
    }
    config.update_from_flattened_dict({name: str(path) for name, path in paths.items()})
    config.update_from_flattened_dict(sizes.reward)
    reward_checks.check(config, jax.device_count())
    reward_run.run(config, str(workdir / "reward"))
    trained = load_model(workdir / "reward" / reward_run.FOLDER)
    half = pretrain.HALF_TRANSFORMERS
    weights.save(out / "reward", trained.params, config=trained.config, **half)


def make_generator(
    workdir: Path,
    sizes: Sizes,
    world: World,
    prompts: Path,
) -> None:
    """Distils the teacher as `di-star train --config=NAME:distill` does, and writes generator/."""
    out = workdir / "checkpoint"
    if (out / "generator").exists():  # it appears whole, and its run's reference is another since
        return
    config = load_config(world.config, "distill")
    config.update_from_flattened_dict(
        {
            "weights.reference": str(out),
            "data.prompts": str(prompts),
            "eval.prompts": "",  # both networks are scored at the end
        }
    )
    config.update_from_flattened_dict(sizes.generator)
    checks.check(config, jax.device_count())
    train.run(config, str(workdir / "generator"))
    trained = load_model(denoiser_in(workdir / "generator", world.family))
    pretrain.save_denoiser(out / "generator", trained.params, world)


def score_all(folder: Path, shared: Path) -> dict[str, dict[str, float]]:
    """Scores of teacher and one-step generator on the held-out captions, by network.

    The teacher's stay in teacher/, and its first pictures, for runs to show beside their own.

    Args: folder, of the checkpoint; shared, of reward and captions.
    """
    parts = _parts_of(folder, shared)
    own = drawing.Asked(None, None, None, (), None)  # the scheduler's steps and guidance
    guided = drawing.sampling_of(own, parts.pipeline)
    teacher = _held_out(shared, parts, guided)
    name = f"teacher, {len(guided.timesteps)} guided steps"
    scored = teacher.measure(parts.models[DENOISER].params, f"scoring the {name}")
    (folder / TEACHER).mkdir(exist_ok=True)
    reward = {"pickscore": folders.digest(shared / "reward")}
    held_out.keep(
        folder / TEACHER,
        TEACHER,
        held_out.of_teacher(teacher.prompts, reward),
        scored,
    )

    one_step = drawing.few_step(parts.pipeline.family.one_step, LATENT_SHAPE)
    generator = load_model(folder / "generator").params
    of_generator = _held_out(shared, parts, one_step).measure(generator, "scoring the generator")
    return {name: scored.scores, "one-step generator": of_generator.scores}


def _parts_of(folder: Path, shared: Path) -> assembly.Parts:
    """Reference and reward of a checkpoint. Args: as of `score_all`."""
    config = load_config("shapes")
    config.weights.reference = str(folder)
    config.weights.pickscore = str(shared / "reward")
    config.weights.reward_tokenizer = str(shared / "tokenizer")
    return assembly.load_parts(config, drawing.one_device())


def _held_out(
    shared: Path,
    parts: assembly.Parts,
    sampling: drawing.Sampling,
) -> HeldOut:
    """The held-out captions, two pictures each."""
    texts = (shared / "prompts_held_out.txt").read_text(encoding="utf-8").splitlines()
    drawer = drawing.Drawer(parts.pipeline, sampling)
    compiled = drawing.make_scored_draw(drawer, parts.rewards, drawing.one_device())

    def draw(denoiser, token_ids, z):
        return compiled(parts.frozen() | {DENOISER: denoiser}, token_ids, z)

    return HeldOut(
        draw=draw,
        sampling=sampling,
        prompts=[Prompt(row, text, {}) for row, text in enumerate(texts)],
        token_ids=parts.tokenize(texts),
        samples=2,
        batch_size=100,
        seed=0,
        reads_attributes=True,
    )


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", None, "Folder for data, stages and the result.", required=True)
    flags.DEFINE_enum(
        "family",
        next(iter(WORLDS)),
        list(WORLDS),
        "Whose networks are made: those of SDXL, or of PixArt-alpha.",
    )


if __name__ == "__main__":
    define_flags()
    run_command(main)
