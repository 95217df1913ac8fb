# SPDX-License-Identifier: Apache-2.0
"""A training step and its parts without weights, to be compiled for devices that need not be here,
or measured.
"""

import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from di_star_jax import assembly, drawing, sharding, step
from di_star_jax.cost import flops, plan
from di_star_jax.diffusion import Schedule
from di_star_jax.errors import UserError
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.rewards import REWARDS

GENERATIONS = {
    "v5e": ("v5litepod", 1),
    "v5p": ("v5p", 2),
    "v6e": ("v6e", 1),
}  # Cloud's name, cores per chip


def topology_devices(name: str) -> list:
    """The devices of a TPU slice, from the TPU compiler alone.

    Args: name, as "v5e:4x4", "v6e:2x4" or "v5p:2x2x1".
    Raises: UserError for an unknown name, and where libtpu is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"topology={name!r}, expected a generation and its chips, e.g. v5e:4x4, v6e:2x4 or v5p:2x2x1"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed; pip install -e '.[tpu]' (no TPU is needed)"
        )
    chips = math.prod(int(n) for n in shape.split("x"))
    cloud, cores = GENERATIONS[generation]
    # libtpu would look for a TPU and for the machine's metadata server, and wait.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=f"{cloud}-{chips * cores}",
    )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever libtpu says of a shape it does not have
        raise UserError(
            f"topology={name!r} is not one that libtpu knows ({str(error).splitlines()[0][:150]}); "
            "try v5e:4x4, v6e:2x4 or v5p:2x2x1"
        ) from None


class Work(NamedTuple):
    """Something to compile or measure: a jitted function, its abstract arguments with their
    shardings, and their mesh.

    The first argument is donated, and is the first result, where `donates`.
    """

    fn: Any
    args: tuple
    mesh: Mesh
    donates: bool


def _frozen(config, mesh: Mesh) -> assembly.Frozen:
    """The run's functions over models that are known by their config.json alone.

    Raises: UserError where weights of the reference or a reward are neither a folder nor a
      published model's name.
    """
    known, unknown = plan.model_configs(config)
    if unknown:
        raise UserError(
            f"{unknown[0]} is neither a folder nor a model whose sizes are known; give a folder"
        )
    options = assembly.model_options(config, mesh.devices.flat[0].platform)
    dtype = jnp.dtype(config.compute.dtype)

    def placed(model):
        return model._replace(
            params=jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
                model.params,
                sharding.params_sharding(mesh, model.params),
            )
        )

    models = {
        name: placed(pipeline.abstract_model(known[name], **options[name]))
        for name in assembly.PARTS
        if name in known
    }
    rewards = {
        name: placed(REWARDS[name].file.abstract(found, **options["reward"]))
        for name, found in known.items()
        if name not in assembly.PARTS
    }
    schedule = Schedule(*2 * (jnp.ones(1000),))  # only its shape counts here
    return assembly.assemble(config, models, rewards, schedule, tokenizers={}, folder=None)


def _token_ids(config, frozen: assembly.Frozen, mesh: Mesh) -> dict:
    names = {"tokenizer": frozen.configs["text_encoder"]}
    if "text_encoder_2" in frozen.configs:
        names["tokenizer_2"] = frozen.configs["text_encoder_2"]
    batch = config.data.batch_size
    ids = {
        name: _array(mesh, (batch, text.get("max_position_embeddings", 77)), jnp.int32)
        for name, text in names.items()
    }
    return ids | {
        name: jax.tree.map(lambda x: _array(mesh, (batch, *x.shape[1:]), x.dtype), reward.shapes)
        for name, reward in frozen.rewards.items()
    }


def _array(mesh: Mesh, shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    """Of a batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def train_work(config, mesh: Mesh) -> Work:
    """The whole training step."""
    frozen, opts = _frozen(config, mesh), assembly.optimizers(config)
    state = assembly.abstract_state(frozen.unet, opts, mesh)
    fn = step.make_train_step(
        frozen.networks,
        assembly.settings_of(config, frozen.latent_shape),
        frozen.schedule,
        *opts,
        mesh,
    )
    return Work(
        assembly.jit_step(fn, state, mesh),
        (state, frozen.params, _token_ids(config, frozen, mesh), _key(mesh)),
        mesh,
        donates=True,
    )


def sample_work(config, mesh: Mesh) -> Work:
    """Prompts to pictures by the generator, and their reward."""
    frozen = _frozen(config, mesh)
    fn = drawing.make_draw_of_run(
        frozen, assembly.settings_of(config, frozen.latent_shape), mesh, score=False
    )
    return Work(
        fn,
        (frozen.params["unet"], frozen.params, _token_ids(config, frozen, mesh), _key(mesh)),
        mesh,
        False,
    )


