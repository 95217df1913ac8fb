# SPDX-License-Identifier: Apache-2.0
"""From a network and preference pairs to the parameters that rank held-out pairs best.

The trainer of reward models: `di-star reward` calls it with a config, the shapes world's
pretraining without one.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from di_star_jax import log, sharding
from di_star_jax.errors import UserError
from di_star_jax.preference import loss as losses
from di_star_jax.preference.loss import LOSSES
from di_star_jax.preference.scorer import Scorer, trainable
from di_star_jax.preference.step import (
    Metrics,
    Optim,
    Params,
    State,
    adamw,
    init_state,
    make_scores,
    make_step,
    rate_schedule,
)
from di_star_jax.preference.stream import Batch
from di_star_jax.storage.checkpoint import Checkpoints


class Settings(NamedTuple):
    """How a reward learns.

    loss: a key of LOSSES. steps, and how many of them lie between two looks at the held-out pairs,
    two checkpoints, and two lines of scalars. batch_size: pairs, over all devices.
    """

    loss: str
    optim: Optim
    steps: int
    batch_size: int
    eval_every: int
    save_every: int
    log_every: int


class Data(NamedTuple):
    """What it learns from.

    stream: (first, until) -> the batches of those steps, with "prompts", of this process's rows.
    held_out: all pairs that it is measured by, as one batch, the same in every process.
    """

    stream: Callable[[int, int], contextlib.AbstractContextManager[Iterator[Batch]]]
    held_out: Batch


@dataclasses.dataclass
class Output:
    """Where the results go.

    Attributes: checkpoints, of the state; best, of the best parameters; writer, of scalars, or
    None; saving, called before a checkpoint is written; stopping, whether to end after this step;
    free, around what loses nothing when the process ends in the middle of it.
    """

    checkpoints: Checkpoints
    best: Checkpoints
    writer: log.Writer | None = None
    saving: Callable[[], None] = lambda: None
    stopping: Callable[[], bool] = lambda: False
    free: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


class Measured(NamedTuple):
    """The held-out pairs' figures.

    accuracy: share of pairs in the people's order, half for a tie. with_ties: where ties are
    predicted too, by the best `tie_threshold` on these very pairs.
    """

    step: int
    accuracy: float
    loss: float
    with_ties: float
    tie_threshold: float
    pairs: int


class Fitted(NamedTuple):
    """step: done. params: the best, or None where it was stopped before. measured: of these."""

    step: int
    params: Params | None
    measured: Measured | None


def fit(
    scorer: Scorer,
    initial: Callable[[Params], Params],
    data: Data,
    settings: Settings,
    mesh: Mesh,
    output: Output,
) -> Fitted:
    """Trains from `initial`, or from the newest checkpoint of `output`.

    Args: initial, from the shapes of the parameters, float32 and with their shardings, to their
      first values.
    Raises: UserError for a gradient that is not finite, and checkpoints that do not fit.
    """
    learns = trainable(scorer.model.params, settings.optim.fixed_blocks)
    optimizer = adamw(settings.optim, settings.steps, learns)
    abstract = abstract_state(scorer, optimizer, mesh)
    judge = Judge(make_scores(scorer.score, mesh), data.held_out, settings, mesh)
    with output.free():
        state = _first_state(initial, abstract, optimizer, output)
    best = Best(output.best, LOSSES[settings.loss].best_by)
    first = int(state.step)
    with Report(settings, output.writer, first) as report:
        if best.measured is None:
            with output.free(), log.waiting("scoring the held-out pairs before training"):
                measured = judge.measure(first, state.params)
            best.offer(measured, state.params)
            report.held_out(measured)
        plain = make_step(scorer.score, settings.loss, optimizer, (settings.optim, learns), mesh)
        places = jax.tree.map(lambda x: x.sharding, abstract)
        update = jax.jit(plain, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
        if first < settings.steps:
            with data.stream(first, settings.steps) as batches:
                placed = (sharding.place_batch(b, mesh, settings.batch_size) for b in batches)
                state = _take_steps(update, state, placed, (judge, best, report, output))
    output.checkpoints.wait()
    output.best.wait()
    if int(state.step) < settings.steps:
        return Fitted(int(state.step), None, None)
    params = output.best.restore_item(best.measured.step, "params", abstract.params)
    return Fitted(int(state.step), params, best.measured)


def abstract_state(
    scorer: Scorer,
    optimizer: Any,
    mesh: Mesh,
) -> State:
    """The state's shapes and shardings; parameters and moments are float32."""
    params = sharding.abstract(scorer.model.params, dtype=jnp.float32)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return sharding.abstract(state, sharding.params_sharding(mesh, state))


