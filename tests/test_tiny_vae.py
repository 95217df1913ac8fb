# SPDX-License-Identifier: Apache-2.0
"""The tiny decoder against diffusers' AutoencoderTiny, and as what the rewards see."""

import math

import jax
import parity
import pytest

from di_star_jax.models import published
from di_star_jax.pipelines import folder as pipeline


@pytest.mark.parametrize("batch, height, width, remat", [(3, 6, 10, "none"), (1, 8, 8, "full")])
def test_decoder_and_its_gradients_equal_diffusers(batch, height, width, remat):
    errors = parity.tiny_vae_errors(batch, height, width, remat=remat)
    print(errors)
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


def test_the_full_size_decoder_has_as_many_parameters_as_diffusers():
    tree = pipeline.abstract_model(published.TINY_VAE).params
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    theirs = parity.torch_tiny_vae(published.TINY_VAE).decoder
    assert found == sum(p.numel() for p in theirs.parameters()) == 1_222_531
