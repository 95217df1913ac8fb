# SPDX-License-Identifier: Apache-2.0
"""A run from weights to weights: build, restore, loop, log, save, export."""

import functools
import math
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from di_star_jax import assembly, drawing, pictures, sharding, step
from di_star_jax import log as metrics
from di_star_jax.cost import plan
from di_star_jax.errors import UserError
from di_star_jax.evaluation import before_after
from di_star_jax.models import attention
from di_star_jax.prompts import files as prompts
from di_star_jax.storage import checkpoint, weights


def load_state(
    config, frozen: assembly.Frozen, mesh: Mesh, checkpoints: checkpoint.Checkpoints, opts
) -> step.TrainState:
    """The newest checkpoint's state, or that of step 0 from the generator's and the assistant's
    weights.
    """
    abstract = assembly.abstract_state(frozen.unet, opts, mesh)
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
    kernel = assembly.kernel_of(config, mesh.devices.flat[0].platform)
    metrics.say(
        f"attention: {kernel}"
        + ("" if kernel == "xla" else f" on {attention.LONG} tokens and more, else xla")
    )
    plan.check_memory(config, mesh.devices.flat[0], jax.device_count())
    frozen = assembly.load_frozen(config, mesh)
    settings = assembly.settings_of(config, frozen.latent_shape)
    opts = assembly.optimizers(config)
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
    draw_compiled = drawing.make_draw_of_run(frozen, settings, mesh)

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
    train_step = assembly.jit_step(
        step.make_train_step(frozen.networks, settings, frozen.schedule, *opts, mesh), state, mesh
    )
    warmup_step = assembly.jit_step(
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
            writer.image(k + 1, "samples", pictures.image_grid(images, 8))
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
