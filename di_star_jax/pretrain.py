# SPDX-License-Identifier: Apache-2.0
"""Makes the shapes checkpoint from nothing:

`di-star pretrain --workdir=runs/pretrain`, and `di-star pretrain --family=pixart --workdir=...`.

Seven stages, a good hour on two cores, each resumed where it stopped when the same command runs
again (at most 100 steps are lost):
  data       renders captioned scenes
  vae        autoencoder, 64x64x3 <-> 16x16x4
  text       two text encoders, trained to predict the mean image of a caption
  teacher    SDXL-shaped UNet, trained on eps-prediction together with the text encoders
  reward     CLIP: contrastive, then PickScore's loss on preference pairs
  generator  one-step generator distilled from the teacher by the project's own step with reward 0
  teacher's scores, on held-out captions, which every run shows beside its own
Writes `WORKDIR/checkpoint`, a diffusers pipeline folder with `generator/`, `reward/` and `teacher/`
beside the usual parts.

--family=pixart makes the twin: a PixArt with a T5 of its own in the same world. Its VAE is that of
the package, copied; its reward and its captions are the package's, where they lie. The twin that is
shipped is of an earlier course of the same stages: 600 steps of the teacher by AdamW and 3,500 by
Muon, whose rate was changed on the way, and 400 steps of the generator.
"""

from pathlib import Path

from absl import flags

from di_star_jax import assembly, checks, drawing, log
from di_star_jax.command import run as run_command
from di_star_jax.config import load_config
from di_star_jax.evaluation import held_out
from di_star_jax.evaluation.held_out import TEACHER, HeldOut
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import load_model
from di_star_jax.prompts.files import Prompt
from di_star_jax.shapes.networks import LATENT_SHAPE
from di_star_jax.shapes.pretrain import RUN, SIZES
from di_star_jax.shapes.worlds import WORLDS
from di_star_jax.storage import folders


def main() -> None:
    checks.check_workdir(flags.FLAGS.workdir)
    workdir = checks.make_workdir(flags.FLAGS.workdir)
    world = flags.FLAGS.family
    shared = RUN[world](workdir, SIZES[world], WORLDS[world])
    scores = score_all(workdir / "checkpoint", shared)
    names = list(next(iter(scores.values())))
    rows = [[name, *(f"{of[name]:.4f}" for of in scores.values())] for name in names]
    print(log.markdown_table(["500 held-out captions, 2 pictures each", *scores], rows))


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
