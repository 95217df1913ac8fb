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
    with pytest.raises(UserError, match="prediction_type='v_prediction'"):
        schedule_from_json({**SDXL, "prediction_type": "v_prediction"})
