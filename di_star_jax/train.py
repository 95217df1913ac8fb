# SPDX-License-Identifier: Apache-2.0
"""A run from weights to weights: build, restore, loop, log, save, export."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from di_star_jax import assembly, drawing, log, pictures, sharding, step
from di_star_jax.assembly import Parts
from di_star_jax.cost import plan
from di_star_jax.errors import UserError
from di_star_jax.evaluation import held_out
from di_star_jax.evaluation.held_out import HeldOut
from di_star_jax.gradients import Settings
from di_star_jax.models import attention
from di_star_jax.pipelines.card import PICTURE, About
from di_star_jax.pipelines.export import FOLDER, Unet, check_export, export_pipeline
from di_star_jax.prompts import source as prompt_source
from di_star_jax.prompts.source import PromptStream, Source
from di_star_jax.storage import checkpoint, folders, weights
from di_star_jax.storage.checkpoint import Checkpoints


def run(config, workdir: str) -> None:
    """Trains as `config` says, continuing what is in `workdir`, and leaves the results there.

    The way to a network: `run` > `step.train_step` > `step.per_device` > a scheme > its evaluation.

    Args:
      config: checked ml_collections.ConfigDict, as configs/sdxl.py.
      workdir: gets checkpoints/, TensorBoard events, metrics.jsonl, and at the end diffusers/ (a
        pipeline folder) and, with eval.prompts, samples.png and before_after.json.
    Raises: UserError for unusable inputs, and for a gradient that is not finite.
    """
    checkpoint.check_path(workdir)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
    introduce(config, mesh)
    check_export(folders.resolve(config.weights.reference), folder / FOLDER)
    parts = assembly.load_parts(config, mesh)
    method = assembly.method_of(config, parts)
    optimizers = assembly.optimizers_of(config)
    frozen = parts.frozen()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(folder / checkpoint.FOLDER, keep=config.train.keep)
        )
        state = load_state(config, parts, mesh, checkpoints, optimizers)
        first = int(state.step)
        metadata = metadata_of(config, parts, method.settings)
        batch_at = batches(config, parts, mesh, folder)

        # Before: scores and pictures of the generator as it came.
        scorer = scorer_of(config, parts, method.settings, mesh, folder)
        if scorer and first == 0:
            log.say(f"scoring the initial generator on {len(scorer.prompts)} held-out prompts")
            before = scorer.measure(state.generator)
            if jax.process_index() == 0:
                held_out.keep_before(folder, *before)

        # The steps, compiled at their first call.
        warmup = config.assistant.warmup_steps
        total = warmup + config.train.steps
        train_step = step.make_train_step(method, optimizers, mesh)
        warmup_step = step.make_warmup_step(method, optimizers, mesh)
        train_step = assembly.jit_step(train_step, state, mesh)
        warmup_step = assembly.jit_step(warmup_step, state, mesh)
        log.say("compiling the step: a minute for the shapes world, many for SDXL")
        writer = stack.enter_context(log.Writer(folder, first_step=first))
        progress = stack.enter_context(log.Progress(total, first))
        report = Report(config, writer, progress, first, total)

        # Step k's metrics are fetched after step k + 1 is dispatched, so that the devices never
        # wait for the host.
        key = jax.random.key(config.seed)
        pending = None
        for k in range(first, total):
            update = warmup_step if k < warmup else train_step
            state, metrics = update(state, frozen, batch_at(k), key)
            if pending is not None:
                report.step(*pending)
            pending = (k + 1, metrics)
            if (k + 1) % config.train.save_every == 0 or k + 1 == total:
                report.step(*pending)  # a state that is not finite is never saved
                pending = None
                checkpoints.save(k + 1, state, metadata)
            if scorer and config.eval_every and (k + 1) % config.eval_every == 0:
                few = scorer.first(config.eval.batch_size, samples=2)
                scores, images = few.measure(state.ema)
                writer.scalars(k + 1, {f"eval/{name}": value for name, value in scores.items()})
                writer.image(k + 1, "samples", pictures.image_grid(images, 8))

    # After.
    if scorer:
        after = scorer.measure(state.ema)
        if jax.process_index() == 0:
            log.say(held_out.compare(folder, scorer.prompts, *after))
    export(parts, state.ema, total, metadata, folder)


class Report:
    """What a run says of its steps.

    Args: writer, progress; first, the step it starts from; total, steps in all.
    """

    def __init__(
        self,
        config,
        writer: log.Writer,
        progress: log.Progress,
        first: int,
        total: int,
    ):
        self._writer = writer
        self._progress = progress
        self._first = first
        self._total = total
        self._batch_size = config.data.batch_size
        self._log_every = config.train.log_every
        self._began = None  # when the first step was done: its compilation is no part of the rate

    def step(self, k: int, metrics: step.Metrics) -> None:
        """Raises: UserError for a gradient that is not finite. Args: k, steps done."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["nonfinite"]:
            raise UserError(
                f"step {k}: a gradient is not finite (assistant/grad_norm="
                f"{values['assistant/grad_norm']}); the newest checkpoint is from before it: lower "
                "optim.generator_lr or the scales in reward, or set compute.dtype=float32"
            )
        if k % self._log_every == 0 or k == self._total:
            self._writer.scalars(k, values)
        self._began = self._began or time.time()
        seconds = max(time.time() - self._began, 1e-9)
        rewards = [
            f"{name.removeprefix('reward/')} {value:.4f}"
            for name, value in values.items()
            if name.startswith("reward/") and name.count("/") == 1 and name != "reward/total"
        ]
        rate = (k - self._first - 1) * self._batch_size / seconds
        self._progress.update(k, f"{', '.join(rewards) or 'warm-up'}, {rate:.1f} images/s")


