# SPDX-License-Identifier: Apache-2.0
"""A whole training step against one that is written out here, from no function of the package.

The networks are a few products, the schedule is jagged, so that a time that is off by one shows,
and what is drawn is given: every number of the step is checked, with SGD.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from di_star_jax import gradients, objectives, sharding, step, train
from di_star_jax.diffusion import FewStep, Schedule
from di_star_jax.models.unet import Condition
from di_star_jax.prompts.files import Prompt

BATCH, SHAPE = 4, (2, 2, 3)
ALPHA = np.random.default_rng(0).uniform(0.3, 0.9, 1000).astype(np.float32)
SIGMA = np.sqrt(1 - ALPHA**2)
PROMPTS = {"ids": jnp.array([2, 0, 3, 1])}
TEXTS = jnp.array([[0.5, -1.0, 0.2], [1.0, 0.3, -0.4], [-0.6, 0.1, 0.9], [0.2, 0.8, -0.7]])
TARGETS = jnp.array([0.1, -0.4, 0.7, 1.3])  # what the reward wants, by prompt
RATES = (1.0, 0.5)  # of generator and assistant
MOMENTUM = 0.9
MEASURED = (6.0, 4.0)  # sum of the ratios of both pulls, and how many
SCALE = 0.5 * 6.0 / 4.0  # of the reward, thereby
SETTINGS = gradients.Settings(
    objective="di_star",
    omega=2.5,
    constants=objectives.Constants(huber_c=0.3, alpha_cfg=0.7),
    weighting="x0",
    reduction="sum",
    generator_times=(100, 899),
    assistant_times=(0, 999),
    assistant_updates=1,
    scheme="separate",
    generator=FewStep((399,)),
    latent_shape=SHAPE,
    ema_half_life=np.inf,
    warmup_steps=2,
    balance=0.5,
)


def tree(seed):
    a, b = 0.6 * jax.random.normal(jax.random.key(seed), (2, 3, 3))
    return {"a": a, "b": b}


GENERATOR, ASSISTANT, REFERENCE, AVERAGE = (tree(seed) for seed in range(4))


def eps_of(params, x, t, text):
    """A network's noise prediction. Args: x [B, 2, 2, 3], t [B], text [B, 3] or [3]."""
    text = jnp.broadcast_to(text, (len(x), 3))
    time = (t % 7 / 7.0)[:, None, None, None]
    return jnp.tanh(x @ params["a"] + text[:, None, None, :] + time) @ params["b"] + 0.2 * x


def reward_of(x0, ids, crop):
    return -((x0 - TARGETS[ids][:, None, None, None]) ** 2).sum((1, 2, 3)) * (1.0 + crop[:, 0])


def drawn(steps=1, chosen=0):
    """All draws of a step, no two alike."""
    rng = np.random.default_rng(5)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return gradients.Draws(
        noise=normal(BATCH, steps, *SHAPE),
        step=jnp.int32(chosen),
        t=jnp.array([150, 420, 610, 899]),
        eps=normal(BATCH, *SHAPE),
        t_psi=jnp.array([3, 998, 251, 507]),
        eps_psi=normal(BATCH, *SHAPE),
        crop=jnp.asarray(rng.uniform(size=(BATCH, 2)), jnp.float32),
    )


def method_of(**changes):
    def denoiser(params):
        return lambda x, t, condition: eps_of(params, x, t, condition.pooled)

    def score_denoiser(params):  # another precision, one that shows
        return lambda x, t, condition: 1.5 * eps_of(params, x, t, condition.pooled)

    def encode_text(frozen, token_ids):
        texts = TEXTS[token_ids["ids"]]
        context = jnp.zeros((BATCH, 1, 1))
        return Condition(context, texts, None), Condition(context, 0 * texts - 0.3, None)

    def reward(frozen, x0, token_ids, crop):
        score = reward_of(x0, token_ids["ids"], crop)
        return 0.4 * score, {"wish": score}

    settings = dataclasses.replace(SETTINGS, **changes)
    schedule = Schedule(jnp.asarray(ALPHA), jnp.asarray(SIGMA))
    return gradients.Method(denoiser, encode_text, reward, schedule, settings, score_denoiser)


def put_in(monkeypatch, draws):
    monkeypatch.setattr(gradients, "draw", lambda key, batch, settings: draws)


def begin(method, at=102):
    """State and optimizers; the average is of its own."""
    optimizers = step.Optimizers(*(optax.sgd(rate, MOMENTUM) for rate in RATES))
    state = step.init_state(GENERATOR, ASSISTANT, optimizers)
    state = state._replace(step=jnp.int32(at), ema=AVERAGE, balance=jnp.array(MEASURED))
    return state, optimizers


