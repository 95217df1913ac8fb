# SPDX-License-Identifier: Apache-2.0
"""Makes pictures from prompts.

    python -m di_star_jax.sample --checkpoint=WORKDIR --prompt="..." --num=4 --seed=0 --out=DIR
    python -m di_star_jax.sample --checkpoint=PIPELINE --sampler=ddim --steps=50 --guidance_scale=5
    --prompt="..." ...

A workdir or an exported generator makes its pictures in one step; the pipeline of a teacher takes
many, with guidance.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import log as metrics
from di_star_jax import samplers, sharding
from di_star_jax.config import UserError, exit_on_user_error
from di_star_jax.diffusion import guide
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts import files as prompts
from di_star_jax.storage import checkpoint, weights


class Sampling(NamedTuple):
    """How pictures are made. sampler: a key of samplers.SAMPLERS; timesteps: int, falling;
    guidance_scale: omega, 1 for none; latent_shape: of one sample [h, w, C].
    """

    sampler: str
    timesteps: np.ndarray
    guidance_scale: float
    latent_shape: tuple[int, int, int]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of one sample: few_step takes fresh noise for every step."""
        return (
            (len(self.timesteps), *self.latent_shape)
            if self.sampler == "few_step"
            else self.latent_shape
        )


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def load(
    source: str, which: str, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[pipeline.Pipeline, tuple[int, ...]]:
    """A pipeline folder (or Hub name), or the pipeline of a run's newest checkpoint with that run's
    UNet in it.

    Args:
      source: folder, workdir or Hub name.
      which: item of the checkpoint: "ema", "generator" or "assistant"; or "initial", the generator
        before the run.
      mesh: of devices that share the parameters; None for one device.
      dtype: of parameters and computation.
    Returns:
      (pipeline, times of its UNet's steps if that is a generator, else ()).
    """
    place = None if mesh is None else lambda tree: sharding.params_sharding(mesh, tree)
    common = dict(shardings=place, dtype=dtype, param_dtype=dtype)
    if not (Path(source).is_dir() and not (Path(source) / "model_index.json").exists()):
        loaded = pipeline.load_pipeline(weights.resolve(source), **common)
        return loaded, (399,) if loaded.scheduler_config["_class_name"] == "LCMScheduler" else ()
    checkpoints = checkpoint.existing(source)
    last = checkpoints.latest_step()
    metadata = checkpoints.metadata(last)
    loaded = pipeline.load_pipeline(weights.resolve(metadata["reference"]), **common)
    unet = pipeline.abstract_model(metadata["unet_config"], dtype=dtype)
    shardings = None if place is None else place(unet.params)
    if which == "initial":
        if "initial" not in metadata:
            raise UserError(
                f"the checkpoint in {source} does not say what it began from; give the folder of a pipeline"
            )
        params = weights.load(
            weights.resolve(metadata["initial"]), unet.params, shardings=shardings, dtype=dtype
        )
    else:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), unet.params)
        if place is not None:
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, shardings
            )
        params = checkpoints.restore_item(last, which, target)
    checkpoints.close()
    loaded = loaded._replace(models=loaded.models | {"unet": unet._replace(params=params)})
    return loaded, () if which == "assistant" else tuple(metadata["generator_timesteps"])