def introduce(config, mesh: Mesh) -> None:
    """Says what the run is, and refuses one that cannot fit its devices. Raises: UserError."""
    planned = plan.make(config, jax.device_count(), mesh.devices.flat[0].device_kind)
    log.say("\n".join(plan.describe(planned)))
    kernel = assembly.kernel_of(config, mesh.devices.flat[0].platform)
    where = "" if kernel == "xla" else f" on {attention.LONG} tokens and more, else xla"
    log.say(f"attention: {kernel}{where}")
    plan.check_memory(planned)


def load_state(
    config,
    parts: Parts,
    mesh: Mesh,
    checkpoints: Checkpoints,
    optimizers: step.Optimizers,
) -> step.TrainState:
    """The newest checkpoint's state, or that of step 0 from generator's and assistant's weights."""
    abstract = assembly.abstract_state(parts.models["unet"], optimizers, mesh)
    latest = checkpoints.latest_step()
    if latest is not None:
        log.say(f"continuing at step {latest} of the checkpoints in {checkpoints.folder}")
        return checkpoints.restore(latest, abstract)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    of_assistant = parts.pipeline.folder / "unet"
    if config.weights.assistant:
        of_assistant = folders.resolve(config.weights.assistant)
    generator = weights.load(folders.resolve(config.weights.generator), abstract.generator)
    assistant = weights.load(of_assistant, abstract.assistant)
    init = jax.jit(
        lambda g, a: step.init_state(g, a, optimizers),
        out_shardings=shardings,
        donate_argnums=(0, 1),
    )
    return init(generator, assistant)


def metadata_of(
    config,
    parts: Parts,
    settings: Settings,
) -> dict[str, Any]:
    """What convert, sample and evaluate need to know of a run; each checkpoint holds it."""
    return {
        "unet_config": parts.models["unet"].config,
        "reference": config.weights.reference,
        "generator_timesteps": settings.generator_timesteps,
        "initial": config.weights.generator,
        "objective": config.objective.name,
        "trained_on": {name: scale for name, scale in config.reward.items() if scale},
        "weights": dict(config.weights.items()),
        "directory": str(Path.cwd()),  # where relative folders are found
    }


def load_prompts(
    config,
    section: str,
    folder: Path,
) -> Source:
    """Prompts of "data" or "eval" by index, prepared by the first host while the others wait."""

    def load() -> Source:
        return prompt_source.load(
            config[section].prompts,
            folder / "prompts",
            file=config[section].prompts_file,
            column=config.data.column,
            option=f"{section}.prompts",
        )

    if jax.process_index() == 0:
        load()
    multihost_utils.sync_global_devices(f"{section}.prompts")
    return load()


def batches(
    config,
    parts: Parts,
    mesh: Mesh,
    folder: Path,
) -> Callable[[int], dict]:
    """k -> token ids of step k, over all devices: the same on any number of hosts."""
    size = config.data.batch_size
    source = load_prompts(config, "data", folder)
    stream = PromptStream(source, seed=config.seed, batch_size=size)
    rows = sharding.local_rows(mesh, size)

    def batch_at(k) -> dict[str, Any]:
        texts = [prompt.text for prompt in stream.at(k, rows)]
        return sharding.place_batch(parts.tokenize(texts), mesh, size)

    return batch_at


def scorer_of(
    config,
    parts: Parts,
    settings: Settings,
    mesh: Mesh,
    folder: Path,
) -> HeldOut | None:
    """What scores the generator on eval.prompts; None without."""
    if not config.eval.prompts:
        return None
    source = load_prompts(config, "eval", folder)
    prompts = [source[i] for i in range(min(config.eval.num_prompts, len(source)))]
    sampling = drawing.Sampling(
        "few_step", np.array(settings.generator_timesteps), 1.0, settings.latent_shape
    )
    drawer = drawing.Drawer(parts.pipeline, sampling)
    compiled = drawing.make_scored_draw(drawer, parts.rewards, mesh)
    frozen = parts.frozen()
    del frozen["reference"]

    def draw(generator, token_ids, z):
        return compiled(frozen | {"unet": generator}, token_ids, z)

    return HeldOut(
        draw=draw,
        sampling=sampling,
        prompts=prompts,
        token_ids=parts.tokenize([prompt.text for prompt in prompts]),
        samples=config.eval.samples,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        reads_attributes=config.eval.oracle == "shapes",
    )


def export(
    parts: Parts,
    generator: Any,
    step_number: int,
    metadata: dict,
    folder: Path,
) -> None:
    """Writes the generator as a pipeline that diffusers draws with, and says how.

    Args: metadata, of `metadata_of`. folder, the workdir, whose samples the model card shows.
    """
    output, picture = folder / FOLDER, folder / PICTURE
    usage = export_pipeline(
        Unet(generator, metadata["unet_config"], tuple(metadata["generator_timesteps"])),
        About.of_run(metadata, f"ema, step {step_number}", picture if picture.exists() else None),
        reference_folder=parts.pipeline.folder,
        output=output,
    )
    log.say(f"exported {output}; to draw with it:\n{usage}")
