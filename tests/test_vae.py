# SPDX-License-Identifier: Apache-2.0
"""The VAE against diffusers' AutoencoderKL; the comparison itself is in parity.py."""

import math

import jax
import parity
import pytest

from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.models.vae import VAEConfig
from di_star_jax.pipelines import folder as pipeline


@pytest.mark.parametrize(
    "batch, height, width", [(3, 48, 80), pytest.param(1, 64, 64, marks=pytest.mark.long)]
)
def test_encoder_and_its_gradients_equal_diffusers(batch, height, width):
    errors = parity.vae_encoder_errors(batch, height, width)
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


@pytest.mark.parametrize(
    "batch, height, width", [(3, 6, 10), pytest.param(1, 8, 8, marks=pytest.mark.long)]
)
def test_decoder_and_its_gradients_equal_diffusers(batch, height, width):
    errors = parity.vae_decoder_errors(batch, height, width)
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


def test_full_size_vae_has_the_published_number_of_parameters():
    tree = pipeline.abstract_model(published.VAE_SDXL).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == 49_490_199 + 34_163_664


def test_scaling_factor_comes_from_the_config_and_unported_settings_are_refused():
    assert VAEConfig.from_json(published.VAE_SDXL).scaling_factor == 0.13025
    assert VAEConfig.from_json(published.VAE_SDXL).scale == 8
    with pytest.raises(UserError, match="shift_factor"):
        VAEConfig.from_json({**published.VAE_SDXL, "shift_factor": 0.1})
