# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from di_star_jax import diffusion
from di_star_jax.errors import UserError
from di_star_jax.pipelines.scheduler import schedule_from_json

SDXL = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
SCHEDULE = diffusion.make_schedule(**SDXL)


@pytest.mark.parametrize(
    "t, alpha, sigma",
    [
        (0, 0.99957491, 0.02915476),
        (20, 0.99061312, 0.13669542),
        (399, 0.65275291, 0.75757088),
        (625, 0.37117251, 0.92856393),
        (980, 0.07644464, 0.99707383),
        (999, 0.06826491, 0.99766723),
    ],
)
def test_sdxl_schedule_has_the_known_constants(t, alpha, sigma):
    np.testing.assert_allclose([SCHEDULE.alpha[t], SCHEDULE.sigma[t]], [alpha, sigma], rtol=1e-6)


def test_schedule_equals_diffusers():
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(**SDXL).alphas_cumprod.double().sqrt().numpy()
    np.testing.assert_allclose(SCHEDULE.alpha, expected, rtol=2e-5)


def test_a_linear_schedule_equals_diffusers():
    from diffusers import DDPMScheduler

    linear = {**SDXL, "beta_schedule": "linear", "beta_end": 0.02}
    expected = DDPMScheduler(**linear).alphas_cumprod.double().sqrt().numpy()
    np.testing.assert_allclose(diffusion.make_schedule(**linear).alpha, expected, rtol=1e-4)


def test_eps_x0_and_score_turn_into_each_other():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 3))
    t = jnp.array([0, 100, 399, 800, 999])
    alpha_t, sigma_t = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    x_t = diffusion.add_noise(x0, eps, alpha_t, sigma_t)
    np.testing.assert_allclose(diffusion.eps_to_x0(x_t, eps, alpha_t, sigma_t), x0, atol=1e-5)
    score = -eps / diffusion.per_sample(sigma_t, eps)
    residual = (
        -(x_t - diffusion.per_sample(alpha_t, x0) * x0) / diffusion.per_sample(sigma_t, x0) ** 2
    )
    np.testing.assert_allclose(score, residual, rtol=1e-2, atol=1e-3)


def test_guidance_omega_one_equals_no_guidance():
    cond, uncond = jax.random.normal(jax.random.key(1), (2, 3, 4))
    np.testing.assert_allclose(diffusion.guide(cond, uncond, 1.0), cond, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(diffusion.guide(cond, uncond, 0.0), uncond)


def test_unsupported_schedules_are_refused_in_one_line():
    with pytest.raises(UserError, match="beta_schedule='squaredcos_cap_v2'"):
        diffusion.make_schedule(**{**SDXL, "beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(UserError, match="prediction_type='sample'"):
        schedule_from_json({**SDXL, "prediction_type": "sample"})


ZERO_SNR = {**SDXL, "rescale_betas_zero_snr": True}


def test_zero_terminal_snr_is_diffusers_schedule():
    from diffusers import EulerDiscreteScheduler

    ours = diffusion.make_schedule(**ZERO_SNR)
    theirs = EulerDiscreteScheduler(**ZERO_SNR).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours.alpha, np.sqrt(theirs), rtol=2e-3, atol=1e-6)
    assert ours.alpha[-1] == diffusion.LAST_ALPHA and ours.sigma[-1] >= 1 - 2.0**-24
    first = diffusion.make_schedule(**SDXL).alpha[0]
    np.testing.assert_allclose(ours.alpha[0], first, rtol=1e-7)


@pytest.mark.parametrize("t", [0, 300, 998, 999])
def test_v_gives_the_noise_and_the_image_that_it_is_made_of(t):
    schedule = diffusion.make_schedule(**ZERO_SNR)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4))
    alpha, sigma = schedule.at(jnp.full(3, t))
    x_t = diffusion.add_noise(x0, eps, alpha, sigma)
    v = diffusion.add_noise(eps, -x0, alpha, sigma)
    found = diffusion.v_to_eps(x_t, v, alpha, sigma)
    np.testing.assert_allclose(found, eps, rtol=1e-5, atol=1e-6)
    # Some eight roundings of numbers below 4, 2^-23 each, are divided by alpha.
    error = 2.0**-20 / alpha[0]
    np.testing.assert_allclose(diffusion.eps_to_x0(x_t, found, alpha, sigma), x0, atol=error + 1e-6)


def test_at_pure_noise_eps_is_the_input_and_the_image_is_minus_v():
    schedule = diffusion.make_schedule(**ZERO_SNR)
    alpha, sigma = schedule.at(jnp.array([999]))
    x_t, v = jax.random.normal(jax.random.key(0), (2, 1, 8, 8, 4))
    zero, one = jnp.zeros(1), jnp.ones(1)
    np.testing.assert_array_equal(diffusion.v_to_eps(x_t, v, zero, one), x_t)
    eps = diffusion.v_to_eps(x_t, v, alpha, sigma)
    np.testing.assert_allclose(eps, x_t, atol=4 * diffusion.LAST_ALPHA)
    x0 = diffusion.eps_to_x0(x_t, eps, alpha, sigma)
    np.testing.assert_allclose(x0, -v, atol=2.0**-20 / diffusion.LAST_ALPHA + 2.0**-10)


def test_levels_between_two_times_are_on_diffusers_line():
    schedule = diffusion.make_schedule(**SDXL)
    alpha, sigma = schedule.at(jnp.array([10.5]))
    ratio = schedule.sigma / schedule.alpha
    np.testing.assert_allclose(sigma / alpha, (ratio[10] + ratio[11]) / 2, rtol=1e-6)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)


def test_zero_terminal_snr_without_v_prediction_is_refused():
    with pytest.raises(UserError, match="rescale_betas_zero_snr=True without prediction_type"):
        schedule_from_json(ZERO_SNR)