def one_device():
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


# The same by hand.


def at(v, t):
    return v[np.asarray(t)][:, None, None, None]


def noised(x0, t, eps):
    return at(ALPHA, t) * x0 + at(SIGMA, t) * eps


def x0_by_hand(generator, draws, form, texts):
    """Each step but the last is noised to the next time; the last is the one that learns."""
    x0 = jnp.zeros((BATCH, *SHAPE))
    first = draws.noise[:, 0] * (SIGMA[form.timesteps[0]] if form.input == "scaled" else 1.0)
    for k in range(int(draws.step) + 1):
        t = np.full(BATCH, form.timesteps[k])
        x = noised(jax.lax.stop_gradient(x0), t, draws.noise[:, k]) if k else first
        x0 = (x - at(SIGMA, t) * eps_of(generator, x, t, texts)) / at(ALPHA, t)
    return x0


def regulariser_by_hand(x0, draws, texts, settings):
    """L_reg [B] in the space of x_0, and the gap between the scores."""
    x_t = noised(x0, draws.t, draws.eps)

    def score(params, text, x):
        return 1.5 * eps_of(params, x, draws.t, text)

    cond, null = (score(REFERENCE, text, x_t) for text in (texts, jnp.float32(-0.3)))
    psi, ref = score(ASSISTANT, texts, x_t), null + settings.omega * (cond - null)
    to_x0 = at(SIGMA, draws.t) / at(ALPHA, draws.t)
    y = to_x0 * (psi - ref)
    if settings.objective.startswith("kl"):
        loss = -(jax.lax.stop_gradient(y) * x0).sum((1, 2, 3))
    else:
        root = jnp.sqrt((y**2).sum((1, 2, 3), keepdims=True) + 0.3**2 * 12)
        loss = -(y / root * to_x0 * (psi - draws.eps)).sum((1, 2, 3))
    if settings.objective.endswith("outside"):
        implicit = jax.lax.stop_gradient(to_x0 * (cond - null)) * x0
        loss += 0.7 * implicit.sum((1, 2, 3))
    return loss, jnp.sqrt(((psi - ref) ** 2).mean((1, 2, 3)))


def assistant_loss_by_hand(assistant, x0, draws, texts, of_scores):
    """[B]. Args: of_scores, with times, noise and precision of the generator's loss."""
    t, eps, factor = (draws.t, draws.eps, 1.5) if of_scores else (draws.t_psi, draws.eps_psi, 1.0)
    found = factor * eps_of(assistant, noised(x0, t, eps), t, texts)
    return ((found - eps) ** 2).sum((1, 2, 3))


def norm(tree):
    return jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


def by_hand(draws, settings):
    """(generator, assistant and average after the step, both gradients, the balance, metrics)."""
    texts = TEXTS[PROMPTS["ids"]]

    def x0_of(generator):
        return x0_by_hand(generator, draws, settings.generator, texts)

    def reward(x0):
        return 0.4 * reward_of(x0, PROMPTS["ids"], draws.crop)

    def regulariser(x0):
        return regulariser_by_hand(x0, draws, texts, settings)[0]

    x0, reward_each = x0_of(GENERATOR), reward_of(x0_of(GENERATOR), PROMPTS["ids"], draws.crop)
    loss, gap = regulariser_by_hand(x0, draws, texts, settings)
    grads = jax.grad(lambda g: (regulariser(x0_of(g)) - SCALE * reward(x0_of(g))).mean())(GENERATOR)
    of_scores = settings.scheme == "shared"
    given = (jax.lax.stop_gradient(x0), draws, texts, of_scores)
    of_assistant = jax.grad(lambda a: assistant_loss_by_hand(a, *given).mean())(ASSISTANT)
    after = [
        jax.tree.map(lambda p, g: p - rate * g, params, grad)
        for rate, params, grad in zip(RATES, (GENERATOR, ASSISTANT), (grads, of_assistant))
    ]
    # 100 steps after the warm-up: half of the average is of the last 20 images, or fewer.
    decay = 0.5 ** (BATCH / min(settings.ema_half_life, 0.05 * 100 * BATCH))
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, AVERAGE, after[0])

    pulls = [jax.grad(lambda x: f(x).sum())(x0) for f in (regulariser, lambda x: -reward(x))]
    sizes = [jnp.sqrt((pull**2).sum((1, 2, 3))) for pull in pulls]
    metrics = {
        "generator/loss": (loss - SCALE * reward(x0)).mean(),
        "generator/grad_norm": norm(grads),
        "generator/x0_std": x0.std(),
        "generator/dropped": 0,
        "regulariser/loss": loss.mean(),
        "pull/regulariser": sizes[0].mean(),
        "reward/total": reward(x0).mean(),
        "pull/reward": SCALE * sizes[1].mean(),
        "pull/cosine": ((pulls[0] * pulls[1]).sum((1, 2, 3)) / sizes[0] / sizes[1]).mean(),
        "pull/reward_scale": SCALE,
        "reward/wish": reward_each.mean(),
        "reward/wish/std": reward_each.std(),
        "assistant/loss": assistant_loss_by_hand(ASSISTANT, *given).mean() / 12,
        "assistant/grad_norm": norm(of_assistant),
        # The times are of the first, the second, the third and the last quarter.
        **{f"gap/quarter_{i + 1}": gap[i] for i in range(4)},
        "nonfinite": 0,
    }
    balance = jnp.array(MEASURED) + jnp.array([sizes[0].mean() / sizes[1].mean(), 1.0])
    return *after, average, grads, of_assistant, balance, metrics


