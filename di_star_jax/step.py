# SPDX-License-Identifier: Apache-2.0
"""One training step of Diff-Instruct* as one pure function: both gradients, both updates, the average.

B is the global batch; latents are [B, h, w, 4], images [B, H, W, 3].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from di_star_jax.diffusion import Schedule, guide
from di_star_jax.models.unet import Condition
from di_star_jax.objectives import OBJECTIVES, denoising_score_matching
from di_star_jax.samplers import one_step

Params = Any


class TrainState(NamedTuple):
    """All that a run changes, in the order of the checkpoint. Parameter trees and moments are float32."""
    step: jax.Array
    generator: Params
    assistant: Params
    ema: Params
    opt_generator: Any
    opt_assistant: Any


class Networks(NamedTuple):
    """The functions a step is made of; parameters always come first.

    unet: (params, x_t [B, h, w, 4], t [B], Condition) -> eps [B, h, w, 4] float32.
    encode_text: (frozen, token_ids) -> (Condition, null Condition).
    reward: (frozen, x0 [B, h, w, 4], token_ids) -> [B], through the VAE decoder.
    """
    unet: Callable[..., jax.Array]
    encode_text: Callable[..., tuple[Condition, Condition]]
    reward: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Plain values of a step; see configs/sdxl.py for units, ranges and reasons."""
    objective: str
    omega: float
    reward_scale: float
    huber_c: float
    generator_times: tuple[int, int]  # first and last, both included
    assistant_times: tuple[int, int]
    assistant_updates: int
    generator_timestep: int
    latent_shape: tuple[int, int, int]
    ema_decay: float


def adamw(learning_rate: float, *, lr_warmup_steps: int, b1: float, b2: float, eps: float, weight_decay: float,
          clip_norm: float) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; the rate rises linearly over `lr_warmup_steps`."""
    schedule = optax.linear_schedule(learning_rate / (lr_warmup_steps + 1), learning_rate, lr_warmup_steps)
    return optax.chain(optax.clip_by_global_norm(clip_norm),
                       optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def init_state(generator: Params, assistant: Params, opt_generator: optax.GradientTransformation,
               opt_assistant: optax.GradientTransformation) -> TrainState:
    """State at step 0. Args: float32 parameter trees (copied, for the state is donated) and their optimizers."""
    def copy(tree):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    return TrainState(jnp.zeros((), jnp.int32), copy(generator), copy(assistant), copy(generator),
                      opt_generator.init(generator), opt_assistant.init(assistant))


def _draw(key: jax.Array, times: tuple[int, int], shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Uniform integer times, both ends included, and noise."""
    key_t, key_eps = jax.random.split(key)
    return jax.random.randint(key_t, shape[:1], times[0], times[1] + 1), jax.random.normal(key_eps, shape)


