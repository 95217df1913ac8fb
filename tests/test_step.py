# SPDX-License-Identifier: Apache-2.0
"""The training step on a tiny SDXL: UNet, two text encoders, VAE and CLIP reward, all real code."""

import dataclasses
import functools
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from di_star_jax import diffusion, gradients, models, objectives, schemes, sharding, step
from di_star_jax.cost import flops
from di_star_jax.diffusion import FewStep
from di_star_jax.models import published
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import conditions
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.rewards import similarity
from di_star_jax.rewards.pixels import clip_pixels

TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8,
    "projection_dim": 16,
    "eos_token_id": 39,
}
CONFIGS = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
        "_class_name": "UNet2DConditionModel",
    },
    "text_encoder": {**TEXT, "architectures": ["CLIPTextModel"]},
    "text_encoder_2": {**TEXT, "architectures": ["CLIPTextModelWithProjection"]},
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 0.5,
    },
    "reward": {
        "architectures": ["CLIPModel"],
        "projection_dim": 16,
        "text_config": TEXT,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 4,
        },
    },
}
SCHEDULE = diffusion.make_schedule(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
SETTINGS = gradients.Settings(
    objective="di_star",
    omega=7.5,
    constants=objectives.Constants(),
    weighting="eps",
    reduction="sum",
    generator_times=(20, 980),
    assistant_times=(0, 999),
    assistant_updates=1,
    scheme="separate",
    generator=FewStep((399,)),
    latent_shape=(8, 8, 4),
    ema_half_life=50_000,
)
BATCH = 8
IDS = {"tokenizer": jnp.tile(jnp.arange(BATCH, dtype=jnp.int32)[:, None], (1, 8))}


def random_model(config, seed):
    """As `models.init` of the class that a config.json names; in NumPy, for a generator for each of
    hundreds of leaves takes longer to compile than what is tested with them.

    Returns: (graphdef, params).
    """
    cls, settings = pipeline.model_class(config)
    graphdef, tree = models.abstract(lambda rngs: cls(settings, rngs=rngs))
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "logit_scale":
            return jnp.float32(settings.logit_scale_init_value)
        if name in ("scale", "bias"):
            return jnp.full(shape, float(name == "scale"), leaf.dtype)
        of_convolution = name == "kernel" and len(shape) == 4
        inputs = np.prod(shape[:3]) if of_convolution else shape[-2] if name == "kernel" else 2500
        return jnp.asarray(rng.standard_normal(shape) * inputs**-0.5, leaf.dtype)

    return graphdef, jax.tree.map_with_path(drawn, tree)


def one_device():
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def world():
    """(method, frozen parameters, another UNet's parameters, token ids)."""
    graphdefs, params = {}, {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        graphdefs[name], params[name] = random_model(config, seed=i)
    other = random_model(CONFIGS["unet"], seed=99)[1]

    def reward(params, x0, ids, crop):
        image = nnx.merge(graphdefs["vae"], params["vae"]).decode(x0)
        score = similarity.cosine(
            graphdefs["reward"], clip_pixels, params["reward"], image, ids["reward"]
        )
        return 100.0 * score, {"pickscore": score}

    method = gradients.Method(
        functools.partial(nnx.merge, graphdefs["unet"]),
        lambda params, ids: conditions(SDXL, SDXL.encode_text(graphdefs, params, ids), None, 16),
        reward,
        SCHEDULE,
        SETTINGS,
    )
    params["reference"] = params.pop("unet")
    ids = np.random.default_rng(0).integers(0, 40, (BATCH, 8)).astype(np.int32)
    return method, params, other, {name: ids for name in ("tokenizer", "tokenizer_2", "reward")}


# A UNet of a few products: what the step does with it is the same, and compiles in a second.
def small_unet(params):
    def unet(x_t, t, condition):
        h = jnp.tanh(
            x_t @ params["a"]
            + condition.pooled[:, None, None, :] @ params["c"]
            + jnp.sin(diffusion.per_sample(t / 200.0, x_t))
        )
        return h @ params["b"] + 0.1 * x_t

    return unet


def small_world(reward_scale=100.0, **changes):
    """(method, frozen parameters, another UNet's parameters, a third one's)."""

    def params(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        return {
            "a": 0.5 * jax.random.normal(keys[0], (4, 16)),
            "b": 0.3 * jax.random.normal(keys[1], (16, 4)),
            "c": jax.random.normal(keys[2], (3, 16)),
        }

    def encode_text(frozen, token_ids):
        pooled = jax.random.normal(jax.random.key(5), (BATCH, 3))[token_ids["tokenizer"][:, 0]]
        condition = Condition(jnp.zeros((len(pooled), 1, 1)), pooled, None)
        return conditions(SDXL, condition, None, 16)

    def reward(frozen, x0, ids, crop):
        score = -(x0**2).mean((1, 2, 3))
        return reward_scale * score, {"small": score}

    settings = dataclasses.replace(SETTINGS, **changes)
    method = gradients.Method(small_unet, encode_text, reward, SCHEDULE, settings)
    return method, {"reference": params(0)}, params(1), params(2)


def plain_sgd():
    """Both optimizers such that a step's change of the parameters is the gradient."""
    return step.Optimizers(optax.sgd(1.0), optax.sgd(1.0))


def adam(weight_decay=0.01):
    settings = step.AdamW(lr_warmup_steps=0, b1=0.0, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return step.Optimizers(step.adamw(1e-4, settings), step.adamw(1e-4, settings))


@pytest.fixture(scope="module")
def small():
    """(state, run(state) -> (state, metrics), the jitted step) of the small world."""
    method, frozen, generator, assistant = small_world()
    update = jax.jit(step.make_train_step(method, adam(), one_device()), donate_argnums=0)
    state = step.init_state(generator, assistant, adam())
    state = jax.device_put(
        state, sharding.params_sharding(one_device(), state)
    )  # where the step leaves it

    def run(state):
        return update(state, frozen, (IDS,), jax.random.key(0))

    return state, run, update


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def distance(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_step_moves_generator_assistant_and_average_and_donates_the_state(small):
    state, run, _ = small
    given, before = copy(state), copy(state)
    after, metrics = run(given)
    assert int(after.step) == 1 and float(metrics["nonfinite"]) == 0
    assert all(np.isfinite(float(v)) for v in metrics.values())
    for name in ("generator", "assistant"):
        assert distance(getattr(before, name), getattr(after, name)) > 1e-5
    assert distance(after.generator, after.ema) == 0.0  # no images were seen before the first step
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.generator))


def test_nothing_recompiles_after_the_first_step(small):
    state, run, update = small
    state = copy(state)
    for _ in range(3):
        state, _ = run(state)
    assert update._cache_size() == 1


def test_stopped_and_restarted_equals_a_straight_run(small):
    state, run, _ = small
    straight = copy(state)
    for _ in range(3):
        straight, _ = run(straight)
    part, _ = run(copy(state))
    part = jax.tree.map(lambda x: jnp.array(np.asarray(x)), part)  # as from a file
    for _ in range(2):
        part, _ = run(part)
    assert distance(straight, part) == 0.0


def world_gradients(world, mesh, **changes):
    """(generator's, assistant's) gradients of one step of the tiny SDXL on a mesh, as NumPy trees,
    and the metrics.

    With plain SGD of rate 1 a step's change of the parameters is the gradient.
    """
    method, params, other, ids = world
    method = dataclasses.replace(method, settings=dataclasses.replace(SETTINGS, **changes))
    state = step.init_state(other, params["reference"], plain_sgd())

    def put(tree):
        return jax.device_put(tree, sharding.params_sharding(mesh, tree))

    spread = {name: jax.device_put(v, sharding.batch_sharding(mesh)) for name, v in ids.items()}
    update = step.make_train_step(method, plain_sgd(), mesh)
    after, metrics = jax.jit(update)(put(state), put(params), (spread,), jax.random.key(0))
    return [
        jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), getattr(after, name), getattr(state, name)
        )
        for name in ("generator", "assistant")
    ], metrics


@pytest.mark.long
def test_gradients_on_eight_devices_equal_those_on_one(world, monkeypatch):
    # The looped scheme, for it compiles fastest; the others are compared with it on one device.
    on_one = world_gradients(world, one_device(), scheme="looped")
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    many, metrics = world_gradients(world, sharding.make_mesh(2, 2, 2), scheme="looped")
    for ours, expected in zip(many, on_one[0]):
        largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
        error = max(
            np.abs(a - b).max() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected))
        )
        assert error <= 1e-5 * max(largest, 1.0), f"{error} of {largest}"
    for name, value in on_one[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


def test_warm_up_trains_the_assistant_alone(small):
    method, frozen, _, _ = small_world()
    state = copy(small[0])
    warmup_step = step.make_warmup_step(method, adam(weight_decay=0.0), one_device())
    after, metrics = jax.jit(warmup_step)(state, frozen, (IDS,), jax.random.key(0))
    assert distance(after.generator, state.generator) == 0.0
    assert distance(after.assistant, state.assistant) > 1e-5
    assert float(metrics["nonfinite"]) == 0


def test_a_gradient_that_is_not_finite_is_counted(small):
    state, run, _ = small
    broken = copy(state)
    broken.generator["a"] = broken.generator["a"].at[0].set(jnp.nan)
    _, metrics = run(broken)
    assert float(metrics["nonfinite"]) > 0


@functools.cache
def small_step(key=0, reward_scale=100.0, **changes):
    """One step of plain SGD with rate 1: the change of the parameters is the gradient.

    Returns: (settings, gradients of the generator, of the assistant, metrics).
    """
    method, frozen, generator, assistant = small_world(reward_scale, **changes)
    state = step.init_state(generator, assistant, plain_sgd())
    train_step = jax.jit(step.make_train_step(method, plain_sgd(), one_device()))
    after, metrics = train_step(state, frozen, (IDS,), jax.random.key(key))
    found = [
        jax.tree.map(lambda a, b: a - b, getattr(state, name), getattr(after, name))
        for name in ("generator", "assistant")
    ]
    return method.settings, *found, metrics


def expected_gradients(settings, key=0):
    """The gradients of the shared scheme, each by its own jax.grad on the same x_t."""
    method, frozen, generator, assistant = small_world(**dataclasses.asdict(settings))
    draws = gradients.draw(jax.random.fold_in(jax.random.key(key), 0), BATCH, settings)
    conditions = method.encode_text(frozen, IDS)
    z, t_z = gradients.simulate(method, generator, draws, conditions[0])
    networks = gradients.score_networks(method, assistant, frozen["reference"], conditions)

    def noised(generator):
        x0 = gradients.x0_of(method, z, t_z, small_unet(generator)(z, t_z, conditions[0]))
        return method.noise(x0, draws.t, draws.eps)

    def generator_loss(generator):
        point = noised(generator)
        scores = gradients.evaluate(method.objective, networks, draws.t, point.x_t)
        reward, _ = method.reward(frozen, point.x0, IDS, draws.crop)
        return (gradients.regulariser(method, scores, point) - reward).mean()

    def assistant_loss(assistant):
        eps_psi = small_unet(assistant)(noised(generator).x_t, draws.t, conditions[0])
        return objectives.denoising_score_matching(eps_psi, draws.eps).mean()

    # Each as one program: of its operations alone XLA makes a hundred.
    return (
        jax.jit(jax.grad(generator_loss))(generator),
        jax.jit(jax.grad(assistant_loss))(assistant),
    )


def separate(method, trained, frozen, token_ids, draws, scale):
    """Both gradients and the figures, of the two losses that share x0 alone."""
    grads, figures = gradients.of_generator(method, trained, frozen, token_ids, draws, scale)
    of_assistant, loss = gradients.of_samples(
        method, trained[1], frozen, figures.condition, draws, figures.x0
    )
    return (grads, of_assistant), figures._replace(assistant=loss, condition=())


def assert_close(a, b, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    "objective",
    [
        "di_star",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("kl_outside", "di_star_outside", "kl")
        ),
    ],
)
def test_one_shared_forward_gives_the_gradients_of_separate_ones_on_the_same_x_t(objective):
    settings, *found, metrics = small_step(objective=objective, scheme="shared")
    for ours, expected in zip(found, expected_gradients(settings)):
        assert_close(ours, expected)
    assert metrics["nonfinite"] == 0


