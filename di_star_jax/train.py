# SPDX-License-Identifier: Apache-2.0
"""A run from weights to weights: build, restore, loop, log, save, export."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from di_star_jax import (
    assembly,
    drawing,
    log,
    pictures,
    processes,
    record,
    rewards,
    sharding,
    step,
)
from di_star_jax.assembly import Parts
from di_star_jax.config import fields
from di_star_jax.cost import flops, plan, remat, report
from di_star_jax.errors import UserError
from di_star_jax.evaluation import held_out
from di_star_jax.evaluation.held_out import HeldOut
from di_star_jax.gradients import Method, Network, Settings
from di_star_jax.models import attention, lora
from di_star_jax.pipelines import trained
from di_star_jax.pipelines.card import PICTURE, About
from di_star_jax.pipelines.export import (
    FOLDER,
    Denoiser,
    check_export,
    export_pipeline,
    form_of_run,
)
from di_star_jax.pipelines.families import family_at
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.folder import check_like, load_tokenizers
from di_star_jax.pipelines.text_cache import TextCache
from di_star_jax.prompts import source as prompt_source
from di_star_jax.prompts import tokens
from di_star_jax.prompts.files import Prompt
from di_star_jax.prompts.source import PromptStream, Source
from di_star_jax.rewards import rewards_used, scales_of
from di_star_jax.stop import Stop
from di_star_jax.storage import checkpoint, files, folders, weights
from di_star_jax.storage.checkpoint import Checkpoints
from di_star_jax.storage.workdir import Workdir

COMPILING = "a minute for the shapes world, many for SDXL"
_DENOISERS = ("reference", "generator")  # of `Parts.frozen`
WARMUP, TRAINING = "warm-up step", "training step"


def run(
    config,
    workdir: str,
    arguments: Sequence[str] = (),
) -> None:
    """Trains as `config` says, continuing what is in `workdir`, and leaves the results there.

    The way to a network: `run` > `step.train_step` > `step.per_device` > a scheme > its evaluation.

    Args:
      config: checked ml_collections.ConfigDict, as configs/sdxl.py.
      workdir: a folder, or a gs:// address; gets config.json, checkpoints/, TensorBoard events,
        metrics.jsonl, and at the end diffusers/ (a pipeline folder) and, with eval.prompts,
        samples.png and before_after.json.
      arguments: of the command line, to say what they change.
    Raises: UserError for unusable inputs, a workdir of another run, a full disk, and a gradient
      that is not finite. SystemExit after Ctrl-C or SIGTERM, when the state is saved.
    """
    with record.begun(config, workdir) as (place, stop):
        follow(config, place, arguments, stop)


def follow(
    config,
    workdir: Workdir,
    arguments: Sequence[str],
    stop: Stop,
) -> None:
    """`run`, in a folder that is there and with signals listened to."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.context)
    introduce(config, mesh)
    record.check_kind(workdir.folder, "objective.name")
    check_outputs(config, workdir)
    with contextlib.ExitStack() as stack:
        with stop.free(), log.waiting("reading prompts"):
            prompts = {s: load_prompts(config, s, workdir.folder) for s in prompt_sections(config)}
        checkpoints = stack.enter_context(
            Checkpoints(workdir.at(checkpoint.FOLDER), keep=config.train.keep)
        )
        # An older version's have no balance: they stay where they are, for `begin` to refuse them.
        checkpoints.tidy([name for name in step.TrainState._fields if name != "balance"])
        begun = begin(config, workdir, arguments, prompts, checkpoints.latest_step())
        if begun.exported and begun.scored:
            show_finished(begun, workdir)
            return
        if begun.latest is not None:
            stop.goes_on = f"stopped at step {begun.latest}; the same command goes on"

        with stop.free():
            config = remat.settled(config, mesh, workdir.folder)
        with stop.free(), log.waiting("loading weights", "minutes for SDXL"):
            agree_on_weights(config, begun.latest)
            check_export(folders.resolve(config.weights.reference), workdir.folder / FOLDER)
            loaded = load(config, mesh, prompts)
            state = load_state(config, loaded, checkpoints)
        if int(state.step) < begun.total:
            checkpoints.check_room(state)
        before = score_before(loaded, state, begun, workdir, stop)
        steps, costs = compile_steps(config, loaded, state, stop)

        first = int(state.step)
        writer = stack.enter_context(
            log.Writer(workdir.folder, first_step=first, written=workdir.push_sometimes)
        )
        report = Report(config, writer, progress_of(config, first, costs, loaded.scorer), first)
        stack.enter_context(report.progress)
        report.begin(arguments, loaded.scorer, before)
        kept = held_out.kept(workdir.folder, held_out.BEFORE, begun.settings or {})
        report.initial = watched(config, kept) if loaded.scorer else {}
        output = Output(workdir, checkpoints, writer, report)
        state = take_steps(config, loaded, steps, state, output, stop)
        finish(loaded, state, begun, output, stop)


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is asked for and what is there, before any weights.

    Attributes: settings, of the scores, or None; latest, step of the newest checkpoint, or None;
      total, steps; exported, scored: whether an earlier start has left those results.
    """

    settings: dict[str, Any] | None
    latest: int | None
    total: int
    exported: bool
    scored: bool


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What the steps are made of, which never changes.

    Attributes: method, optimizers: of the steps; scorer, or None without eval.prompts; batch_at,
      step -> its token ids; metadata, of each checkpoint.
    """

    mesh: Mesh
    parts: Parts
    method: Method
    optimizers: step.Optimizers
    scorer: HeldOut | None
    batch_at: Callable[[int], tuple[dict, ...]]
    metadata: dict[str, Any]


