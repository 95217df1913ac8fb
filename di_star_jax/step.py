# SPDX-License-Identifier: Apache-2.0
"""One training step of Diff-Instruct* as one compiled function: draws, both gradients, both
updates, the average.

The gradients run per device (gradients.py under `sharding.on_each`); the rest is elementwise or
drawn, and XLA splits it. B is the global batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from di_star_jax import gradients, schemes, sharding
from di_star_jax.diffusion import Schedule
from di_star_jax.gradients import Networks, Params, Settings


class TrainState(NamedTuple):
    """All that a run changes, in the order of the checkpoint.

    Parameter trees and moments are float32.
    """

    step: jax.Array
    generator: Params
    assistant: Params
    ema: Params
    opt_generator: Any
    opt_assistant: Any


def adamw(
    learning_rate: float,
    *,
    lr_warmup_steps: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; the rate rises linearly over `lr_warmup_steps`.

    At b1 = 0 the first moment is the gradient itself and is not kept: 10 GB less for each of SDXL's
    two networks.
    """
    schedule = optax.linear_schedule(
        learning_rate / (lr_warmup_steps + 1), learning_rate, lr_warmup_steps
    )
    if b1:
        adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    else:
        adam = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        adam,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def init_state(
    generator: Params,
    assistant: Params,
    opt_generator: optax.GradientTransformation,
    opt_assistant: optax.GradientTransformation,
) -> TrainState:
    """State at step 0.

    Args: float32 parameter trees (copied, for the state is donated) and their optimizers.
    """

    def copy(tree):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    return TrainState(
        jnp.zeros((), jnp.int32),
        copy(generator),
        copy(assistant),
        copy(generator),
        opt_generator.init(generator),
        opt_assistant.init(assistant),
    )


def _update(optimizer, params: Params, grads: Params, opt_state):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _batch_specs(tree: Any) -> Any:
    """Splits every leaf's first axis, the batch; scalars are everywhere the same."""
    return jax.tree.map(lambda x: sharding.batch_spec() if x.ndim else PartitionSpec(), tree)


def _on_each(mesh: Mesh, fn, networks: tuple, batch: tuple, summed: tuple, parts: int = 1):
    """fn(*networks, *batch) -> (gradients of `summed`, per-sample results), run per device and
    summed over devices.
    """
    specs = sharding.params_spec(mesh, summed)

    def each(networks, batch):
        grads, results = gradients.in_microbatches(
            lambda *part: fn(*networks, *part), parts, *batch
        )
        return sharding.sum_gradients(grads, specs), results

    spread = sharding.on_each(
        mesh,
        each,
        (sharding.params_spec(mesh, networks), _batch_specs(batch)),
        (specs, sharding.batch_spec()),
    )
    return spread(networks, batch)


def _draw(mesh: Mesh, key: jax.Array, batch: int, settings: Settings) -> gradients.Draws:
    """The same draws on any mesh, each device making its own part."""
    draws = gradients.draw(key, batch, settings)
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)),
        draws,
        _batch_specs(draws),
    )


def _batch_size(token_ids: dict) -> int:
    return jax.tree.leaves(token_ids)[0].shape[0]


def make_assistant_updates(
    networks: Networks, settings: Settings, schedule: Schedule, optimizer, mesh: Mesh
):
    """Returns update(assistant, opt_state, frozen, token_ids, x0 [B, h, w, 4], key, first) -> the
    first two, figures.

    `assistant_updates` steps of denoising score matching on one batch of x0, each with fresh times
    and noise, from the number `first` on; figures are those of the last.
    """

    def gradient(assistant, frozen, token_ids, x0, t, eps):
        return gradients.of_assistant(
            assistant, frozen, token_ids, x0, t, eps, networks=networks, schedule=schedule
        )

    def one(carry, key, frozen, token_ids, x0):
        t, eps = gradients.times_and_noise(key, settings.assistant_times, x0.shape)
        grads, loss = _on_each(
            mesh,
            gradient,
            (carry[0], frozen),
            (token_ids, x0, t, eps),
            carry[0],
            settings.microbatches,
        )
        return _update(optimizer, carry[0], grads, carry[1]), (
            jnp.mean(loss),
            optax.global_norm(grads),
        )

    def update(assistant, opt_state, frozen, token_ids, x0, key, first):
        keys = jax.random.split(key, settings.assistant_updates)[first:]
        carry, logged = one((assistant, opt_state), keys[0], frozen, token_ids, x0)
        if len(keys) > 1:
            # One traced body for all others. The first stays outside the loop: on CPU a
            # convolution's gradient is
            # 15 times slower inside of one.
            carry, history = jax.lax.scan(
                lambda carry, key: one(carry, key, frozen, token_ids, x0), carry, keys[1:]
            )
            logged = jax.tree.map(lambda values: values[-1], history)
        return *carry, {"assistant/loss": logged[0], "assistant/grad_norm": logged[1]}

    return update