# One whose scores pass their gradients on, and one whose do not; others are in test_by_hand.py, and
# the losses of all in test_objectives.py.
@pytest.mark.parametrize(
    "objective, scheme",
    [
        ("di_star", "separate"),
        ("kl", "separate"),
        ("di_star", "looped"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("di_star_outside", "looped"),
                ("kl", "looped"),
                *((name, "separate") for name in ("di_star_outside", "sid")),
                *((name, "separate") for name in ("kl_outside", "reward_only")),
            )
        ),
    ],
)
def test_with_fresh_times_the_generators_gradient_is_the_same(objective, scheme):
    settings, generator, assistant, metrics = small_step(objective=objective, scheme=scheme)
    expected = expected_gradients(settings)
    assert_close(generator, expected[0])
    assert distance(assistant, expected[1]) > 1e-3  # other times, other noise
    assert metrics["nonfinite"] == 0
    if scheme != "separate":  # which would be compared with itself
        assert_close(assistant, small_step(objective=objective)[2])


def test_no_regulariser_and_no_reward_is_no_gradient():
    _, generator, _, _ = small_step(objective="reward_only", reward_scale=0.0)
    assert all((g == 0).all() for g in jax.tree.leaves(generator))


def test_microbatches_have_the_gradients_and_figures_of_the_whole_batch():
    _, *whole, metrics = small_step()
    _, *parts, in_parts = small_step(microbatches=4)
    for ours, expected in zip(parts, whole):
        assert_close(ours, expected)
    for name, value in metrics.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-4, err_msg=name)


