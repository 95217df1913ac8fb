# SPDX-License-Identifier: Apache-2.0
"""Both gradients of a Diff-Instruct* step, of one device's part of the batch.

All here runs inside `sharding.on_each`: b is the images of this device, K the generator's steps;
latents are [b, h, w, 4], images [b, H, W, 3]. Everything random comes in as arguments. Sums over
devices are the caller's: a device returns its share of the gradients of the whole batch's mean, and
per-sample figures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from di_star_jax import objectives, samplers, sharding
from di_star_jax.diffusion import Schedule, add_noise, guide
from di_star_jax.models.unet import Condition

Params = Any


class Networks(NamedTuple):
    """The functions a step is made of; parameters always come first.

    unet: (params, x_t [b, h, w, 4], t [b], Condition) -> eps [b, h, w, 4] float32.
    encode_text: (frozen, token_ids) -> (Condition, null Condition).
    reward: (frozen, x0 [b, h, w, 4], prompts, crop [b, 2]) -> (alpha_rew r(x0, c) summed over the
      rewards [b], each reward by name [b]), through the VAE decoder. Only the sum is
      differentiated.
    """

    unet: Callable[..., jax.Array]
    encode_text: Callable[..., tuple[Condition, Condition]]
    reward: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Plain values of a step; see configs/sdxl.py for units, ranges and reasons."""

    objective: str
    omega: float
    constants: objectives.Constants
    weighting: str
    reduction: str  # of the regulariser over a sample: "sum" or "mean"
    generator_times: tuple[int, int]  # first and last, both included
    assistant_times: tuple[int, int]
    assistant_updates: int
    sharing: str  # a key of GRADIENTS
    generator_timesteps: tuple[int, ...]  # falling, one per step of the generator
    latent_shape: tuple[int, int, int]
    ema_decay: float
    microbatches: int = 1  # parts that a device's images are taken in, one after the other


class Draws(NamedTuple):
    """All that is random in one step; the batch is the first axis.

    noise: [B, K, h, w, 4] standard normal; the first of K is z.
    step: scalar int32, the generator's step that learns, the same for the whole batch.
    t, eps: [B] int32 and [B, h, w, 4], of the generator's loss.
    t_psi, eps_psi: of the assistant's loss.
    crop: [B, 2] in [0, 1), where the reward looks, if it looks at a part.
    """

    noise: jax.Array
    step: jax.Array
    t: jax.Array
    eps: jax.Array
    t_psi: jax.Array
    eps_psi: jax.Array
    crop: jax.Array


class Figures(NamedTuple):
    """What a gradient leaves per sample. x0: [b, h, w, 4]; the others [b], to log.

    reward: alpha_rew r, summed over the rewards. rewards: each by itself. assistant: its loss.
    """

    x0: jax.Array
    reward: jax.Array
    rewards: dict[str, jax.Array]
    regulariser: jax.Array
    assistant: jax.Array


