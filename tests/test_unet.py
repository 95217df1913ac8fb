# SPDX-License-Identifier: Apache-2.0
"""The UNet against diffusers' UNet2DConditionModel; the comparison itself is in parity.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.models.unet import Condition, UNetConfig
from di_star_jax.pipelines import folder as pipeline


# 25x39 is odd at every level: upsampling must crop to its skip.
@pytest.mark.parametrize(
    "name, batch, height, width, remat",
    [
        ("SDXL, small", 2, 25, 39, "full"),
        pytest.param("SDXL", 2, 24, 40, "full", marks=pytest.mark.long),
        pytest.param("SD 1.5", 1, 24, 40, "dots", marks=pytest.mark.long),
        pytest.param("SDXL", 1, 25, 39, "none", marks=pytest.mark.long),
        pytest.param("SD 1.5", 3, 16, 16, "full", marks=pytest.mark.long),
    ],
)
def test_unet_and_its_gradients_equal_diffusers(name, batch, height, width, remat):
    errors = parity.unet_errors(name, batch, height, width, remat=remat)
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


@pytest.mark.long
def test_bfloat16_compute_stays_near_float32_and_returns_float32():
    v = parity.unet_inputs("SDXL", 1, 16, 16)
    module = parity.torch_unet("SDXL")
    condition = Condition(v["context"], v["pooled"], v["time_ids"])
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = parity.port(module, parity.UNETS["SDXL"], dtype=dtype)
        outputs.append(jax.jit(lambda p: nnx.merge(graphdef, p)(v["x"], v["t"], condition))(params))
    assert outputs[1].dtype == jnp.float32
    rms = np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2) / np.mean(outputs[0] ** 2))
    assert rms < 0.03, rms


@pytest.mark.parametrize(
    "config, count",
    [
        (published.UNET_SDXL, 2_567_463_684),
        pytest.param(published.UNET_SD15, 859_520_964, marks=pytest.mark.long),
    ],
)
def test_full_size_unet_has_the_published_number_of_parameters(config, count):
    tree = pipeline.abstract_model(config).params
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == count


def test_a_setting_that_is_not_ported_is_refused_by_name():
    with pytest.raises(UserError, match="time_embedding_type='fourier'"):
        UNetConfig.from_json({**published.UNET_SDXL, "time_embedding_type": "fourier"})
    with pytest.raises(UserError, match="AttnDownBlock2D"):
        UNetConfig.from_json({**published.UNET_SDXL, "down_block_types": ["AttnDownBlock2D"] * 3})
    with pytest.raises(UserError, match="wrong architecture.*ControlNetModel"):
        UNetConfig.from_json({**published.UNET_SDXL, "_class_name": "ControlNetModel"})