def test_on_gpus_the_second_gradient_is_a_branch_that_is_always_taken():
    def on(platform):
        mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
        return lambda count, x: step.by_itself(jnp.sin, mesh, count)(x)

    for count in (0, 7):
        assert on("gpu")(jnp.asarray(count), 2.0) == jnp.sin(2.0)
    programs = {name: str(jax.make_jaxpr(on(name))(0, 2.0)) for name in ("gpu", "cpu", "tpu")}
    assert [name for name, program in programs.items() if "cond" in program] == ["gpu"]


def test_omega_one_turns_guidance_off():
    unguided = small_step(omega=1.0)[1]
    constants = SETTINGS.constants._replace(alpha_cfg=0.0)
    assert_close(
        unguided, small_step(objective="di_star_outside", omega=1.0, constants=constants)[1]
    )
    assert distance(unguided, small_step(omega=2.0)[1]) > 1e-4


@pytest.mark.slow
def test_reduction_and_weighting_scale_the_regulariser_alone():
    at_399 = dict(reward_scale=0.0, generator_times=(399, 399))
    plain = small_step(**at_399)[1]
    mean = small_step(reduction="mean", **at_399)[1]
    assert_close(jax.tree.map(lambda g: g * 8 * 8 * 4, mean), plain)
    ratio = SCHEDULE.alpha[399] / SCHEDULE.sigma[399]
    x0 = small_step(weighting="x0", **at_399)[1]
    assert_close(jax.tree.map(lambda g: g * ratio, x0), plain)
    score = small_step(weighting="score", **at_399)[1]
    assert_close(jax.tree.map(lambda g: g * SCHEDULE.sigma[399], score), plain)
    squared = dict(constants=objectives.Constants(distance="l2"), **at_399)
    l2 = small_step(weighting="x0", **squared)[1]
    assert_close(jax.tree.map(lambda g: g * ratio**2, l2), small_step(**squared)[1])


