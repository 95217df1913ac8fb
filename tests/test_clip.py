# SPDX-License-Identifier: Apache-2.0
"""The CLIP port against transformers with random weights, and at full size without allocating
anything.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from di_star_jax import models
from di_star_jax.errors import UserError
from di_star_jax.models import clip
from di_star_jax.storage import weights

FORWARD, GRADIENT = 2e-5, 1e-4  # max|difference| / max|reference|
TEXT = dict(
    vocab_size=99,
    hidden_size=64,
    intermediate_size=160,
    projection_dim=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=20,
    bos_token_id=97,
    eos_token_id=98,
    pad_token_id=0,
)
VISION = dict(
    hidden_size=80,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=1,
    image_size=32,
    patch_size=8,
    hidden_act="gelu",
    projection_dim=48,
)
SMALL = clip.CLIPTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=20,
    eos_token_id=98,
)


def _randomise(model):
    """Weights of unit gain, and nothing left at zero or one: a mixed-up bias or norm would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2 and "embedding.weight" not in name or "patch_embedding" in name:
                noise = noise / math.sqrt(p[0].numel())
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            elif p.ndim < 2:
                noise = 0.2 * noise
            p.copy_(noise)
    return model.eval()


def _hub_names(model, tensors):
    """transformers 5 dropped the prefix of a plain text encoder; the hub's files have it."""
    prefix = "text_model." if isinstance(model, transformers.CLIPTextModel) else ""
    return {prefix + name: value.detach().numpy() for name, value in tensors}


def _port(cls, config, torch_model):
    graphdef, abstract = models.abstract(lambda rngs: cls(config, rngs=rngs))
    return graphdef, weights.params_from_tensors(
        _hub_names(torch_model, torch_model.state_dict().items()), abstract
    )


def _gradient_error(grads, torch_model, names):
    """Largest relative error over the named weights, in PyTorch's names."""
    ours = weights.tensors_from_params(grads)
    expected = _hub_names(
        torch_model, ((n, p.grad) for n, p in torch_model.named_parameters() if p.grad is not None)
    )
    return max(_relative(ours[name], expected[name]) for name in names)


def _relative(ours, reference):
    reference = np.asarray(reference)
    return np.max(np.abs(np.asarray(ours) - reference)) / np.max(np.abs(reference))


def _report(module, **errors):
    """Shown by `pytest -rP`: the figures of the README's parity table."""
    print(module, " ".join(f"{name}={error:.1e}" for name, error in errors.items()))


def _prompts(batch, eos_in_vocabulary):
    """Ids with one end-of-text at another place in each row, followed by copies of it, as
    tokenizers pad.
    """
    ids = (
        np.random.default_rng(0)
        .integers(1, 97, (batch, TEXT["max_position_embeddings"]))
        .astype(np.int32)
    )
    for row in range(batch):
        ids[row, 5 + 4 * row :] = eos_in_vocabulary
    return ids


def _text_outputs(torch_model, ids):
    out = torch_model(torch.from_numpy(ids).long(), output_hidden_states=True)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    return out.hidden_states[-2], out.last_hidden_state, pooled


CLASSES = {
    "CLIPTextModel": transformers.CLIPTextModel,
    "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection,
}


@pytest.mark.parametrize(
    "name, batch, settings",
    [
        ("CLIPTextModel", 1, dict(hidden_act="quick_gelu", eos_token_id=2)),
        (
            "CLIPTextModel",
            3,
            dict(
                hidden_act="gelu",
                eos_token_id=98,
                num_hidden_layers=2,
                hidden_size=96,
                num_attention_heads=6,
            ),
        ),
        ("CLIPTextModelWithProjection", 1, dict(hidden_act="gelu", eos_token_id=98)),
        ("CLIPTextModelWithProjection", 3, dict(hidden_act="quick_gelu", eos_token_id=2)),
    ],
)
def test_text_encoders_equal_transformers(name, batch, settings):
    reference = _randomise(CLASSES[name](transformers.CLIPTextConfig(**{**TEXT, **settings})))
    config = clip.CLIPTextConfig.from_json(
        json.loads(reference.config.to_json_string(use_diff=False))
    )
    graphdef, params = _port(getattr(clip, name), config, reference)
    ids = _prompts(batch, eos_in_vocabulary=98)
    expected = _text_outputs(reference, ids)
    cotangents = [
        np.random.default_rng(i).standard_normal(e.shape, np.float32)
        for i, e in enumerate(expected)
    ]

    def loss(params):
        outputs = nnx.merge(graphdef, params)(ids)
        return sum(jnp.sum(out * c) for out, c in zip(outputs, cotangents)), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(params)
    sum((e * torch.from_numpy(c)).sum() for e, c in zip(expected, cotangents)).backward()

    forward = max(_relative(ours, e.detach()) for ours, e in zip(outputs, expected))
    gradient = _gradient_error(
        grads,
        reference,
        [
            "text_model.embeddings.token_embedding.weight",
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "text_model.encoder.layers.1.mlp.fc1.bias",
            "text_model.final_layer_norm.weight",
        ],
    )
    _report(name, forward=forward, gradient=gradient)
    assert forward <= FORWARD
    assert gradient <= GRADIENT


