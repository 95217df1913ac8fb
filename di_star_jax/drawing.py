# SPDX-License-Identifier: Apache-2.0
"""Pictures from prompts: what draws, with which weights, in how many steps."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import gradients, samplers, sharding
from di_star_jax.assembly import Frozen
from di_star_jax.diffusion import guide
from di_star_jax.errors import UserError
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


def make_draw_of_run(
    frozen: Frozen, settings: gradients.Settings, mesh: Mesh, *, score: bool = True
):
    """Returns the compiled draw(params, frozen.params, token_ids [B, L], key) -> (images [B, H, W,
    3], rewards [B] by name).

    Without `score` it returns the images alone.
    """
    timesteps = settings.generator_timesteps

    def each(params, frozen_params, token_ids, noise):
        condition, _ = frozen.networks.encode_text(frozen_params, token_ids)
        x0 = samplers.few_step(
            lambda x, t: frozen.networks.unet(params, x, t, condition),
            noise,
            timesteps,
            frozen.schedule,
        )
        image = frozen.decode(frozen_params, x0)
        clipped = jnp.clip(image, -1.0, 1.0)
        return (clipped, frozen.score(frozen_params, image, token_ids)) if score else clipped

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def draw(params, frozen_params, token_ids, key):
        batch = jax.tree.leaves(token_ids)[0].shape[0]
        noise = jax.random.normal(key, (len(timesteps), batch, *settings.latent_shape))
        spread = sharding.on_each(
            mesh,
            each,
            (
                sharding.params_spec(mesh, params),
                sharding.params_spec(mesh, frozen_params),
                sharding.batch_spec(),
                sharding.batch_spec(1),
            ),
            sharding.batch_spec(),
        )
        return spread(params, frozen_params, token_ids, noise)

    return draw