class Output(NamedTuple):
    """Where the results go."""

    workdir: Workdir
    checkpoints: Checkpoints
    writer: log.Writer
    report: "Report"


# Before the steps.


def agree_on_weights(config, latest: int | None) -> None:
    """Raises: UserError where the processes of a run see other weights.

    What is on the Hub is downloaded here. Args: latest, step of the newest checkpoint, which has
    the trained networks; or None.
    """
    if processes.alone():
        return
    names = ("reference",) if latest is not None else ("reference", "generator", "assistant")
    found = {name: folders.resolve(config.weights[name]) for name in names if config.weights[name]}
    for name, source in assembly.reward_sources(config).items():
        found |= {name: rewards.resolve(name, source)} if source else {}
    digests = {f"weights.{name}": files.sampled_digest(path) for name, path in found.items()}
    processes.agree("weights", digests)


def check_outputs(config, workdir: Workdir) -> None:
    """Raises: UserError where the export could not be written at the end."""
    if Path(config.weights.reference).is_dir():  # one of the Hub's is looked at once it is here
        check_export(Path(config.weights.reference), workdir.folder / FOLDER)
    workdir.check_folder(FOLDER)


def begin(
    config,
    workdir: Workdir,
    arguments: Sequence[str],
    prompts: dict[str, Source],
    latest: int | None,
) -> Begun:
    """Compares what is asked for with what is there, and writes what this start is.

    Raises: UserError for a workdir of another run, and processes that see different things.
    """
    digests = {f"{section}.prompts": source.digest for section, source in prompts.items()}
    processes.agree("prompts and checkpoints", digests | {"newest checkpoint": latest})
    record.agree(config, workdir.folder, arguments, prompts["data"].digest, latest)
    check_steps(config, latest)
    log.say(record.sentence(config, arguments))
    total = total_of(config)
    settings = eval_settings(config, prompts)
    done = record.finished(workdir.folder)
    exported = done.get("step") == total == latest and is_exported(workdir)
    scored = done == {"step": total, "scored": settings} and is_scored(workdir.folder, settings)
    return Begun(settings, latest, total, of_first(exported), of_first(scored))