def make_draw(
    loaded: pipeline.Pipeline,
    *,
    sampler: str,
    timesteps: np.ndarray,
    guidance_scale: float,
    mesh: Mesh | None = None,
):
    """A compiled function from prompts and noise to pictures.

    Args:
      loaded: the pipeline.
      sampler: a key of samplers.SAMPLERS. timesteps: int, falling.
      guidance_scale: omega; 0 or 1 is no guidance (diffusers' convention), and saves the
        unconditional pass.
      mesh: where the pipeline was loaded to; None for one device.
    Returns:
      draw(texts: B prompts, z: [B, h, w, 4] standard normal, [K, B, h, w, 4] for few_step) ->
      images float32 [B, H, W, 3] in [-1, 1].
    """
    mesh = mesh or one_device()
    graphdefs = {name: model.graphdef for name, model in loaded.models.items()}
    params = {name: model.params for name, model in loaded.models.items()}
    guided = guidance_scale not in (0.0, 1.0)

    def each(params, token_ids, z):
        unet = nnx.merge(graphdefs["unet"], params["unet"])
        condition, null = pipeline.encode_text(
            graphdefs, params, token_ids, z.shape[-2] * loaded.vae_scale
        )
        both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)

        def plain_eps(x_t, t):
            return unet(x_t, t, condition)

        def guided_eps(x_t, t):
            eps = unet(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
            return guide(*jnp.split(eps, 2), guidance_scale)

        x0 = samplers.SAMPLERS[sampler](
            guided_eps if guided else plain_eps, z, timesteps, loaded.schedule
        )
        return jnp.clip(nnx.merge(graphdefs["vae"], params["vae"]).decode(x0), -1.0, 1.0)

    compiled = jax.jit(
        sharding.on_each(
            mesh,
            each,
            (
                sharding.params_spec(mesh, params),
                sharding.batch_spec(),
                sharding.batch_spec(1 if sampler == "few_step" else 0),
            ),
            sharding.batch_spec(),
        )
    )
    return lambda texts, z: np.asarray(
        compiled(params, prompts.token_batch(texts, loaded.tokenizers), z)
    )


def define_flags() -> None:  # not at import: other commands have flags of the same names
    """The flags that say what makes pictures and how; `evaluate` has them too."""
    flags.DEFINE_string("checkpoint", None, "Workdir of a run, pipeline folder, or Hub name.")
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
        "steps", 50, "Of ddim, euler and dpm_solver_pp.", lower_bound=1, upper_bound=1000
    )
    flags.DEFINE_float(
        "guidance_scale",
        5.0,
        "Of ddim, euler and dpm_solver_pp; 1 is no guidance.",
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


def check_flags(args) -> None:
    """Raises: UserError for a resolution or timesteps that no sampler can take."""
    if args.resolution is not None and (args.resolution < 64 or args.resolution % 64):
        raise UserError(
            f"resolution={args.resolution} is not a multiple of 64; use {-(-args.resolution // 64) * 64}"
        )
    times = args.timestep or ()
    if any(a <= b for a, b in zip(times, times[1:])):
        raise UserError(
            f"timestep={list(times)}, expected falling numbers; 999, 749, 499, 249 for DMD2's four steps"
        )


def sampling_of(args, loaded: pipeline.Pipeline, times: tuple[int, ...]) -> Sampling:
    """What the flags ask for. Args: flags; the result of `load`."""
    times = tuple(args.timestep or times)
    sampler = args.sampler or ("few_step" if times else "euler")
    _, unet = pipeline.model_class(loaded.models["unet"].config)
    size = args.resolution // loaded.vae_scale if args.resolution else unet.sample_size
    shape = (size, size, unet.in_channels)
    if sampler == "few_step":
        return Sampling(sampler, np.array(times or (399,)), 1.0, shape)
    spaced = (
        samplers.dpm_solver_timesteps if sampler == "dpm_solver_pp" else samplers.leading_timesteps
    )
    return Sampling(sampler, spaced(args.steps), args.guidance_scale, shape)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
    args = flags.FLAGS
    if args.checkpoint is None:
        raise UserError(
            "no --checkpoint; give a run's workdir, a pipeline folder, or a name on the Hub"
        )
    check_flags(args)
    loaded, times = load(args.checkpoint, args.which, dtype=jnp.dtype(args.dtype))
    sampling = sampling_of(args, loaded, times)
    texts = [text for text in args.prompt for _ in range(args.num)]
    *steps, h, w, c = sampling.noise_shape
    z = jax.random.normal(jax.random.key(args.seed), (*steps, len(texts), h, w, c))
    images = make_draw(
        loaded,
        sampler=sampling.sampler,
        timesteps=sampling.timesteps,
        guidance_scale=sampling.guidance_scale,
    )(texts, z)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        metrics.save_png(out / f"{i:04d}.png", metrics.to_uint8(image))
    metrics.save_png(out / "grid.png", metrics.image_grid(images, args.num))
    print(
        f"wrote {len(images)} pictures and grid.png in {out} ({sampling.sampler}, {len(sampling.timesteps)} steps)"
    )


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_multi_string(
        "prompt", None, "What to draw; may be given several times.", required=True
    )
    flags.DEFINE_integer("num", 4, "Pictures of each prompt.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Folder for the PNG files.")
    app.run(exit_on_user_error(main), flags_parser=exit_on_user_error(flags.FLAGS))