def _first_state(
    initial: Callable[[Params], Params],
    abstract: State,
    optimizer: Any,
    output: Output,
) -> State:
    latest = output.checkpoints.latest_step()
    if latest is not None:
        log.say(f"continuing at step {latest} of the checkpoints in {output.checkpoints.folder}")
        return output.checkpoints.restore(latest, abstract)
    output.best.clear()  # of a start that did not come to a checkpoint, maybe with other settings
    places = jax.tree.map(lambda x: x.sharding, abstract)
    make = jax.jit(lambda p: init_state(p, optimizer), out_shardings=places)
    return make(initial(abstract.params))


def _take_steps(
    update: Callable,
    state: State,
    batches: Iterator[dict[str, Any]],
    parts: tuple["Judge", "Best", "Report", Output],
) -> State:
    """The state after the last step, or after the one at which it is stopped, when it is saved.

    Step k's metrics are fetched after step k + 1 is dispatched, so that the devices never wait for
    the host.
    """
    judge, best, report, output = parts
    settings = judge.settings
    first = int(state.step)
    with output.free(), log.waiting("reading the first pairs"):
        arrays = next(batches)
    with output.free(), log.waiting("compiling the step"):
        update = update.lower(state, arrays).compile()
    pending = None
    for k in range(first, settings.steps):
        state, metrics = update(state, arrays if k == first else next(batches))
        if pending is not None:
            report.step(*pending)
        pending = (k + 1, metrics)
        stopping, last = output.stopping(), k + 1 == settings.steps
        saves = stopping or last or (k + 1) % settings.save_every == 0
        measures = last or (k + 1) % settings.eval_every == 0
        if saves or measures:
            report.step(*pending)  # a state that is not finite is neither saved nor measured
            pending = None
        # In this order: a step whose checkpoint is there has been measured.
        if measures:
            with report.progress.paused("scoring"):
                measured = judge.measure(k + 1, state.params)
                best.offer(measured, state.params)
            report.held_out(measured)
        if saves:
            with report.progress.paused("saving"):
                output.saving()
                output.checkpoints.save(k + 1, state, {"pairs": (k + 1) * settings.batch_size})
        if stopping:
            break
    return state


class Judge:
    """Measures parameters by the held-out pairs.

    Args: scores, of `make_scores`; pairs, of `Data.held_out`.
    """

    def __init__(
        self,
        scores: Callable[[Params, Batch], jax.Array],
        pairs: Batch,
        settings: Settings,
        mesh: Mesh,
    ):
        self.settings = settings
        self.mesh = mesh
        self._scores = scores
        self._pairs = pairs

    def measure(self, k: int, params: Params) -> Measured:
        """Args: k, steps done."""
        label_0 = self._pairs["label_0"]
        scores = self.scores(params)
        loss = LOSSES[self.settings.loss]
        each = loss.per_pair(scores, label_0)
        weight = losses.weights_of(jnp.asarray(self._pairs["num_examples"]), loss)
        threshold, with_ties = losses.best_threshold(scores, label_0)
        return Measured(
            step=k,
            accuracy=float(jnp.mean(losses.agreement(scores, label_0))),
            loss=float(jnp.sum(weight * each)),
            with_ties=with_ties,
            tie_threshold=threshold,
            pairs=len(label_0),
        )

    def scores(self, params: Params) -> np.ndarray:
        """Of all held-out pairs, [N, 2]."""
        size = self.settings.batch_size
        count = len(self._pairs["label_0"])
        rows = np.array(sharding.local_rows(self.mesh, size))
        found = []
        for start in range(0, count, size):
            chosen = (start + rows) % count  # the last batch is filled up with the first pairs
            batch = jax.tree.map(lambda x: x[chosen], self._pairs)  # noqa: B023
            found.append(self._scores(params, sharding.place_batch(batch, self.mesh, size)))
        return np.concatenate(jax.device_get(found))[:count]