def of_first(answer: bool) -> bool:
    """What the first process says: a network drive may show two processes different things."""
    return processes.gather("what is done", str(answer))[0] == "True"


def total_of(config) -> int:
    """Steps of a whole run."""
    return config.assistant.warmup_steps + config.train.steps


def show_finished(begun: Begun, workdir: Workdir) -> None:
    """Says what an earlier start has left."""
    log.say(f"finished: all {begun.total} steps are done, in {workdir}")
    if begun.settings:
        log.say(workdir.named(held_out.table(workdir.folder)))
    exported = workdir.folder / FOLDER
    log.say(
        workdir.named(f"exported {exported}; {exported / 'README.md'} says how to draw with it")
    )


def load(
    config,
    mesh: Mesh,
    prompts: dict[str, Source],
) -> Loaded:
    """The networks that are not trained, and what the steps are made of."""
    check_lengths(config, prompts)
    cache = open_text_cache(config, prompts)
    parts = assembly.load_parts(config, mesh, cache)
    method = assembly.method_of(config, parts)
    return Loaded(
        mesh=mesh,
        parts=parts,
        method=method,
        optimizers=assembly.optimizers_of(config),
        scorer=scorer_of(config, parts, method.settings, mesh, prompts),
        batch_at=batches(
            config, parts, mesh, prompts["data"], step.prompt_batches(method.settings)
        ),
        metadata=metadata_of(config, parts, method.settings),
    )


def check_lengths(config, prompts: dict[str, Source]) -> None:
    """Raises: UserError for prompts that the reference's tokenizers would cut."""
    reference = folders.resolve(config.weights.reference)
    tokenizers = load_tokenizers(reference, family_at(reference))
    for section, source in prompts.items():
        for tokenizer in tokenizers.values():
            texts = (prompt.text for prompt in source)
            tokens.check_lengths(tokenizer, texts, f"{section}.prompts")


def open_text_cache(config, prompts: dict[str, Source]) -> TextCache | None:
    """The cache of data.cache, if there is one. Raises: UserError where it does not fit the run."""
    if not config.data.cache:
        return None
    texts = {"data.prompts": [prompt.text for prompt in prompts["data"]]}
    if "eval" in prompts:
        held = eval_prompts(config, prompts["eval"])
        texts["eval.prompts"] = [prompt.text for prompt in held]
    return assembly.open_text_cache(config, texts)


def score_before(
    loaded: Loaded,
    state: step.TrainState,
    begun: Begun,
    workdir: Workdir,
    stop: Stop,
) -> held_out.Measured | None:
    """Scores and pictures of the generator as it came; None where they are there or not wanted."""
    if loaded.scorer is None or begun.scored:
        return None
    kept = held_out.kept(workdir.folder, held_out.BEFORE, begun.settings)
    if of_first(int(state.step) > 0 and kept is not None):
        return None
    with stop.free():
        before = score_initial(loaded, state)
    if jax.process_index() == 0:
        held_out.keep(workdir.folder, held_out.BEFORE, begun.settings, before)
    return before


def watched(config, kept: held_out.Kept | None) -> dict[str, float]:
    """First scores, beside which later ones show a gamed reward; none where there is no reward."""
    return kept.first if kept and any(scales_of(config.reward).values()) else {}


