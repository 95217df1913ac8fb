# SPDX-License-Identifier: Apache-2.0
"""A config as records: networks, parameters, settings, optimizers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import objectives, sharding, step
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.gradients import Method, Settings
from di_star_jax.models import int8, lora
from di_star_jax.models.lora import Lora
from di_star_jax.models.tiny_vae import decoder_alone
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import adapters, text_cache
from di_star_jax.pipelines.export import denoiser_in, form_of, in_workdir
from di_star_jax.pipelines.family import DENOISER, TEXT, TINY_VAE
from di_star_jax.pipelines.folder import (
    Model,
    Options,
    Pipeline,
    abstract_model,
    check_like,
    check_pipeline,
    check_tiny_vae,
    load_model,
    load_pipeline,
    model_class,
    read_config,
)
from di_star_jax.pipelines.text_cache import TextCache
from di_star_jax.prompts.tokens import token_batch
from di_star_jax.rewards import REWARDS, load_rewards, load_tokenizers, rewards_used, scales_of
from di_star_jax.rewards.reward import Reward
from di_star_jax.rewards.views import PARTIAL, VIEWS, in_slices
from di_star_jax.samplers import generator_form
from di_star_jax.storage import folders, weights


class Start(NamedTuple):
    """What a generator begins as. folder: of the weights. form: it was trained for, if known."""

    folder: Path
    form: FewStep | None


class Parts(NamedTuple):
    """The models of a run, whose parameters may be abstract: the reference's, and its rewards.

    cache: of prompts, in place of the text encoders. start: of the generator, where it is known.
    base: frozen, of a generator whose adapters learn, where it is not the reference's.
    frozen_adapters: {FROZEN: tree} that this base is made of, beside the reference's; or None.
    """

    pipeline: Pipeline
    rewards: dict[str, Reward]
    cache: TextCache | None = None
    start: Start | None = None
    base: Any = None
    frozen_adapters: Any = None

    @property
    def models(self) -> dict[str, Model]:
        """By component; the denoiser is the reference's."""
        return self.pipeline.models

    @property
    def graphdefs(self) -> dict[str, nnx.GraphDef]:
        """Of the models."""
        return {name: model.graphdef for name, model in self.models.items()}

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[h, w, C] of one sample. Args: pixels."""
        side = resolution // self.pipeline.vae_scale
        return side, side, model_class(self.models[DENOISER].config)[1].in_channels

    def frozen(self) -> dict:
        """Parameters that a run never changes.

        Those of the reference, the VAE, the text encoders and, by name, the rewards; and the
        generator's base, where it has its own, or what makes it of the reference's.
        """
        params = {name: model.params for name, model in self.models.items()}
        params["reference"] = params.pop(DENOISER)
        if self.base is not None:
            params["generator"] = self.base
        if self.frozen_adapters is not None:
            params["generator_adapters"] = self.frozen_adapters
        return params | {"rewards": {name: r.params for name, r in self.rewards.items()}}

    def tokenize(self, prompts: list[str]) -> dict[str, Any]:
        """What text encoders and rewards make of B prompts: trees of NumPy arrays [B, ...]."""
        if self.cache is None:
            ids = token_batch(prompts, self.pipeline.tokenizers)
        else:
            shapes = {name: reward.shapes for name, reward in self.rewards.items()}
            ids = self.cache.batch(prompts, shapes)
        others = {name: reward for name, reward in self.rewards.items() if name not in ids}
        return ids | {name: reward.tokenize(prompts) for name, reward in others.items()}


def load_parts(
    config,
    mesh: Mesh,
    cache: TextCache | None = None,
) -> Parts:
    """Reads reference pipeline and rewards, sharded over the mesh, in the compute dtype.

    Args: cache, in place of the text encoders.
    """
    options = model_options(config, mesh)
    folder = folders.resolve(config.weights.reference)
    check_teacher(config.weights.reference, folder)
    tiny = load_tiny_vae(config, folder, options)
    of_empty = cache.batch([""], {})[TEXT] if cache else None
    reference = load_pipeline(folder, options["text"], options, of_empty)
    reference = reference._replace(models=reference.models | tiny)
    tokenizer = config.weights.reward_tokenizer
    rewards = load_rewards(reward_sources(config), tokenizer, options["reward"])
    start = start_of(config, reference)
    return with_adapters(config, Parts(reference, rewards, cache, start), options[DENOISER])


def load_tiny_vae(
    config,
    reference: Path,
    options: Mapping[str, Options],
) -> dict[str, Model]:
    """The decoder of decode.view="tiny" by its name; {} for other views.

    Args: reference, folder of the pipeline. Raises: UserError as of `check_tiny_vae`.
    """
    if not is_tiny(config):
        return {}
    folder = folders.resolve(config.weights.tiny_vae)
    found = folders.read_config(folder)
    check_tiny_vae(found, read_config(reference, "vae"), str(folder / "config.json"))
    return {
        TINY_VAE: load_model(folder, options[TINY_VAE], config=found, arrange=decoder_alone),
    }


def is_tiny(config) -> bool:
    """Whether the rewards see what a tiny decoder makes of x0."""
    return config.decode.view == "tiny"


def seen_pixels(config) -> int:
    """Of the image that the rewards see in training, along one side."""
    part = config.decode.view in PARTIAL
    return config.decode.resolution if part else config.data.resolution


def with_adapters(
    config,
    parts: Parts,
    options: Options,
) -> Parts:
    """The parts of a run whose adapters learn, with the generator's base; any other's as they are.

    Args: options, of the denoiser. Raises: UserError for a rank or targets that do not fit it, and
      a base of another kind.
    """
    low_rank = lora_of(config)
    if low_rank is None:
        return parts
    denoiser = parts.models[DENOISER]._replace(lora=low_rank)
    lora.abstract(denoiser.params, low_rank)
    if low_rank.int8:
        denoiser = denoiser._replace(params=int8.rounded(denoiser.params))
    base = frozen_adapters = None
    file = shared_base(config)
    if file is not None:
        found, rank = adapters.as_tree(adapters.read(file, denoiser.config), denoiser.params)
        denoiser = denoiser._replace(lora=low_rank._replace(frozen_rank=rank))
        shapes = sharding.abstract(found, dtype=jnp.dtype(config.compute.dtype))
        places = None if options.shardings is None else options.shardings(shapes)
        frozen_adapters = jax.device_put(
            jax.tree.map(lambda x, like: x.astype(like.dtype), found, shapes), places
        )
    elif has_own_base(config):
        options = dataclasses.replace(options, param_dtype=jnp.dtype(config.compute.dtype))
        base = abstract_model(denoiser.config, options).params
        if parts.start is not None:
            check_like(parts.start.folder, denoiser.config)
            base = weights.load(parts.start.folder, base)
        base = int8.rounded(base) if low_rank.int8 else base
    pipeline = parts.pipeline._replace(models=parts.models | {DENOISER: denoiser})
    return parts._replace(pipeline=pipeline, base=base, frozen_adapters=frozen_adapters)


def lora_of(config) -> Lora | None:
    """What learns in place of whole networks; None where these do."""
    given = config.lora
    if not given.rank:
        return None
    return Lora(**given.to_dict() | {"targets": tuple(given.targets)})


def has_own_base(config) -> bool:
    """Whether a generator's adapters are learnt to another network than the reference."""
    own = config.weights.generator not in ("", config.weights.reference)
    return bool(config.lora.rank and config.lora.generator and own and not shared_base(config))