def assert_close(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "objective, scheme, omega, timesteps",
    [
        ("di_star", "separate", 2.5, (399,)),
        ("di_star", "looped", 2.5, (398, 200)),
        ("di_star", "shared", 2.5, (399,)),
        ("di_star", "separate", 1.0, (399,)),
        ("di_star", "looped", 1.0, (399,)),
        ("di_star", "looped", 0.0, (399,)),
        ("di_star_outside", "separate", 0.0, "scaled"),
        ("kl_outside", "separate", 2.5, (398, 200)),
    ],
)
def test_a_step_is_the_one_that_is_written_out_by_hand(
    monkeypatch, objective, scheme, omega, timesteps
):
    form = FewStep((399,), "scaled") if timesteps == "scaled" else FewStep(timesteps)
    method = method_of(
        objective=objective,
        scheme=scheme,
        omega=omega,
        generator=form,
        ema_half_life=10.0 if scheme == "looped" else np.inf,
    )
    steps = len(form.timesteps)
    draws = drawn(steps, steps - 1)
    put_in(monkeypatch, draws)
    state, optimizers = begin(method)
    train_step = jax.jit(step.make_train_step(method, optimizers, one_device()))
    after, metrics = train_step(state, {"reference": REFERENCE}, (PROMPTS,), jax.random.key(0))
    *expected, expected_metrics = jax.jit(lambda: by_hand(draws, method.settings))()
    moments = [jax.tree.leaves(opt) for opt in (after.opt_generator, after.opt_assistant)]
    found = [after.generator, after.assistant, after.ema, *moments, after.balance]
    assert_close(found, expected)
    assert after.step == 103
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("input, factor", [("noise", 1.0), ("scaled", SIGMA[399])])
def test_the_one_step_generator_is_given_z_or_sigma_t_z(input, factor):
    method, draws = method_of(generator=FewStep((399,), input)), drawn()
    x_t, t = gradients.simulate(method, GENERATOR, draws, None)
    np.testing.assert_allclose(x_t, factor * draws.noise[:, 0], rtol=1e-6)
    assert t.tolist() == [399] * BATCH


@pytest.mark.parametrize("updates", [1, 2])
def test_the_assistants_own_updates_are_of_fresh_samples_of_the_generator(monkeypatch, updates):
    timesteps = (398, 200)
    method = method_of(assistant_updates=updates, generator=FewStep(timesteps))
    draws = drawn(2, 1)
    put_in(monkeypatch, draws)
    state, optimizers = begin(method)
    warmup_step = jax.jit(step.make_warmup_step(method, optimizers, one_device()))
    batches = (PROMPTS, {"ids": PROMPTS["ids"][::-1]}, {"ids": 0 * PROMPTS["ids"]})
    after, metrics = warmup_step(state, {"reference": REFERENCE}, batches, jax.random.key(0))
    assistant, moment = ASSISTANT, jax.tree.map(jnp.zeros_like, ASSISTANT)
    for batch in batches[:updates]:
        texts = TEXTS[batch["ids"]]
        given = (x0_by_hand(GENERATOR, draws, FewStep(timesteps), texts), draws, texts, False)
        loss_of = jax.value_and_grad(
            lambda a, given=given: assistant_loss_by_hand(a, *given).mean()
        )
        loss, grads = jax.jit(loss_of)(assistant)
        moment = jax.tree.map(lambda m, g: MOMENTUM * m + g, moment, grads)
        assistant = jax.tree.map(lambda p, m: p - RATES[1] * m, assistant, moment)
    assert_close([after.assistant, jax.tree.leaves(after.opt_assistant)], [assistant, moment])
    assert_close([after.generator, after.ema], [GENERATOR, AVERAGE])
    assert after.step == 103
    assert float(metrics["assistant/loss"]) == pytest.approx(float(loss) / 12, rel=1e-3)


