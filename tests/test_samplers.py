# SPDX-License-Identifier: Apache-2.0
"""Samplers against diffusers' schedulers, on a nonlinear noise predictor of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from di_star_jax import diffusion, samplers

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = diffusion.make_schedule(**SDXL)
Z = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)


def eps_fn(x, t):
    """Some smooth function of x and t, the same in jax and torch."""
    wave = (x * 0.7).tanh() if isinstance(x, torch.Tensor) else jnp.tanh(x * 0.7)
    return wave + 0.3 * x * t.reshape(-1, 1, 1, 1) / 1000.0


def diffusers_sample(scheduler, timesteps=None, num_steps=None):
    scheduler.set_timesteps(num_steps, **({} if timesteps is None else {"timesteps": timesteps}))
    x = torch.tensor(Z) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = eps_fn(scheduler.scale_model_input(x, t), t.reshape(1).float())
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return x.numpy()


@pytest.mark.parametrize("num_steps", [4, 50])
def test_ddim_equals_diffusers(num_steps):
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(**SDXL, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
                              clip_sample=False)
    ours = samplers.ddim(eps_fn, jnp.array(Z), samplers.leading_timesteps(num_steps), SCHEDULE)
    np.testing.assert_allclose(ours, diffusers_sample(scheduler, num_steps=num_steps), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_steps", [4, 50])
def test_euler_equals_diffusers(num_steps):
    from diffusers import EulerDiscreteScheduler
    scheduler = EulerDiscreteScheduler(**SDXL, timestep_spacing="leading", steps_offset=1)
    ours = samplers.euler(eps_fn, jnp.array(Z), samplers.leading_timesteps(num_steps), SCHEDULE)
    np.testing.assert_allclose(ours, diffusers_sample(scheduler, num_steps=num_steps), rtol=1e-3, atol=1e-4)


def test_one_step_equals_diffusers_lcm_at_399():
    from diffusers import LCMScheduler
    ours = samplers.one_step(eps_fn, jnp.array(Z), [399], SCHEDULE)
    np.testing.assert_allclose(ours, diffusers_sample(LCMScheduler(**SDXL), timesteps=[399]), rtol=1e-4, atol=1e-4)


def test_few_steps_equal_diffusers_lcm_with_the_same_noise():
    from diffusers import LCMScheduler
    times = [999, 749, 499, 249]
    scheduler = LCMScheduler(**SDXL)
    scheduler.set_timesteps(timesteps=times)
    generator = torch.Generator().manual_seed(0)
    noise = [Z, *(torch.randn(Z.shape, generator=generator).numpy() for _ in times[1:])]
    generator.manual_seed(0)
    x = torch.tensor(Z)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_fn(x, t.reshape(1).float()), t, x, generator=generator, return_dict=False)[0]
    ours = samplers.few_step(eps_fn, jnp.array(np.stack(noise)), times, SCHEDULE)
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-3, atol=1e-3)


def test_ddim_and_euler_find_the_data_of_a_gaussian():
    # Data N(2, 0.5^2) has a linear score; the flow maps N(0, 1) onto it.
    def exact(x_t, t):
        alpha, sigma = (diffusion.per_sample(v[t], x_t) for v in SCHEDULE)
        return sigma * (x_t - 2.0 * alpha) / (0.25 * alpha**2 + sigma**2)

    z = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))
    for sampler in (samplers.ddim, samplers.euler):
        x0 = sampler(exact, z, samplers.leading_timesteps(50), SCHEDULE)
        np.testing.assert_allclose([x0.mean(), x0.std()], [2.0, 0.5], rtol=0.1)