def shared_base(config) -> Path | None:
    """The file of adapters of which a generator's base is made, beside the reference's denoiser.

    Of a generator whose adapters learn, and whose weights.generator was such a file.
    """
    given, low_rank = config.weights.generator, config.lora
    if not (given and low_rank.rank and low_rank.generator):
        return None
    folder = Path(given)
    if not adapters.is_merged(folder):
        return None
    reference = folders.resolve(config.weights.reference)
    family, _ = check_pipeline(reference)
    return adapters.beside(folder, denoiser_in(reference, family))


def check_teacher(name: str, folder: Path) -> None:
    """Raises: UserError where the reference draws in few steps. Args: name, as it was given."""
    family, scheduler = check_pipeline(folder)
    form = form_of(scheduler.config, family.one_step)
    if form:
        steps = len(form.timesteps)
        raise UserError(
            f"weights.reference={name} is a generator of {steps} step{'s' * (steps > 1)} (its "
            "scheduler says so) and has no scores to learn from; give the pipeline of its teacher"
        )


def start_of(config, reference: Pipeline) -> Start:
    """Where the generator's first weights are: a denoiser's folder, or what a run has exported.

    Raises: UserError for a pipeline of another family, and for one that was trained for another
      form than the config asks for.
    """
    given = folders.resolve(config.weights.generator or config.weights.reference)
    denoiser = denoiser_in(given, reference.family)
    folder = in_workdir(given)
    if not folders.is_pipeline(folder):
        return Start(denoiser, None)
    family, scheduler = check_pipeline(folder)
    if family is not reference.family:
        raise UserError(
            f"weights.generator={config.weights.generator} is of {family.name}, the reference is "
            f"of {reference.family.name}; give a generator of the reference's kind"
        )
    form = form_of(scheduler.config, family.one_step)
    if form and generator_form(config.generator, form) != form:
        raise UserError(
            f"weights.generator={config.weights.generator} was trained for times {form.timesteps} "
            f"and {form.input} as input, which the fields of generator are not; leave them out, or "
            f"give {denoiser} to begin another form from it"
        )
    return Start(denoiser, form)


