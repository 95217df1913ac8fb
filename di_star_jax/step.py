# SPDX-License-Identifier: Apache-2.0
"""One training step of Diff-Instruct* as one compiled function.

Draws, both gradients, both updates, the average. The gradients run per device (gradients.py); the
rest is elementwise or drawn, and XLA splits it. B is the global batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from di_star_jax import gradients, sharding
from di_star_jax.gradients import Draws, Figures, Method, Params, Settings
from di_star_jax.schemes import SCHEMES


class TrainState(NamedTuple):
    """All that a run changes: a checkpoint holds one item for each field, in this order.

    Beside them it holds `train.metadata_of`; draws and prompts follow from seed and step.
    Parameter trees and moments are float32.
    """

    step: jax.Array
    generator: Params
    assistant: Params
    ema: Params
    opt_generator: Any
    opt_assistant: Any


class Optimizers(NamedTuple):
    """optax transformations of both networks."""

    generator: optax.GradientTransformation
    assistant: optax.GradientTransformation


Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, dict, dict, jax.Array], tuple[TrainState, Metrics]]


class AdamW(NamedTuple):
    """AdamW behind a global-norm clip; the rate rises linearly over `lr_warmup_steps`."""

    lr_warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


def adamw(learning_rate: float, settings: AdamW) -> optax.GradientTransformation:
    """The optimizer of one network.

    At b1 = 0 the first moment is the gradient itself and is not kept: 10 GB less for each of SDXL's
    two networks.
    """
    s = settings
    schedule = rate_schedule(learning_rate, s.lr_warmup_steps)
    adam = optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps)
    if s.b1 == 0.0:
        adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(
        optax.clip_by_global_norm(s.clip_norm),
        adam,
        optax.add_decayed_weights(s.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def rate_schedule(learning_rate: float, lr_warmup_steps: int) -> optax.Schedule:
    """updates done -> the rate of the next one: a linear rise, then constant."""
    first = learning_rate / (lr_warmup_steps + 1)
    return optax.linear_schedule(first, learning_rate, lr_warmup_steps)


def init_state(
    generator: Params,
    assistant: Params,
    optimizers: Optimizers,
) -> TrainState:
    """State at step 0.

    Args: float32 parameter trees (copied, for the state is donated) and their optimizers.
    """

    def copy(tree):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=copy(generator),
        assistant=copy(assistant),
        ema=copy(generator),
        opt_generator=optimizers.generator.init(generator),
        opt_assistant=optimizers.assistant.init(assistant),
    )


def make_train_step(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """Returns the step, to be jitted with the state donated.

    train_step(state, frozen, token_ids, key) -> (state, metrics):
      state: TrainState.
      frozen: parameters that never change: {'reference': a UNet's, ...}, see assembly.py.
      token_ids: what text encoders and rewards make of B prompts, trees of [B, ...].
      key: of the run; the step's number is folded in.
      metrics: float32 scalars; `nonfinite` counts the gradients' non-finite norms.
    """
    settings = method.settings
    both_gradients = functools.partial(SCHEMES[settings.scheme], method)
    update_assistant = make_assistant_update(method, optimizers.assistant, mesh)

    def train_step(
        state: TrainState,
        frozen: dict,
        token_ids: dict,
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        draws = draw(mesh, jax.random.fold_in(key, state.step), token_ids, settings)
        trained = (state.generator, state.assistant)
        batch = (token_ids, draws)
        on_devices = spread(mesh, both_gradients, (trained, frozen), batch, trained, settings)
        grads, figures = on_devices((trained, frozen), batch)

        generator, opt_generator = update(
            optimizers.generator, grads[0], state.generator, state.opt_generator
        )
        learnt = update(optimizers.assistant, grads[1], state.assistant, state.opt_assistant)
        logged = assistant_metrics(figures.assistant, grads[1])
        if settings.assistant_updates > 1:
            batch = (token_ids, figures.x0, draws)
            learnt, logged = further_updates(update_assistant, learnt, frozen, batch, first=1)
        ema = optax.incremental_update(generator, state.ema, 1.0 - settings.ema_decay)
        after = TrainState(state.step + 1, generator, learnt[0], ema, opt_generator, learnt[1])
        return after, step_metrics(figures, grads, logged)

    return train_step


def make_warmup_step(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """As `make_train_step`, of the assistant alone on the frozen generator."""
    settings = method.settings
    generate = functools.partial(gradients.samples, method)
    update_assistant = make_assistant_update(method, optimizers.assistant, mesh)

    def warmup_step(
        state: TrainState,
        frozen: dict,
        token_ids: dict,
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        draws = draw(mesh, jax.random.fold_in(key, state.step), token_ids, settings)
        batch = (token_ids, draws)
        networks = ((state.generator, frozen),)
        _, x0 = spread(mesh, generate, networks, batch, (), settings)(networks, batch)
        learnt = (state.assistant, state.opt_assistant)
        batch = (token_ids, x0, draws)
        learnt, logged = further_updates(update_assistant, learnt, frozen, batch, first=0)
        logged["nonfinite"] = count_nonfinite(logged["assistant/grad_norm"])
        state = state._replace(step=state.step + 1, assistant=learnt[0], opt_assistant=learnt[1])
        return state, logged

    return warmup_step


def make_assistant_update(
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable:
    """Returns one step of denoising score matching on samples x0.

    update_assistant((assistant, opt_state), frozen, token_ids, x0, (times [B], noise)) ->
    the first two, metrics.
    """
    gradient = functools.partial(gradients.of_assistant, method)

    def update_assistant(learnt, frozen, token_ids, x0, noised):
        assistant, opt_state = learnt
        networks = ((assistant, frozen),)
        batch = (token_ids, x0, noised)
        on_devices = spread(mesh, gradient, networks, batch, assistant, method.settings)
        grads, loss = on_devices(networks, batch)
        learnt = update(optimizer, grads, assistant, opt_state)
        return learnt, assistant_metrics(loss, grads)

    return update_assistant


def further_updates(
    update_assistant: Callable,
    learnt: tuple,
    frozen: dict,
    batch: tuple,
    *,
    first: int,
) -> tuple[tuple, Metrics]:
    """The assistant's updates from the number `first` on, each with its own times and noise.

    Args: batch, of token ids, x0 and draws. Returns: what has learnt; the last one's metrics.
    """
    token_ids, x0, draws = batch
    t = jnp.moveaxis(draws.t_psi, 1, 0)[first:]
    eps = jnp.moveaxis(draws.eps_psi, 1, 0)[first:]
    learnt, logged = update_assistant(learnt, frozen, token_ids, x0, (t[0], eps[0]))
    if len(t) == 1:
        return learnt, logged

    def another(learnt, noised):
        return update_assistant(learnt, frozen, token_ids, x0, noised)

    # One traced body for all others. The first stays outside the loop: on CPU a convolution's
    # gradient is 15 times slower inside of one.
    learnt, history = jax.lax.scan(another, learnt, (t[1:], eps[1:]))
    return learnt, jax.tree.map(lambda values: values[-1], history)


def update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    params: Params,
    opt_state: Any,
) -> tuple[Params, Any]:
    """(params, opt_state) after one step of optax."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def assistant_metrics(loss: jax.Array, grads: Params) -> Metrics:
    """Of one update. Args: loss [B]; grads, of the assistant."""
    return {"assistant/loss": jnp.mean(loss), "assistant/grad_norm": optax.global_norm(grads)}


def step_metrics(
    figures: Figures,
    grads: tuple[Params, Params],
    assistant: Metrics,
) -> Metrics:
    """What a step logs. Args: assistant, of its last update."""
    norms = [optax.global_norm(grad) for grad in grads]
    regulariser = jnp.mean(figures.regulariser)
    reward = jnp.mean(figures.reward)
    return assistant | {
        "generator/loss": regulariser - reward,
        "generator/grad_norm": norms[0],
        "generator/x0_std": jnp.std(figures.x0),
        "regulariser/loss": regulariser,
        "reward/total": reward,
        **{f"reward/{name}": jnp.mean(values) for name, values in figures.rewards.items()},
        **{f"reward/{name}/std": jnp.std(values) for name, values in figures.rewards.items()},
        "nonfinite": count_nonfinite(*norms, assistant["assistant/grad_norm"]),
    }


def count_nonfinite(*norms: jax.Array) -> jax.Array:
    """How many of the norms are not finite, float32."""
    return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)


