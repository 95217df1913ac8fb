# SPDX-License-Identifier: Apache-2.0
"""The forward process q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), and how eps and x_0 turn into
each other.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from di_star_jax.errors import UserError

LAST_ALPHA = 2.0**-12  # in place of 0, see `make_schedule`


class Schedule(NamedTuple):
    """alpha and sigma: [T] float32, indexed by the integer timestep."""

    alpha: jax.Array
    sigma: jax.Array

    def at(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha and sigma of times [B]; between two times sigma / alpha is linear, as in
        diffusers' Euler.
        """
        if jnp.issubdtype(t.dtype, jnp.integer):
            return self.alpha[t], self.sigma[t]
        steps = jnp.arange(len(self.alpha), dtype=self.alpha.dtype)
        ratio = jnp.interp(t, steps, self.sigma / self.alpha)
        alpha = 1.0 / jnp.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha


@dataclasses.dataclass(frozen=True)
class Betas:
    """The arguments of `make_schedule`, under their names in diffusers; the defaults are SDXL's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    rescale_betas_zero_snr: bool = False

    def schedule(self) -> Schedule:
        """What they make. Raises: as `make_schedule`."""
        return make_schedule(**dataclasses.asdict(self))


def make_schedule(
    *,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    rescale_betas_zero_snr: bool = False,
) -> Schedule:
    """alpha_t = sqrt(prod(1 - beta_s)), sigma_t = sqrt(1 - alpha_t^2), computed in float64.

    With zero terminal SNR, alpha is moved and stretched so that it keeps its first value and ends
    at 0 (Lin et al. 2024, arXiv 2305.08891, Algorithm 1). The rule for the last time is diffusers'
    Euler's: alpha is 2^-12 there and not 0, by which x_0 and eps can still be had from each other.

    Args: the fields of a diffusers scheduler_config.json, under their names there.
    Raises: UserError for a beta schedule other than 'scaled_linear' (SDXL, SD 1.5) or 'linear'.
    """
    if beta_schedule == "scaled_linear":
        beta = (
            np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
        )
    elif beta_schedule == "linear":
        beta = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64)
    else:
        raise UserError(
            f"scheduler_config.json has beta_schedule={beta_schedule!r}, "
            "expected 'scaled_linear' or 'linear'"
        )
    alpha_bar = np.cumprod(1.0 - beta)
    if rescale_betas_zero_snr:
        alpha = np.sqrt(alpha_bar)
        alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        alpha_bar[-1] = LAST_ALPHA**2
    return Schedule(
        jnp.asarray(np.sqrt(alpha_bar), jnp.float32),
        jnp.asarray(np.sqrt(1.0 - alpha_bar), jnp.float32),
    )


def per_sample(v: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ..., 1] with as many axes as `like`: where [B] meets [B, H, W, C]."""
    return v.reshape(v.shape + (1,) * (like.ndim - 1))


def add_noise(
    x0: jax.Array,
    eps: jax.Array,
    alpha_t: jax.Array,
    sigma_t: jax.Array,
) -> jax.Array:
    """x_t = alpha_t x_0 + sigma_t eps.

    Args: x0, eps [B, ...]; alpha_t, sigma_t [B]. Returns: [B, ...].
    """
    return per_sample(alpha_t, x0) * x0 + per_sample(sigma_t, x0) * eps


def eps_to_x0(
    x_t: jax.Array,
    eps: jax.Array,
    alpha_t: jax.Array,
    sigma_t: jax.Array,
) -> jax.Array:
    """x_0 = (x_t - sigma_t eps) / alpha_t.

    Args: x_t, eps [B, ...]; alpha_t, sigma_t [B]. Returns: [B, ...].
    """
    return (x_t - per_sample(sigma_t, x_t) * eps) / per_sample(alpha_t, x_t)


def v_to_eps(
    x_t: jax.Array,
    v: jax.Array,
    alpha_t: jax.Array,
    sigma_t: jax.Array,
) -> jax.Array:
    """eps = alpha_t v + sigma_t x_t, where v = alpha_t eps - sigma_t x_0.

    Where alpha_t is 0 that is x_t itself, which says nothing of v; at `LAST_ALPHA` it does, and
    `eps_to_x0` gives alpha_t x_t - sigma_t v to what float32 keeps of it, 2^-20 / alpha_t: 0.004 at
    the last time, 1e-5 where alpha_t is 0.1.

    Args: x_t, v [B, ...]; alpha_t, sigma_t [B]. Returns: [B, ...]. Source: Salimans and Ho 2022,
    arXiv 2202.00512, Appendix D.
    """
    return per_sample(alpha_t, x_t) * v + per_sample(sigma_t, x_t) * x_t


def guide(
    eps_cond: jax.Array,
    eps_uncond: jax.Array,
    omega: float,
) -> jax.Array:
    """Classifier-free guidance eps_0 + omega (eps_c - eps_0); omega = 1 is no guidance.

    Same shapes in and out.
    """
    return eps_uncond + omega * (eps_cond - eps_uncond)


class FewStep(NamedTuple):
    """The form of a few-step generator.

    timesteps: of its steps, falling, in [0, 999].
    input: what the first step is given, one of INPUTS: "noise" is z (DMD2, PixArt-DMD), "scaled"
      is sigma_t z (SIM, SiD-LSG).
    """

    timesteps: tuple[int, ...]
    input: str = "noise"


INPUTS = ("noise", "scaled")


def first_input(z: jax.Array, form: FewStep, schedule: Schedule) -> jax.Array:
    """What a generator's first step is given. Args and result: z [B, ...] standard normal."""
    return schedule.sigma[form.timesteps[0]] * z if form.input == "scaled" else z