def open_text_cache(config, prompts: dict[str, list[str]]) -> TextCache:
    """The cache of data.cache. Args: prompts that it must have, by their option.

    Raises: UserError where it does not fit the config.
    """
    cache = text_cache.open_cache(config.data.cache)
    reference = folders.resolve(config.weights.reference)
    text_cache.check_same(cache, reference, config.compute.dtype)
    for option, texts in prompts.items():
        text_cache.check_prompts(cache, option, texts)
    tokenizers = load_tokenizers(reward_sources(config), config.weights.reward_tokenizer)
    text_cache.check_rewards(cache, prompts["data.prompts"], tokenizers)
    return cache


def reward_sources(config) -> dict[str, str]:
    """Folder or Hub name of the weights of each reward that a run uses."""
    return {
        name: config.weights[name] if name in config.weights else REWARDS[name].weights
        for name in rewards_used(scales_of(config.reward), config.eval.metrics)
    }


def kernel_of(config, platform: str) -> str:
    """The attention kernel that a config asks for, "auto" by platform: "tpu", "gpu" or "cpu"."""
    by_platform = {"tpu": "splash", "gpu": "cudnn", "cpu": "xla"}
    asked = config.compute.attention
    return by_platform[platform] if asked == "auto" else asked


def model_options(config, mesh: Mesh) -> dict[str, Options]:
    """How components run and are held: in the compute dtype, over the mesh.

    Returns: of the denoiser, both VAEs, the rewards and, under "text", all text encoders.
    """
    compute = config.compute
    common = Options(
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.dtype(compute.dtype),
        kernel=kernel_of(config, mesh.devices.flat[0].platform),
        shardings=functools.partial(sharding.params_sharding, mesh),
    )
    remat = {
        DENOISER: compute.remat_denoiser,
        "vae": compute.remat_vae,
        TINY_VAE: compute.remat_vae,
        "reward": compute.remat_reward,
        "text": "none",
    }
    options = {part: dataclasses.replace(common, remat=policy) for part, policy in remat.items()}
    param_dtype = reference_dtype(config)
    options[DENOISER] = dataclasses.replace(options[DENOISER], param_dtype=param_dtype)
    return options


def reference_dtype(config) -> jnp.dtype:
    """In which the reference is kept: that of the scores, which are all that it gives."""
    return jnp.promote_types(config.compute.dtype, scores_dtype(config))


def scores_dtype(config) -> jnp.dtype:
    """In which assistant and reference predict for the generator's loss.

    "auto" is float32 where nothing guides the reference: there the predictions are so close that
    their difference in bfloat16 is mostly rounding.
    """
    asked = config.compute.scores
    if asked != "auto":
        return jnp.dtype(asked)
    objective = config.objective
    guided = objective.omega != 1.0 and objective.name not in objectives.OUTSIDE
    return jnp.dtype(config.compute.dtype if guided else "float32")


def method_of(config, parts: Parts) -> Method:
    """The step's networks and settings."""
    resolution = config.data.resolution
    return Method(
        denoiser=parts.models[DENOISER].network,
        encode_text=text_encoder(parts, resolution),
        reward=reward_of_latents(config, parts),
        schedule=parts.pipeline.schedule,
        settings=settings_of(config, parts.latent_shape(resolution), one_step_of(parts)),
        score_denoiser=score_denoiser(config, parts),
        bases=functools.partial(bases_of, parts.models[DENOISER].lora),
    )


def bases_of(low_rank: Lora | None, frozen: dict) -> tuple[Any, Any]:
    """`Method.bases`: the assistant's is the reference, and so is a generator's without its own.

    Or the reference and frozen adapters.
    """
    if low_rank is None:
        return None, None
    reference = frozen["reference"]
    own = frozen.get("generator", reference)
    if "generator_adapters" in frozen:
        own = reference | frozen["generator_adapters"]
    return own if low_rank.generator else None, reference if low_rank.assistant else None


def one_step_of(parts: Parts) -> FewStep:
    """The generator's form where the config does not say it."""
    known = parts.start and parts.start.form
    return known or parts.pipeline.family.one_step


def score_denoiser(config, parts: Parts) -> Callable | None:
    """`Method.score_denoiser`; None where it is the one that learns."""
    dtype = scores_dtype(config)
    if dtype == jnp.dtype(config.compute.dtype):
        return None
    kernel = kernel_of(config, jax.default_backend())
    options = Options(dtype=dtype, remat=config.compute.remat_denoiser, kernel=kernel)
    denoiser = parts.models[DENOISER]
    model = abstract_model(denoiser.config, options)._replace(lora=denoiser.lora)

    def bind(params: Any) -> Callable[..., jax.Array]:
        network = model.network(params)

        def predict(x_t, t, condition) -> jax.Array:
            # Three passes of bfloat16 on a TPU, whose products of float32 are else of one.
            with jax.default_matmul_precision("high"):
                return network(x_t, t, condition)

        return predict

    return bind


