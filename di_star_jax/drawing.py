# SPDX-License-Identifier: Apache-2.0
"""Pictures from prompts: what draws, with which weights, in how many steps."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import samplers, sharding
from di_star_jax.diffusion import FewStep, guide
from di_star_jax.errors import UserError
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import scheduler, single, trained
from di_star_jax.pipelines.export import denoiser_in, form_of_run
from di_star_jax.pipelines.family import DENOISER, Family
from di_star_jax.pipelines.folder import (
    Model,
    Options,
    Pipeline,
    abstract_model,
    check_like,
    load_denoiser,
    load_pipeline,
    model_class,
)
from di_star_jax.prompts.tokens import token_batch
from di_star_jax.rewards.reward import Reward
from di_star_jax.samplers import EpsFn
from di_star_jax.storage import buckets, checkpoint, folders, weights
from di_star_jax.storage.files import expand


class Sampling(NamedTuple):
    """How pictures are made.

    sampler: a key of samplers.SAMPLERS.
    timesteps: int, falling.
    guidance_scale: omega; 0 or 1 is no guidance (diffusers' convention), and saves a pass.
    latent_shape: of one sample [h, w, C].
    settings: the sampler's keyword arguments.
    """

    sampler: str
    timesteps: np.ndarray
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    settings: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of one sample: few_step takes fresh noise for every step."""
        if self.sampler == "few_step":
            return (len(self.timesteps), *self.latent_shape)
        return self.latent_shape

    @property
    def noise_axis(self) -> int:
        """The batch's axis of the noise: few_step has its steps first."""
        return 1 if self.sampler == "few_step" else 0

    @property
    def guided(self) -> bool:
        """Whether there is guidance."""
        return self.guidance_scale not in (0.0, 1.0)


def few_step(form: FewStep, latent_shape: tuple[int, int, int]) -> Sampling:
    """How a few-step generator draws."""
    times = np.array(form.timesteps)
    return Sampling("few_step", times, 1.0, latent_shape, {"input": form.input})


def noise(
    seed: int,
    rows: Sequence[int],
    samples: Sequence[int],
    sampling: Sampling,
) -> np.ndarray:
    """Standard normal, of seed, prompt's row and sample alone, whatever the batch.

    Args: rows and samples, B numbers each: of the prompt in its file, and of the image.
    Returns: float32 [B, h, w, C], or [K, B, h, w, C] for few_step.
    """
    key = jax.random.key(seed)
    keys = [
        jax.random.fold_in(jax.random.fold_in(key, row), sample)
        for row, sample in zip(rows, samples)
    ]
    z = jax.vmap(lambda key: jax.random.normal(key, sampling.noise_shape))(jnp.stack(keys))
    return np.asarray(jnp.moveaxis(z, 0, sampling.noise_axis))


@dataclasses.dataclass(frozen=True)
class Drawer:
    """Prompts to pictures on one device: b is its part of the batch.

    Of the pipeline's parameters nothing is used.
    """

    pipeline: Pipeline
    sampling: Sampling

    def images(
        self,
        params: dict,
        token_ids: dict,
        z: jax.Array,
    ) -> jax.Array:
        """Images [b, H, W, 3] in [-1, 1].

        Args: params, by component; z [b, h, w, C], [K, b, h, w, C] for few_step.
        """
        graphdefs = {name: model.graphdef for name, model in self.pipeline.models.items()}
        resolution = z.shape[-2] * self.pipeline.vae_scale
        conditions = self.pipeline.encode_text(params, token_ids, resolution)
        denoiser = self.pipeline.models[DENOISER].network(params[DENOISER])
        eps_fn = self.eps_fn(denoiser, conditions)
        sampler = samplers.SAMPLERS[self.sampling.sampler]
        x0 = sampler(
            eps_fn, z, self.sampling.timesteps, self.pipeline.schedule, **self.sampling.settings
        )
        return jnp.clip(nnx.merge(graphdefs["vae"], params["vae"]).decode(x0), -1.0, 1.0)

    def eps_fn(self, denoiser: Callable, conditions: tuple[Condition, Condition]) -> EpsFn:
        """The denoiser's noise prediction, with guidance if there is any."""
        condition, null = conditions
        omega = self.sampling.guidance_scale

        def plain(x_t, t) -> jax.Array:
            return denoiser(x_t, t, condition)

        def guided(x_t, t) -> jax.Array:
            both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)
            eps = denoiser(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
            eps_cond, eps_null = jnp.split(eps, 2)
            return guide(eps_cond, eps_null, omega)

        return guided if self.sampling.guided else plain


class Scored(NamedTuple):
    """Images with what rewards make of them, as 8-bit files.

    images: [B, H, W, 3] in [-1, 1]. rewards: [B] by name. features: unit embeddings [B, D] of the
    rewards that are CLIPs, by name.
    """

    images: jax.Array
    rewards: dict[str, jax.Array]
    features: dict[str, jax.Array]


def make_draw(drawer: Drawer, mesh: Mesh) -> Callable:
    """Returns the compiled draw(params, token_ids [B, L], z) -> images, whole on every device."""
    return _over_devices(drawer.images, drawer.sampling, mesh)


def make_scored_draw(
    drawer: Drawer,
    rewards: dict[str, Reward],
    mesh: Mesh,
) -> Callable:
    """As `make_draw`, returning `Scored`. Its params hold those of the rewards, by name, too."""

    def draw(params, token_ids, z):
        images = drawer.images(params, token_ids, z)
        scores = {}
        features = {}
        for name, reward in rewards.items():
            of_reward = params["rewards"][name]
            scores[name] = reward.evaluate(of_reward, images, token_ids[name])
            if reward.features is not None:
                features[name] = reward.features(of_reward, images)
        return Scored(images, scores, features)

    return _over_devices(draw, drawer.sampling, mesh)


def _over_devices(
    draw: Callable,
    sampling: Sampling,
    mesh: Mesh,
) -> Callable:
    """draw(params, token_ids, z) of each device's part, as a compiled function of the whole."""
    batch = sharding.batch_spec()
    of_noise = sharding.batch_spec(sampling.noise_axis)

    def whole(params, token_ids, z):
        in_specs = (sharding.params_spec(mesh, params), batch, of_noise)
        return sharding.on_each(mesh, draw, in_specs, batch)(params, token_ids, z)

    return jax.jit(whole, out_shardings=sharding.replicated(mesh))


def draw_prompts(
    loaded: Pipeline,
    sampling: Sampling,
    mesh: Mesh | None = None,
) -> Callable:
    """Returns draw(B prompts, z) -> images float32 [B, H, W, 3] in [-1, 1], a NumPy array.

    Args: mesh, where the pipeline was loaded to; None for one device.
    """
    compiled = make_draw(Drawer(loaded, sampling), mesh or one_device())
    params = {name: model.params for name, model in loaded.models.items()}

    def draw(prompts, z):
        return np.asarray(compiled(params, token_batch(prompts, loaded.tokenizers), z))

    return draw


def one_device() -> Mesh:
    """A mesh of the first device alone."""
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def load(
    source: str,
    which: str,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    reference: str | None = None,
) -> Pipeline:
    """A pipeline, or the reference's with a denoiser of a run's newest checkpoint, or with another.

    Args:
      source: pipeline folder, workdir, folder of a single denoiser, address of one, Hub name, or a
        file of the original layout, here or in a bucket, whose tokenizers and settings are then the
        reference's.
      which: item of the checkpoint: "ema", "generator" or "assistant"; or "initial", the generator
        before the run. Of what has one network, "ema".
      mesh: of devices that share the parameters; None for one device.
      dtype: of parameters and computation.
      reference: pipeline of what a denoiser lacks, a folder, Hub name or such a file; None for the
        one of the run.
    Raises: UserError for what is not there or does not go together.
    """
    if single.is_file(source):
        source, reference = single.as_folder(source, reference), None
    reference = single.as_folder(reference) if reference else None
    shardings = None if mesh is None else functools.partial(sharding.params_sharding, mesh)
    options = Options(dtype=dtype, param_dtype=dtype, shardings=shardings)
    if is_run(source):
        return _load_run(source, which, reference, options)
    if which != "ema":
        raise UserError(
            f"--which={which} with {source}, which is no run and has one network; leave the flag "
            "out, or give the workdir of a run"
        )
    folder = folders.resolve(source)
    if folders.is_model(folder):
        return _load_denoiser(folder, reference, options)
    if reference:
        raise UserError(
            f"--reference_pipeline={reference} with {source}, which is a whole pipeline; leave the "
            "flag out"
        )
    return load_pipeline(folder, options)


def is_run(source: str) -> bool:
    """Whether this is a folder, here or in a bucket, that is neither a pipeline's nor a model's."""
    if single.is_file(source):
        return False
    is_remote = buckets.is_remote(source)
    folder = source if is_remote else expand(source)
    there = buckets.exists(source) if is_remote else folder.is_dir()
    return there and not folders.is_pipeline(folder) and not folders.is_model(folder)


def _load_run(
    source: str,
    which: str,
    reference: str | None,
    options: Options,
) -> Pipeline:
    with checkpoint.existing(source) as checkpoints:
        metadata = checkpoint.located(checkpoints.metadata(checkpoints.latest_step()))
        step, folder = checkpoints.latest_step(), checkpoint.reference_of(metadata, reference)
        loaded = load_pipeline(folder, options)
        denoiser = abstract_model(metadata["denoiser_config"], options)
        if which == "initial":
            params = _initial(source, metadata, loaded.family, denoiser)
        else:
            params = trained.restored(checkpoints, step, which, metadata, folder, options)
    models = loaded.models | {DENOISER: denoiser._replace(params=params)}
    form = None if which == "assistant" else form_of_run(metadata)
    return loaded._replace(models=models, form=form)


def _load_denoiser(
    folder: Path,
    reference: str | None,
    options: Options,
) -> Pipeline:
    """A denoiser that stands alone is a one-step generator's, as DMD2 publishes its own."""
    if not reference:
        raise UserError(
            f"{folder} holds a single model; say with --reference_pipeline=FOLDER which pipeline "
            "its text encoders and VAE are from"
        )
    loaded = load_pipeline(folders.resolve(reference), options)
    models = loaded.models | {
        DENOISER: load_denoiser(folder, loaded.family, loaded.scheduler, options)
    }
    return loaded._replace(models=models, form=loaded.family.one_step)


def _initial(
    source: str,
    metadata: dict,
    family: Family,
    denoiser: Model,
) -> Any:
    """Parameters of the generator that a run began from."""
    if "initial" not in metadata:
        raise UserError(
            f"the checkpoint in {source} does not say what it began from; give the folder of a "
            "pipeline"
        )
    folder = denoiser_in(folders.resolve(metadata["initial"]), family)
    check_like(folder, denoiser.config)
    return weights.load(folder, denoiser.params)


class Asked(NamedTuple):
    """Sampling as a user asks for it; what is None is the pipeline's own.

    timesteps: of few_step, falling. steps, guidance_scale: of the other samplers; 50 and 7.5 for
    SDXL, 50 and 3 for the shapes world. resolution: pixels.
    """

    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    timesteps: tuple[int, ...]
    resolution: int | None

    def check(self) -> None:
        """Raises: UserError for a resolution or timesteps that no sampler can take."""
        pixels = self.resolution
        if pixels is not None and (pixels < 64 or pixels % 64):
            raise UserError(
                f"resolution={pixels} is not a multiple of 64; use {-(-pixels // 64) * 64}"
            )
        if any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:])):
            raise UserError(
                f"timestep={list(self.timesteps)}, expected falling numbers; 999, 749, 499, 249 "
                "for DMD2's four steps"
            )