def compile_steps(
    config,
    loaded: Loaded,
    state: step.TrainState,
    stop: Stop,
) -> tuple[dict[str, Callable], dict[str, int]]:
    """The kinds of steps that are still to be taken, compiled ahead, so that no step waits for it.

    Returns: {kind: step}, {kind: its FLOPs}.
    """
    first = int(state.step)
    key = jax.random.key(config.seed)
    steps = {}
    costs = {}
    for name, make, until in (
        (WARMUP, step.make_warmup_step, config.assistant.warmup_steps),
        (TRAINING, step.make_train_step, total_of(config)),
    ):
        if first >= until:
            continue
        plain = make(loaded.method, loaded.optimizers, loaded.mesh)
        jitted = assembly.jit_step(plain, state, loaded.mesh)
        with stop.free(), log.waiting(f"compiling the {name}", COMPILING):
            traced = jitted.trace(state, loaded.parts.frozen(), loaded.batch_at(first), key)
            steps[name] = traced.lower().compile()
        costs[name] = flops.count_traced(traced.jaxpr)
    return steps, costs


# The steps and after.


def take_steps(
    config,
    loaded: Loaded,
    steps: dict[str, Callable],
    state: step.TrainState,
    output: Output,
    stop: Stop,
) -> step.TrainState:
    """The state after the last step, when it is saved. Raises: SystemExit where a signal came.

    Step k's metrics are fetched after step k + 1 is dispatched, so that the devices never wait for
    the host.
    """
    first, total = int(state.step), total_of(config)
    frozen = loaded.parts.frozen()
    key = jax.random.key(config.seed)
    report = output.report
    pending = None
    for k in range(first, total):
        stop.doing = f"step {k + 1} and its checkpoint"
        update = steps[WARMUP if k < config.assistant.warmup_steps else TRAINING]
        state, metrics = update(state, frozen, loaded.batch_at(k), key)
        if pending is not None:
            report.step(*pending)
        pending = (k + 1, metrics)
        stopping = stop.reached(loaded.mesh)
        if stopping or (k + 1) % config.train.save_every == 0 or k + 1 == total:
            report.step(*pending)  # a state that is not finite is never saved
            pending = None
            save(k + 1, state, loaded.metadata, output)
        if stopping:
            break
        if loaded.scorer and config.eval_every and (k + 1) % config.eval_every == 0:
            score_few(k + 1, state, loaded.scorer, report)
    report.progress.close()
    if first < total:
        log.say(report.clipped())
        stop.doing = "the checkpoint"
        with log.waiting("saving the last checkpoint"):
            output.checkpoints.wait()
        stop.goes_on = f"stopped at step {int(state.step)}; the same command goes on"
    stop.leave_if_asked()
    return state


def save(
    k: int,
    state: step.TrainState,
    metadata: dict[str, Any],
    output: Output,
) -> None:
    """Begins to write the state after k steps, and what was said until then."""
    with output.report.progress.paused("saving"):
        output.writer.flush()
        output.workdir.push()
        output.checkpoints.save(k, state, metadata)


def score_few(
    k: int,
    state: step.TrainState,
    scorer: HeldOut,
    report: "Report",
) -> None:
    """Scores a few images in the course of a run."""
    few = scorer.first()
    with report.progress.paused("scoring"), log.waiting(f"scoring {few.batches} batches"):
        report.scores(k, few.measure(state.ema))


def finish(
    loaded: Loaded,
    state: step.TrainState,
    begun: Begun,
    output: Output,
    stop: Stop,
) -> None:
    """Scores and exports the trained generator."""
    folder, scorer, total = output.workdir.folder, loaded.scorer, begun.total
    if scorer and not begun.scored:
        output.writer.flush()
        with stop.free():
            after = scorer.measure(state.ema, "scoring the trained generator")
        output.report.scores(total, after)
        if jax.process_index() == 0:
            before = held_out.kept(folder, held_out.BEFORE, begun.settings)
            held_out.compare(folder, scorer.prompts, before, after, scorer.teacher)
    if scorer and jax.process_index() == 0:
        log.say(output.workdir.named(held_out.table(folder)))
    if not begun.exported:
        stop.doing = "the export"
        with log.waiting("exporting the generator"):
            export(loaded.parts, state.ema, total, loaded.metadata, output.workdir)
    record.finish(folder, {"step": total, "scored": begun.settings})
    processes.gather("the end")  # the first one writes for minutes, more than JAX would wait