@functools.cache
def small():
    """(graphdef, params) of a text encoder."""
    return models.init(lambda rngs: clip.CLIPTextModel(SMALL, rngs=rngs), seed=0)


def test_prompts_pool_at_the_first_end_of_text_under_both_conventions():
    """What follows the first end-of-text has no influence, whether it is found as `98` or as the
    largest id.
    """
    ids = _prompts(2, eos_in_vocabulary=98)
    changed = ids.copy()
    changed[:, -5:] = 7
    _, params = small()
    for eos in (2, 98):
        config = dataclasses.replace(SMALL, eos_token_id=eos)
        graphdef, _ = models.abstract(lambda rngs: clip.CLIPTextModel(config, rngs=rngs))
        run = jax.jit(lambda ids: nnx.merge(graphdef, params)(ids))
        np.testing.assert_allclose(run(ids).pooled, run(changed).pooled, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            run(ids).pooled, run(ids).last_hidden_state[np.arange(2), [5, 9]]
        )


@pytest.mark.parametrize("act, eos, heads, batch", [("gelu", 98, 1, 3), ("quick_gelu", 2, 5, 1)])
def test_clip_model_equals_transformers(act, eos, heads, batch):
    text = {**TEXT, "hidden_act": act, "eos_token_id": eos}
    vision = {
        **VISION,
        "hidden_act": act,
        "num_attention_heads": heads,
    }  # heads of 80, as ViT-H, and of 16
    reference = _randomise(
        transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
        )
    )
    config = clip.CLIPConfig.from_json(json.loads(reference.config.to_json_string(use_diff=False)))
    graphdef, params = _port(clip.CLIPModel, config, reference)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((batch, 32, 32, 3), np.float32)
    cotangent = rng.standard_normal((batch, 48), np.float32)
    ids = _prompts(batch, eos_in_vocabulary=98)

    def loss(params, pixels):
        features = nnx.merge(graphdef, params).image_features(pixels)
        return jnp.sum(features * cotangent), features

    (grads, grad_pixels), image = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        params, pixels
    )
    text_features = jax.jit(lambda params: nnx.merge(graphdef, params).text_features(ids))(params)

    torch_pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).requires_grad_()
    # transformers 5 returns objects here
    expected_image = reference.get_image_features(torch_pixels).pooler_output
    expected_text = reference.get_text_features(torch.from_numpy(ids).long()).pooler_output
    (expected_image * torch.from_numpy(cotangent)).sum().backward()

    forward = max(
        _relative(image, expected_image.detach()), _relative(text_features, expected_text.detach())
    )
    pixels_gradient = _relative(grad_pixels, torch_pixels.grad.permute(0, 2, 3, 1))
    gradient = _gradient_error(
        grads,
        reference,
        [
            "vision_model.embeddings.class_embedding",
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.encoder.layers.1.mlp.fc1.bias",
            "vision_model.encoder.layers.0.self_attn.v_proj.weight",
        ],
    )
    _report("CLIPModel", forward=forward, pixels_gradient=pixels_gradient, gradient=gradient)
    assert forward <= FORWARD
    assert max(gradient, pixels_gradient) <= GRADIENT
    assert params["logit_scale"] == reference.logit_scale.detach().numpy()


def test_rematerialisation_changes_no_value_and_no_gradient():
    ids = _prompts(1, eos_in_vocabulary=98)
    _, params = small()

    def run(remat):
        graphdef, _ = models.abstract(
            lambda rngs: clip.CLIPTextModel(SMALL, rngs=rngs, remat=remat)
        )
        loss = jax.value_and_grad(
            lambda params: jnp.sum(nnx.merge(graphdef, params)(ids).pooled ** 2)
        )
        traced = jax.jit(loss).trace(params)
        return traced.lower().compile()(params), str(traced.jaxpr)

    (plain, plain_jaxpr), (remat, remat_jaxpr) = run("none"), run("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
    assert "remat" in remat_jaxpr and "remat" not in plain_jaxpr


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
    graphdef, params = small()
    half, half_params = models.abstract(
        lambda rngs: clip.CLIPTextModel(SMALL, rngs=rngs, dtype=jnp.bfloat16)
    )
    assert {p.dtype for p in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
    ids = _prompts(2, eos_in_vocabulary=98)
    run = jax.jit(lambda graphdef: nnx.merge(graphdef, params)(ids), static_argnums=0)
    for full, low in zip(run(graphdef), run(half)):
        assert low.dtype == jnp.bfloat16
        assert np.max(np.abs(full - low.astype(jnp.float32))) < 0.05 * np.max(np.abs(full))


def test_layers_are_stacked_and_start_from_different_weights():
    _, params = small()
    kernel = params["text_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (3, 32, 64)
    assert not np.allclose(kernel[0], kernel[1])


CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    projection_dim=768,
    eos_token_id=2,
)
BIG_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=20,
    num_hidden_layers=32,
    projection_dim=1280,
    hidden_act="gelu",
)
VIT_H = dict(
    projection_dim=1024,
    text_config=dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        hidden_act="gelu",
        eos_token_id=2,
    ),
    vision_config=dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=16,
        num_hidden_layers=32,
        patch_size=14,
        hidden_act="gelu",
    ),
)


