# SPDX-License-Identifier: Apache-2.0
"""Samplers: one function each, one signature `sampler(eps_fn, z, timesteps, schedule) -> x_0`.

z is [B, ...]; that of `few_step` is [K, B, ...], noise for every step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from di_star_jax.diffusion import Schedule, add_noise, eps_to_x0

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


def one_step(eps_fn: EpsFn, z: jax.Array, timesteps: np.ndarray, schedule: Schedule) -> jax.Array:
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
    eps_fn: EpsFn, noise: jax.Array, timesteps: np.ndarray, schedule: Schedule
) -> jax.Array:
    """x_0 from each time, noised again to the next one: a few-step generator of DMD2.

    Args:
      eps_fn: as in `one_step`.
      noise: [K, B, ...] standard normal; the first is z.
      timesteps: [K] int, falling; 999, 749, 499, 249 for DMD2's four steps.
      schedule: alpha and sigma.
    Returns:
      [B, ...] scaled latents. Source: diffusers `LCMScheduler`, whose boundary conditions are
      within 1e-7 of this.
    """
    x0 = one_step(eps_fn, noise[0], timesteps[:1], schedule)
    for eps, k in zip(noise[1:], range(1, len(timesteps))):
        t = jnp.full(x0.shape[:1], timesteps[k], jnp.int32)
        x0 = one_step(
            eps_fn,
            add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t]),
            timesteps[k : k + 1],
            schedule,
        )
    return x0


def _deterministic(
    eps_fn: EpsFn, z: jax.Array, timesteps: np.ndarray, schedule: Schedule, *, last: int | None
):
    """x_t / alpha_t moves along eps by the change of sigma_t / alpha_t:

    DDIM with eta 0, Euler on the ODE of VE.
    """
    alpha, sigma = schedule.alpha[timesteps], schedule.sigma[timesteps]
    end = (
        (jnp.ones(()), jnp.zeros(()))
        if last is None
        else (schedule.alpha[last], schedule.sigma[last])
    )
    alpha_next, sigma_next = jnp.append(alpha[1:], end[0]), jnp.append(sigma[1:], end[1])

    def body(x_t, step):
        t, a, s, a_next, s_next = step
        eps = eps_fn(x_t, jnp.full(z.shape[:1], t, jnp.int32))
        return a_next * (x_t - s * eps) / a + s_next * eps, None

    return jax.lax.scan(body, z, (jnp.asarray(timesteps), alpha, sigma, alpha_next, sigma_next))[0]


def ddim(eps_fn: EpsFn, z: jax.Array, timesteps: np.ndarray, schedule: Schedule) -> jax.Array:
    """DDIM with eta 0, ending at alpha_0. Args and result as `one_step`, timesteps falling, [N].

    Source: diffusers `DDIMScheduler` with `set_alpha_to_one=False`.
    """
    return _deterministic(eps_fn, z, timesteps, schedule, last=0)


def euler(eps_fn: EpsFn, z: jax.Array, timesteps: np.ndarray, schedule: Schedule) -> jax.Array:
    """Euler steps of the probability-flow ODE, ending at sigma 0. Args and result as `ddim`.

    Source: diffusers `EulerDiscreteScheduler`; its x is x_t / alpha_t, and its first one is z /
      alpha_t.
    """
    return _deterministic(eps_fn, z, timesteps, schedule, last=None)


def dpm_solver_pp(
    eps_fn: EpsFn, z: jax.Array, timesteps: np.ndarray, schedule: Schedule
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
    alpha, sigma = schedule.alpha[timesteps], schedule.sigma[timesteps]
    alpha_next, sigma_next = jnp.append(alpha[1:], 1.0), jnp.append(sigma[1:], 0.0)
    h = jnp.diff(jnp.log(alpha / sigma))  # [N - 1], lambda's step
    half = jnp.pad(h[1:] / (2.0 * h[:-1]), 1)[
        : len(timesteps)
    ]  # [N], 1 / (2 r); 0 where the step is of first order

    def body(carry, step):
        x_t, x0_before = carry
        t, a, s, a_next, s_next, half_t = step
        x0 = (x_t - s * eps_fn(x_t, jnp.full(z.shape[:1], t, jnp.int32))) / a
        extrapolated = x0 + half_t * (x0 - x0_before)
        # alpha_next (1 - exp(-h)), in a form that is finite where sigma_next is 0 and h infinite.
        return (s_next / s * x_t + (a_next - a * s_next / s) * extrapolated, x0), None

    steps = (jnp.asarray(timesteps), alpha, sigma, alpha_next, sigma_next, half)
    return jax.lax.scan(body, (z, jnp.zeros_like(z)), steps)[0][0]


SAMPLERS = {"few_step": few_step, "ddim": ddim, "euler": euler, "dpm_solver_pp": dpm_solver_pp}


def generator_timesteps(generator, one_step: int) -> tuple[int, ...]:
    """The times of the generator's steps.

    Args: the config's section; without timesteps they are DMD2's. The one step's, of the family.
    """
    if generator.timesteps:
        return tuple(generator.timesteps)
    if generator.steps == 1:
        return (one_step,)
    return tuple(999 - i * 1000 // generator.steps for i in range(generator.steps))
