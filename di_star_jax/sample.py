# SPDX-License-Identifier: Apache-2.0
"""Draws pictures from prompts.

    di-star sample                                     # a grid by the generator that is shipped
    di-star sample --prompt="two red circles on a gray background"
    di-star sample --checkpoint=WORKDIR --prompt="..." --num=4 --seed=0 --out=DIR
    di-star sample --checkpoint=PIPELINE --prompt="..."      # a teacher: 50 steps, guidance 7.5
    di-star sample --checkpoint=PIPELINE --sampler=ddim --steps=20 --guidance_scale=5 --prompt="..."

A workdir or an exported generator makes its pictures in one step; the pipeline of a teacher takes
many, with guidance. For SDXL the defaults are those of the paper's SDXL rows: 50 steps of the
folder's scheduler, guidance 7.5. Leaves 0000.png and so on, grid.png, and prompts.json, which says
what each picture was drawn from and which `evaluate --images` reads.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from di_star_jax import drawing, log, pictures, samplers
from di_star_jax.command import run as run_command
from di_star_jax.errors import UserError
from di_star_jax.pipelines.folder import Pipeline
from di_star_jax.prompts.tokens import check_lengths
from di_star_jax.shapes import scenes, tokenizer
from di_star_jax.storage import buckets
from di_star_jax.storage.files import expand, write_text

SHIPPED = Path(tokenizer.__file__).parent / "checkpoint"
PROMPTS = "prompts.json"
_TRIED = 6  # held-out captions, where no prompt is given


def define_flags() -> None:  # not at import: other commands have flags of the same names
    """The flags that say what makes pictures and how; `evaluate` has them too."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, folder of a pipeline or of a denoiser, SDXL or SD 1.5 in one "
        "FILE.safetensors, an address (gs://, s3://) of one, or Hub name.",
    )
    flags.DEFINE_string(
        "reference_pipeline",
        None,
        "Pipeline of the other networks: of a denoiser's folder, or of a run where it has moved.",
    )
    flags.DEFINE_integer("seed", 0, "Seed of the noise.")
    flags.DEFINE_enum(
        "which",
        "ema",
        ["ema", "generator", "assistant", "initial"],
        "Network of a run's checkpoint; initial is the generator before the run.",
    )
    flags.DEFINE_enum(
        "sampler",
        None,
        sorted(samplers.SAMPLERS),
        "If not given, few_step for a generator, else as the scheduler's file says, or euler.",
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "Steps of the samplers ddim, euler and dpm_solver_pp; if not given 50, as in the paper's "
        "SDXL rows.",
        lower_bound=1,
        upper_bound=1000,
    )
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "Guidance of the samplers ddim, euler and dpm_solver_pp; if not given, 7.5, as in the "
        "paper's SDXL rows and diffusers' SD 1.5, and 3 for the shapes world; 1 is none.",
        lower_bound=0.0,
    )
    flags.DEFINE_multi_integer(
        "timestep",
        None,
        "Times of few_step, falling; may be given several times. Its run's, or 399, if not given.",
        lower_bound=0,
        upper_bound=999,
    )
    flags.DEFINE_integer("resolution", None, "Pixels of a side; the denoiser's own if not given.")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Numbers that the networks compute in; bfloat16 is what SDXL is fast in.",
    )


def asked() -> drawing.Asked:
    """What the flags of `define_flags` say."""
    args = flags.FLAGS
    return drawing.Asked(
        args.sampler, args.steps, args.guidance_scale, tuple(args.timestep or ()), args.resolution
    )


def open_folder(out: Path) -> None:
    """Makes the folder for the pictures. Raises: UserError where nothing can be written there."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file, expected a folder; give another name")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --out={out} ({error.strerror}); give a folder") from None
    if not os.access(out, os.W_OK):
        raise UserError(f"--out={out} may not be written; give a folder of your own")


def shipped(dtype: jnp.dtype) -> Pipeline:
    """The shapes world's one-step generator, as it is before any alignment."""
    return drawing.load(str(SHIPPED / "generator"), "ema", dtype=dtype, reference=str(SHIPPED))


