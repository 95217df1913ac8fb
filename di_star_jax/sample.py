# SPDX-License-Identifier: Apache-2.0
"""Makes pictures from prompts.

    python -m di_star_jax.sample --checkpoint=WORKDIR --prompt="..." --num=4 --seed=0 --out=DIR
    python -m di_star_jax.sample --checkpoint=PIPELINE --sampler=ddim --steps=50 --guidance_scale=5 --prompt="..." ...

A workdir or an exported generator makes its pictures in one step; the pipeline of a teacher takes many, with guidance.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from di_star_jax import checkpoint, metrics, pipeline, prompts, samplers, weights
from di_star_jax.config import UserError, exit_on_user_error
from di_star_jax.diffusion import guide


def load(source: str, which: str) -> tuple[pipeline.Pipeline, tuple[int, ...]]:
    """A pipeline folder (or Hub name), or the pipeline of a run's newest checkpoint with that run's UNet in it.

    Args:
      source: folder, workdir or Hub name.
      which: item of the checkpoint: "ema", "generator" or "assistant".
    Returns:
      (pipeline, times of its UNet's steps if that is a generator, else ()).
    """
    if not (Path(source).is_dir() and not (Path(source) / "model_index.json").exists()):
        loaded = pipeline.load_pipeline(weights.resolve(source))
        return loaded, (399,) if loaded.scheduler_config["_class_name"] == "LCMScheduler" else ()
    checkpoints = checkpoint.existing(source)
    last = checkpoints.latest_step()
    metadata = checkpoints.metadata(last)
    loaded = pipeline.load_pipeline(weights.resolve(metadata["reference"]))
    unet = pipeline.abstract_model(metadata["unet_config"])
    unet = unet._replace(params=checkpoints.restore_item(last, which, unet.params))
    checkpoints.close()
    return loaded._replace(models=loaded.models | {"unet": unet}), () if which == "assistant" else tuple(metadata["generator_timesteps"])


def make_draw(loaded: pipeline.Pipeline, *, sampler: str, timesteps: np.ndarray, guidance_scale: float):
    """A compiled function from prompts and noise to pictures.

    Args:
      loaded: the pipeline.
      sampler: a key of samplers.SAMPLERS. timesteps: int, falling.
      guidance_scale: omega; 0 or 1 is no guidance (diffusers' convention), and saves the unconditional pass.
    Returns:
      draw(texts: B prompts, z: [B, h, w, 4] standard normal, [K, B, h, w, 4] for few_step) -> images float32
      [B, H, W, 3] in [-1, 1].
    """
    graphdefs = {name: model.graphdef for name, model in loaded.models.items()}
    params = {name: model.params for name, model in loaded.models.items()}
    guided = guidance_scale not in (0.0, 1.0)

    @jax.jit
    def compiled(params, token_ids, z):
        unet = nnx.merge(graphdefs["unet"], params["unet"])
        condition, null = pipeline.encode_text(graphdefs, params, token_ids, z.shape[-2] * loaded.vae_scale)
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)

        def plain_eps(x_t, t):
            return unet(x_t, t, condition)

        def guided_eps(x_t, t):
            eps = unet(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
            return guide(*jnp.split(eps, 2), guidance_scale)

        x0 = samplers.SAMPLERS[sampler](guided_eps if guided else plain_eps, z, timesteps, loaded.schedule)
        return jnp.clip(nnx.merge(graphdefs["vae"], params["vae"]).decode(x0), -1.0, 1.0)

    return lambda texts, z: np.asarray(compiled(params, prompts.token_batch(texts, loaded.tokenizers), z))


def _define_flags() -> None:  # not at import: other commands have flags of the same names
    flags.DEFINE_string("checkpoint", None, "Workdir of a run, pipeline folder, or Hub name.", required=True)
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times.", required=True)
    flags.DEFINE_integer("num", 4, "Pictures of each prompt.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_string("out", "samples", "Folder for the PNG files.")
    flags.DEFINE_enum("which", "ema", ["ema", "generator", "assistant"], "Network of a run's checkpoint.")
    flags.DEFINE_enum("sampler", None, sorted(samplers.SAMPLERS), "few_step for a generator, euler else, if not given.")
    flags.DEFINE_integer("steps", 50, "Of ddim and euler.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_float("guidance_scale", 5.0, "Of ddim and euler; 1 is no guidance.", lower_bound=0.0)
    flags.DEFINE_multi_integer("timestep", None, "Of few_step, falling; may be given several times. Its run's, or 399, "
                               "if not given.", lower_bound=0, upper_bound=999)
    flags.DEFINE_integer("resolution", None, "Pixels; the UNet's own if not given.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    args = flags.FLAGS
    if args.resolution is not None and (args.resolution < 64 or args.resolution % 64):
        raise UserError(f"resolution={args.resolution} is not a multiple of 64; use {-(-args.resolution // 64) * 64}")
    loaded, times = load(args.checkpoint, args.which)
    times = tuple(args.timestep or times)
    if any(a <= b for a, b in zip(times, times[1:])):
        raise UserError(f"timestep={list(times)}, expected falling numbers; 999, 749, 499, 249 for DMD2's four steps")
    sampler = args.sampler or ("few_step" if times else "euler")
    few = sampler == "few_step"
    timesteps = np.array(times or (399,)) if few else samplers.leading_timesteps(args.steps)
    _, unet = pipeline.model_class(loaded.models["unet"].config)
    size = args.resolution // loaded.vae_scale if args.resolution else unet.sample_size
    texts = [text for text in args.prompt for _ in range(args.num)]
    shape = (len(texts), size, size, unet.in_channels)
    z = jax.random.normal(jax.random.key(args.seed), (len(timesteps), *shape) if few else shape)
    images = make_draw(loaded, sampler=sampler, timesteps=timesteps,
                       guidance_scale=1.0 if few else args.guidance_scale)(texts, z)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        metrics.save_png(out / f"{i:04d}.png", metrics.to_uint8(image))
    metrics.save_png(out / "grid.png", metrics.image_grid(images, args.num))
    print(f"wrote {len(images)} pictures and grid.png in {out} ({sampler}, {len(timesteps)} steps)")


if __name__ == "__main__":
    _define_flags()
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(flags.FLAGS))
