# SPDX-License-Identifier: Apache-2.0
"""Samplers: one function each, one signature `sampler(eps_fn, z, timesteps, schedule) -> x_0`.

z is [B, ...]; that of `few_step` is [K, B, ...], noise for every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from di_star_jax.diffusion import FewStep, Schedule, add_noise, eps_to_x0, first_input

EpsFn = Callable[[jax.Array, jax.Array], jax.Array]


def leading_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """[num_steps] int32, falling to 1: diffusers' `timestep_spacing="leading"` with
    `steps_offset=1`, as SDXL ships.
    """
    return (np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps) + 1).astype(np.int32)


def dpm_solver_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """[num_steps] int32, falling: what diffusers' DPM-Solver++ makes of the same two settings,
    which is another grid.

    Its step is num_train_timesteps // (num_steps + 1), and its last time is one step above 1: 48
    for 20 steps.
    """
    return (np.arange(num_steps, 0, -1) * (num_train_timesteps // (num_steps + 1)) + 1).astype(
        np.int32
    )


def one_step(
    eps_fn: EpsFn,
    z: jax.Array,
    timesteps: np.ndarray,
    schedule: Schedule,
) -> jax.Array:
    """x_0 = (z - sigma_t eps(z, t)) / alpha_t: the one-step generator of DMD2 and DI*, whose z is
    not scaled.

    Args:
      eps_fn: (x_t [B, ...], t [B]) -> eps [B, ...].
      z: [B, ...] standard normal.
      timesteps: [1] int, 399 for SDXL.
      schedule: alpha and sigma.
    Returns:
      [B, ...] scaled latents.
    """
    t = jnp.full(z.shape[:1], timesteps[0], jnp.int32)
    return eps_to_x0(z, eps_fn(z, t), schedule.alpha[t], schedule.sigma[t])


def few_step(
    eps_fn: EpsFn,
    noise: jax.Array,
    timesteps: np.ndarray,
    schedule: Schedule,
    *,
    input: str = "noise",
) -> jax.Array:
    """x_0 from each time, noised again to the next one: a few-step generator of DMD2.

    Args:
      eps_fn: as in `one_step`.
      noise: [K, B, ...] standard normal; the first is z.
      timesteps: [K] int, falling; 999, 749, 499, 249 for DMD2's four steps.
      schedule: alpha and sigma.
      input: as in `FewStep`.
    Returns:
      [B, ...] scaled latents. Source: diffusers `LCMScheduler`, whose boundary conditions are
      within 1e-7 of this.
    """
    z = first_input(noise[0], FewStep(tuple(timesteps), input), schedule)
    x0 = one_step(eps_fn, z, timesteps[:1], schedule)
    for k in range(1, len(timesteps)):
        t = jnp.full(x0.shape[:1], timesteps[k], jnp.int32)
        x_t = add_noise(x0, noise[k], schedule.alpha[t], schedule.sigma[t])
        x0 = one_step(eps_fn, x_t, timesteps[k : k + 1], schedule)
    return x0


class _Steps(NamedTuple):
    """Each step's time and its alpha and sigma before and after, [N]."""

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    alpha_next: jax.Array
    sigma_next: jax.Array


