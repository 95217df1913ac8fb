# SPDX-License-Identifier: Apache-2.0
"""A config as what a run is made of: networks, parameters, settings, optimizers, shardings."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import gradients, objectives, sharding, step
from di_star_jax.cost import plan
from di_star_jax.diffusion import Schedule
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.rewards import load_rewards, sources_of
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.views import VIEWS, in_slices
from di_star_jax.samplers import generator_timesteps
from di_star_jax.storage import weights


class Frozen(NamedTuple):
    """What never changes in a run.

    `params` holds unet (the reference), vae, the text encoders and, by name, rewards.

    The functions run per device, see sharding.py.
    """

    params: dict
    networks: gradients.Networks
    decode: object  # (params, latents) -> image [B, H, W, 3]
    score: object  # (params, image, token_ids) -> each reward [B] of 8-bit images, by name
    schedule: Schedule
    tokenizers: dict  # and what the rewards make of prompts, by name
    rewards: dict[str, Reward]
    folder: Path
    unet: pipeline.Model
    configs: dict[str, dict]  # config.json by component
    latent_shape: tuple[int, int, int]


def kernel_of(config, platform: str) -> str:
    """The attention kernel that a config asks for, "auto" by platform: "tpu", "gpu" or "cpu"."""
    by_platform = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
    return by_platform[platform] if config.compute.attention == "auto" else config.compute.attention


def model_options(config, platform: str) -> dict[str, dict]:
    """By component what `pipeline.abstract_model` takes besides the folder's config.json."""
    c = config.compute
    common = dict(dtype=jnp.dtype(c.dtype), kernel=kernel_of(config, platform))
    remat = {"unet": c.remat_unet, "vae": c.remat_vae, "reward": c.remat_reward}
    return {part: dict(common, remat=remat.get(part, "none")) for part in (*plan.PARTS, "reward")}


def assemble(
    config,
    models: dict[str, pipeline.Model],
    rewards: dict[str, Reward],
    schedule: Schedule,
    *,
    tokenizers: dict,
    folder: Path,
) -> Frozen:
    """The functions of a run over its models and rewards, whose parameters may be abstract.

    Args: models: by component; rewards, by name; tokenizers, folder: of the reference.
    """
    graphdefs = {name: model.graphdef for name, model in models.items()}
    scale = pipeline.vae_scale(models["vae"].config)
    side, view = config.data.resolution // scale, VIEWS[config.decode.view]
    scales = {name: config.reward[name] for name in rewards if config.reward[name]}

    def unet(params, x_t, t, condition):
        return nnx.merge(graphdefs["unet"], params)(x_t, t, condition)

    def decode(params, latents):
        return nnx.merge(graphdefs["vae"], params["vae"]).decode(latents)

    def encode_text(params, token_ids):
        return pipeline.encode_text(graphdefs, params, token_ids, config.data.resolution)

    def reward_of_latents(params, x0, token_ids, crop):
        def score_of(x0, token_ids):
            image = decode(params, x0)
            each = {
                name: reward.reward(params["rewards"][name], image, token_ids[name])
                for name, reward in rewards.items()
            }
            return sum(
                (scale * each[name] for name, scale in scales.items()), jnp.zeros(len(x0))
            ), each

        seen = view(x0, crop, config.decode.resolution // scale)
        return in_slices(score_of, config.decode.slice)(
            seen, {name: token_ids[name] for name in rewards}
        )

    def score(params, image, token_ids):
        return {
            name: reward.evaluate(params["rewards"][name], image, token_ids[name])
            for name, reward in rewards.items()
        }

    params = {name: model.params for name, model in models.items()}
    params["rewards"] = {name: reward.params for name, reward in rewards.items()}
    channels = pipeline.model_class(models["unet"].config)[1].in_channels
    return Frozen(
        params,
        gradients.Networks(unet, encode_text, reward_of_latents),
        decode,
        score,
        schedule,
        tokenizers | {name: reward.tokenize for name, reward in rewards.items()},
        rewards,
        folder,
        models["unet"],
        {name: model.config for name, model in models.items()},
        (side, side, channels),
    )


def load_frozen(config, mesh: Mesh) -> Frozen:
    """Reads reference pipeline and rewards, sharded over the mesh, in the compute dtype."""
    options = model_options(config, mesh.devices.flat[0].platform)
    common = dict(
        shardings=lambda tree: sharding.params_sharding(mesh, tree),
        param_dtype=jnp.dtype(config.compute.dtype),
    )
    reference = pipeline.load_pipeline(
        weights.resolve(config.weights.reference), options=options, **common
    )
    loaded = load_rewards(
        sources_of(config), config.weights.reward_tokenizer, **options["reward"], **common
    )
    return assemble(
        config,
        reference.models,
        loaded,
        reference.schedule,
        tokenizers=reference.tokenizers,
        folder=reference.folder,
    )


def settings_of(config, latent_shape: tuple[int, int, int]) -> gradients.Settings:
    """The plain values that the step needs of a config."""
    c = config.objective
    return gradients.Settings(
        objective=c.name,
        omega=c.omega,
        constants=objectives.Constants(c.huber_c, c.alpha_cfg, c.sid_alpha),
        weighting=c.weighting,
        reduction=c.reduction,
        generator_times=(c.t_min, c.t_max),
        assistant_times=(config.assistant.t_min, config.assistant.t_max),
        assistant_updates=config.assistant.updates,
        sharing="loops" if config.compute.loop_networks else config.assistant.sharing,
        generator_timesteps=generator_timesteps(config.generator),
        latent_shape=latent_shape,
        ema_decay=0.5 ** (config.data.batch_size / config.ema.half_life_samples),
        microbatches=config.compute.microbatches,
    )


def optimizers(config):
    """(generator's, assistant's) optax transformations."""
    o = config.optim
    common = dict(
        lr_warmup_steps=o.lr_warmup_steps,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )
    return step.adamw(o.generator_lr, **common), step.adamw(o.assistant_lr, **common)


def abstract_state(unet: pipeline.Model, opts, mesh: Mesh) -> step.TrainState:
    """The state's shapes and shardings.

    Args: the generator's model; its and the assistant's optimizers.
    """
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), unet.params)
    state = jax.eval_shape(lambda g, a: step.init_state(g, a, *opts), tree, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        sharding.params_sharding(mesh, state),
    )


def jit_step(step_fn, state, mesh: Mesh):
    """A step compiled with its state donated, and left where it was.

    Args: state, for its shardings; may be abstract.
    """
    return jax.jit(
        step_fn,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    )