def sampling_of(asked: Asked, loaded: Pipeline) -> Sampling:
    """What is asked for, of a pipeline. Raises: UserError for a setting that would not be used."""
    is_generator = asked.timesteps or loaded.form
    sampler = asked.sampler or ("few_step" if is_generator else _own_sampler(loaded.scheduler))
    _, denoiser = model_class(loaded.models[DENOISER].config)
    if not asked.resolution and denoiser.sample_size is None:
        where = loaded.folder / loaded.family.parts[DENOISER].folder / "config.json"
        raise UserError(f"{where} has no sample_size; give --resolution")
    size = asked.resolution // loaded.vae_scale if asked.resolution else denoiser.sample_size
    shape = (size, size, denoiser.in_channels)
    if sampler == "few_step":
        form = _form(asked, loaded)
        _check_few_step(asked, form.timesteps)
        scheduler.check(loaded.scheduler, sampler)
        return few_step(form, shape)
    if asked.timesteps:
        raise UserError(
            f"--timestep={asked.timesteps[0]} with --sampler={sampler}, which takes --steps; leave "
            "one of the two out"
        )
    teacher, guidance_scale = loaded.family.teacher, asked.guidance_scale
    times, settings = scheduler.spacing(loaded.scheduler, sampler, asked.steps or teacher.steps)
    if guidance_scale is None:
        guidance_scale = scheduler.guidance_scale_of(loaded.scheduler, teacher.guidance_scale)
    return Sampling(sampler, times, guidance_scale, shape, settings)


def _form(asked: Asked, loaded: Pipeline) -> FewStep:
    """Of the steps that are asked for; several begin at the noise itself."""
    form = loaded.form or loaded.family.one_step
    times = asked.timesteps or form.timesteps
    return FewStep(times, form.input if len(times) == 1 else "noise")


def _check_few_step(asked: Asked, times: Sequence[int]) -> None:
    """Raises: UserError for steps or guidance other than a generator's own."""
    if asked.steps not in (None, len(times)):
        raise UserError(
            f"--steps={asked.steps}, but the generator takes {len(times)} at {list(times)}; leave "
            "it out, or give --timestep, or another --sampler"
        )
    if asked.guidance_scale not in (None, 0.0, 1.0):
        raise UserError(
            f"--guidance_scale={asked.guidance_scale:g}, but few_step has no guidance; leave it "
            "out, or give another --sampler"
        )


def _own_sampler(file: scheduler.SchedulerFile) -> str:
    """The sampler that scheduler_config.json names, or euler where it is not ported."""
    name = file.config.get("_class_name")
    if name not in scheduler.OWN:
        logging.warning(
            "%s names %s, which is not ported: drawing with --sampler=euler", file.file, name
        )
    return scheduler.OWN.get(name, "euler")