def unet_work(config, mesh: Mesh) -> Work:
    """The UNet forward and backward to its float32 parameters."""
    frozen = _frozen(config, mesh)
    params = assembly.abstract_state(frozen.unet, assembly.optimizers(config), mesh).generator
    specs, batch = sharding.params_spec(mesh, params), config.data.batch_size
    ids = _token_ids(config, frozen, mesh)
    local = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (frozen.params, ids))
    whole = jax.tree.map(
        lambda x: _array(mesh, x.shape, x.dtype),
        jax.eval_shape(frozen.networks.encode_text, *local)[0],
    )

    def each(params, x_t, t, condition):
        loss = lambda params: jnp.sum(frozen.networks.unet(params, x_t, t, condition) ** 2) / batch
        return sharding.sum_gradients(jax.grad(loss)(params), specs)

    spread = sharding.on_each(mesh, each, (specs, *3 * (sharding.batch_spec(),)), specs)
    return Work(
        jax.jit(spread),
        (
            params,
            _array(mesh, (batch, *frozen.latent_shape)),
            _array(mesh, (batch,), jnp.int32),
            whole,
        ),
        mesh,
        False,
    )


def vae_work(config, mesh: Mesh) -> Work:
    """The decoder forward and backward to its latents."""
    frozen = _frozen(config, mesh)

    def each(params, latents):
        return jax.grad(lambda x: jnp.sum(frozen.decode(params, x) ** 2))(latents)

    return _of_latents(config, mesh, frozen, each)


def reward_work(config, mesh: Mesh) -> Work:
    """Decoder and reward forward and backward to the latents."""
    frozen = _frozen(config, mesh)

    def each(params, latents, token_ids, crop):
        return jax.grad(lambda x: jnp.sum(frozen.networks.reward(params, x, token_ids, crop)[0]))(
            latents
        )

    return _of_latents(
        config,
        mesh,
        frozen,
        each,
        _token_ids(config, frozen, mesh),
        _array(mesh, (config.data.batch_size, 2)),
    )


def _of_latents(config, mesh: Mesh, frozen: assembly.Frozen, each, *others) -> Work:
    latents = _array(mesh, (config.data.batch_size, *frozen.latent_shape))
    spread = sharding.on_each(
        mesh,
        each,
        (sharding.params_spec(mesh, frozen.params), *(1 + len(others)) * (sharding.batch_spec(),)),
        sharding.batch_spec(),
    )
    return Work(jax.jit(spread), (frozen.params, latents, *others), mesh, False)


WORK = {
    "train": train_work,
    "sample": sample_work,
    "unet": unet_work,
    "vae": vae_work,
    "reward": reward_work,
}


def model_flop(what: str, config, device) -> float:
    """Model FLOP of one sample: one pass each, nothing recomputed, whatever the config saves memory
    by.
    """
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "data.batch_size": 1,
            "compute.microbatches": 1,
            "compute.loop_networks": False,
            "compute.remat_unet": "none",
            "compute.remat_vae": "none",
            "compute.remat_reward": "none",
            "compute.attention": "xla",
            "decode.slice": 0,
        }
    )
    work = WORK[what](config, sharding.make_mesh(1, 1, devices=[device]))
    return flops.count(work.fn, *work.args)


class Compiled(NamedTuple):
    """run: the compiled function; seconds: of trace, lower, compile; memory: bytes a device by
    purpose; traffic: see `flops.collectives`.
    """

    run: Any
    seconds: dict[str, float]
    memory: dict[str, int]
    traffic: dict


def compile_work(work: Work, config, *, effort: float) -> Compiled:
    """Traces, lowers and compiles; nothing runs.

    Args: effort, of XLA, from -1.0 to 1.0; 0.0 is its own. Raises: UserError where it does not fit
      the devices.
    """
    device = work.mesh.devices.flat[0]
    seconds, began = {}, time.time()

    def lap(name, result):
        nonlocal began
        seconds[name], began = time.time() - began, time.time()
        return result

    traced = lap("trace", work.fn.trace(*work.args))
    lowered = lap(
        "lower",
        traced.lower(lowering_platforms=({"gpu": "cuda"}.get(device.platform, device.platform),)),
    )
    try:
        run = lap(
            "compile",
            lowered.compile({"exec_time_optimization_effort": effort} if effort else None),
        )
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, config, device.device_kind) from None
    sizes = run.memory_analysis()
    memory = (
        {}
        if sizes is None
        else {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
            "peak": sizes.peak_memory_in_bytes,
        }
    )
    return Compiled(run, seconds, memory, flops.collectives(traced.jaxpr))


def _too_large(error: Exception, config, chip: str) -> Exception:
    """A UserError for the compiler's out-of-memory message, any other error as it is."""
    found = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", str(error))
    if not found:
        return error
    need, have = (
        float(found[i]) * {"G": 1.0, "M": 1e-3}[found[i + 1]] * 2**30 / 1e9 for i in (1, 3)
    )
    return plan.out_of_memory(need, have, chip, config)