def text_encoder(parts: Parts, resolution: int) -> Callable:
    """(frozen, token_ids) -> (Condition, null Condition) of images of so many pixels."""

    def encode_text(frozen, token_ids) -> tuple[Condition, Condition]:
        return parts.pipeline.encode_text(frozen, token_ids, resolution)

    return encode_text


def decoder(parts: Parts) -> Callable:
    """(frozen, latents [b, h, w, 4]) -> images [b, H, W, 3], about in [-1, 1], for the rewards."""
    name = TINY_VAE if TINY_VAE in parts.models else "vae"
    graphdef = parts.graphdefs[name]

    def decode(frozen, latents) -> jax.Array:
        return nnx.merge(graphdef, frozen[name]).decode(latents)

    return decode


def reward_of_latents(config, parts: Parts) -> Callable:
    """`Method.reward` of the rewards that a config trains on or measures."""
    decode = decoder(parts)
    view = VIEWS[config.decode.view]
    size = config.decode.resolution // parts.pipeline.vae_scale
    rewards = parts.rewards
    scales = {name: scale for name, scale in scales_of(config.reward).items() if scale}

    def reward(frozen, x0, token_ids, crop):
        def score(x0, token_ids):
            image = decode(frozen, x0)
            each = {}
            total = jnp.zeros(len(x0))
            for name, reward in rewards.items():
                each[name] = reward.reward(frozen["rewards"][name], image, token_ids[name])
            for name, scale in scales.items():
                total += scale * each[name]
            return total, each

        of_rewards = {name: token_ids[name] for name in rewards}
        return in_slices(score, config.decode.slice)(view(x0, crop, size), of_rewards)

    return reward


def settings_of(
    config,
    latent_shape: tuple[int, int, int],
    one_step: FewStep,
) -> Settings:
    """The plain values that the step needs of a config. Args: one_step, as of `one_step_of`."""
    objective = config.objective
    scheme = {"x0": "separate", "x_t": "shared"}[config.assistant.sharing]
    # The limit is of a loss that is a mean over a sample's elements.
    numbers = math.prod(latent_shape)
    of_generator = numbers if objective.reduction == "sum" else 1
    return Settings(
        objective=objective.name,
        omega=objective.omega,
        constants=objectives.Constants(
            **{name: objective[name] for name in objectives.Constants._fields}
        ),
        weighting=objective.weighting,
        reduction=objective.reduction,
        generator_times=(objective.t_min, objective.t_max),
        assistant_times=(config.assistant.t_min, config.assistant.t_max),
        assistant_updates=config.assistant.updates,
        scheme="looped" if config.compute.loop_networks else scheme,
        generator=generator_form(config.generator, one_step),
        latent_shape=latent_shape,
        ema_half_life=config.ema.half_life_samples,
        assistant_first=config.assistant.first,
        warmup_steps=config.assistant.warmup_steps,
        clip_norms=(config.optim.clip_norm * of_generator, config.optim.clip_norm * numbers),
        balance=config.reward.balance,
        microbatches=config.compute.microbatches,
    )


def optimizers_of(config) -> step.Optimizers:
    """Both networks' optimizers."""
    optim = config.optim
    settings = step.AdamW(**{name: optim[name] for name in step.AdamW._fields})
    return step.Optimizers(
        generator=step.adamw(optim.generator_lr, settings),
        assistant=step.adamw(optim.assistant_lr, settings),
    )


def abstract_state(
    denoiser: Model,
    optimizers: step.Optimizers,
    mesh: Mesh,
) -> step.TrainState:
    """The state's shapes and shardings. Args: denoiser, the generator's model."""
    params = [learnt_of(denoiser, name) for name in ("generator", "assistant")]
    state = jax.eval_shape(lambda g, a: step.init_state(g, a, optimizers), *params)
    return sharding.abstract(state, sharding.params_sharding(mesh, state))


def learnt_of(denoiser: Model, name: str) -> Any:
    """Shapes of what a network learns, float32: its adapters, or all of it.

    Args: name, generator or assistant.
    """
    if denoiser.lora is not None and denoiser.lora.adapts(name):
        return lora.abstract(denoiser.params, denoiser.lora)
    return sharding.abstract(denoiser.params, dtype=jnp.float32)


def jit_step(
    train_step: step.Step,
    state: step.TrainState,
    mesh: Mesh,
) -> Callable:
    """A step compiled with its state donated, and left where it was.

    Args: state, for its shardings; may be abstract.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