def _load() -> Pipeline:
    args = flags.FLAGS
    dtype = jnp.dtype(args.dtype)
    if args.checkpoint is None:
        log.say(
            "no --checkpoint: the shipped one-step generator of the shapes world draws, as it is "
            "before any alignment"
        )
        return shipped(dtype)
    log.say(f"reading {args.checkpoint}")
    return drawing.load(args.checkpoint, args.which, dtype=dtype, reference=args.reference_pipeline)


def _prompts() -> list[str]:
    args = flags.FLAGS
    if args.prompt:
        return args.prompt
    if args.checkpoint is not None:
        raise UserError('no --prompt; give what to draw, e.g. --prompt="a cat"')
    held_out = (SHIPPED / "prompts_held_out.txt").read_text(encoding="utf-8").splitlines()
    return held_out[:_TRIED]


def _warn_of_unknown_words(loaded: Pipeline, prompts: list[str]) -> None:
    words = tokenizer.unknown_words(loaded.tokenizers["tokenizer"], prompts)
    if words:
        log.say(
            f"warning: this generator never saw {', '.join(words)}, and draws anything for it; it "
            f"knows {', '.join(scenes.words())}"
        )


def _save(
    out: Path,
    images: list,
    prompts: list[str],
) -> None:
    """Args: images [N, H, W, 3] in [-1, 1]; prompts, one for every --num of them."""
    num = flags.FLAGS.num
    names = [f"{i:04d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        pictures.save_png(out / name, pictures.to_uint8(image))
    pictures.save_png(out / "grid.png", pictures.captioned_grid(images, prompts))
    of = {name: prompts[i // num] for i, name in enumerate(names)}
    write_text(out / PROMPTS, json.dumps(of, indent=1) + "\n")


def main() -> None:
    args = flags.FLAGS
    prompts = _prompts()
    asked().check()
    with _folder(args.out) as out:
        _draw(prompts, out)
    if args.checkpoint is None:
        log.say("next: di-star train --config=shapes --workdir=runs/shapes   # aligns it")


@contextlib.contextmanager
def _folder(name: str) -> Iterator[Path]:
    """The folder for the pictures, opened; of a bucket a new one, which is uploaded in the end.

    A new one goes again where an error comes before the first picture.
    """
    if buckets.is_remote(name):
        with buckets.new_folder(name) as out:
            yield out
        log.say(f"uploaded all to {name}")
        return
    out = expand(name)
    is_new = not out.exists()
    open_folder(out)
    try:
        yield out
    except UserError:
        if is_new:
            with contextlib.suppress(OSError):  # there are pictures in it
                out.rmdir()
        raise


def _draw(prompts: list[str], out: Path) -> None:
    args = flags.FLAGS
    loaded = _load()
    for tokenize in loaded.tokenizers.values():
        check_lengths(tokenize, prompts, "--prompt")
    _warn_of_unknown_words(loaded, prompts)
    sampling = drawing.sampling_of(asked(), loaded)
    count, steps = len(prompts) * args.num, len(sampling.timesteps)
    guidance = f", guidance {sampling.guidance_scale:g}" if sampling.guided else ""
    log.say(
        f"drawing {_number(count, 'picture')} by {sampling.sampler} in {_number(steps, 'step')}"
        f"{guidance}; compiling comes first, a quarter of a minute for the shapes world and many "
        "for SDXL"
    )
    began = time.time()
    each = [prompt for prompt in prompts for _ in range(args.num)]
    *before, h, w, c = sampling.noise_shape
    z = jax.random.normal(jax.random.key(args.seed), (*before, len(each), h, w, c))
    images = drawing.draw_prompts(loaded, sampling)(each, z)
    _save(out, images, prompts)
    log.say(
        f"wrote {_number(count, 'picture')}, {PROMPTS} and {out / 'grid.png'} in "
        f"{time.time() - began:.0f} s"
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_alias("reference", "reference_pipeline")
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times.")
    flags.DEFINE_integer("num", 4, "Pictures of each prompt.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Folder for the pictures, or an address (gs://, s3://).")
    run_command(main)
