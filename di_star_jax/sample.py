# SPDX-License-Identifier: Apache-2.0
"""Makes pictures from prompts.

    python -m di_star_jax.sample --checkpoint=WORKDIR --prompt="..." --num=4 --seed=0 --out=DIR
    python -m di_star_jax.sample --checkpoint=PIPELINE --sampler=ddim --steps=50 \\
        --guidance_scale=5 --prompt="..."

A workdir or an exported generator makes its pictures in one step; the pipeline of a teacher takes
many, with guidance.
"""

import jax
import jax.numpy as jnp
from absl import flags

from di_star_jax import drawing, pictures, samplers
from di_star_jax.errors import UserError
from di_star_jax.errors import run as run_command
from di_star_jax.storage.files import expand


def define_flags() -> None:  # not at import: other commands have flags of the same names
    """The flags that say what makes pictures and how; `evaluate` has them too."""
    flags.DEFINE_string(
        "checkpoint", None, "Workdir of a run, folder of a pipeline or of a UNet, or Hub name."
    )
    flags.DEFINE_string(
        "reference_pipeline",
        None,
        "Pipeline of the other networks: of a UNet's folder, or of a run where it has moved.",
    )
    flags.DEFINE_integer("seed", 0, "Of the noise.")
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
        "few_step for a generator, euler else, if not given.",
    )
    flags.DEFINE_integer(
        "steps", None, "Of ddim, euler and dpm_solver_pp; 50.", lower_bound=1, upper_bound=1000
    )
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "Of ddim, euler and dpm_solver_pp; 5 if not given, 1 is no guidance.",
        lower_bound=0.0,
    )
    flags.DEFINE_multi_integer(
        "timestep",
        None,
        "Of few_step, falling; may be given several times. Its run's, or 399, if not given.",
        lower_bound=0,
        upper_bound=999,
    )
    flags.DEFINE_integer("resolution", None, "Pixels; the UNet's own if not given.")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Of the generator; bfloat16 is what SDXL is fast in.",
    )


def asked() -> drawing.Asked:
    """What the flags of `define_flags` say."""
    args = flags.FLAGS
    return drawing.Asked(
        args.sampler, args.steps, args.guidance_scale, tuple(args.timestep or ()), args.resolution
    )


def main() -> None:
    args = flags.FLAGS
    if args.checkpoint is None:
        raise UserError(
            "no --checkpoint; give a run's workdir, a pipeline folder, or a name on the Hub"
        )
    asked().check()
    dtype = jnp.dtype(args.dtype)
    loaded = drawing.load(
        args.checkpoint, args.which, dtype=dtype, reference=args.reference_pipeline
    )
    sampling = drawing.sampling_of(asked(), loaded)
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    *steps, h, w, c = sampling.noise_shape
    z = jax.random.normal(jax.random.key(args.seed), (*steps, len(prompts), h, w, c))
    images = drawing.draw_prompts(loaded, sampling)(prompts, z)
    out = expand(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pictures.save_png(out / f"{i:04d}.png", pictures.to_uint8(image))
    pictures.save_png(out / "grid.png", pictures.image_grid(images, args.num))
    steps = f"{sampling.sampler}, {len(sampling.timesteps)} steps"
    print(f"wrote {len(images)} pictures and grid.png in {out} ({steps})")


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_alias("reference", "reference_pipeline")
    flags.DEFINE_multi_string(
        "prompt", None, "What to draw; may be given several times.", required=True
    )
    flags.DEFINE_integer("num", 4, "Pictures of each prompt.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Folder for the PNG files.")
    run_command(main)