def draw(
    mesh: Mesh,
    key: jax.Array,
    token_ids: dict,
    settings: Settings,
) -> Draws:
    """The same draws on any mesh, each device making its own part."""
    batch = jax.tree.leaves(token_ids)[0].shape[0]
    draws = gradients.draw(key, batch, settings)
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)),
        draws,
        batch_specs(draws),
    )


def batch_specs(tree: Any) -> Any:
    """Splits every leaf's first axis, the batch; scalars are everywhere the same."""
    return jax.tree.map(lambda x: sharding.batch_spec() if x.ndim else PartitionSpec(), tree)


def spread(
    mesh: Mesh,
    fn: Callable,
    networks: tuple,
    batch: tuple,
    summed: Any,
    settings: Settings,
) -> Callable:
    """fn(*networks, *batch) -> (gradients like `summed`, per-sample results), over all devices.

    Args: networks, batch, summed: the trees themselves, for their shapes.
    Returns: a function (networks, batch) -> (gradients, results) of the whole batch.
    """
    specs = sharding.params_spec(mesh, summed)
    parts = settings.microbatches

    def per_device(networks, batch):
        if parts > 1:
            grads, results = in_microbatches(functools.partial(fn, *networks), parts, batch)
        else:
            grads, results = fn(*networks, *batch)
        return sharding.sum_gradients(grads, specs), results

    in_specs = (sharding.params_spec(mesh, networks), batch_specs(batch))
    return sharding.on_each(mesh, per_device, in_specs, (specs, sharding.batch_spec()))


def in_microbatches(
    fn: Callable,
    count: int,
    batch: tuple,
) -> tuple[Any, Any]:
    """fn(*batch) -> (gradients, per-sample results) in `count` parts, one after the other.

    Args: count, a divisor of the batch; batch, trees whose leaves' first axis is the batch, but for
      scalars.
    Returns: the parts' mean gradients and their results one after the other, as of one call.
    """

    def cut(x):
        return x.reshape(count, -1, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, (count,))

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def one(sums, part):
        grads, results = fn(*part)
        return jax.tree.map(lambda total, grad: total + grad / count, sums, grads), results

    sums, results = jax.lax.scan(one, zeros, parts)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
