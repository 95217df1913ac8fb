# SPDX-License-Identifier: Apache-2.0
"""`di-star reward`: a run from preference pairs to a reward's folder."""

import contextlib
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from di_star_jax import log, processes, record, sharding
from di_star_jax.config import fields
from di_star_jax.errors import UserError
from di_star_jax.pipelines.folder import Options
from di_star_jax.preference import scorer as networks
from di_star_jax.preference import source, stream
from di_star_jax.preference.fit import Data, Fitted, Output, Settings, fit
from di_star_jax.preference.loss import LOSSES, TIE
from di_star_jax.preference.records import BROKEN, EQUAL, UNKNOWN, UNLABELLED
from di_star_jax.preference.scorer import Scorer
from di_star_jax.preference.source import Examples, Found
from di_star_jax.preference.step import Optim
from di_star_jax.stop import Stop
from di_star_jax.storage import checkpoint, files, folders
from di_star_jax.storage.checkpoint import Checkpoints
from di_star_jax.storage.workdir import Workdir

FOLDER = "reward"  # of the result, in the workdir
BEST = "best"  # of the best parameters
LEFT_OUT = "left_out.txt"  # lists the rows that could not be used
# What a later start may change, beside where its sources lie: as `record.RESUMABLE`.
RESUMABLE = (
    "mesh.",
    "compute.",
    "train.log_every",
    "train.save_every",
    "data.workers",
    "data.records",
    "data.left_out",
    "optim.lr",
    "optim.clip_norm",
)
_BY_CONTENT = ("data.pairs", "data.validation", "weights.model", "weights.tokenizer")


class Pairs(NamedTuple):
    """What a run learns from, what it is measured by, and digests of both."""

    train: Examples
    held_out: Examples
    digests: dict[str, str]


def run(
    config,
    workdir: str,
    arguments: Sequence[str] = (),
) -> None:
    """Trains a reward as `config` says, continuing what is in `workdir`, and leaves it there.

    Args:
      config: checked ml_collections.ConfigDict, as configs/reward.py.
      workdir: a folder, or a gs:// address; gets config.json, checkpoints/, best/, TensorBoard
        events, metrics.jsonl, left_out.txt, and at the end reward/, a folder of the network in
        transformers' layout.
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
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    record.check_kind(workdir.folder, "loss")
    workdir.check_folder(FOLDER)
    folders.check_output(workdir.folder / FOLDER)
    with stop.free():
        scorer = networks.read(
            config.weights.model, config.weights.tokenizer, options_of(config, mesh)
        )
        log.say(sentence(config, scorer, mesh))
        pairs = load_pairs(config, workdir)
    with contextlib.ExitStack() as stack:
        checkpoints, best = (
            stack.enter_context(Checkpoints(workdir.at(name), keep=1))
            for name in (checkpoint.FOLDER, BEST)
        )
        checkpoints.tidy(["params", "opt"])
        best.tidy(["params"])
        latest = checkpoints.latest_step()
        agree(config, workdir.folder, arguments, pairs, latest)
        if latest == config.train.steps and workdir.holds(FOLDER, networks.FILE):
            show_finished(workdir)
            return
        if latest is not None:
            stop.goes_on = f"stopped at step {latest}; the same command goes on"
        writer = stack.enter_context(
            log.Writer(workdir.folder, first_step=latest or 0, written=workdir.push_sometimes)
        )
        writer.text(latest or 0, "run", sentence(config, scorer, mesh))
        rows = [[name, str(value)] for name, value in fields(config).items()]
        writer.text(latest or 0, "config", log.markdown_table(["field", "value"], rows))
        output = Output(
            checkpoints, best, writer, stopping=lambda: stop.reached(mesh), free=stop.free
        )
        output.saving = lambda: (writer.flush(), workdir.push())
        with stop.free(), log.waiting("decoding the held-out pairs"):
            data = data_of(config, scorer, pairs, mesh)
        stop.doing = "the step at hand and its checkpoint"
        fitted = fit(
            scorer,
            lambda abstract: networks.load(scorer, config.weights.model, abstract),
            data,
            settings_of(config),
            mesh,
            output,
        )
        stop.goes_on = f"stopped at step {fitted.step}; the same command goes on"
        stop.leave_if_asked()
        stop.doing = "the export"
        export(config, scorer, fitted, workdir)


# Before the steps.


def options_of(config, mesh: Mesh) -> Options:
    """How the network runs: in the compute dtype, its masters float32 and over the mesh."""
    return Options(
        dtype=jnp.dtype(config.compute.dtype),
        param_dtype=jnp.float32,
        remat=config.compute.remat,
        shardings=functools.partial(sharding.params_sharding, mesh),
    )


def settings_of(config) -> Settings:
    """The plain values that `fit` needs of a config."""
    optim = config.optim
    return Settings(
        loss=config.loss,
        optim=Optim(**{name: optim[name] for name in Optim._fields}),
        steps=config.train.steps,
        batch_size=config.data.batch_size,
        eval_every=config.eval_every,
        save_every=config.train.save_every,
        log_every=config.train.log_every,
    )


def sentence(
    config,
    scorer: Scorer,
    mesh: Mesh,
) -> str:
    """What a run is, in one line."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(scorer.model.params)]
    count = sum(sizes)
    kind = "ImageReward" if scorer.crop == "torchvision" else "CLIP"
    held = 16 * count / mesh.shape["fsdp"]  # float32: parameters, gradients and two moments
    return (
        f"{config.loss}'s loss on a {kind} of {count:,} parameters at {scorer.size} pixels "
        f"({held / 1e9:.3g} GB a device and activations), learning rate {config.optim.lr:g}, batch "
        f"{config.data.batch_size}, {config.train.steps} steps, seed {config.seed}"
    )