def test_a_run_begins_with_the_generator_as_its_own_average():
    optimizers = begin(method_of())[1]
    state = step.init_state(GENERATOR, ASSISTANT, optimizers)
    assert_close([state.generator, state.assistant, state.ema], [GENERATOR, ASSISTANT, GENERATOR])
    assert state.step == 0 and not state.balance.any()


@pytest.mark.parametrize("kind", ["first", "warm-up"])
def test_no_two_steps_of_any_kind_have_the_same_noise(kind):
    method = method_of(assistant_first=kind == "first")
    make = step.make_train_step if kind == "first" else step.make_warmup_step
    state, optimizers = begin(method)
    update = jax.jit(make(method, optimizers, one_device()))
    given = ({"reference": REFERENCE}, (PROMPTS, PROMPTS), jax.random.key(0))
    losses = [
        {k: float(v) for k, v in update(state._replace(step=jnp.int32(k)), *given)[1].items()}
        for k in range(3)
    ]
    for name in {"assistant/loss", "generator/x0_std", "regulariser/loss"} & losses[0].keys():
        assert len({round(each[name], 4) for each in losses}) == 3, name


def test_draws_are_normal_and_each_samples_own_and_times_include_both_ends():
    settings = dataclasses.replace(
        SETTINGS,
        latent_shape=(8, 8, 4),
        generator=FewStep((900, 600, 300)),
        generator_times=(5, 7),
        assistant_times=(1, 2),
    )
    draw = jax.jit(functools.partial(gradients.draw, batch=32, settings=settings))
    draws = draw(jax.random.key(1))
    assert set(draws.t.tolist()) == {5, 6, 7} and set(draws.t_psi.tolist()) == {1, 2}
    noise = [draws.noise.reshape(96, -1), draws.eps.reshape(32, -1), draws.eps_psi.reshape(32, -1)]
    noise = np.concatenate(noise)
    assert np.abs(np.corrcoef(noise) - np.eye(160)).max() < 0.4  # 6 sigma
    for part in (noise[:96], noise[96:128], noise[128:]):
        found = [part.mean(), part.var(), (part**4).mean()]
        np.testing.assert_allclose(found, [0, 1, 3], atol=0.25)
    assert len(np.unique(draws.crop)) == 64 and 0 <= draws.crop.min() <= draws.crop.max() < 1
    chosen = {int(draw(jax.random.key(k)).step) for k in range(20)}
    assert chosen == {0, 1, 2}


