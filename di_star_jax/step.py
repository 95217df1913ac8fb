# SPDX-License-Identifier: Apache-2.0
"""One training step of Diff-Instruct* as one pure function: both gradients, both updates, the average.

B is the global batch, K the generator's steps; latents are [B, h, w, 4], images [B, H, W, 3].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from di_star_jax import objectives, samplers
from di_star_jax.diffusion import Schedule, add_noise, guide
from di_star_jax.models.unet import Condition

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
    constants: objectives.Constants
    weighting: str
    reduction: str  # of the regulariser over a sample: "sum" or "mean"
    reward_scale: float
    generator_times: tuple[int, int]  # first and last, both included
    assistant_times: tuple[int, int]
    assistant_updates: int
    sharing: str  # what the two losses share: "x0", or "x_t" and the assistant's forward pass
    generator_timesteps: tuple[int, ...]  # falling, one per step of the generator
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


def reference_scores(unet, params: Params, condition: Condition, null: Condition, omega: float):
    """The reference's (guided, cond, null) noise predictions, functions of (x_t, t).

    Guided evaluates conditional and unconditional as one batch of 2B; at omega = 1 it is the conditional alone.
    """
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)

    def guided(x_t, t):
        eps = unet(params, jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        return guide(*jnp.split(eps, 2), omega)

    def cond(x_t, t):
        return unet(params, x_t, t, condition)

    return (cond if omega == 1.0 else guided), cond, lambda x_t, t: unet(params, x_t, t, null)


def denoise(params: Params, x_t: jax.Array, t: jax.Array, condition: Condition, *, networks: Networks,
            schedule: Schedule) -> jax.Array:
    """x_0 [B, h, w, 4] by one step of the generator from x_t at the time t, a scalar."""
    return samplers.one_step(lambda x, t: networks.unet(params, x, t, condition), x_t, t[None], schedule)


def simulate(params: Params, key: jax.Array, condition: Condition, *, networks: Networks, settings: Settings,
             schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """DMD2's backward simulation: what a random step of the generator, the same for the whole batch, is given.

    Returns: (x_t [B, h, w, 4] without gradient, t scalar int32). With one step, z and its time.
    """
    timesteps = jnp.array(settings.generator_timesteps)
    batch = condition.context.shape[0]
    noise = jax.random.normal(key, (len(timesteps), batch, *settings.latent_shape))
    if len(timesteps) == 1:
        return noise[0], timesteps[0]
    params = jax.lax.stop_gradient(params)
    step = jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(timesteps))

    def earlier(k, x_t):
        x0 = denoise(params, x_t, timesteps[k], condition, networks=networks, schedule=schedule)
        t = jnp.full((batch,), timesteps[k + 1])
        return add_noise(x0, noise[k + 1], schedule.alpha[t], schedule.sigma[t])

    return jax.lax.fori_loop(0, step, earlier, noise[0]), timesteps[step]


def generator_loss(x0: jax.Array, t: jax.Array, eps: jax.Array, *, psi, frozen: dict, conditions, token_ids,
                   networks: Networks, settings: Settings, schedule: Schedule):
    """Mean over the batch of -alpha_rew r(x0, c) + L_reg(x0) (Eq. 3.4), and what to log.

    Args:
      x0, t, eps: samples, times [B] and noise.
      psi: (x_t, t) -> the assistant's noise prediction.
      others: as in `make_train_step`.
    """
    scores = objectives.Scores(psi, *reference_scores(networks.unet, frozen["unet"], *conditions, settings.omega))
    regulariser = objectives.OBJECTIVES[settings.objective](
        x0, t, eps, scores=scores, constants=settings.constants, schedule=schedule)
    regulariser *= objectives.WEIGHTINGS[settings.weighting](schedule.alpha[t], schedule.sigma[t])
    regulariser *= {"sum": 1.0, "mean": 1.0 / x0[0].size}[settings.reduction]
    # Without weight the reward is only logged: no backward pass through the VAE.
    reward = networks.reward(frozen, x0 if settings.reward_scale else jax.lax.stop_gradient(x0), token_ids)
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
        x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
        return jnp.mean(objectives.denoising_score_matching(networks.unet(assistant, x_t, t, condition), eps))

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


def share_assistant(assistant: Params, x0: jax.Array, t: jax.Array, eps: jax.Array, *, condition: Condition,
                    networks: Networks, schedule: Schedule):
    """The assistant evaluated and linearised once, for both losses on the same x_t.

    Returns:
      (psi, loss, grads): the noise prediction as a function of (x_t, t), at this x_t and t only, with its gradient; the
      denoising score matching loss, and its gradient with respect to the assistant. Each gradient is a pull-back of
      the one linearisation: with respect to the input for psi, to the parameters for grads.
    """
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    eps_psi, pull_back = jax.vjp(lambda a, x: networks.unet(a, x, t, condition), assistant, x_t)

    @jax.custom_vjp
    def psi(x_t, t):
        return eps_psi

    psi.defvjp(lambda x_t, t: (eps_psi, None), lambda _, cotangent: (pull_back(cotangent)[1], None))
    loss, cotangent = jax.value_and_grad(
        lambda eps_psi: jnp.mean(objectives.denoising_score_matching(eps_psi, eps)))(eps_psi)
    return psi, loss, pull_back(cotangent)[0]


def make_train_step(networks: Networks, settings: Settings, schedule: Schedule, opt_generator, opt_assistant):
    """Returns the step, to be jitted with the state donated.

    train_step(state, frozen, token_ids, key) -> (state, metrics):
      state: TrainState.
      frozen: parameters that never change: {'unet': the reference, ...}, see pipeline.py.
      token_ids: dict of int32 [B, L].
      key: of the run; the step's number is folded in.
      metrics: float32 scalars; `nonfinite` counts the gradients' non-finite norms.
    """
    common = dict(networks=networks, settings=settings, schedule=schedule)

    def train_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key_z, key_generator, key_assistant = jax.random.split(jax.random.fold_in(key, state.step), 3)
        conditions = jax.lax.stop_gradient(networks.encode_text(frozen, token_ids))
        condition = conditions[0]

        # One generator forward serves both losses; everything that acts on x0 is differentiated there first.
        z, t_z = simulate(state.generator, key_z, condition, **common)
        x0, pull_back = jax.vjp(lambda params: denoise(params, z, t_z, condition, networks=networks,
                                                       schedule=schedule), state.generator)
        t, eps = _draw(key_generator, settings.generator_times, x0.shape)
        fixed_x0 = jax.lax.stop_gradient(x0)
        if settings.sharing == "x_t":
            psi, assistant_loss, assistant_grads = share_assistant(
                state.assistant, fixed_x0, t, eps, condition=condition, networks=networks, schedule=schedule)
        else:
            psi = lambda x_t, t: networks.unet(state.assistant, x_t, t, condition)
        (loss, metrics), dx0 = jax.value_and_grad(generator_loss, has_aux=True)(
            x0, t, eps, psi=psi, frozen=frozen, conditions=conditions, token_ids=token_ids, **common)
        grads, = pull_back(dx0)
        generator, opt_g = _update(opt_generator, state.generator, grads, state.opt_generator)

        if settings.sharing == "x_t":
            assistant, opt_a = _update(opt_assistant, state.assistant, assistant_grads, state.opt_assistant)
            assistant_metrics = {"assistant/loss": assistant_loss / x0[0].size,
                                 "assistant/grad_norm": optax.global_norm(assistant_grads)}
        else:
            assistant, opt_a, assistant_metrics = train_assistant(
                state.assistant, state.opt_assistant, fixed_x0, key_assistant, condition=condition,
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
    def warmup_step(state: TrainState, frozen: dict, token_ids: dict, key: jax.Array):
        key_z, _, key_assistant = jax.random.split(jax.random.fold_in(key, state.step), 3)
        condition, _ = networks.encode_text(frozen, token_ids)
        z, t_z = simulate(state.generator, key_z, condition, networks=networks, settings=settings, schedule=schedule)
        x0 = denoise(state.generator, z, t_z, condition, networks=networks, schedule=schedule)
        assistant, opt_a, metrics = train_assistant(
            state.assistant, state.opt_assistant, x0, key_assistant, condition=condition, networks=networks,
            settings=settings, schedule=schedule, optimizer=opt_assistant)
        metrics["nonfinite"] = _count_nonfinite(metrics["assistant/grad_norm"])
        return state._replace(step=state.step + 1, assistant=assistant, opt_assistant=opt_a), metrics

    return warmup_step


def _count_nonfinite(*norms: jax.Array) -> jax.Array:
    return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)
