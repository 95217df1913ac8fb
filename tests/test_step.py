# SPDX-License-Identifier: Apache-2.0
"""The training step on a tiny SDXL: UNet, two text encoders, VAE and CLIP reward, all real code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from di_star_jax import diffusion, pipeline, rewards, sharding, step

TEXT = {"model_type": "clip_text_model", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 8, "projection_dim": 16,
        "eos_token_id": 39}
CONFIGS = {
    "unet": {"sample_size": 8, "block_out_channels": [16, 64], "layers_per_block": 1, "norm_num_groups": 8,
             "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
             "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
             "transformer_layers_per_block": [1, 2], "attention_head_dim": [1, 2], "cross_attention_dim": 32,
             "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 64, "_class_name": "UNet2DConditionModel"},
    "text_encoder": {**TEXT, "architectures": ["CLIPTextModel"]},
    "text_encoder_2": {**TEXT, "architectures": ["CLIPTextModelWithProjection"]},
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16], "layers_per_block": 1,
            "norm_num_groups": 8, "scaling_factor": 0.5},
    "reward": {"architectures": ["CLIPModel"], "projection_dim": 16, "text_config": TEXT,
               "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
                                 "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}},
}
SCHEDULE = diffusion.make_schedule(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                                   beta_schedule="scaled_linear")
SETTINGS = step.Settings(
    objective="di_star", omega=7.5, reward_scale=100.0, huber_c=0.00054, generator_times=(20, 980),
    assistant_times=(0, 999), assistant_updates=1, generator_timestep=399, latent_shape=(8, 8, 4), ema_decay=0.9)
BATCH = 8


@pytest.fixture(scope="module")
def world():
    """(networks, frozen parameters, another UNet's parameters, token ids)."""
    from di_star_jax import models
    graphdefs, params = {}, {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        cls, settings = pipeline.model_class(config)
        graphdefs[name], params[name] = models.init(lambda rngs: cls(settings, rngs=rngs), seed=i)
    other = models.init(lambda rngs: pipeline.model_class(CONFIGS["unet"])[0](
        pipeline.model_class(CONFIGS["unet"])[1], rngs=rngs), seed=99)[1]

    def reward(params, x0, ids):
        text = rewards.text_embeddings(graphdefs["reward"], params["reward"], ids["reward"])
        return rewards.pickscore(graphdefs["reward"], params["reward"],
                                 nnx.merge(graphdefs["vae"], params["vae"]).decode(x0), text)

    networks = step.Networks(
        lambda params, x_t, t, condition: nnx.merge(graphdefs["unet"], params)(x_t, t, condition),
        lambda params, ids: pipeline.encode_text(graphdefs, params, ids, 16), reward)
    ids = np.random.default_rng(0).integers(0, 40, (BATCH, 8)).astype(np.int32)
    return networks, params, other, {name: ids for name in ("tokenizer", "tokenizer_2", "reward")}


def make(world, settings=SETTINGS, optimizer=None):
    networks, params, other, ids = world
    opt = optimizer or step.adamw(1e-4, lr_warmup_steps=0, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.01,
                                  clip_norm=10.0)
    state = step.init_state(other, params["unet"], opt, opt)
    update = jax.jit(step.make_train_step(networks, settings, SCHEDULE, opt, opt), donate_argnums=0)
    return state, lambda state, key=jax.random.key(0): update(state, params, ids, key), update


@pytest.fixture(scope="module")
def default(world):
    return make(world)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def distance(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_step_moves_generator_assistant_and_average_and_donates_the_state(default):
    state, run, _ = default
    before, given = copy(state), copy(state)
    after, metrics = run(given)
    assert int(after.step) == 1 and float(metrics["nonfinite"]) == 0
    assert all(np.isfinite(float(v)) for v in metrics.values())
    for name in ("generator", "assistant"):
        assert distance(getattr(before, name), getattr(after, name)) > 1e-5
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, before.ema, after.generator)
    assert distance(expected, after.ema) < 1e-6
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.generator))


def test_nothing_recompiles_after_the_first_step(default):
    state, run, update = default
    state = copy(state)
    for _ in range(3):
        state, _ = run(state)
    assert update._cache_size() == 1