def test_one_number_that_is_not_finite_drops_its_sample_whole_and_no_other():
    of_reward = jnp.array([[1.0, 1.0], [jnp.nan, 1.0], [0.0, -1.0]])
    of_regulariser = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    total, pull = gradients.combine(of_regulariser, of_reward, jnp.float32(2.0))
    np.testing.assert_array_equal(total, [[3.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(pull.kept, [1, 0, 1])
    np.testing.assert_allclose(pull.cosine[np.array([0, 2])], [2**-0.5, -1.0], rtol=1e-6)
    # Those of the mean over three samples, as of one.
    np.testing.assert_allclose(pull.regulariser, [3.0, 3 * 2**0.5, 6.0], rtol=1e-6)
    np.testing.assert_allclose(pull.reward[np.array([0, 2])], [3 * 2**0.5, 3.0], rtol=1e-6)


def test_a_balance_is_not_measured_where_the_reward_has_no_pull():
    before, ones = jnp.array([3.0, 1.0]), jnp.ones(2)
    pull = gradients.Pull(kept=ones, regulariser=4 * ones, reward=2 * ones, cosine=ones)
    measured = functools.partial(step.measured_balance, before, settings=SETTINGS)
    np.testing.assert_array_equal(measured(pull), [5.0, 2.0])
    for change in ({"reward": 0 * ones}, {"kept": 0 * ones}, {"regulariser": jnp.inf * ones}):
        np.testing.assert_array_equal(measured(pull._replace(**change)), before)


def test_what_is_logged_is_of_the_samples_that_were_kept():
    kept = jnp.array([1.0, 0.0, 1.0, 1.0])
    values = jnp.array([1.0, jnp.nan, 2.0, 6.0])
    pull = gradients.Pull(kept, values, 2 * values, values / 10)
    figures = gradients.Figures(
        x0=jnp.arange(8.0).reshape(4, 2),
        reward=values,
        rewards={"wish": values},
        regulariser=5 * values,
        pull=pull,
        t=jnp.array([100, 299, 299, 899]),
        gap=jnp.array([1.0, 100.0, 3.0, 7.0]),
        assistant=kept,
    )
    scale = jnp.float32(0.5)
    found = step.generator_metrics(figures, jnp.float32(1.0), scale, SETTINGS)
    expected = {
        "generator/loss": 15 - 0.5 * 3,
        "generator/dropped": 1,
        "regulariser/loss": 15,
        "pull/regulariser": 3,
        "reward/total": 3,
        "pull/reward": 0.5 * 6,
        "pull/cosine": 0.3,
        "reward/wish": 3,
        "reward/wish/std": np.std([1, 2, 6]),
        "gap/quarter_1": 2,  # the times are 100 to 899: up to 299
        "gap/quarter_2": np.nan,
        "gap/quarter_4": 7,
        "nonfinite": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert step.finish({"a/grad_norm": jnp.float32(jnp.nan)})["nonfinite"] == 1
    assert step.finish({"a/grad_norm": jnp.float32(jnp.inf)})["nonfinite"] == 1


def test_each_batch_of_each_step_has_prompts_of_its_own():
    config = ml_collections.ConfigDict({"seed": 3, "data": {"batch_size": 4}})
    source = [Prompt(i, f"prompt {i}", {}) for i in range(24)]
    numbers = types.SimpleNamespace(
        tokenize=lambda texts: {"ids": np.array([int(text.split()[1]) for text in texts])}
    )
    batch_at = train.batches(config, numbers, one_device(), source, 2)
    seen = [ids for k in range(3) for batch in batch_at(k) for ids in batch["ids"].tolist()]
    assert len(batch_at(0)) == 2 and sorted(seen) == list(range(24))


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adamw_is_optaxs_with_a_linear_rise_of_the_rate(b1):
    settings = step.AdamW(lr_warmup_steps=2, b1=b1, b2=0.8, eps=0.1, weight_decay=0.2)
    rate = 0.03 * jnp.minimum(jnp.arange(1, 6) / 3, 1.0)
    theirs = optax.adamw(lambda done: rate[done], b1=b1, b2=0.8, eps=0.1, weight_decay=0.2)
    ours = step.adamw(0.03, settings)
    found, expected = (GENERATOR, ours.init(GENERATOR)), (GENERATOR, theirs.init(GENERATOR))
    for k in range(5):
        found, _ = step.update(ours, tree(10 + k), *found, np.inf)
        expected, _ = step.update(theirs, tree(10 + k), *expected, np.inf)
        for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0])):
            np.testing.assert_allclose(x, y, rtol=1e-5)


def test_sdxls_condition_has_both_contexts_in_order_and_its_null_is_zeros(monkeypatch):
    from di_star_jax.pipelines import sdxl
    from di_star_jax.pipelines.family import conditions

    def encoder(graphdef, params):
        def encode(ids):
            context = jnp.full((2, 5, params), 1.0 * params) * ids[:, None, None]
            pooled = jnp.full((2, params), 10.0 * params)
            return types.SimpleNamespace(hidden_states_penultimate=context, pooled=pooled)

        return encode

    monkeypatch.setattr(sdxl.nnx, "merge", encoder)
    widths = {"text_encoder": 3, "text_encoder_2": 4}
    ids = {"tokenizer": jnp.array([1, 2]), "tokenizer_2": jnp.array([3, 4])}
    text = sdxl.encode_text(dict.fromkeys(widths), widths, ids)
    condition, null = conditions(sdxl.SDXL, text, None, 640)
    assert condition.context.shape == (2, 5, 7)
    np.testing.assert_array_equal(condition.context[1, 0], [6, 6, 6, 16, 16, 16, 16])
    np.testing.assert_array_equal(condition.pooled, jnp.full((2, 4), 40.0))
    for found in (condition, null):  # original size, crop, size
        np.testing.assert_array_equal(found.time_ids, [[640, 640, 0, 0, 640, 640]] * 2)
    assert not null.context.any() and not null.pooled.any()
    assert null.context.shape == (2, 5, 7) and null.pooled.shape == (2, 4)