class Report:
    """What a run says of its steps.

    Args: writer, progress; first, the step it starts from.
    """

    def __init__(
        self,
        config,
        writer: log.Writer,
        progress: log.Progress,
        first: int,
    ):
        self.progress = progress
        self._config = config
        self._writer = writer
        self._first = first
        self._total = total_of(config)
        self._rates = rates_of(config)
        self.initial = {}  # the few scores of the initial generator
        self._scored = set()  # steps
        self._clipped = {}  # by network: how many steps, of how many
        self._batches = 0  # of the scoring at the end
        self._each = math.inf  # seconds of one

    def begin(
        self,
        arguments: Sequence[str],
        scorer: HeldOut | None,
        before: held_out.Measured | None,
    ) -> None:
        """What is known before the first step: the run in words, its config, the first scores."""
        first = self._first
        rows = [[name, str(value)] for name, value in fields(self._config).items()]
        self._writer.text(first, "run", record.sentence(self._config, arguments))
        self._writer.text(first, "config", log.markdown_table(["field", "value"], rows))
        if scorer is None:
            return
        self._batches = scorer.batches
        captions = [f"{i + 1}. {p.text}" for i, p in enumerate(scorer.prompts[: held_out.PICTURED])]
        self._writer.text(first, "samples/prompts", "\n".join(captions))
        if before is not None:
            self.scores(0, before)

    def step(self, k: int, metrics: step.Metrics) -> None:
        """Raises: UserError for a gradient that is not finite. Args: k, steps done."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["nonfinite"]:
            raise UserError(
                f"step {k}: a gradient is not finite (assistant/grad_norm="
                f"{values['assistant/grad_norm']}); the newest checkpoint is from before it: lower "
                "optim.generator_lr or optim.clip_norm, or set compute.dtype=float32, and run "
                "again; lower scales in reward are another run, in another workdir"
            )
        self._count_clipped(values)
        if k % self._config.train.log_every == 0 or k == self._total:
            # A quarter of the times without a sample has no mean.
            known = {name: value for name, value in values.items() if not math.isnan(value)}
            self._writer.scalars(k, known | self._rates(k))
        each = self.progress.step_seconds()
        rate = f"{self._config.data.batch_size / each:.1f} images/s" if each else ""
        warming = "warm-up" if k <= self._config.assistant.warmup_steps else ""
        parts = [warming, shown(values), rate]
        self.progress.update(k, ", ".join(part for part in parts if part))

    def _count_clipped(self, values: dict[str, float]) -> None:
        for name in ("generator", "assistant"):
            if f"{name}/clipped" in values:
                clipped, steps = self._clipped.get(name, (0.0, 0))
                self._clipped[name] = (clipped + values[f"{name}/clipped"], steps + 1)

    def clipped(self) -> str:
        """In what share of this start's steps gradients were clipped."""
        shares = [f"{name} in {c / n:.0%} of {n}" for name, (c, n) in self._clipped.items()]
        return f"gradients clipped: {', '.join(shares)} steps"

    def scores(self, k: int, measured: held_out.Measured) -> None:
        """Writes scores of the first batch and its pictures, once for a step."""
        if k in self._scored:
            return
        self._scored.add(k)
        self._writer.scalars(k, {f"eval/{name}": v for name, v in measured.first.items()})
        self._writer.image(k, "samples", pictures.image_grid(measured.images, 8))
        astray = held_out.gone_astray(measured.first, self.initial)
        if astray:
            log.say(
                f"warning: step {k}: {'; '.join(astray)}: as where a reward is gamed; look at the "
                "pictures, and lower the reward's scale if they are worse (docs/ablation.md)"
            )
        if measured.seconds:  # of a few batches only, it may be more than the usual
            self._each = min(self._each, measured.seconds)
            self.progress.expect("final", self._each * self._batches)


