# SPDX-License-Identifier: Apache-2.0
"""Compiles the whole training step for devices that are not here: memory, collectives and roofline, no weights, no TPU."""

import importlib.util
import math
import os
import re
import resource
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from di_star_jax import flops, pipeline, plan, sharding, step, train
from di_star_jax.config import UserError
from di_star_jax.diffusion import Schedule

GENERATIONS = {"v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}  # Cloud's name, cores per chip


def topology_devices(name: str) -> list:
    """The devices of a TPU slice, from the TPU compiler alone.

    Args: name, as "v5e:4x4", "v6e:2x4" or "v5p:2x2x1".
    Raises: UserError for an unknown name, and where libtpu is not installed.
    """
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"topology={name!r}, expected a generation and its chips, e.g. v5e:4x4, v6e:2x4 or v5p:2x2x1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed; pip install -e '.[tpu]' (no TPU is needed)")
    chips = math.prod(int(n) for n in shape.split("x"))
    cloud, cores = GENERATIONS[generation]
    # libtpu would look for a TPU and for the machine's metadata server, and wait.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost",
                      TPU_ACCELERATOR_TYPE=f"{cloud}-{chips * cores}")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever libtpu says of a shape it does not have
        raise UserError(f"topology={name!r} is not one that libtpu knows ({str(error).splitlines()[0][:150]}); "
                        "try v5e:4x4, v6e:2x4 or v5p:2x2x1") from None


class Step(NamedTuple):
    """A step that can be traced: the function, its abstract arguments with their shardings, and their mesh."""
    fn: Any
    args: tuple
    mesh: Mesh


def abstract_step(config, mesh: Mesh) -> Step:
    """The training step of a config over models that are known by their config.json alone.

    Raises: UserError where weights.reference or weights.reward is neither a folder nor a published model's name.
    """
    known, unknown = plan.model_configs(config)
    if unknown:
        raise UserError(f"{unknown[0]} is neither a folder nor a model whose sizes are known; give a folder")
    options = train.model_options(config, mesh.devices.flat[0].platform)
    models = {name: pipeline.abstract_model(model, **options[name]) for name, model in known.items()}
    schedule = Schedule(*2 * (jnp.ones(1000),))  # only its shape counts here
    frozen = train.assemble(config, models, schedule, tokenizers={}, folder=None)
    opts = train.optimizers(config)
    state = train.abstract_state(frozen.unet, opts, mesh)
    dtype = jnp.dtype(config.compute.dtype)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), frozen.params,
                          sharding.params_sharding(mesh, frozen.params))
    length = {"reward": known["reward"]["text_config"], "tokenizer": known["text_encoder"],
              "tokenizer_2": known.get("text_encoder_2", known["text_encoder"])}
    ids = {name: jax.ShapeDtypeStruct((config.data.batch_size, text.get("max_position_embeddings", 77)), jnp.int32,
                                      sharding=sharding.batch_sharding(mesh)) for name, text in length.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    settings = train.settings_of(config, frozen.latent_shape)
    fn = step.make_train_step(frozen.networks, settings, schedule, *opts, mesh)
    return Step(train.jit_step(fn, state, mesh), (state, params, ids,
                jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))), mesh)


def compile_step(step: Step, config, chip: str) -> dict:
    """Traces, lowers and compiles; nothing runs.

    Returns: seconds, host_gb, memory in bytes per chip (arguments, temporaries, aliased, peak), flop of one device's
      step, collectives. Raises: UserError where it does not fit the chip.
    """
    times, began = {}, time.time()
    def lap(name):
        nonlocal began
        times[name], began = time.time() - began, time.time()

    traced = step.fn.trace(*step.args)
    lap("trace")
    lowered = traced.lower(lowering_platforms=("tpu",))
    lap("lower")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _too_large(error, config, chip) from None
    lap("compile")
    memory = compiled.memory_analysis()
    sizes = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
             "aliased": memory.alias_size_in_bytes, "peak": memory.peak_memory_in_bytes}
    return {"seconds": times, "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "memory": sizes,
            "executed_flop": flops.count_traced(traced.jaxpr), "collectives": flops.collectives(traced.jaxpr)}


def _too_large(error: Exception, config, chip: str) -> Exception:
    """A UserError for the compiler's out-of-memory message, any other error as it is."""
    found = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)([GM]) hbm", str(error))
    if not found:
        return error
    need, have = (float(found[i]) * {"G": 1.0, "M": 1e-3}[found[i + 1]] * 2**30 / 1e9 for i in (1, 3))
    return out_of_memory(need, have, chip, config)


def out_of_memory(need: float, have: float, chip: str, config) -> UserError:
    """Args: need, have, GB of one chip."""
    c = config.compute
    return UserError(
        f"the step needs {need:.1f} GB a chip, a {chip} has {have:.1f}; in this order raise compute.microbatches={c.microbatches}, "
        f"set compute.remat_unet={c.remat_unet!r}, remat_vae={c.remat_vae!r} and remat_reward={c.remat_reward!r} to 'full', "
        f"raise mesh.fsdp={config.mesh.fsdp} or lower data.batch_size={config.data.batch_size}")
