# SPDX-License-Identifier: Apache-2.0
"""PixArt's transformer against diffusers' PixArtTransformer2DModel; the comparison itself is in
parity.py.
"""

import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from flax import nnx

from di_star_jax import gradients, objectives, schemes, sharding
from di_star_jax.cost import flops
from di_star_jax.errors import UserError
from di_star_jax.models import pixart, published
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import weights

SMALL = parity.PIXARTS["PixArt-512"]


# 10x14 and 26x18 patches are stretched to 32x32 and 64x64; halves of them are odd.
@pytest.mark.parametrize(
    "name, batch, height, width, remat",
    [
        ("PixArt-512", 3, 10, 14, "none"),
        ("PixArt-1024", 1, 26, 18, "full"),
        pytest.param("PixArt-512", 1, 64, 64, "dots", marks=pytest.mark.long),
        pytest.param("PixArt-1024", 3, 6, 22, "none", marks=pytest.mark.slow),
    ],
)
def test_pixart_and_its_gradients_equal_diffusers(name, batch, height, width, remat):
    errors = parity.pixart_errors(name, batch, height, width, remat=remat)
    print(f"{name}: forward {errors.forward:.1e}, gradient {errors.gradient:.1e}")
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


@pytest.mark.parametrize("rows, columns", [(32, 32), (13, 9)])
def test_positions_are_those_of_diffusers_for_any_size(rows, columns):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    settings = pixart.PixArtConfig.from_json({**SMALL, "interpolation_scale": 2})
    embed = pixart.PatchEmbed(settings, dtype=jnp.float32, rngs=nnx.Rngs(0))
    theirs = get_2d_sincos_pos_embed(
        72, (rows, columns), interpolation_scale=2, base_size=32, output_type="pt"
    )
    ours = embed._positions(rows, columns).reshape(rows * columns, 72)
    assert parity.relative(ours, theirs.numpy()) < 1e-7


def test_bfloat16_compute_stays_near_float32_and_returns_float32():
    v = parity.pixart_inputs(SMALL, 2, 8, 8)
    module = parity.torch_pixart("PixArt-512")
    condition = parity.pixart_condition(v)
    outputs = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = parity.port(module, SMALL, dtype=dtype)
        outputs.append(jax.jit(lambda p: nnx.merge(graphdef, p)(v["x"], v["t"], condition))(params))
    assert outputs[1].dtype == jnp.float32
    rms = np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2) / np.mean(outputs[0] ** 2))
    assert rms < 0.03, rms


@pytest.mark.parametrize("name", parity.PIXARTS)
def test_weights_go_there_and_back_without_a_changed_bit(name):
    theirs = {k: p.numpy() for k, p in parity.torch_pixart(name).state_dict().items()}
    _, params = parity.port(parity.torch_pixart(name), parity.PIXARTS[name])
    ours = weights.tensors_from_params(params)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor, key, strict=True)


@pytest.mark.parametrize(
    "config, count, tensors, forward",
    [
        (published.PIXART_512, 610_856_096, 603, 1.236e12),
        (published.PIXART_1024, 611_349_152, 611, 6.510e12),
    ],
    ids=["512", "1024"],
)
def test_full_size_pixart_has_the_published_parameters_and_flops(config, count, tensors, forward):
    model = pipeline.abstract_model(config)
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == count
    keys = [weights.torch_keys(tuple(k.key for k in path), leaf) for path, leaf in leaves]
    assert sum(1 if isinstance(key, str) else len(key) for key in keys) == tensors
    size = config["sample_size"]
    v = parity.pixart_inputs(config, 1, size, size, tokens=120)
    found = flops.count(
        lambda params: nnx.merge(model.graphdef, params)(
            v["x"], v["t"], parity.pixart_condition(v)
        ),
        model.params,
    )
    print(f"{size}: {found:.4e} FLOPs, expected {forward:.3e}")
    assert found == pytest.approx(forward, rel=0.02)


def test_a_folder_as_published_is_read_with_the_defaults_of_what_it_lacks(tmp_path):
    module = parity.torch_pixart("PixArt-1024")
    module.save_pretrained(tmp_path)
    saved = pipeline.read_config(tmp_path)
    assert saved["_class_name"] == "PixArtTransformer2DModel"
    old = {
        name: value
        for name, value in saved.items()
        if name not in ("interpolation_scale", "use_additional_conditions")
    }
    old |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None}
    (tmp_path / "config.json").write_text(json.dumps(old), encoding="utf-8")
    model = pipeline.load_model(tmp_path)
    cls, settings = pipeline.model_class(model.config)
    assert cls is pixart.PixArtTransformer2DModel
    assert settings == pipeline.model_class(saved)[1]
    pipeline.check_like(tmp_path, saved)
    for key, tensor in weights.tensors_from_params(model.params).items():
        np.testing.assert_array_equal(tensor, module.state_dict()[key].numpy())