def shown(values: dict[str, float]) -> str:
    """Of a step's metrics, what a line has room for: its rewards, or else its losses."""
    scores = [
        f"{name.removeprefix('reward/')} {value:.4f}"
        for name, value in values.items()
        if name.startswith("reward/") and name.count("/") == 1 and name != "reward/total"
    ]
    losses = ("assistant/loss", "regulariser/loss")
    return ", ".join(scores or [f"{name} {values[name]:.4g}" for name in losses if name in values])


def rates_of(config) -> Callable[[int], dict[str, float]]:
    """steps done -> the learning rates of the last one's updates, by the metric's name."""
    optim = config.optim
    warmup = config.assistant.warmup_steps
    generator = step.rate_schedule(optim.generator_lr, optim.lr_warmup_steps)
    assistant = step.rate_schedule(optim.assistant_lr, optim.lr_warmup_steps)

    def rates(k) -> dict[str, float]:
        of_assistant = float(assistant(k * config.assistant.updates - 1))
        if k <= warmup:
            return {"assistant/lr": of_assistant}
        return {"generator/lr": float(generator(k - warmup - 1)), "assistant/lr": of_assistant}

    return rates


def progress_of(
    config,
    first: int,
    costs: dict[str, int],
    scorer: HeldOut | None,
) -> log.Progress:
    """The run's progress, which knows its phases and pauses. Args: costs, FLOPs by kind of step."""
    warmup = config.assistant.warmup_steps
    total = total_of(config)
    each = config.eval_every if scorer else 0
    training = costs.get(TRAINING, 1)
    return log.Progress(
        total,
        first,
        phases=[
            log.Phase(warmup, costs.get(WARMUP, training)),
            log.Phase(total, training),
        ],
        pauses={
            "saving": lambda k: total // config.train.save_every - k // config.train.save_every,
            "scoring": lambda k: total // each - k // each if each else 0,
            "final": lambda k: 1 if scorer else 0,
        },
    )


def prompt_sections(config) -> list[str]:
    """The config's sections whose prompts a run reads."""
    return ["data", "eval"] if config.eval.prompts else ["data"]


def check_steps(config, latest: int | None) -> None:
    """Raises: UserError where a run has gone beyond the steps that are asked for."""
    warmup = config.assistant.warmup_steps
    total = total_of(config)
    if latest is not None and latest > total:
        raise UserError(
            f"train.steps={config.train.steps} after {warmup} of warm-up end at step {total}, but "
            f"this run is at step {latest}; give train.steps={latest - warmup} or more, or another "
            "--workdir"
        )


def eval_settings(config, prompts: dict[str, Source]) -> dict[str, Any] | None:
    """What a run's scores depend on beside the generator; None without eval.prompts."""
    if "eval" not in prompts:
        return None
    return held_out.settings_of(
        eval_prompts(config, prompts["eval"]),
        config.eval.samples,
        config.seed,
        metrics=rewards_used(scales_of(config.reward), config.eval.metrics),
        oracle=config.eval.oracle,
    )


def eval_prompts(config, source: Source) -> list[Prompt]:
    """The first of the held-out prompts."""
    return [source[i] for i in range(min(config.eval.num_prompts, len(source)))]


def is_exported(workdir: Workdir) -> bool:
    """Whether a run's workdir has an export."""
    return workdir.holds(FOLDER, "model_index.json")


def is_scored(folder: Path, settings: dict[str, Any] | None) -> bool:
    """Whether a finished run's scores are there, where there are to be any."""
    return settings is None or (folder / held_out.AFTER).is_file()


