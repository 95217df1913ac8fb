# SPDX-License-Identifier: Apache-2.0
"""Samplers against diffusers' schedulers, on a nonlinear noise predictor of our own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from di_star_jax import diffusion, samplers
from di_star_jax.pipelines import scheduler

SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
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

    scheduler = DDIMScheduler(
        **SDXL,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    ours = samplers.ddim(eps_fn, jnp.array(Z), samplers.leading_timesteps(num_steps), SCHEDULE)
    np.testing.assert_allclose(
        ours, diffusers_sample(scheduler, num_steps=num_steps), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("num_steps", [4, 50])
def test_euler_equals_diffusers(num_steps):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**SDXL, timestep_spacing="leading", steps_offset=1)
    ours = samplers.euler(eps_fn, jnp.array(Z), samplers.leading_timesteps(num_steps), SCHEDULE)
    np.testing.assert_allclose(
        ours, diffusers_sample(scheduler, num_steps=num_steps), rtol=1e-3, atol=1e-4
    )


def dpm_solver():
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        **SDXL,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
    )


@pytest.mark.parametrize(
    "num_steps", [1, 2, 3, 14, 20, 50]
)  # diffusers tells fewer than 15 steps from more
def test_dpm_solver_pp_and_its_times_equal_diffusers(num_steps):
    times = samplers.dpm_solver_timesteps(num_steps)
    scheduler = dpm_solver()
    expected = diffusers_sample(scheduler, num_steps=num_steps)
    assert times.tolist() == scheduler.timesteps.tolist()
    np.testing.assert_allclose(
        samplers.dpm_solver_pp(eps_fn, jnp.array(Z), times, SCHEDULE),
        expected,
        rtol=1e-3,
        atol=1e-4,
    )


def test_dpm_solver_pp_equals_diffusers_at_the_times_of_the_other_samplers():
    times = samplers.leading_timesteps(20)
    expected = diffusers_sample(dpm_solver(), timesteps=times)
    np.testing.assert_allclose(
        samplers.dpm_solver_pp(eps_fn, jnp.array(Z), times, SCHEDULE),
        expected,
        rtol=1e-3,
        atol=1e-4,
    )


def test_one_step_equals_diffusers_lcm_at_399():
    from diffusers import LCMScheduler

    ours = samplers.one_step(eps_fn, jnp.array(Z), [399], SCHEDULE)
    np.testing.assert_allclose(
        ours, diffusers_sample(LCMScheduler(**SDXL), timesteps=[399]), rtol=1e-4, atol=1e-4
    )


def test_one_scaled_step_equals_diffusers_euler_at_625():
    from diffusers import EulerDiscreteScheduler

    times = [625]
    ours = samplers.few_step(eps_fn, jnp.array(Z)[None], times, SCHEDULE, input="scaled")
    theirs = diffusers_sample(EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing"), times)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


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
        x = scheduler.step(
            eps_fn(x, t.reshape(1).float()), t, x, generator=generator, return_dict=False
        )[0]
    ours = samplers.few_step(eps_fn, jnp.array(np.stack(noise)), times, SCHEDULE)
    np.testing.assert_allclose(ours, x.numpy(), rtol=1e-3, atol=1e-3)


def gaussian_eps(schedule):
    """The exact noise predictor of data N(2, 0.5^2)."""

    def exact(x_t, t):
        alpha, sigma = (diffusion.per_sample(v[t], x_t) for v in schedule)
        return sigma * (x_t - 2.0 * alpha) / (0.25 * alpha**2 + sigma**2)

    return exact


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.euler, samplers.dpm_solver_pp])
def test_the_samplers_of_a_teacher_find_the_data_of_a_gaussian(sampler):
    z = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))
    x0 = sampler(gaussian_eps(SCHEDULE), z, samplers.leading_timesteps(50), SCHEDULE)
    np.testing.assert_allclose([x0.mean(), x0.std()], [2.0, 0.5], rtol=0.1)


@pytest.mark.parametrize("sampler, order", [(samplers.euler, 1), (samplers.dpm_solver_pp, 2)])
def test_half_the_step_divides_the_error_by_two_to_the_order(sampler, order):
    # Times even in log(alpha / sigma), from -3 to 10, where the last step to sigma 0 costs 1e-9.
    with jax.enable_x64(True):
        log_snr = jnp.linspace(10.0, -3.0, 513)
        schedule = diffusion.Schedule(
            jax.nn.sigmoid(2 * log_snr) ** 0.5, jax.nn.sigmoid(-2 * log_snr) ** 0.5
        )
        alpha, sigma = schedule.alpha[-1], schedule.sigma[-1]
        u = jnp.array(
            [-1.5, 0.3, 1.0, 2.0]
        )  # standard deviations from the mean, which the flow keeps
        z = 2.0 * alpha + u * jnp.sqrt(0.25 * alpha**2 + sigma**2)
        errors = [
            jnp.abs(
                sampler(gaussian_eps(schedule), z, np.arange(512, -1, -stride), schedule)
                - (2.0 + 0.5 * u)
            ).max()
            for stride in (16, 8, 4)
        ]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.15)


# Networks that predict v.

ZERO_SNR = {**SDXL, "rescale_betas_zero_snr": True}


def eps_of_v(schedule):
    """eps_fn as the prediction of v, which becomes eps as in the network."""
    return lambda x, t: diffusion.v_to_eps(x, eps_fn(x, t), *schedule.at(t))


@pytest.mark.parametrize("num_steps", [1, 5, 30])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("betas", [SDXL, ZERO_SNR])
def test_v_prediction_equals_diffusers_euler(betas, spacing, num_steps):
    from diffusers import EulerDiscreteScheduler

    config = {**betas, "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    theirs = diffusers_sample(EulerDiscreteScheduler(**config), num_steps=num_steps)
    schedule = scheduler.schedule_from_json(config)
    file = scheduler.SchedulerFile({"_class_name": "EulerDiscreteScheduler", **config})
    times, settings = scheduler.spacing(file, "euler", num_steps)
    ours = samplers.euler(eps_of_v(schedule), jnp.array(Z), times, schedule, **settings)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_one_step_of_v_prediction_equals_diffusers_euler_at_399():
    from diffusers import EulerDiscreteScheduler

    config = {**ZERO_SNR, "timestep_spacing": "leading", "prediction_type": "v_prediction"}
    theirs = diffusers_sample(EulerDiscreteScheduler(**config, steps_offset=399), num_steps=1)
    schedule = scheduler.schedule_from_json(config)
    ours = samplers.one_step(eps_of_v(schedule), jnp.array(Z), np.array([399]), schedule)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
