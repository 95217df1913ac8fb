# SPDX-License-Identifier: Apache-2.0
"""A training step and its parts without weights, to be compiled or measured.

The devices that they are compiled for need not be here.
"""

import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from di_star_jax import assembly, drawing, sharding, step
from di_star_jax.assembly import Parts
from di_star_jax.cost import flops, gpus, plan, slices
from di_star_jax.diffusion import Schedule
from di_star_jax.errors import UserError
from di_star_jax.pipelines import text_cache
from di_star_jax.pipelines.family import DENOISER, TEXT
from di_star_jax.pipelines.folder import Model, Pipeline, abstract_model, model_class
from di_star_jax.prompts.tokens import token_batch
from di_star_jax.rewards import REWARDS


def topology_devices(name: str) -> list:
    """The devices of a TPU slice, or of several, or of a host's GPUs, from the compiler alone.

    Args: name, as "v5e:4x4", "v5p:2x2x1" or "2xv5e:4x4" (see `cost.slices`), or "h100:8".
    Raises: UserError for an unknown name, and where the compiler is not installed.
    """
    on_gpus = gpus.parse(name)
    if on_gpus:
        return gpus.devices(on_gpus)
    wanted = slices.parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed; pip install -e '.[tpu]' (no TPU is needed)"
        )
    # libtpu would look for a TPU and for the machine's metadata server, and wait.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=wanted.accelerator_type,
    )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options = {"num_slices": wanted.count} if wanted.count > 1 else {}
    if wanted.generation == "v4":  # its two cores as one device, as on a real one
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{wanted.generation}:{wanted.shape}", **options
        )
    except Exception as error:  # whatever libtpu says of a shape it does not have
        raise UserError(
            f"topology={name!r} is not one that libtpu knows ({str(error).splitlines()[0][:150]}); "
            f"try {slices.EXAMPLES}"
        ) from None
    return found.devices


class Work(NamedTuple):
    """Something to compile or measure: a jitted function and its abstract arguments on a mesh.

    The first argument is donated, and is the first result, where `donates`.
    """

    fn: Any
    args: tuple
    mesh: Mesh
    donates: bool = False


def _parts(config, mesh: Mesh) -> Parts:
    """The run's models, which are known by their config.json alone.

    Raises: UserError where weights of the reference or a reward are neither a folder nor a
      published model's name.
    """
    known = plan.known_models(config)
    if known.family is None or known.unknown:
        raise UserError(
            f"{known.unknown[0]} is neither a folder nor a model whose sizes are known; give a "
            "folder"
        )
    options = assembly.model_options(config, mesh)
    models = {
        name: abstract_model(found, options.get(name, options["text"]))
        for name, found in known.networks.items()
    }
    rewards = {}
    for name, found in known.rewards.items():
        reward = REWARDS[name].abstract(found, options["reward"])
        rewards[name] = reward._replace(params=options["reward"].placed(reward.params))
    tokenizers = {
        name: _blank(models[encoder])
        for name, encoder in known.family.tokenizers.items()
        if encoder in models
    }
    ones = jnp.ones(1000)  # only its shape counts here
    pipeline = Pipeline(Path(), known.family, models, tokenizers, Schedule(ones, ones))
    pipeline = _without_encoders(pipeline) if config.data.cache else pipeline
    return assembly.with_adapters(config, Parts(pipeline, rewards), options[DENOISER])


def _without_encoders(pipeline: Pipeline) -> Pipeline:
    """The pipeline as with a cache of its prompts, whose states are all 1."""
    encoders = pipeline.family.tokenizers.values()
    models = pipeline.models
    graphdefs = {name: models[name].graphdef for name in encoders}
    params = {name: sharding.abstract(models[name].params) for name in encoders}
    encode = functools.partial(text_cache.encode, pipeline.family, graphdefs)
    text = jax.eval_shape(encode, params, token_batch([""], pipeline.tokenizers))
    return pipeline._replace(
        models={name: model for name, model in models.items() if name not in encoders},
        of_empty=jax.tree.map(lambda x: np.ones(x.shape, x.dtype), text),
    )


