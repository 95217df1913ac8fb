# SPDX-License-Identifier: Apache-2.0
"""A run from weights to weights: build, restore, loop, log, save, export."""

import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from di_star_jax import gradients, objectives, samplers, sharding, step
from di_star_jax import log as metrics
from di_star_jax.config import UserError, generator_timesteps
from di_star_jax.cost import plan
from di_star_jax.diffusion import Schedule
from di_star_jax.evaluation import before_after
from di_star_jax.models import attention
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts import files as prompts
from di_star_jax.rewards import load_rewards, sources_of
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.views import VIEWS, in_slices
from di_star_jax.storage import checkpoint, weights


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


def load_state(
    config, frozen: Frozen, mesh: Mesh, checkpoints: checkpoint.Checkpoints, opts
) -> step.TrainState:
    """The newest checkpoint's state, or that of step 0 from the generator's and the assistant's
    weights.
    """
    abstract = abstract_state(frozen.unet, opts, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    latest = checkpoints.latest_step()
    if latest is not None:
        metrics.say(f"continuing at step {latest} of the checkpoints in {checkpoints.folder}")
        return checkpoints.restore(latest, abstract)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract.generator)
    generator = weights.load(
        weights.resolve(config.weights.generator), tree, shardings=shardings.generator
    )
    assistant_folder = (
        weights.resolve(config.weights.assistant)
        if config.weights.assistant
        else frozen.folder / "unet"
    )
    assistant = weights.load(assistant_folder, tree, shardings=shardings.assistant)
    init = jax.jit(
        lambda g, a: step.init_state(g, a, *opts), out_shardings=shardings, donate_argnums=(0, 1)
    )
    return init(generator, assistant)


def jit_step(step_fn, state, mesh: Mesh):
    """A step compiled with its state donated, and left where it was.

    Args: state, for its shardings; may be abstract.
    """
    return jax.jit(
        step_fn,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    )


def make_draw(frozen: Frozen, settings: gradients.Settings, mesh: Mesh, *, score: bool = True):
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


def load_prompts(file: str, workdir: Path, column: str) -> prompts.Source:
    """A prompt list by index, prepared in the workdir by the first host while the others wait."""
    if jax.process_index() == 0:
        prompts.load(file, workdir / "prompts", column=column)
    multihost_utils.sync_global_devices(f"prompts of {file}")
    return prompts.load(file, workdir / "prompts", column=column)


def _lasting(source: str) -> str:
    """A folder's absolute path, which holds from anywhere; a Hub name as it is."""
    return str(Path(source).absolute()) if source and Path(source).is_dir() else source