def guided_reference(unet, params: Params, condition: Condition, null: Condition, omega: float):
    """eps_ref(x_t, t) with guidance inside: conditional and unconditional as one batch of 2B."""
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)

    def eps_ref(x_t, t):
        eps = unet(params, jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        return guide(*jnp.split(eps, 2), omega)

    return eps_ref


def make_generate(networks: Networks, settings: Settings, schedule: Schedule):
    """Returns generate(params, z, condition) -> x0 [B, h, w, 4]: the one-step generator."""
    timesteps = [settings.generator_timestep]

    def generate(params, z, condition):
        return one_step(lambda x, t: networks.unet(params, x, t, condition), z, timesteps, schedule)

    return generate


def generator_loss(x0: jax.Array, key: jax.Array, *, assistant: Params, frozen: dict, conditions, token_ids,
                   networks: Networks, settings: Settings, schedule: Schedule):
    """Mean over the batch of -alpha_rew r(x0, c) + L_reg(x0) (Eq. 3.4), and what to log."""
    condition, null = conditions
    t, eps = _draw(key, settings.generator_times, x0.shape)
    regulariser = OBJECTIVES[settings.objective](
        x0, t, eps,
        eps_psi=lambda x_t, t: networks.unet(assistant, x_t, t, condition),
        eps_ref=guided_reference(networks.unet, frozen["unet"], condition, null, settings.omega),
        huber_c=settings.huber_c, schedule=schedule)
    reward = networks.reward(frozen, x0, token_ids)
    loss = jnp.mean(regulariser - settings.reward_scale * reward)
    return loss, {"regulariser/loss": jnp.mean(regulariser), "reward/mean": jnp.mean(reward),
                  "reward/std": jnp.std(reward)}


def _update(optimizer, params: Params, grads: Params, opt_state):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train_assistant(assistant: Params, opt_state, x0: jax.Array, key: jax.Array, *, condition: Condition,
                    networks: Networks, settings: Settings, schedule: Schedule, optimizer):
    """`assistant_updates` steps of denoising score matching on one batch of x0, each with fresh times and noise."""
    def loss_fn(assistant, key):
        t, eps = _draw(key, settings.assistant_times, x0.shape)
        return jnp.mean(denoising_score_matching(
            x0, t, eps, eps_psi=lambda x_t, t: networks.unet(assistant, x_t, t, condition), schedule=schedule))

    def one_update(carry, key):
        loss, grads = jax.value_and_grad(loss_fn)(carry[0], key)
        return _update(optimizer, carry[0], grads, carry[1]), (loss / x0[0].size, optax.global_norm(grads))

    keys = jax.random.split(key, settings.assistant_updates)
    carry, logged = one_update((assistant, opt_state), keys[0])
    if settings.assistant_updates > 1:
        # One traced body for all others. The first stays outside the loop: on CPU a convolution's gradient is
        # 15 times slower inside of one.
        carry, history = jax.lax.scan(one_update, carry, keys[1:])
        logged = jax.tree.map(lambda values: values[-1], history)
    (assistant, opt_state), (loss, norm) = carry, logged
    return assistant, opt_state, {"assistant/loss": loss, "assistant/grad_norm": norm}


def make_train_step(networks: Networks, settings: Settings, schedule: Schedule, opt_generator, opt_assistant):
    """Returns the step, to be jitted with the state donated.

    train_step(state, frozen, token_ids, key) -> (state, metrics):
      state: TrainState.
      frozen: parameters that never change: {'unet': the reference, ...}, see pipeline.py.
      token_ids: dict of int32 [B, L].
      key: of the run; the step's number is folded in.
      metrics: float32 scalars; `nonfinite` counts the gradients' non-finite norms.
    """
    generate = make_generate(networks, settings, schedule)
    common = dict(networks=networks, settings=settings, schedule=schedule)

    def train_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key_z, key_generator, key_assistant = jax.random.split(jax.random.fold_in(key, state.step), 3)
        conditions = jax.lax.stop_gradient(networks.encode_text(frozen, token_ids))
        condition = conditions[0]
        z = jax.random.normal(key_z, (condition.context.shape[0], *settings.latent_shape))

        # One generator forward serves both losses; everything that acts on x0 is differentiated there first.
        x0, pull_back = jax.vjp(lambda params: generate(params, z, condition), state.generator)
        (loss, metrics), dx0 = jax.value_and_grad(generator_loss, has_aux=True)(
            x0, key_generator, assistant=state.assistant, frozen=frozen, conditions=conditions,
            token_ids=token_ids, **common)
        grads, = pull_back(dx0)
        generator, opt_g = _update(opt_generator, state.generator, grads, state.opt_generator)

        assistant, opt_a, assistant_metrics = train_assistant(
            state.assistant, state.opt_assistant, jax.lax.stop_gradient(x0), key_assistant, condition=condition,
            optimizer=opt_assistant, **common)

        decay = settings.ema_decay
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, generator)
        norm = optax.global_norm(grads)
        metrics |= assistant_metrics | {
            "generator/loss": loss, "generator/grad_norm": norm, "generator/x0_std": jnp.std(x0),
            "nonfinite": _count_nonfinite(norm, assistant_metrics["assistant/grad_norm"])}
        return TrainState(state.step + 1, generator, assistant, ema, opt_g, opt_a), metrics

    return train_step


def make_warmup_step(networks: Networks, settings: Settings, schedule: Schedule, opt_assistant):
    """Returns a step with `make_train_step`'s signature that trains the assistant alone on the frozen generator."""
    generate = make_generate(networks, settings, schedule)

    def warmup_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key_z, _, key_assistant = jax.random.split(jax.random.fold_in(key, state.step), 3)
        condition, _ = networks.encode_text(frozen, token_ids)
        z = jax.random.normal(key_z, (condition.context.shape[0], *settings.latent_shape))
        x0 = generate(state.generator, z, condition)
        assistant, opt_a, metrics = train_assistant(
            state.assistant, state.opt_assistant, x0, key_assistant, condition=condition, networks=networks,
            settings=settings, schedule=schedule, optimizer=opt_assistant)
        metrics["nonfinite"] = _count_nonfinite(metrics["assistant/grad_norm"])
        return state._replace(step=state.step + 1, assistant=assistant, opt_assistant=opt_a), metrics

    return warmup_step


def _count_nonfinite(*norms: jax.Array) -> jax.Array:
    return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)