def test_stopped_and_restarted_equals_a_straight_run(default):
    state, run, _ = default
    straight = copy(state)
    for _ in range(3):
        straight, _ = run(straight)
    part, _ = run(copy(state))
    part = jax.tree.map(lambda x: jnp.array(np.asarray(x)), part)  # as from a file
    for _ in range(2):
        part, _ = run(part)
    assert distance(straight, part) == 0.0


def test_gradients_on_eight_devices_equal_those_on_one(world):
    # With plain SGD of rate 1 a step's change of the parameters is the gradient.
    networks, params, other, ids = world
    sgd = optax.sgd(1.0)
    update = jax.jit(step.make_train_step(networks, SETTINGS, SCHEDULE, sgd, sgd))
    state = step.init_state(other, params["unet"], sgd, sgd)
    one, _ = update(state, params, ids, jax.random.key(0))
    mesh = sharding.make_mesh(2, 4)
    put = lambda tree: jax.device_put(tree, sharding.params_sharding(mesh, tree))
    spread = {name: jax.device_put(v, sharding.batch_sharding(mesh)) for name, v in ids.items()}
    eight, _ = jax.jit(update)(put(state), put(params), spread, jax.random.key(0))
    assert isinstance(mesh, Mesh) and len(mesh.devices.ravel()) == 8
    for name in ("generator", "assistant"):
        gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), getattr(one, name), getattr(state, name))
        largest = max(np.abs(g).max() for g in jax.tree.leaves(gradient))
        error = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in
                    zip(jax.tree.leaves(getattr(one, name)), jax.tree.leaves(getattr(eight, name))))
        assert error <= 1e-5 * max(largest, 1.0), f"{name}: {error} of {largest}"


def test_the_generators_gradient_is_that_of_the_whole_loss(world):
    # The step differentiates at x0 and pulls back; one jax.grad through everything must agree.
    networks, params, other, ids = world
    sgd = optax.sgd(1.0)
    state = step.init_state(other, params["unet"], sgd, sgd)
    key = jax.random.key(0)
    after, _ = jax.jit(step.make_train_step(networks, SETTINGS, SCHEDULE, sgd, sgd))(state, params, ids, key)

    def whole(generator):
        key_z, key_generator, _ = jax.random.split(jax.random.fold_in(key, 0), 3)
        conditions = networks.encode_text(params, ids)
        z = jax.random.normal(key_z, (BATCH, 8, 8, 4))
        x0 = step.make_generate(networks, SETTINGS, SCHEDULE)(generator, z, conditions[0])
        return step.generator_loss(x0, key_generator, assistant=state.assistant, frozen=params,
                                   conditions=conditions, token_ids=ids, networks=networks, settings=SETTINGS,
                                   schedule=SCHEDULE)[0]

    expected = jax.tree.map(lambda p, g: p - g, state.generator, jax.jit(jax.grad(whole))(state.generator))
    largest = distance(expected, state.generator)
    assert distance(after.generator, expected) <= 1e-4 * largest


def test_warm_up_trains_the_assistant_alone(world):
    networks, params, other, ids = world
    opt = step.adamw(1e-4, lr_warmup_steps=0, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=10.0)
    state = step.init_state(other, params["unet"], opt, opt)
    warm = jax.jit(step.make_warmup_step(networks, SETTINGS, SCHEDULE, opt))
    after, metrics = warm(state, params, ids, jax.random.key(0))
    assert distance(after.generator, state.generator) == 0.0
    assert distance(after.assistant, state.assistant) > 1e-5
    assert float(metrics["nonfinite"]) == 0


def test_two_assistant_updates_move_the_assistant_further_than_one(world):
    twice = dataclasses.replace(SETTINGS, assistant_updates=2)
    sgd = optax.sgd(1e-3)
    moved = []
    for settings in (SETTINGS, twice):
        state, run, _ = make(world, settings, sgd)
        start = copy(state.assistant)
        after, _ = run(state)
        moved.append(distance(after.assistant, start))
    assert moved[1] > 1.2 * moved[0]


def test_a_gradient_that_is_not_finite_is_counted(default):
    state, run, _ = default
    broken = copy(state)
    broken.generator["conv_in"]["bias"] = broken.generator["conv_in"]["bias"].at[0].set(jnp.nan)
    _, metrics = run(broken)
    assert float(metrics["nonfinite"]) > 0