def score_initial(loaded: Loaded, state: step.TrainState) -> held_out.Measured:
    """Scores of the generator before training, also where the run has gone on since."""
    generator, scorer = state.generator, loaded.scorer
    low_rank = loaded.parts.models[DENOISER].lora
    if int(state.step) and low_rank and low_rank.generator:
        log.say("the initial generator's scores are not there; its base is scored anew")
        generator = jax.tree.map(jnp.zeros_like, generator)
    elif int(state.step):
        log.say("the initial generator's scores are not there; it is loaded and scored anew")
        abstract = sharding.abstract(generator, jax.tree.map(lambda x: x.sharding, generator))
        generator = weights.load(loaded.parts.start.folder, abstract)
    log.say(f"scoring the initial generator on {len(scorer.prompts)} held-out prompts")
    return scorer.measure(generator, "scoring the initial generator")


def introduce(config, mesh: Mesh) -> None:
    """Says what the run is, and refuses one that cannot fit its devices. Raises: UserError."""
    planned = plan.make(config, jax.device_count(), mesh.devices.flat[0].device_kind)
    log.say("\n".join(report.describe(planned)))
    kernel = assembly.kernel_of(config, mesh.devices.flat[0].platform)
    where = "" if kernel == "xla" else f" on {attention.LONG} tokens and more, else xla"
    log.say(f"attention: {kernel}{where}")
    plan.check_memory(planned)


def load_state(
    config,
    loaded: Loaded,
    checkpoints: Checkpoints,
) -> step.TrainState:
    """The newest checkpoint's state, or that of step 0 from generator's and assistant's weights."""
    parts, optimizers = loaded.parts, loaded.optimizers
    abstract = assembly.abstract_state(parts.models[DENOISER], optimizers, loaded.mesh)
    latest = checkpoints.latest_step()
    if latest is not None:
        log.say(f"continuing at step {latest} of the checkpoints in {checkpoints.folder}")
        return checkpoints.restore(latest, abstract)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)

    of_assistant = parts.pipeline.folder / parts.pipeline.family.parts[DENOISER].folder
    if config.weights.assistant:
        of_assistant = folders.resolve(config.weights.assistant)
    of_generator = parts.start.folder
    generator = first_of(parts, "generator", of_generator, abstract.generator, config.seed)
    assistant = first_of(parts, "assistant", of_assistant, abstract.assistant, config.seed)
    init = jax.jit(
        lambda g, a: step.init_state(g, a, optimizers),
        out_shardings=shardings,
        donate_argnums=(0, 1),
    )
    return init(generator, assistant)


def first_of(
    parts: Parts,
    name: str,
    folder: Path,
    abstract: Any,
    seed: int,
) -> Any:
    """What a network learns, before its first step: weights of a folder, or new adapters.

    Args: name, generator or assistant; abstract, its shapes and shardings.
    """
    denoiser = parts.models[DENOISER]
    if denoiser.lora is None or not denoiser.lora.adapts(name):
        check_like(folder, denoiser.config)
        return weights.load(folder, abstract)
    key = jax.random.fold_in(jax.random.key(seed), ("generator", "assistant").index(name))
    places = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda key: lora.init(key, abstract), out_shardings=places)(key)


def metadata_of(
    config,
    parts: Parts,
    settings: Settings,
) -> dict[str, Any]:
    """What convert, sample and evaluate need to know of a run; each checkpoint holds it."""
    low_rank = parts.models[DENOISER].lora
    adapters = trained.metadata_of(low_rank, parts.start.folder) if low_rank else {}
    return {
        "denoiser_config": parts.models[DENOISER].config,
        "reference": config.weights.reference,
        "generator_timesteps": settings.generator.timesteps,
        "generator_input": settings.generator.input,
        "initial": config.weights.generator or config.weights.reference,
        "objective": config.objective.name,
        "trained_on": {name: scale for name, scale in scales_of(config.reward).items() if scale},
        "weights": dict(config.weights.items()),
        "directory": str(Path.cwd()),  # where relative folders are found
        **adapters,
    } | folders.identity(parts.pipeline.folder)


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
    processes.gather(f"{section}.prompts")
    return load()