def load_pairs(config, workdir: Workdir) -> Pairs:
    """The pairs, read by the first process while the others wait, and split.

    Raises: UserError for what cannot be used, and where nothing is left to learn.
    """
    folder = _records_folder(config, workdir)

    def load(name: str, option: str) -> Found:
        def read() -> Found:
            return source.load(name, folder, config.data.workers, option)

        if jax.process_index() == 0:
            read()
        processes.gather(option)
        return read()

    found = {"data.pairs": load(config.data.pairs, "data.pairs")}
    if config.data.validation:
        found["data.validation"] = load(config.data.validation, "data.validation")
    tell(found, config.data.left_out, workdir.folder / LEFT_OUT)
    train, held_out = split(config, found)
    digests = {name: each.digest for name, each in found.items()}
    processes.agree("pairs", digests)
    log.say(f"trains on {_told(train)}, measured by {_told(held_out)}")
    return Pairs(train, held_out, digests)


def _records_folder(config, workdir: Workdir) -> Path:
    if config.data.records:
        return files.writable_folder(config.data.records, "data.records")
    return files.user_cache() / "pairs" if workdir.url else workdir.folder / "pairs"


def _told(examples: Examples) -> str:
    prompts = len(np.unique(examples.index["prompt"]))
    return f"{len(examples):,} pairs of {prompts:,} prompts"


def tell(
    found: dict[str, Found],
    limit: float,
    file: Path,
) -> None:
    """Says in one line for each source what is left out, and lists all of it in a file.

    Raises: UserError where that is more than a share `limit`, or all.
    """
    lines = [
        f"{name}: row {fault.row}: {fault.kind}: {fault.what}"
        for each in found.values()
        for name, fault in each.faults
    ]
    if jax.process_index() == 0:
        files.write_text(file, "".join(f"{line}\n" for line in lines))
    for option, each in found.items():
        bad = {kind: each.counts[kind] for kind in (BROKEN, EQUAL, UNKNOWN) if each.counts[kind]}
        rows = len(each) + sum(bad.values())
        said = f"{option}: {len(each):,} of {rows:,} labelled pairs are usable"
        if each.counts[UNLABELLED]:
            said += f", {each.counts[UNLABELLED]:,} more have no label"
        if bad:
            name, fault = each.faults[0]
            counted = ", ".join(f"{count:,} {kind}" for kind, count in bad.items())
            said += (
                f"; left out: {counted}; first: {name}: row {fault.row}: {fault.kind}: {fault.what}"
            )
        if not len(each) or sum(bad.values()) > limit * rows:
            raise UserError(
                f"{said}; more than data.left_out={limit:g} of them, or all: mend the pairs, or "
                "raise it"
            )
        log.say(said + (f"; all are listed in {file}" if bad else ""))


def split(config, found: dict[str, Found]) -> tuple[Examples, Examples]:
    """(pairs to train on, held-out ones), which share no prompt.

    Raises: UserError where they do, or where one of them has nothing that can be learnt or
      measured.
    """
    pairs = found["data.pairs"]
    if "data.validation" in found:
        validation = found["data.validation"]
        _check_apart(config, pairs, validation)
        chosen = np.arange(len(pairs))
        _, others = source.by_prompt(validation, 1.0, config.seed)
    else:
        validation = pairs
        chosen, others = source.by_prompt(pairs, config.data.held_out, config.seed)
    option = "data.validation" if config.data.validation else "data.held_out"
    train = _usable(config, pairs, chosen, "data.pairs")
    held_out = _usable(config, validation, others, option)
    if len(train) < config.data.batch_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} is more than the {len(train)} pairs to "
            f"train on; use {2 ** int(math.log2(len(train)))} or less"
        )
    return pairs.take(train), validation.take(held_out[: config.data.validation_pairs])


def _check_apart(
    config,
    pairs: Found,
    validation: Found,
) -> None:
    shared = source.shared_prompts(pairs, validation)
    if len(shared):
        first = validation.take(shared[:1])[0].caption
        raise UserError(
            f"data.validation={config.data.validation}: {len(shared)} of its {len(validation)} "
            f"pairs have prompts that data.pairs has too, the first is {first!r:.80}; give pairs "
            "of other prompts, or leave data.validation empty to have some held out"
        )