@pytest.mark.parametrize(
    "timesteps", [(999, 499), pytest.param((999, 749, 499, 249), marks=pytest.mark.long)]
)
def test_a_few_step_generator_learns_at_each_step_from_what_the_earlier_ones_made(timesteps):
    method, frozen, generator, _ = small_world(generator=FewStep(timesteps))
    condition = method.encode_text(frozen, IDS)[0]
    unet = small_unet(generator)
    seen = {}
    for k in range(30):
        draws = gradients.draw(jax.random.key(k), BATCH, method.settings)
        x_t, t = gradients.simulate(method, generator, draws, condition)
        assert (t == t[0]).all()
        noise = jnp.moveaxis(draws.noise, 1, 0)
        i = timesteps.index(int(t[0]))
        seen[i] = seen.setdefault(i, 0) + 1
        expected = noise[0]
        for j in range(i):
            earlier = jnp.full(BATCH, timesteps[j])
            x0 = diffusion.eps_to_x0(
                expected, unet(expected, earlier, condition), *(v[earlier] for v in SCHEDULE)
            )
            later = jnp.full(BATCH, timesteps[j + 1])
            expected = diffusion.add_noise(x0, noise[j + 1], *(v[later] for v in SCHEDULE))
        np.testing.assert_allclose(x_t, expected, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == list(range(len(timesteps)))
    settings, *found, _ = small_step(generator=FewStep(timesteps), scheme="shared", key=3)
    for ours, expected in zip(found, expected_gradients(settings, key=3)):
        assert_close(ours, expected)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("separate", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in schemes.SCHEMES),
    ],
)
def test_from_main_to_the_unet_it_is_six_calls_at_most(world, monkeypatch, scheme):
    """Those that `main` makes to get there: `run`, then `train_step` and what it calls."""
    calls = set()
    unet = pipeline.model_class(CONFIGS["unet"])[0]
    forward = unet.__call__

    def recorded(self, *inputs):
        stack = [f for f in traceback.extract_stack() if "/di_star_jax/" in f.filename]
        calls.add(tuple(frame.name for frame in stack))
        return forward(self, *inputs)

    monkeypatch.setattr(unet, "__call__", recorded)
    method, params, other, ids = world
    method = dataclasses.replace(method, settings=dataclasses.replace(SETTINGS, scheme=scheme))
    state = step.init_state(other, params["reference"], plain_sgd())
    train_step = step.make_train_step(method, plain_sgd(), one_device())
    jax.eval_shape(train_step, state, params, (ids,), jax.random.key(0))
    assert {stack[0] for stack in calls} == {"train_step"}
    assert max(len(stack) for stack in calls) + 1 <= 6, calls