def batches(
    config,
    parts: Parts,
    mesh: Mesh,
    source: Source,
    count: int,
) -> Callable[[int], tuple[dict, ...]]:
    """k -> token ids of step k, over all devices: the same on any number of hosts.

    A tuple of `step.prompt_batches`. Args: count, of these.
    """
    size = config.data.batch_size
    stream = PromptStream(source, seed=config.seed, batch_size=size)
    rows = sharding.local_rows(mesh, size)

    @functools.lru_cache(1)  # the first step's is asked for when it is compiled, too
    def batch_at(k) -> tuple[dict[str, Any], ...]:
        turns = range(k * count, (k + 1) * count)
        texts = [[prompt.text for prompt in stream.at(turn, rows)] for turn in turns]
        return tuple(sharding.place_batch(parts.tokenize(each), mesh, size) for each in texts)

    return batch_at


def scorer_of(
    config,
    parts: Parts,
    settings: Settings,
    mesh: Mesh,
    prompts: dict[str, Source],
) -> HeldOut | None:
    """What scores the generator on eval.prompts; None without."""
    if "eval" not in prompts:
        return None
    held = eval_prompts(config, prompts["eval"])
    sampling = drawing.few_step(settings.generator, settings.latent_shape)
    drawer = drawing.Drawer(parts.pipeline, sampling)
    compiled = drawing.make_scored_draw(drawer, parts.rewards, mesh)
    frozen = parts.frozen()
    base, _ = assembly.bases_of(parts.models[DENOISER].lora, frozen)
    frozen = {name: params for name, params in frozen.items() if name not in _DENOISERS}

    def draw(generator, token_ids, z):
        params = Network(generator, base).params
        return compiled(frozen | {DENOISER: params}, token_ids, z)

    return HeldOut(
        draw=draw,
        sampling=sampling,
        prompts=held,
        token_ids=parts.tokenize([prompt.text for prompt in held]),
        samples=config.eval.samples,
        batch_size=config.eval.batch_size,
        seed=config.seed,
        reads_attributes=config.eval.oracle == "shapes",
        teacher=teacher_of(config, held),
    )


def teacher_of(config, prompts: list[Prompt]) -> held_out.Kept | None:
    """The teacher's scores, where eval.teacher has them for these prompts and rewards."""
    if not config.eval.teacher:
        return None
    folder = files.expand(config.eval.teacher)
    sources = assembly.reward_sources(config)
    found = {name: folders.digest(rewards.resolve(name, sources[name])) for name in sources}
    settings = held_out.of_teacher(prompts, found)
    teacher = held_out.kept(folder, held_out.TEACHER, settings)
    if teacher is None:
        log.say(f"eval.teacher={folder} is of other prompts or rewards: left out of the scores")
    return teacher


def export(
    parts: Parts,
    generator: Any,
    step_number: int,
    metadata: dict,
    workdir: Workdir,
) -> None:
    """Writes the generator as a pipeline that diffusers draws with, and says how.

    Args: metadata, of `metadata_of`. workdir, whose samples the model card shows.
    """
    output, picture = workdir.folder / FOLDER, workdir.folder / PICTURE
    config, low_rank = metadata["denoiser_config"], parts.models[DENOISER].lora
    if low_rank is not None and low_rank.generator:
        generator = trained.merged_on_host(parts.start.folder, config, generator, low_rank)
    usage = export_pipeline(
        Denoiser(generator, config, form_of_run(metadata)),
        About.of_run(
            checkpoint.located(metadata),
            f"ema, step {step_number}",
            picture if picture.exists() else None,
            held_out.for_card(workdir.folder),
        ),
        reference_folder=parts.pipeline.folder,
        output=output,
    )
    if jax.process_index() == 0:
        workdir.upload(FOLDER)
    copy = ", in a copy on your disk" if workdir.url else ""
    log.say(workdir.named(f"exported {output}; to draw with it{copy}:\n{usage}"))