@pytest.mark.parametrize(
    "cls, config, count",
    [
        (clip.CLIPTextModel, clip.CLIPTextConfig.from_json(CLIP_L), 123_060_480),
        (clip.CLIPTextModelWithProjection, clip.CLIPTextConfig.from_json(BIG_G), 694_659_840),
        (clip.CLIPModel, clip.CLIPConfig.from_json(VIT_H), 986_109_441),
    ],
    ids=["CLIP-L text", "bigG text", "PickScore ViT-H"],
)
def test_full_size_models_have_the_published_parameter_counts_and_trace(cls, config, count):
    graphdef, params = models.abstract(lambda rngs: cls(config, rngs=rngs))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(params)) == count
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    if cls is clip.CLIPModel:
        pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
        image = jax.eval_shape(
            lambda p, x: nnx.merge(graphdef, p).image_features(x), params, pixels
        )
        text = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p).text_features(x), params, ids)
        assert image.shape == text.shape == (2, 1024)
        return
    output = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p)(x), params, ids)
    assert (
        output.hidden_states_penultimate.shape
        == output.last_hidden_state.shape
        == (2, 77, config.hidden_size)
    )
    assert output.pooled.shape == (2, config.hidden_size)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (clip.CLIPTextConfig, transformers.CLIPTextConfig),
        (clip.CLIPVisionConfig, transformers.CLIPVisionConfig),
        (clip.CLIPConfig, transformers.CLIPConfig),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_assumes(ours, theirs):
    reference, built = theirs().to_dict(), dataclasses.asdict(ours.from_json({}))
    towers = {name: built.pop(name) for name in ("text_config", "vision_config") if name in built}
    assert built == {name: reference[name] for name in built}
    for name, tower in towers.items():
        assert tower == {field: reference[name][field] for field in tower}


def test_old_two_tower_configs_are_read_as_transformers_reads_them():
    old = dict(
        projection_dim=48,
        text_config={**TEXT, "eos_token_id": 2},
        text_config_dict=dict(hidden_size=768),
        vision_config=VISION,
        vision_config_dict=None,
    )
    config = clip.CLIPConfig.from_json(old)  # first: transformers writes into the dict
    reference = transformers.CLIPConfig(**old)
    for tower in ("text_config", "vision_config"):
        ours = dataclasses.asdict(getattr(config, tower))
        assert ours == {field: getattr(getattr(reference, tower), field) for field in ours}


@pytest.mark.parametrize(
    "cls, config, message",
    [
        (
            clip.CLIPTextConfig,
            dict(model_type="t5"),
            "has model_type='t5', expected 'clip_text_model'",
        ),
        (
            clip.CLIPConfig,
            dict(model_type="clip_text_model"),
            "has model_type='clip_text_model', expected 'clip'",
        ),
        (
            clip.CLIPTextConfig,
            dict(hidden_act="gelu_new"),
            "hidden_act='gelu_new', the port implements",
        ),
        (
            clip.CLIPVisionConfig,
            dict(hidden_size=100, num_attention_heads=12),
            "hidden_size=100, .*num_attention_heads=12",
        ),
        (
            clip.CLIPVisionConfig,
            dict(image_size=[224, 336]),
            r"image_size=\[224, 336\], .*one integer",
        ),
    ],
)
def test_a_config_the_port_does_not_implement_is_refused_in_one_line(cls, config, message):
    with pytest.raises(UserError, match=message) as error:
        cls.from_json(config)
    assert "\n" not in str(error.value)


def test_inputs_of_a_wrong_size_are_refused_in_one_line():
    config = clip.CLIPConfig(
        text_config=clip.CLIPTextConfig(vocab_size=9, hidden_size=16, num_attention_heads=2),
        vision_config=clip.CLIPVisionConfig(hidden_size=24),
    )
    graphdef, params = models.abstract(lambda rngs: clip.CLIPModel(config, rngs=rngs))
    with pytest.raises(UserError, match="got 78 token ids per prompt, .* at most 77"):
        jax.eval_shape(
            lambda p: nnx.merge(graphdef, p).text_features(jnp.zeros((1, 78), jnp.int32)), params
        )
    with pytest.raises(
        UserError, match=r"got pixels \(64, 64, 3\), the CLIP model takes \(224, 224, 3\)"
    ):
        jax.eval_shape(
            lambda p: nnx.merge(graphdef, p).image_features(jnp.zeros((1, 64, 64, 3))), params
        )