def _levels(times: np.ndarray, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma of times, [N] each; of -1 they are 1 and 0.

    Between two times of the schedule sigma / alpha is linear, as in diffusers' Euler.
    """
    if np.issubdtype(times.dtype, np.integer):
        clean = times < 0
        at = np.maximum(times, 0)
        alpha = jnp.where(clean, 1.0, schedule.alpha[at])
        return alpha, jnp.where(clean, 0.0, schedule.sigma[at])
    alpha, sigma = schedule.at(jnp.asarray(times))
    return jnp.where(times < 0, 1.0, alpha), jnp.where(times < 0, 0.0, sigma)


def _steps(
    timesteps: np.ndarray,
    schedule: Schedule,
    to: np.ndarray,
) -> _Steps:
    """The steps from falling times, each to the time in `to`, where -1 has no noise."""
    return _Steps(jnp.asarray(timesteps), *_levels(timesteps, schedule), *_levels(to, schedule))


def _onwards(timesteps: np.ndarray, end: int) -> np.ndarray:
    """The time that each step leads to: the next step's, and an end."""
    timesteps = np.asarray(timesteps)
    return np.append(timesteps[1:], np.array(end, timesteps.dtype))


def _deterministic(
    eps_fn: EpsFn,
    z: jax.Array,
    steps: _Steps,
    clip: float | None = None,
) -> jax.Array:
    """x_t / alpha_t moves along eps by the change of sigma_t / alpha_t.

    That is DDIM with eta 0, and Euler's method on the ODE of VE.
    """

    def body(x_t, step):
        eps = eps_fn(x_t, jnp.full(z.shape[:1], step.t))
        x0 = (x_t - step.sigma * eps) / step.alpha
        x0 = x0 if clip is None else jnp.clip(x0, -clip, clip)
        return step.alpha_next * x0 + step.sigma_next * eps, None

    x_t, _ = jax.lax.scan(body, z, steps)
    return x_t


def ddim(
    eps_fn: EpsFn,
    z: jax.Array,
    timesteps: np.ndarray,
    schedule: Schedule,
    *,
    to: np.ndarray | None = None,
    clip: float | None = None,
) -> jax.Array:
    """DDIM with eta 0. Args and result as `one_step`, timesteps falling, [N].

    Args:
      to: [N] int, the time that each step leads to, -1 for no noise; the next one's if None, and 0
        at the end, as with `set_alpha_to_one=False`.
      clip: bound of x_0, or None.

    Source: diffusers `DDIMScheduler`.
    """
    timesteps = np.asarray(timesteps)
    to = _onwards(timesteps, 0) if to is None else to
    return _deterministic(eps_fn, z, _steps(timesteps, schedule, to), clip)


def euler(
    eps_fn: EpsFn,
    z: jax.Array,
    timesteps: np.ndarray,
    schedule: Schedule,
    *,
    end: int = -1,
    pure_noise: bool = False,
) -> jax.Array:
    """Euler steps of the probability-flow ODE. Args and result as `ddim`.

    Args:
      timesteps: also float, for times between two of the schedule.
      end: the time that the last step leads to, -1 for no noise.
      pure_noise: begin at sigma_t z, as diffusers does where its times are not 'leading', and not
        at z.

    Source: diffusers `EulerDiscreteScheduler`; its x is x_t / alpha_t.
    """
    timesteps = np.asarray(timesteps)
    steps = _steps(timesteps, schedule, _onwards(timesteps, end))
    x = _deterministic(eps_fn, steps.sigma[0] * z if pure_noise else z, steps)
    return x / steps.alpha_next[-1]  # as diffusers' x, which matters where noise is left


def dpm_solver_pp(
    eps_fn: EpsFn,
    z: jax.Array,
    timesteps: np.ndarray,
    schedule: Schedule,
) -> jax.Array:
    """DPM-Solver++(2M): second-order multistep on x_0, deterministic, ending at sigma 0.

    Args and result as `ddim`.

    The first and the last step are of first order. Each step calls eps_fn once.

    Source: Lu et al. 2022, DPM-Solver++, Algorithm 2; diffusers `DPMSolverMultistepScheduler` with
    algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True,
    final_sigmas_type="zero", use_karras_sigmas=False, thresholding=False. Its times with
    timestep_spacing="leading" and steps_offset=1 are `dpm_solver_timesteps`; other falling times do
    as well.
    """
    timesteps = np.asarray(timesteps)
    steps = _steps(timesteps, schedule, _onwards(timesteps, -1))
    h = jnp.diff(jnp.log(steps.alpha / steps.sigma))  # [N - 1], lambda's step
    # 1 / (2 r) of each step, 0 where it is of first order.
    half = jnp.pad(h[1:] / (2.0 * h[:-1]), 1)[: len(timesteps)]  # [N]

    def body(carry, inputs):
        x_t, x0_before = carry
        step, half_t = inputs
        eps = eps_fn(x_t, jnp.full(z.shape[:1], step.t, jnp.int32))
        x0 = (x_t - step.sigma * eps) / step.alpha
        extrapolated = x0 + half_t * (x0 - x0_before)
        # alpha_next (1 - exp(-h)), in a form that is finite where sigma_next is 0 and h infinite.
        ratio = step.sigma_next / step.sigma
        weight = step.alpha_next - step.alpha * ratio
        return (ratio * x_t + weight * extrapolated, x0), None

    (x_t, _), _ = jax.lax.scan(body, (z, jnp.zeros_like(z)), (steps, half))
    return x_t


SAMPLERS = {"few_step": few_step, "ddim": ddim, "euler": euler, "dpm_solver_pp": dpm_solver_pp}


def generator_form(generator, one_step: FewStep) -> FewStep:
    """The form of the generator that a config trains.

    Args: the config's section, where () and "" are the family's for one step, DMD2's for more; the
      family's.
    """
    if generator.steps == 1:
        times = tuple(generator.timesteps) or one_step.timesteps
        return FewStep(times, generator.input or one_step.input)
    count = generator.steps
    times = tuple(generator.timesteps) or tuple(999 - i * 1000 // count for i in range(count))
    return FewStep(times, generator.input or "noise")