def times_and_noise(
    key: jax.Array, times: tuple[int, int], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Uniform integer times, both ends included, and noise."""
    key_t, key_eps = jax.random.split(key)
    return jax.random.randint(key_t, shape[:1], times[0], times[1] + 1), jax.random.normal(
        key_eps, shape
    )


def draw(key: jax.Array, batch: int, settings: Settings) -> Draws:
    """The draws of one step. Args: key, of the step; batch, of all devices together."""
    key_z, key_generator, key_assistant = jax.random.split(key, 3)
    shape, count = (batch, *settings.latent_shape), len(settings.generator_timesteps)
    noise = jnp.moveaxis(jax.random.normal(key_z, (count, *shape)), 0, 1)
    step = jax.random.randint(jax.random.fold_in(key_z, 1), (), 0, count)
    return Draws(
        noise,
        step,
        *times_and_noise(key_generator, settings.generator_times, shape),
        *times_and_noise(
            jax.random.split(key_assistant, settings.assistant_updates)[0],
            settings.assistant_times,
            shape,
        ),
        jax.random.uniform(jax.random.fold_in(key_z, 2), (batch, 2)),
    )


def denoise(
    params: Params,
    x_t: jax.Array,
    t: jax.Array,
    condition: Condition,
    *,
    networks: Networks,
    schedule: Schedule,
) -> jax.Array:
    """x_0 [b, h, w, 4] by one step of the generator from x_t at the time t, a scalar."""
    return samplers.one_step(
        lambda x, t: networks.unet(params, x, t, condition), x_t, t[None], schedule
    )


def simulate(
    params: Params,
    draws: Draws,
    condition: Condition,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """DMD2's backward simulation: what the generator's step `draws.step` is given.

    Returns: (x_t [b, h, w, 4] without gradient, t scalar int32). With one step, z and its time.
    """
    timesteps = jnp.array(settings.generator_timesteps)
    noise = jnp.moveaxis(draws.noise, 1, 0)
    if len(timesteps) == 1:
        return noise[0], timesteps[0]
    params = jax.lax.stop_gradient(params)

    def earlier(k, x_t):
        x0 = denoise(params, x_t, timesteps[k], condition, networks=networks, schedule=schedule)
        t = jnp.full(x_t.shape[:1], timesteps[k + 1])
        return add_noise(x0, noise[k + 1], schedule.alpha[t], schedule.sigma[t])

    return jax.lax.fori_loop(0, draws.step, earlier, noise[0]), timesteps[draws.step]


def reference_scores(unet, params: Params, conditions: tuple[Condition, Condition], omega: float):
    """The reference's (guided, cond, null) noise predictions, functions of (x_t, t).

    Guided evaluates conditional and unconditional as one batch of 2b; at omega = 1 it is the
    conditional alone.
    """
    condition, null = conditions
    both = jax.tree.map(lambda c, n: jnp.concatenate([c, n]), condition, null)

    def guided(x_t, t):
        eps = unet(params, jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        return guide(*jnp.split(eps, 2), omega)

    def cond(x_t, t):
        return unet(params, x_t, t, condition)

    return (cond if omega == 1.0 else guided), cond, lambda x_t, t: unet(params, x_t, t, null)


def _mean(per_sample_loss: jax.Array) -> jax.Array:
    """This device's share of the whole batch's mean."""
    return jnp.sum(per_sample_loss) / (per_sample_loss.shape[0] * sharding.size(*sharding.BATCH))


def regulariser(
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    scores: objectives.Scores,
    settings: Settings,
    schedule: Schedule,
) -> jax.Array:
    """L_reg(x0) [b] (Eq. 3.4), weighted and reduced as the settings say.

    Args: samples, times and noise; scores.
    """
    loss = objectives.OBJECTIVES[settings.objective](
        x0, t, eps, scores=scores, constants=settings.constants, schedule=schedule
    )
    loss *= objectives.WEIGHTINGS[settings.weighting](schedule.alpha[t], schedule.sigma[t])
    return loss * {"sum": 1.0, "mean": 1.0 / x0[0].size}[settings.reduction]


def generator_gradient(
    x0: jax.Array,
    draws: Draws,
    *,
    scores: objectives.Scores,
    frozen: dict,
    token_ids: dict,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
):
    """d/dx0 of the mean of -alpha_rew r(x0, c) + L_reg(x0) (Eq. 3.4).

    One part after the other, so that the decoder's activations and the score networks' need not be
    held together.

    Returns: (dx0 [b, h, w, 4], the two results of networks.reward, L_reg [b]).
    """

    def mean_regulariser(x0):
        loss = regulariser(
            x0, draws.t, draws.eps, scores=scores, settings=settings, schedule=schedule
        )
        return _mean(loss), loss

    def mean_reward(x0):
        reward, each = networks.reward(frozen, x0, token_ids, draws.crop)
        return _mean(-reward), (reward, each)

    (_, loss), dx0 = jax.value_and_grad(mean_regulariser, has_aux=True)(x0)
    (_, reward), of_reward = jax.value_and_grad(mean_reward, has_aux=True)(x0)
    return dx0 + of_reward, reward, loss


def assistant_loss(
    assistant: Params,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    condition: Condition,
    *,
    networks: Networks,
    schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
    """Denoising score matching on x0 (Eq. 2.2): its share of the mean, and per sample and element."""
    x_t = add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
    loss = objectives.denoising_score_matching(networks.unet(assistant, x_t, t, condition), eps)
    return _mean(loss), loss / x0[0].size


def _generate(
    generator: Params,
    draws: Draws,
    condition: Condition,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
):
    """(x0, its pull-back to the generator's parameters)."""
    x_t, t = simulate(
        generator, draws, condition, networks=networks, settings=settings, schedule=schedule
    )
    return jax.vjp(
        lambda params: denoise(params, x_t, t, condition, networks=networks, schedule=schedule),
        generator,
    )


def apart(
    generator: Params,
    assistant: Params,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
) -> tuple[tuple[Params, Params], Figures]:
    """((generator's gradient, assistant's), figures) where the two losses share x0 alone, not times
    and noise.
    """
    common = dict(networks=networks, schedule=schedule)
    conditions = jax.lax.stop_gradient(networks.encode_text(frozen, token_ids))
    # One generator forward serves both losses; everything that acts on x0 is differentiated there
    # first.
    x0, pull_back = _generate(generator, draws, conditions[0], settings=settings, **common)
    scores = objectives.one_by_one(
        lambda x_t, t: networks.unet(assistant, x_t, t, conditions[0]),
        *reference_scores(networks.unet, frozen["unet"], conditions, settings.omega),
    )
    dx0, reward, loss_reg = generator_gradient(
        x0, draws, scores=scores, frozen=frozen, token_ids=token_ids, settings=settings, **common
    )
    (grads,) = pull_back(dx0)
    (_, loss), assistant_grads = jax.value_and_grad(assistant_loss, has_aux=True)(
        assistant, x0, draws.t_psi, draws.eps_psi, conditions[0], **common
    )
    return (grads, assistant_grads), Figures(x0, *reward, loss_reg, loss)


def of_assistant(
    assistant: Params,
    frozen: dict,
    token_ids: dict,
    x0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    networks: Networks,
    schedule: Schedule,
) -> tuple[Params, jax.Array]:
    """The assistant's gradient alone, and its loss per sample and element."""
    condition = networks.encode_text(frozen, token_ids)[0]
    (_, loss), grads = jax.value_and_grad(assistant_loss, has_aux=True)(
        assistant, x0, t, eps, condition, networks=networks, schedule=schedule
    )
    return grads, loss


def samples(
    generator: Params,
    frozen: dict,
    token_ids: dict,
    draws: Draws,
    *,
    networks: Networks,
    settings: Settings,
    schedule: Schedule,
) -> jax.Array:
    """x0 [b, h, w, 4] without gradient."""
    condition = networks.encode_text(frozen, token_ids)[0]
    x_t, t = simulate(
        generator, draws, condition, networks=networks, settings=settings, schedule=schedule
    )
    return denoise(generator, x_t, t, condition, networks=networks, schedule=schedule)


def in_microbatches(fn: Callable, count: int, *batch):
    """fn(*batch) -> (gradients, per-sample results) in `count` parts of the batch, one after the
    other.

    Args: fn; count, a divisor of the batch; batch, trees whose leaves' first axis is the batch, but
      for scalars.
    Returns: the parts' mean gradients and their results one after the other, as of one call.
    """
    if count == 1:
        return fn(*batch)
    parts = jax.tree.map(
        lambda x: x.reshape(count, -1, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, (count,)),
        batch,
    )
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], parts))[0]

    def one(sums, part):
        grads, results = fn(*part)
        return jax.tree.map(lambda total, grad: total + grad / count, sums, grads), results

    sums, results = jax.lax.scan(
        one, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), parts
    )
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