def test_sizes_are_told_and_positions_halved_by_sample_size_unless_the_file_says_so():
    def read(sample_size, **fields):
        settings = pixart.PixArtConfig.from_json(
            {**published.PIXART_512, "sample_size": sample_size, **fields}
        )
        return settings.interpolation_scale, settings.use_additional_conditions

    assert read(32) == (1.0, False)
    assert read(64) == (1.0, False)
    assert read(128) == (2.0, True)
    assert read(256) == (4.0, False)
    # PixArt-Sigma's files, and the 256 pixels of PixArt-alpha.
    assert read(128, use_additional_conditions=False, interpolation_scale=2) == (2.0, False)
    assert read(32, interpolation_scale=0.5) == (0.5, False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm_type": "ada_norm_zero"}, "wrong architecture: .* is of a 'Transformer2DModel'"),
        ({"_class_name": "DiTTransformer2DModel"}, "wrong architecture.*folder of a PixArt-alpha"),
        ({"activation_fn": "geglu"}, "activation_fn='geglu', the port implements 'gelu-approx"),
        ({"interpolation_scale": 0}, "interpolation_scale=0, expected a finite number in 0.001"),
        (
            {"attention_head_dim": 71},
            "16 x attention_head_dim=71 = 1136, expected a multiple of 12",
        ),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768, expected 1152"),
        ({"out_channels": 6}, "out_channels=6, expected in_channels=4 for the noise, or twice"),
        ({"sample_size": 1}, "sample_size=1, expected patch_size=2 at least"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm', a field that the port does not know"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_not_ported_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as error:
        pixart.PixArtConfig.from_json({**published.PIXART_1024, **change})
    assert "\n" not in str(error.value)


def test_latents_that_are_not_whole_patches_are_refused():
    model = pipeline.abstract_model(SMALL)
    v = parity.pixart_inputs(SMALL, 1, 7, 8)
    with pytest.raises(UserError, match="latents of height 7 and width 8, expected multiples of 2"):
        jax.eval_shape(
            lambda params: nnx.merge(model.graphdef, params)(
                v["x"], v["t"], parity.pixart_condition(v)
            ),
            model.params,
        )


@pytest.mark.slow
def test_rows_and_weights_split_over_devices_give_the_result_of_one(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # so that each leaf is split, small as they are here
    mesh = sharding.make_mesh(1, 2, 4)
    config = parity.PIXARTS["PixArt-1024"]
    graphdef, params = parity.port(parity.torch_pixart("PixArt-1024"), config, remat="full")
    v = parity.pixart_inputs(config, 2, 16, 6)
    condition, t = parity.pixart_condition(v), v["t"]
    projection = np.random.default_rng(1).standard_normal(v["x"].shape).astype(np.float32)
    specs, batch = sharding.params_spec(mesh, params), sharding.batch_spec()

    def run(params, x, t, condition, projection):
        def loss(params, x):
            eps = nnx.merge(graphdef, params)(x, t, condition)
            return jnp.sum(eps * projection), eps

        (_, eps), (grads, of_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        return eps, of_x, sharding.sum_gradients(grads, specs)

    given = (params, v["x"], t, condition, projection)
    alone = jax.jit(run)(*given)
    split = sharding.on_each(mesh, run, (specs, *[batch] * 4), (batch, batch, specs))
    together = jax.jit(split)(*given)
    for ours, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        # Biases of keys have no gradient but rounding: a softmax does not see them.
        near = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=near)


def test_a_mask_goes_with_its_context_through_guidance():
    """A network of nothing but the masked text shows which mask it was given."""
    rng = np.random.default_rng(0)
    masks = np.array([[1, 1, 0], [1, 0, 0]], bool), np.array([[1, 0, 0], [1, 0, 0]], bool)
    condition, null = (
        Condition(jnp.asarray(rng.standard_normal((2, 3, 1)), jnp.float32), None, None, mask)
        for mask in map(jnp.asarray, masks)
    )

    def network(params, x_t, t, condition):
        seen = condition.context[..., 0] * condition.mask
        return params * x_t + seen.sum(-1)[:, None, None, None]

    def bind(params):
        return functools.partial(network, params)

    x_t, t = jnp.ones((2, 2, 2, 4)), jnp.array([3, 500])
    expected = 1 + 3.0 * network(1.0, 0 * x_t, t, condition) - 2 * network(1.0, 0 * x_t, t, null)
    method = SimpleNamespace(
        score=bind,
        objective=objectives.OBJECTIVES["di_star"],
        settings=SimpleNamespace(omega=3.0),
    )
    conditions = (condition, null)
    _, reference = gradients.score_networks(method, jnp.ones(()), jnp.ones(()), conditions)
    np.testing.assert_allclose(reference(x_t, t)["guided"], expected, rtol=1e-5)
    scores = schemes.scanned_scores(method, jnp.ones(()), jnp.ones(()), conditions, t, x_t)
    np.testing.assert_allclose(scores.guided, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.psi, network(1.0, x_t, t, condition), rtol=1e-5)


@pytest.mark.long
def test_full_size_pixart_512_equals_diffusers_with_random_weights(monkeypatch):
    monkeypatch.setitem(parity.PIXARTS, "PixArt-512", published.PIXART_512)
    module = parity.torch_pixart("PixArt-512")
    v = parity.pixart_inputs(published.PIXART_512, 1, 64, 64, tokens=120)
    with torch.no_grad():
        expected = parity.torch_pixart_eps(module, v, parity.to_nchw(v["x"]))
    graphdef, params = parity.port(module, published.PIXART_512)
    ours = jax.jit(
        lambda params: nnx.merge(graphdef, params)(v["x"], v["t"], parity.pixart_condition(v))
    )(params)
    error = parity.relative(ours, parity.to_nhwc(expected))
    print(f"PixArt-512 at full size, 64x64 latents, 120 tokens: {error:.1e}")
    assert error <= parity.FORWARD