class Best:
    """Keeps the parameters that were measured best, in a checkpoint of their own.

    Args: checkpoints, that keep one; by, "accuracy" or "loss".
    """

    def __init__(self, checkpoints: Checkpoints, by: str):
        self._checkpoints = checkpoints
        self._by = by
        self.measured = None
        latest = checkpoints.latest_step()
        if latest is not None:
            self.measured = Measured(**checkpoints.metadata(latest)["measured"])

    def offer(self, measured: Measured, params: Params) -> None:
        """Keeps the parameters where they are better than those that are kept."""
        if self.measured is not None and not self._is_better(measured):
            return
        self.measured = measured
        self._checkpoints.save(measured.step, {"params": params}, {"measured": measured._asdict()})

    def _is_better(self, measured: Measured) -> bool:
        if self._by == "loss":
            return measured.loss < self.measured.loss
        return measured.accuracy > self.measured.accuracy


class Report(contextlib.AbstractContextManager):
    """What training says of its steps. Args: writer, or None; first, the step it starts from."""

    def __init__(
        self,
        settings: Settings,
        writer: log.Writer | None,
        first: int,
    ):
        total = settings.steps
        self._settings = settings
        self._writer = writer
        self._rate = rate_schedule(settings.optim, total)
        self._shown = ""
        self.progress = log.Progress(
            total,
            first,
            pauses={
                "saving": lambda k: total // settings.save_every - k // settings.save_every,
                "scoring": lambda k: total // settings.eval_every - k // settings.eval_every,
            },
        )

    def __exit__(self, *error: object) -> None:
        self.progress.close()

    def step(self, k: int, metrics: Metrics) -> None:
        """Raises: UserError for a gradient that is not finite. Args: k, steps done."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("nonfinite"):
            raise UserError(
                f"step {k}: the gradient is not finite (train/loss={values['train/loss']:g}); the "
                "newest checkpoint is from before it: lower optim.lr, or set "
                "compute.dtype=float32, and run again"
            )
        values["train/lr"] = float(self._rate(k - 1))
        if k % self._settings.log_every == 0 or k == self._settings.steps:
            self._write(k, values)
        each = self.progress.step_seconds()
        parts = [
            f"loss {values['train/loss']:.4f}",
            f"accuracy {values['train/accuracy']:.3f}",
            self._shown,
            f"{self._settings.batch_size / each:.1f} pairs/s" if each else "",
        ]
        self.progress.update(k, ", ".join(part for part in parts if part))

    def held_out(self, measured: Measured) -> None:
        """Writes what the held-out pairs say after a step."""
        values = measured._asdict()
        k = values.pop("step")
        self._write(k, {f"held_out/{name}": float(value) for name, value in values.items()})
        self._shown = f"held-out {measured.accuracy:.3f}"
        log.say(
            f"step {k}: held-out accuracy {measured.accuracy:.3f} ({measured.with_ties:.3f} with "
            f"ties by {measured.tie_threshold:g}), loss {measured.loss:.4f}"
        )

    def _write(self, k: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            known = {name: value for name, value in values.items() if math.isfinite(value)}
            self._writer.scalars(k, known)