def _usable(
    config,
    found: Found,
    chosen: np.ndarray,
    option: str,
) -> np.ndarray:
    """Those of some pairs that the loss can use. Raises: UserError where there is none but ties."""
    ties = found.index["label_0"][chosen] == TIE
    if not len(chosen):
        raise UserError(
            f"{option}: no pairs are left of {len(found)}; give more, or another data.held_out"
        )
    if ties.all():
        raise UserError(
            f"{option}: all {len(chosen)} pairs are ties, of which nothing can be "
            "learnt or measured; give pairs of which one picture is better"
        )
    return chosen if LOSSES[config.loss].with_ties else chosen[~ties]


def data_of(
    config,
    scorer: Scorer,
    pairs: Pairs,
    mesh: Mesh,
) -> Data:
    """The pairs as batches of what the network reads."""
    rows = sharding.local_rows(mesh, config.data.batch_size)
    of_step = stream.Batches(
        pairs.train, config.seed, config.data.batch_size, tuple(rows), scorer.size, scorer.crop
    )

    @contextlib.contextmanager
    def batches(first: int, until: int):
        with stream.batches(of_step, first, until, config.data.workers) as made:
            yield (stream.tokenized(batch, scorer.tokenize) for batch in made)

    held_out = stream.held_out(pairs.held_out, scorer.size, scorer.crop)
    return Data(batches, stream.tokenized(held_out, scorer.tokenize))


def agree(
    config,
    folder: Path,
    arguments: Sequence[str],
    pairs: Pairs,
    latest: int | None,
) -> None:
    """Checks that a workdir's run is the one of `config`, and writes what this start is.

    Args: latest, step of the newest checkpoint, or None.
    Raises: UserError in one line with what differs.
    """
    kept = record.read(folder) if latest is not None else {}
    source_of_model = Path(folders.resolve(config.weights.model))
    weights = {"weights.model": folders.digest(source_of_model)}
    now = {
        "config": json.loads(json.dumps(fields(config))),
        "arguments": [arg for arg in arguments if arg.lstrip("-").startswith("config")],
        "pairs": pairs.digests,
        "weights": weights,
        "versions": record.versions(),
        "git": record.git_hash(),
    }
    processes.agree("weights and checkpoints", weights | {"newest checkpoint": latest})
    if kept:
        record.check_fields(folder, kept, now, lambda name, both: _may_change(name))
        for what in ("pairs", "weights"):
            _check_content(folder, what, kept.get(what), now)
    processes.gather("config read")
    if jax.process_index() == 0:
        content = now | {"finished": kept.get("finished", {})}
        files.write_text(folder / record.FILE, json.dumps(content, indent=1) + "\n")


def _may_change(name: str) -> bool:
    by_name = any(name == each or (each[-1] == "." and name.startswith(each)) for each in RESUMABLE)
    return by_name or name in _BY_CONTENT


def _check_content(
    folder: Path,
    what: str,
    kept: dict[str, str] | None,
    now: dict[str, Any],
) -> None:
    for name, digest in now[what].items():
        if kept and kept.get(name, digest) != digest:
            raise UserError(
                f"{folder} holds another run: {name}={now['config'][name]} has another content "
                "than at its start; give another --workdir, or what it had"
            )


# After them.


def export(
    config,
    scorer: Scorer,
    fitted: Fitted,
    workdir: Workdir,
) -> None:
    """Writes the best parameters as a reward's folder, and says how to use it."""
    folder = workdir.folder / FOLDER
    measured = fitted.measured
    facts = {
        "loss": config.loss,
        "began_with": config.weights.model,
        "pairs": config.data.pairs,
        "held_out": measured._asdict(),
    }
    with log.waiting("exporting the reward"):
        networks.export(scorer, fitted.params, folder, json.dumps(facts, indent=1) + "\n")
        if jax.process_index() == 0:
            workdir.upload(FOLDER)
    record.finish(workdir.folder, {"step": fitted.step, "held_out": measured._asdict()})
    processes.gather("the end")
    show_finished(workdir)


def show_finished(workdir: Workdir) -> None:
    """Says what a run has left."""
    done = record.finished(workdir.folder)
    held_out = done.get("held_out", {})
    if held_out:
        log.say(
            f"finished: best at step {held_out['step']} of {done['step']}: accuracy "
            f"{held_out['accuracy']:.3f} on {held_out['pairs']} held-out pairs, "
            f"{held_out['with_ties']:.3f} with ties predicted where the probabilities differ by "
            f"{held_out['tie_threshold']:g} at most, which was chosen on these pairs"
        )
    folder = workdir.at(FOLDER)
    name = "imagereward" if (workdir.folder / FOLDER / "med_config.json").exists() else "pickscore"
    log.say(
        f"the reward is in {folder}; to use it: --config.weights.{name}={folder} "
        f"--config.reward.{name}=SCALE"
        + (f" --config.weights.reward_tokenizer={folder}" if name == "pickscore" else "")
    )