def run(config, workdir: str) -> None:
    """Trains as `config` says, continuing what is in `workdir`, and leaves the results there.

    Args:
      config: checked ml_collections.ConfigDict, as configs/sdxl.py.
      workdir: gets checkpoints/, TensorBoard events, metrics.jsonl, and at the end diffusers/ (a
        pipeline folder) and, with eval.prompts, samples.png and before_after.json.
    Raises: UserError for unusable inputs, and for a gradient that is not finite.
    """
    # Where and what.
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
    metrics.say("\n".join(plan.describe(config, jax.device_count())))
    kernel = kernel_of(config, mesh.devices.flat[0].platform)
    metrics.say(
        f"attention: {kernel}"
        + ("" if kernel == "xla" else f" on {attention.LONG} tokens and more, else xla")
    )
    plan.check_memory(config, mesh.devices.flat[0], jax.device_count())
    frozen = load_frozen(config, mesh)
    settings = settings_of(config, frozen.latent_shape)
    opts = optimizers(config)
    checkpoints = checkpoint.Checkpoints(folder / checkpoint.FOLDER, keep=config.train.keep)
    state = load_state(config, frozen, mesh, checkpoints, opts)
    # What convert, sample and evaluate need to know of this run.
    metadata = {
        "unet_config": frozen.unet.config,
        "reference": str(frozen.folder.absolute()),
        "generator_timesteps": settings.generator_timesteps,
        "initial": _lasting(config.weights.generator),
        "trained_on": {name: scale for name, scale in config.reward.items() if scale},
        "weights": {name: _lasting(source) for name, source in config.weights.items()},
    }

    # Prompts, by index: step k sees the same ones on any number of hosts and after any restart.
    source = load_prompts(config.data.prompts, folder, config.data.column)
    stream = prompts.PromptStream(source, seed=config.seed, batch_size=config.data.batch_size)
    batch_sharding = sharding.batch_sharding(mesh)

    each = config.data.batch_size // math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    mine = sorted(
        {
            rows.start or 0
            for (rows,) in batch_sharding.addressable_devices_indices_map(
                (config.data.batch_size,)
            ).values()
        }
    )  # this process's devices' parts of the batch

    def batch_at(k):
        texts = [
            text
            for start in mine
            for text in stream.at(k, start // each, config.data.batch_size // each)
        ]
        ids = prompts.token_batch(texts, frozen.tokenizers)
        return jax.tree.map(
            lambda rows: jax.make_array_from_callback(
                (config.data.batch_size, *rows.shape[1:]),
                batch_sharding,
                lambda index: rows[(at := mine.index(index[0].start or 0) * each) : at + each],
            ),
            ids,
        )

    # Before: scores and pictures of the generator as it came.
    draw_compiled = make_draw(frozen, settings, mesh)

    def draw(params, token_ids, key):
        spread = jax.tree.map(
            lambda ids: jax.make_array_from_callback(ids.shape, batch_sharding, lambda i: ids[i]),
            token_ids,
        )
        return draw_compiled(params, frozen.params, spread, key)

    held_out, held_out_ids = [], {}
    if config.eval.prompts:
        held_out_source = load_prompts(config.eval.prompts, folder, config.data.column)
        held_out = [
            held_out_source[i] for i in range(min(config.eval.num_prompts, len(held_out_source)))
        ]
        held_out_ids = prompts.token_batch(held_out, frozen.tokenizers)

    def measure(params, count, samples):
        return before_after.measure(
            functools.partial(draw, params),
            held_out[:count],
            jax.tree.map(lambda ids: ids[:count], held_out_ids),
            samples_per_prompt=samples,
            batch_size=config.eval.batch_size,
            read_back=config.eval.oracle,
        )

    everything = len(held_out), config.eval.num_per_prompt

    first_host = jax.process_index() == 0
    if held_out and int(state.step) == 0:
        metrics.say(f"scoring the initial generator on {len(held_out)} held-out prompts")
        scores, images = measure(state.generator, *everything)
        if first_host:
            before_after.keep_before(folder, scores, images)

    # The step, compiled at its first call.
    key = jax.random.key(config.seed)
    train_step = jit_step(
        step.make_train_step(frozen.networks, settings, frozen.schedule, *opts, mesh), state, mesh
    )
    warmup_step = jit_step(
        step.make_warmup_step(frozen.networks, settings, frozen.schedule, opts[1], mesh),
        state,
        mesh,
    )
    first = int(state.step)
    writer = metrics.Writer(folder, first_step=first)
    total = config.assistant.warmup_steps + config.train.steps
    progress = metrics.Progress(total, first)
    metrics.say("compiling the step: a minute for the shapes world, many for SDXL")
    clock = {}  # since the first step was done: its compilation is no part of the rate

    def report(k, values):
        values = {name: float(v) for name, v in jax.device_get(values).items()}
        if values["nonfinite"]:
            raise UserError(
                f"step {k}: a gradient is not finite (assistant/grad_norm="
                f"{values['assistant/grad_norm']}); the newest checkpoint is from before it: lower "
                "optim.generator_lr or the scales in reward, or set compute.dtype=float32"
            )
        if k % config.train.log_every == 0 or k == total:
            writer.scalars(k, values)
        began = clock.setdefault("began", time.time())
        rate = (k - first - 1) * config.data.batch_size / max(time.time() - began, 1e-9)
        shown = (
            ", ".join(
                f"{name} {values[f'reward/{name}']:.4f}"
                for name in frozen.rewards
                if f"reward/{name}" in values
            )
            or "warm-up"
        )
        progress.update(k, f"{shown}, {rate:.1f} images/s")

    # Loop. Step k's metrics are fetched after step k + 1 is dispatched, so that the devices never
    # wait for the host.
    pending = None
    for k in range(first, total):
        update = warmup_step if k < config.assistant.warmup_steps else train_step
        state, values = update(state, frozen.params, batch_at(k), key)
        if pending is not None:
            report(*pending)
        pending = (k + 1, values)
        if (k + 1) % config.train.save_every == 0 or k + 1 == total:
            report(*pending)  # a state that is not finite is never saved
            pending = None
            checkpoints.save(k + 1, state, metadata)
        if held_out and config.eval_every and (k + 1) % config.eval_every == 0:
            scores, images = measure(state.ema, config.eval.batch_size, 2)
            writer.scalars(k + 1, {f"eval/{name}": value for name, value in scores.items()})
            writer.image(k + 1, "samples", metrics.image_grid(images, 8))
    progress.close()
    writer.close()
    checkpoints.close()

    # After.
    weights.export_pipeline(
        state.ema,
        unet_config=frozen.unet.config,
        reference_folder=frozen.folder,
        output=folder / "diffusers",
        scheduler=weights.one_step_scheduler(frozen.folder),
    )
    after = measure(state.ema, *everything) if held_out else None
    metrics.say(
        f"exported {folder / 'diffusers'}, a folder for diffusers.StableDiffusionXLPipeline.from_pretrained"
    )
    if held_out and first_host:
        metrics.say(before_after.compare(folder, held_out, *after, rewards=list(frozen.rewards)))
        metrics.say(f"pictures of the same noise before and after: {folder / 'samples.png'}")