# UNet forwards per sample (an input-VJP is one, a whole backward pass two), VAE and reward apart.
@pytest.mark.parametrize(
    "changes, forwards",
    [
        pytest.param({}, 12, marks=pytest.mark.long),
        pytest.param({"scheme": "shared"}, 11, marks=pytest.mark.long),
        pytest.param({"objective": "di_star_outside", "omega": 1.0}, 11, marks=pytest.mark.long),
        pytest.param({"objective": "kl"}, 9, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_the_step_costs_as_many_unet_forwards_as_its_scheme_says(changes, forwards):
    unet = pipeline.abstract_model(published.UNET_SDXL)
    merge = functools.partial(nnx.merge, unet.graphdef)
    shape = (2, 128, 128, 4)
    condition = Condition(jnp.zeros((2, 77, 2048)), jnp.zeros((2, 1280)), jnp.zeros((2, 6)))
    one = flops.count(
        lambda params, *inputs: merge(params)(*inputs),
        unet.params,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jnp.zeros(2, jnp.int32),
        condition,
    )
    assert one / 2 == pytest.approx(6.761e12, rel=1e-3)
    method = gradients.Method(
        merge,
        lambda frozen, ids: conditions(SDXL, condition, None, 16),
        lambda frozen, x0, ids, crop: (jnp.zeros(2), {}),
        SCHEDULE,
        dataclasses.replace(SETTINGS, latent_shape=shape[1:], **changes),
    )
    state = jax.eval_shape(lambda p: step.init_state(p, p, plain_sgd()), unet.params)
    whole = flops.count(
        step.make_train_step(method, plain_sgd(), one_device()),
        state,
        {"reference": unet.params},
        ({"prompt": jnp.zeros(2)},),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    assert whole / one == pytest.approx(forwards, rel=0.05)


def test_every_step_draws_anew_and_every_stream_is_its_own():
    draws = [
        gradients.draw(jax.random.fold_in(jax.random.key(0), k), BATCH, SETTINGS) for k in range(2)
    ]
    noises = [[d.noise[:, 0], d.eps, d.eps_psi] for d in draws]
    flat = np.array([np.ravel(noise) for each in noises for noise in each])
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.12  # 2048 numbers: 5 sigma
    times = np.array([t for d in draws for t in (d.t, d.t_psi)])
    assert len({tuple(row) for row in times}) == len(times)
    assert (draws[0].crop != draws[1].crop).all()


def test_two_steps_of_a_run_see_different_noise(small):
    state, run, _ = small
    later = copy(state)._replace(step=state.step + 1)
    now, then = run(copy(state))[1], run(later)[1]
    for name in ("generator/x0_std", "regulariser/loss", "assistant/loss"):
        assert abs(float(now[name]) - float(then[name])) > 1e-4, name


def test_without_momentum_adamw_is_optaxs():
    settings = step.AdamW(lr_warmup_steps=0, b1=0.0, b2=0.99, eps=1e-8, weight_decay=0.01)
    ours, theirs = step.adamw(1e-3, settings), optax.adamw(1e-3, b1=0.0, b2=0.99, weight_decay=0.01)
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    found, expected = (params, ours.init(params)), (params, theirs.init(params))
    for k in range(3):
        grads = {"w": jax.random.normal(jax.random.key(k), (3,))}
        found, _ = step.update(ours, grads, *found, np.inf)
        expected, _ = step.update(theirs, grads, *expected, np.inf)
        np.testing.assert_allclose(found[0]["w"], expected[0]["w"], rtol=1e-6)


def prompts(k):
    """Token ids of one of several batches."""
    return {"tokenizer": (IDS["tokenizer"] + k) % BATCH}


# Of the assistant's plain gradient descent; gradients are about 1e3, and what rounding does to one
# update, a larger rate multiplies in the next.
RATE = 2e-5


def descend(method, networks, k, key):
    """(assistant after one more update on fresh samples of the generator).

    Args: networks, assistant, generator and frozen; k, of the prompts; key, of the update.
    """
    draws = gradients.draw(key, BATCH, method.settings)
    grads, _ = gradients.of_assistant(method, networks, prompts(k), draws)
    return jax.tree.map(lambda p, g: p - RATE * g, networks[0], grads)


def ordered_step(**changes):
    """(method, networks, the state before and after a step, its key)."""
    method, frozen, generator, assistant = small_world(**changes)
    optimizers = step.Optimizers(optax.sgd(1.0), optax.sgd(RATE))
    state = step.init_state(generator, assistant, optimizers)
    train_step = jax.jit(step.make_train_step(method, optimizers, one_device()))
    ids = tuple(prompts(k) for k in range(step.prompt_batches(method.settings)))
    after, _ = train_step(state, frozen, ids, jax.random.key(0))
    return method, frozen, state, after, jax.random.fold_in(jax.random.key(0), 0)


@pytest.mark.slow
def test_further_updates_see_fresh_prompts_noise_and_the_new_generator():
    method, frozen, before, after, key = ordered_step(assistant_updates=3)
    trained, none = (before.generator, before.assistant), jnp.ones(())
    draws = gradients.draw(key, BATCH, method.settings)
    (_, grads), _ = separate(method, trained, frozen, prompts(0), draws, none)
    expected = jax.tree.map(lambda p, g: p - RATE * g, before.assistant, grads)
    for k in (1, 2):
        networks = (expected, after.generator, frozen)
        expected = descend(method, networks, k, jax.random.fold_in(key, k))
    assert_close(after.assistant, expected, rtol=1e-5)
    assert distance(after.assistant, before.assistant) > 1e-2


def test_with_the_assistant_first_the_generator_sees_what_it_has_learnt():
    method, frozen, before, after, key = ordered_step(assistant_updates=2, assistant_first=True)
    assistant = before.assistant
    for k in (1, 2):
        networks = (assistant, before.generator, frozen)
        assistant = descend(method, networks, k, jax.random.fold_in(key, k))
    assert_close(after.assistant, assistant, rtol=1e-5)
    draws = gradients.draw(key, BATCH, method.settings)
    trained = (before.generator, assistant)
    grads, _ = gradients.of_generator(method, trained, frozen, prompts(0), draws, jnp.ones(()))
    assert_close(after.generator, jax.tree.map(jnp.subtract, before.generator, grads))
    stale, _ = gradients.of_generator(
        method, (before.generator, before.assistant), frozen, prompts(0), draws, jnp.ones(())
    )
    assert distance(grads, stale) > 1e-3


def test_the_average_is_of_the_last_twentieth_of_the_images():
    # A half-life of a share r of the images seen keeps the update of step j by (j / k)^(ln 2 / r);
    # from H images on, by 0.5^((k - j) B / H).
    settings = dataclasses.replace(SETTINGS, ema_half_life=np.inf, warmup_steps=2)
    kept = np.cumprod(
        [float(step.ema_decay(jnp.asarray(k), BATCH, settings)) for k in range(102, 202)]
    )
    assert kept[-1] == pytest.approx((100 / 200) ** (np.log(2) / 0.05), rel=0.1)
    assert step.ema_decay(jnp.asarray(2), BATCH, settings) == 0  # nothing seen: the new weights
    settings = dataclasses.replace(settings, ema_half_life=10 * BATCH)
    late = [float(step.ema_decay(jnp.asarray(k), BATCH, settings)) for k in range(500, 510)]
    assert np.prod(late) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.slow
def test_clipping_shrinks_the_gradient_to_its_limit_and_counts():
    small = small_step(generator_times=(399, 399))
    norms = [float(small[3][f"{name}/grad_norm"]) for name in ("generator", "assistant")]
    limits = (norms[0] / 4, norms[1] * 4)
    _, generator, assistant, metrics = small_step(generator_times=(399, 399), clip_norms=limits)
    assert_close(jax.tree.map(lambda g: 4 * g, generator), small[1])
    assert_close(assistant, small[2])
    assert (metrics["generator/clipped"], metrics["assistant/clipped"]) == (1, 0)
    assert float(metrics["generator/grad_norm"]) == pytest.approx(norms[0])  # before it


def bad_reward(bad):
    """The small world's reward, not finite for some of the prompts."""

    def reward(frozen, x0, ids, crop):
        score = -(x0**2).mean((1, 2, 3))
        broken = jnp.isin(ids["tokenizer"][:, 0], jnp.array(bad))
        return jnp.where(broken, jnp.nan, 100.0) * score, {"small": score}

    return reward


def step_with(reward, **changes):
    method, frozen, generator, assistant = small_world(**changes)
    method = dataclasses.replace(method, reward=reward)
    state = step.init_state(generator, assistant, plain_sgd())
    train_step = jax.jit(step.make_train_step(method, plain_sgd(), one_device()))
    after, metrics = train_step(state, frozen, (IDS,), jax.random.key(0))
    return method, frozen, state, after, metrics


@pytest.mark.long
def test_a_sample_whose_gradient_is_not_finite_is_dropped_and_counted():
    method, frozen, state, after, metrics = step_with(bad_reward([3]))
    assert (metrics["generator/dropped"], metrics["nonfinite"]) == (1, 0)
    assert np.isfinite(metrics["reward/total"])
    # The gradient of the others alone, still over the whole batch.
    draws = gradients.draw(jax.random.fold_in(jax.random.key(0), 0), BATCH, method.settings)
    rest = np.arange(BATCH) != 3
    draws = draws._replace(
        **{name: x[rest] for name, x in draws._asdict().items() if name != "step"}
    )
    ids = {"tokenizer": IDS["tokenizer"][rest]}
    trained = (state.generator, state.assistant)
    grads, _ = jax.jit(functools.partial(gradients.of_generator, method))(
        trained, frozen, ids, draws, jnp.ones(())
    )
    expected = jax.tree.map(lambda p, g: p - g * (BATCH - 1) / BATCH, state.generator, grads)
    assert_close(after.generator, expected)


def test_a_step_that_has_to_drop_all_samples_counts_as_not_finite():
    assert step_with(bad_reward(list(range(BATCH))))[-1]["nonfinite"] > 0


@pytest.mark.long
def test_a_balance_is_measured_over_the_first_steps_and_then_fixed(monkeypatch):
    monkeypatch.setattr(step, "MEASURED", 2)
    method, frozen, generator, assistant = small_world(balance=0.5)
    state = step.init_state(generator, assistant, adam())
    train_step = jax.jit(step.make_train_step(method, adam(), one_device()))
    ratios, scales = [], []
    for _ in range(4):
        before = state
        state, metrics = train_step(state, frozen, (IDS,), jax.random.key(0))
        scales.append(float(metrics["pull/reward_scale"]))
        draws = gradients.draw(
            jax.random.fold_in(jax.random.key(0), before.step), BATCH, method.settings
        )
        trained = (before.generator, before.assistant)
        _, figures = gradients.of_generator(method, trained, frozen, IDS, draws, jnp.ones(()))
        ratios.append(float(figures.pull.regulariser.mean() / figures.pull.reward.mean()))
    measured = 0.5 * np.array([0.0, ratios[0], np.mean(ratios[:2]), np.mean(ratios[:2])])
    np.testing.assert_allclose(scales, measured, rtol=1e-4)
    pulls = float(metrics["pull/reward"] / metrics["pull/regulariser"])
    assert pulls == pytest.approx(scales[-1] / ratios[-1], rel=1e-3)


@pytest.mark.long
def test_what_pulls_on_the_samples_is_logged():
    *_, metrics = small_step(generator_times=(0, 399))
    known = {name for name, value in metrics.items() if np.isfinite(value)}
    assert {"pull/regulariser", "pull/reward", "pull/cosine", "gap/quarter_1"} <= known
    assert abs(float(metrics["pull/cosine"])) <= 1
    alone = small_step(generator_times=(0, 399), reward_scale=0.0)[3]
    assert alone["pull/reward"] == 0 and alone["pull/regulariser"] > 0
    only = small_step(generator_times=(399, 399), objective="reward_only")[3]
    assert only["pull/regulariser"] == 0
    # All samples at the last time: in the last quarter, and in no other.
    last = small_step(generator_times=(0, 0))[3]
    assert np.isfinite(last["gap/quarter_1"]) and np.isnan(last["gap/quarter_4"])