def _blank(encoder: Model) -> Callable[[list[str]], np.ndarray]:
    """A tokenizer whose token ids are all 1, as many as a text encoder takes."""
    _, settings = model_class(encoder.config)
    return lambda texts: np.ones((len(texts), settings.tokens), np.int32)


def _token_ids(
    config,
    parts: Parts,
    mesh: Mesh,
) -> dict:
    batch = config.data.batch_size
    one = token_batch([""], parts.pipeline.tokenizers)
    if parts.pipeline.of_empty is not None:
        one = {TEXT: parts.pipeline.of_empty}
    one |= {name: reward.shapes for name, reward in parts.rewards.items()}
    return jax.tree.map(lambda x: _array(mesh, (batch, *x.shape[1:]), x.dtype), one)


def _array(
    mesh: Mesh,
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> jax.ShapeDtypeStruct:
    """Of a batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _latents(
    config,
    parts: Parts,
    mesh: Mesh,
) -> jax.ShapeDtypeStruct:
    return _array(mesh, (config.data.batch_size, *parts.latent_shape(config.data.resolution)))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return sharding.abstract(key, sharding.replicated(mesh))


def train_work(config, mesh: Mesh) -> Work:
    """The whole training step."""
    parts, optimizers = _parts(config, mesh), assembly.optimizers_of(config)
    state = assembly.abstract_state(parts.models[DENOISER], optimizers, mesh)
    method = assembly.method_of(config, parts)
    fn = step.make_train_step(method, optimizers, mesh)
    ids = (_token_ids(config, parts, mesh),) * step.prompt_batches(method.settings)
    args = (state, parts.frozen(), ids, _key(mesh))
    return Work(assembly.jit_step(fn, state, mesh), args, mesh, donates=True)


def sample_work(config, mesh: Mesh) -> Work:
    """Prompts to pictures by the generator."""
    parts = _parts(config, mesh)
    method = assembly.method_of(config, parts)
    sampling = drawing.few_step(method.settings.generator, method.settings.latent_shape)
    drawer = drawing.Drawer(parts.pipeline, sampling)
    params = {name: model.params for name, model in parts.models.items()}
    shape = (len(sampling.timesteps), config.data.batch_size, *sampling.latent_shape)
    places = NamedSharding(mesh, sharding.batch_spec(sampling.noise_axis))
    noise = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places)
    token_ids = _token_ids(config, parts._replace(rewards={}), mesh)  # nothing is scored
    return Work(drawing.make_draw(drawer, mesh), (params, token_ids, noise), mesh)


def denoiser_work(config, mesh: Mesh) -> Work:
    """The denoiser forward and backward to its float32 parameters."""
    parts, batch = _parts(config, mesh), config.data.batch_size
    method = assembly.method_of(config, parts)
    optimizers = assembly.optimizers_of(config)
    whole = parts.models[DENOISER]._replace(lora=None)
    params = assembly.abstract_state(whole, optimizers, mesh).generator
    specs = sharding.params_spec(mesh, params)
    local = sharding.abstract((parts.frozen(), _token_ids(config, parts, mesh)))
    condition, _ = jax.eval_shape(method.encode_text, *local)
    condition = sharding.abstract(condition, sharding.batch_sharding(mesh))

    def gradient(
        params: Any,
        x_t: jax.Array,
        t: jax.Array,
        condition: Any,
    ) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(method.denoiser(params)(x_t, t, condition) ** 2) / batch

        return sharding.sum_gradients(jax.grad(loss)(params), specs)

    one = sharding.batch_spec()
    fn = jax.jit(sharding.on_each(mesh, gradient, (specs, one, one, one), specs))
    t = _array(mesh, (batch,), jnp.int32)
    return Work(fn, (params, _latents(config, parts, mesh), t, condition), mesh)


def vae_work(config, mesh: Mesh) -> Work:
    """The decoder forward and backward to its latents."""
    parts = _parts(config, mesh)
    decode = assembly.decoder(parts)

    def total(latents: jax.Array, params: dict) -> jax.Array:
        return jnp.sum(decode(params, latents) ** 2)

    return _of_latents(total, parts.frozen(), [_latents(config, parts, mesh)], mesh)


def reward_work(config, mesh: Mesh) -> Work:
    """Decoder and reward forward and backward to the latents."""
    parts = _parts(config, mesh)
    reward = assembly.reward_of_latents(config, parts)

    def total(
        latents: jax.Array,
        params: dict,
        token_ids: dict,
        crop: jax.Array,
    ) -> jax.Array:
        return jnp.sum(reward(params, latents, token_ids, crop)[0])

    crop = _array(mesh, (config.data.batch_size, 2))
    batch = [_latents(config, parts, mesh), _token_ids(config, parts, mesh), crop]
    return _of_latents(total, parts.frozen(), batch, mesh)


def _of_latents(
    total: Callable,
    params: dict,
    batch: list,
    mesh: Mesh,
) -> Work:
    """The gradient of total(latents, params, ...) by device. Args: batch, latents first."""

    def gradient(
        params: dict,
        latents: jax.Array,
        *others: Any,
    ) -> jax.Array:
        return jax.grad(total)(latents, params, *others)

    one = sharding.batch_spec()
    specs = (sharding.params_spec(mesh, params), *[one] * len(batch))
    return Work(jax.jit(sharding.on_each(mesh, gradient, specs, one)), (params, *batch), mesh)


WORK = {
    "train": train_work,
    "sample": sample_work,
    "denoiser": denoiser_work,
    "vae": vae_work,
    "reward": reward_work,
}


# What changes neither the model's arithmetic nor its result: one image, nothing recomputed.
_PLAIN = {
    "data.batch_size": 1,
    "compute.microbatches": 1,
    "compute.loop_networks": False,
    "compute.remat_denoiser": "none",
    "compute.remat_vae": "none",
    "compute.remat_reward": "none",
    "compute.attention": "xla",
    "decode.slice": 0,
}


def model_flop(
    what: str,
    config,
    device: jax.Device,
) -> float:
    """Model FLOP of one sample: one pass each, however the config saves memory."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(_PLAIN)
    work = WORK[what](config, sharding.make_mesh(1, 1, devices=[device]))
    return flops.count(work.fn, *work.args)


class Compiled(NamedTuple):
    """A compiled function and what compiling told.

    seconds: of trace, lower, compile; memory: bytes a device by purpose; traffic: see
    `flops.collectives`.
    """

    run: Any
    seconds: dict[str, float]
    memory: dict[str, int]
    traffic: dict


def compile_work(
    work: Work,
    config,
    *,
    effort: float,
) -> Compiled:
    """Traces, lowers and compiles; nothing runs.

    Args: effort, of XLA, from -1.0 to 1.0; 0.0 is its own. Raises: UserError where it does not fit
      the devices.
    """
    device = work.mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    began = time.time()
    traced = work.fn.trace(*work.args)
    traced_at = time.time()
    lowered = traced.lower(lowering_platforms=(platform,))
    lowered_at = time.time()
    try:
        run = lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, config, device.device_kind) from None
    seconds = {
        "trace": traced_at - began,
        "lower": lowered_at - traced_at,
        "compile": time.time() - lowered_at,
    }
    return Compiled(run, seconds, _memory(run), flops.collectives(traced.jaxpr))


def _memory(compiled: Any) -> dict[str, int]:
    """Bytes a device by purpose; {} where the compiler does not say."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return {}
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "peak": sizes.peak_memory_in_bytes,
    }


def held(memory: dict[str, int]) -> int:
    """Bytes that a device must have. Args: memory, as of `Compiled`; 0 where that says nothing.

    Temporaries are one buffer, as large as it gets, beside arguments.
    """
    return memory.get("arguments", 0) + memory.get("temporaries", 0)


def _too_large(
    error: Exception,
    config,
    device_kind: str,
) -> Exception:
    """A UserError for the compiler's out-of-memory message, any other error as it is."""
    sizes = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", str(error))
    if not sizes:
        return error
    unit = {"G": 2**30 / 1e9, "M": 2**30 / 1e12}
    need, have = (float(sizes[i]) * unit[sizes[i + 1]] for i in (1, 3))
    return plan.out_of_memory(need, have, device_kind, config)