def make_train_step(
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
    opt_generator,
    opt_assistant,
    mesh: Mesh,
):
    """Returns the step, to be jitted with the state donated.

    train_step(state, frozen, token_ids, key) -> (state, metrics):
      state: TrainState.
      frozen: parameters that never change: {'unet': the reference, ...}, see pipeline.py.
      token_ids: dict of int32 [B, L].
      key: of the run; the step's number is folded in.
      metrics: float32 scalars; `nonfinite` counts the gradients' non-finite norms.
    """
    further_updates = make_assistant_updates(networks, settings, schedule, opt_assistant, mesh)

    def gradient(generator, assistant, frozen, token_ids, draws):
        return schemes.GRADIENTS[settings.sharing](
            generator,
            assistant,
            frozen,
            token_ids,
            draws,
            networks=networks,
            settings=settings,
            schedule=schedule,
        )

    def train_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        draws = _draw(mesh, key, _batch_size(token_ids), settings)
        trained = (state.generator, state.assistant)
        grads, figures = _on_each(
            mesh, gradient, (*trained, frozen), (token_ids, draws), trained, settings.microbatches
        )
        norms = tuple(optax.global_norm(grad) for grad in grads)

        generator, opt_g = _update(opt_generator, state.generator, grads[0], state.opt_generator)
        assistant, opt_a = _update(opt_assistant, state.assistant, grads[1], state.opt_assistant)
        assistant_metrics = {
            "assistant/loss": jnp.mean(figures.assistant),
            "assistant/grad_norm": norms[1],
        }
        if settings.assistant_updates > 1:
            assistant, opt_a, assistant_metrics = further_updates(
                assistant, opt_a, frozen, token_ids, figures.x0, jax.random.split(key, 3)[2], 1
            )

        decay = settings.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, generator)
        metrics = assistant_metrics | {
            "generator/loss": jnp.mean(figures.regulariser) - jnp.mean(figures.reward),
            "generator/grad_norm": norms[0],
            "generator/x0_std": jnp.std(figures.x0),
            "regulariser/loss": jnp.mean(figures.regulariser),
            "reward/total": jnp.mean(figures.reward),
            **{f"reward/{name}": jnp.mean(reward) for name, reward in figures.rewards.items()},
            **{f"reward/{name}/std": jnp.std(reward) for name, reward in figures.rewards.items()},
            "nonfinite": _count_nonfinite(
                norms[0], norms[1], assistant_metrics["assistant/grad_norm"]
            ),
        }
        return TrainState(state.step + 1, generator, assistant, ema, opt_g, opt_a), metrics

    return train_step


def make_warmup_step(
    networks: Networks, settings: Settings, schedule: Schedule, opt_assistant, mesh: Mesh
):
    """Returns a step with `make_train_step`'s signature that trains the assistant alone on the
    frozen generator.
    """
    update = make_assistant_updates(networks, settings, schedule, opt_assistant, mesh)

    def generate(generator, frozen, token_ids, draws):
        return (), gradients.samples(
            generator,
            frozen,
            token_ids,
            draws,
            networks=networks,
            settings=settings,
            schedule=schedule,
        )

    def warmup_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        draws = _draw(mesh, key, _batch_size(token_ids), settings)
        _, x0 = _on_each(
            mesh, generate, (state.generator, frozen), (token_ids, draws), (), settings.microbatches
        )
        assistant, opt_a, metrics = update(
            state.assistant,
            state.opt_assistant,
            frozen,
            token_ids,
            x0,
            jax.random.split(key, 3)[2],
            0,
        )
        metrics["nonfinite"] = _count_nonfinite(metrics["assistant/grad_norm"])
        return state._replace(
            step=state.step + 1, assistant=assistant, opt_assistant=opt_a
        ), metrics

    return warmup_step


def _count_nonfinite(*norms: jax.Array) -> jax.Array:
    return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)
