# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: their networks, their gradients, and whole runs that learn nothing else."""

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pipelines import TRANSFORMER
from test_config import dry, load
from test_plan import SDXL
from test_step import (
    BATCH,
    CONFIGS,
    IDS,
    assert_close,
    one_device,
    plain_sgd,
    random_model,
    separate,
    small_world,
)
from test_train import UNET, config_for, write_pipeline

from di_star_jax import (
    assembly,
    checks,
    convert,
    drawing,
    gradients,
    schemes,
    sharding,
    step,
    train,
)
from di_star_jax.cost import flops, plan
from di_star_jax.errors import UserError
from di_star_jax.models import lora, published
from di_star_jax.models.lora import Lora
from di_star_jax.models.unet import Condition
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.export import FOLDER
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.storage import checkpoint, weights
from di_star_jax.studies import ablation

ALL = tuple(lora.TARGETS)
NAMES = ("generator", "assistant")
SD15 = UNET | {"use_linear_projection": False, "addition_embed_type": None}
PIXART = TRANSFORMER | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "sample_size": 8,
}
FAMILIES = {"sdxl": UNET, "sd15": SD15, "pixart": PIXART}
# SD 1.5's UNet is SDXL's with other maps into its transformers.
SOME = [
    "pixart",
    pytest.param("sdxl", marks=pytest.mark.long),
    pytest.param("sd15", marks=pytest.mark.long),
]


def denoiser(config=UNET, low_rank=None, seed=0):
    graphdef, params = made(json.dumps(config), seed)
    return pipeline.Model(graphdef, params, config, low_rank)


@functools.cache
def made(config, seed):
    return random_model(json.loads(config), seed)


def inputs(config, batch=2):
    """(x_t, t, condition) of random numbers."""
    key = iter(jax.random.split(jax.random.key(1), 4))
    width = config.get("caption_channels") or config["cross_attention_dim"]
    condition = Condition(jax.random.normal(next(key), (batch, 5, width)))
    if config.get("addition_embed_type"):
        sizes = jnp.full((batch, 6), 64.0)
        condition = condition._replace(
            pooled=jax.random.normal(next(key), (batch, 16)), time_ids=sizes
        )
    if "caption_channels" in config:
        condition = condition._replace(mask=jnp.ones((batch, 5), bool))
    return jax.random.normal(next(key), (batch, 8, 8, 4)), jnp.arange(batch) * 300, condition


def random_adapters(params, low_rank, seed=5):
    """Both factors random, where B would begin at zero."""
    shapes = lora.abstract(params, low_rank)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@pytest.mark.parametrize("family", SOME)
def test_new_adapters_add_nothing_and_merged_ones_are_the_same_network(family):
    low_rank = Lora(4, 6.0, ALL)
    model = denoiser(FAMILIES[family], low_rank)
    given = inputs(model.config)
    run = jax.jit(lambda params: model.network(params)(*given))
    plain = run(model.params)
    new = lora.init(jax.random.key(0), lora.abstract(model.params, low_rank))
    np.testing.assert_array_equal(run(model.params | new), plain)
    learnt = random_adapters(model.params, low_rank)
    adapted = run(model.params | learnt)
    assert float(jnp.abs(adapted - plain).max()) > 0.1
    whole = jax.tree.map(jnp.copy, lora.merged(model.params, learnt, low_rank))
    np.testing.assert_allclose(run(whole), adapted, atol=2e-5 * float(jnp.abs(adapted).max()))
    assert jax.tree.structure(whole) == jax.tree.structure(model.params)


def test_adapters_of_sdxl_are_as_many_as_its_matrices_ask_for():
    params = pipeline.abstract_model(published.UNET_SDXL).params
    shapes = lora.abstract(params, Lora(64, 64.0, ("attention", "feed_forward", "projections")))
    assert plan.parameters(shapes) == 64 * 2_659_840  # counted by hand, see lora.md's 2.66 M
    found = lora.modules(shapes, 64.0)
    a, b, alpha = found["mid_block", "attentions", 0, "transformer_blocks", "attn2", "to_k"]
    assert (a.shape, b.shape, alpha) == ((10, 2048, 64), (10, 64, 1280), 64.0)
    convolutions = lora.modules(lora.abstract(params, Lora(8, 8.0, ("convolutions",))), 8.0)
    a, b, _ = convolutions["down_blocks", 1, "resnets", 0, "conv1"]
    assert (a.shape, b.shape) == ((3, 3, 320, 8), (8, 640))


@pytest.mark.slow
def test_at_full_rank_their_gradients_are_the_projections_of_the_whole_ones():
    low_rank = Lora(16, 8.0, ALL)  # the width of all matrices
    model = denoiser(UNET, low_rank)
    x_t, t, condition = inputs(UNET)
    learnt = random_adapters(model.params, low_rank)

    def loss(params):
        return jnp.sum(jnp.sin(model.network(params)(x_t, t, condition)))

    @jax.jit
    def both(learnt):
        ours = jax.grad(lambda learnt: loss(model.params | learnt))(learnt)
        return ours, jax.grad(loss)(lora.merged(model.params, learnt, low_rank))

    ours, whole = both(learnt)
    factors, found = lora.modules(learnt, 0.0), lora.modules(ours, 0.0)
    for path, (a, b, _) in factors.items():
        gradient = whole
        for name in (*path, "kernel"):
            gradient = gradient[name]
        expected = 0.5 * gradient @ jnp.swapaxes(b, -1, -2)
        of_b = jnp.swapaxes(a, -1, -2) @ gradient  # summed over a convolution's window
        of_b = 0.5 * (of_b.sum((0, 1)) if of_b.ndim == 4 else of_b)
        assert_close((found[path][0], found[path][1]), (expected, of_b), rtol=2e-4)


# The gradient's code, with a network of three products: its parameters are base and what is learnt
# added up, so that the gradients are those of the whole.


def added(**changes):
    """(method, frozen, trained), of `small_world`, whose networks learn what is added to a base."""
    method, frozen, generator, assistant = small_world(**changes)
    zeros = jax.tree.map(jnp.zeros_like, generator)

    def bound(params):
        whole = {name: params[name] + params["lora"][name] for name in zeros}
        return method.denoiser(whole if "lora" in params else params)

    def network(params):
        return bound(params) if "lora" in params else method.denoiser(params)

    frozen |= {"generator": generator, "reference": assistant}
    low_rank = Lora(1, 1.0, ())
    learns = dataclasses.replace(
        method, denoiser=network, bases=lambda f: assembly.bases_of(low_rank, f)
    )
    return method, learns, frozen, ((generator, assistant), ({"lora": zeros}, {"lora": zeros}))


CASES = [
    ("di_star", "separate"),
    ("di_star", "shared"),
    ("di_star", "looped"),
    ("kl", "separate"),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            ("di_star_outside", "separate"),
            ("sid", "separate"),
            ("kl_outside", "looped"),
        )
    ),
]


@pytest.mark.parametrize("objective, scheme", CASES)
def test_all_objectives_and_schemes_learn_on_a_base_as_without(objective, scheme):
    whole, learns, frozen, (plain, adapted) = added(objective=objective)
    draws = gradients.draw(jax.random.key(0), BATCH, whole.settings)
    gradient = schemes.SCHEMES.get(scheme, separate)

    @jax.jit
    def both(draws):
        args = (frozen, IDS, draws, jnp.ones(()))
        return gradient(whole, plain, *args)[0], gradient(learns, adapted, *args)[0]

    expected, found = both(draws)
    for ours, theirs in zip(found, expected):
        assert ours.keys() == {"lora"}
        assert_close(ours["lora"], theirs)


def test_the_generator_alone_and_the_assistant_alone_learn_on_a_base_as_without():
    whole, learns, frozen, (plain, adapted) = added()
    draws = gradients.draw(jax.random.key(0), BATCH, whole.settings)

    @jax.jit
    def found(draws):
        each = []
        for method, (generator, assistant) in ((whole, plain), (learns, adapted)):
            args = (frozen, IDS, draws)
            trained = (generator, assistant)
            each += [
                gradients.of_generator(method, trained, *args, jnp.ones(()))[0],
                gradients.of_assistant(method, (assistant, generator, frozen), *args[1:])[0],
            ]
        return each

    generator, assistant, *ours = found(draws)
    assert_close(ours[0]["lora"], generator)
    assert_close(ours[1]["lora"], assistant)


# The whole step on a tiny UNet.


def tiny_step(low_rank, config=UNET, mesh=None, scheme="separate", batch=BATCH, own_base=True):
    """(jitted step, its arguments) with plain descent, abstract but for what is asked to run."""
    mesh = mesh or one_device()
    model = denoiser(config, low_rank)
    _, t, condition = inputs(config, batch)
    plain, _, _, _ = small_world(scheme=scheme)

    def encode_text(frozen, ids):
        rows = ids["tokenizer"][:, 0]
        seen = jax.tree.map(lambda x: x[rows], condition)
        return seen, jax.tree.map(jnp.zeros_like, seen)

    method = dataclasses.replace(
        plain,
        denoiser=model.network,
        encode_text=encode_text,
        bases=lambda frozen: assembly.bases_of(low_rank, frozen),
    )
    frozen = {"reference": model.params}
    if low_rank:
        learnt = [random_adapters(model.params, low_rank, seed) for seed in (5, 6)]
        frozen |= {"generator": denoiser(config, seed=1).params} if own_base else {}
    else:
        learnt = [denoiser(config, seed=seed).params for seed in (1, 2)]
    state = step.init_state(*learnt, plain_sgd())

    def put(tree):
        return jax.device_put(tree, sharding.params_sharding(mesh, tree))

    ids = jax.device_put(IDS, sharding.batch_sharding(mesh))
    fn = step.make_train_step(method, plain_sgd(), mesh)
    return fn, (put(state), put(frozen), (ids,), jax.random.key(0))


@pytest.mark.long
def test_no_gradient_of_a_frozen_matrix_is_computed():
    """12 forward passes of a whole run are 10: both networks' weight gradients are gone."""
    whole, ours = (
        flops.count(fn, *args)
        for fn, args in (tiny_step(low_rank) for low_rank in (None, Lora(1, 1.0, ("attention",))))
    )
    print(f"{12 * ours / whole:.2f} forward passes for 12")
    assert 9.0 < 12 * ours / whole < 10.3


def flops_of_sdxl(rank):
    """Of a sample's step at 1024 pixels, without text encoders, decoder and reward."""
    unet = pipeline.abstract_model(published.UNET_SDXL)
    low_rank = Lora(rank, 64.0, ("attention", "feed_forward", "projections"))
    model = unet._replace(lora=low_rank)
    condition = Condition(jnp.zeros((2, 77, 2048)), jnp.zeros((2, 1280)), jnp.zeros((2, 6)))
    plain, _, _, _ = small_world(latent_shape=(128, 128, 4))
    method = dataclasses.replace(
        plain,
        denoiser=model.network,
        encode_text=lambda frozen, ids: (condition, condition),
        reward=lambda frozen, x0, ids, crop: (jnp.zeros(2), {}),
        bases=lambda frozen: assembly.bases_of(low_rank, frozen),
    )
    learnt = lora.abstract(unet.params, low_rank)
    state = jax.eval_shape(lambda p: step.init_state(p, p, plain_sgd()), learnt)
    whole = flops.count(
        step.make_train_step(method, plain_sgd(), one_device()),
        state,
        {"reference": unet.params, "generator": unet.params},
        ({"prompt": jnp.zeros(2)},),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return whole / 2


@pytest.mark.long
def test_a_sample_of_sdxl_takes_ten_forward_passes_and_what_adapters_add():
    forward = 6.761e12
    at_64, at_128 = flops_of_sdxl(64), flops_of_sdxl(128)
    adapters = at_128 - at_64  # linear in the rank
    # The matrices of a base have one gradient for two, but attention's products have both of theirs
    # still: a quarter of a forward pass, twice.
    assert 10.4 * forward < at_64 - adapters < 10.5 * forward
    assert adapters < forward / 2


def moved(work):
    """What each network's adapters have moved, and the metrics."""
    fn, args = work
    after, metrics = jax.jit(fn)(*args)
    both = [(getattr(args[0], name), getattr(after, name)) for name in NAMES]
    return [jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *one) for one in both], metrics


def assert_moved_alike(found, plain):
    """Args: of `moved`."""
    for ours, expected in zip(found, plain):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        assert largest > 1e-3
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, atol=2e-5 * largest)


@pytest.mark.parametrize(
    "own_base",
    [
        pytest.param(True, marks=pytest.mark.long, id="two bases"),
        pytest.param(False, marks=pytest.mark.long, id="one base"),
    ],
)
def test_a_step_is_the_same_looped_and_on_eight_devices(monkeypatch, own_base):
    made = functools.partial(tiny_step, Lora(8, 4.0, ALL), own_base=own_base)
    plain, metrics = moved(made())
    looped, _ = moved(made(scheme="looped"))
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    mesh = sharding.make_mesh(2, 2, 2)
    many, on_many = moved(made(mesh=mesh, scheme="looped"))
    assert_moved_alike(looped, plain)
    assert_moved_alike(many, plain)
    assert on_many["generator/loss"] == pytest.approx(float(metrics["generator/loss"]), rel=2e-4)


# A whole run.

FIELDS = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "objective.name": "kl",
    "assistant.sharing": "x_t",
    "eval.num_prompts": 4,
    "train.save_every": 100,
    "optim.generator_lr": 1e-2,
    "optim.lr_warmup_steps": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(pipeline, workdir of a run that was stopped after one of two steps)."""
    folder, workdir = (tmp_path_factory.mktemp(name) for name in ("pipeline", "run"))
    write_pipeline(folder)
    for steps in (1, 2):
        train.run(config_for(folder, **FIELDS, **{"train.steps": steps}), str(workdir))
    return folder, workdir


def leaves(tree):
    return jax.tree.leaves(tree)


@pytest.mark.long
def test_a_checkpoint_holds_adapters_alone_and_a_later_start_goes_on_with_them(run):
    folder, workdir = run
    low_rank = assembly.lora_of(config_for(folder, **FIELDS))
    shapes = lora.abstract(pipeline.abstract_model(UNET).params, low_rank)
    with contextlib.closing(checkpoint.existing(workdir)) as store:
        assert store.steps() == [2, 3]
        first, last = (store.restore_item(k, "ema", shapes) for k in (2, 3))
        assert store.metadata(3)["lora"]["rank"] == 4
    assert all((a["b"] != 0).any() for a in [_any(last)])
    assert any((a != b).any() for a, b in zip(leaves(first), leaves(last)))


def _any(learnt):
    a, b, _ = lora.modules(learnt, 1.0)["mid_block", "attentions", 0, "proj_in"]
    return {"a": a, "b": b}


@pytest.mark.long
def test_export_sample_and_evaluate_see_base_and_adapters_as_one_network(run):
    folder, workdir = run
    low_rank = assembly.lora_of(config_for(folder, **FIELDS))
    shapes = lora.abstract(pipeline.abstract_model(UNET).params, low_rank)
    base = pipeline.load_model(folder / "generator").params
    reference = pipeline.load_model(folder / "unet").params
    with contextlib.closing(checkpoint.existing(workdir)) as store:
        learnt = {name: store.restore_item(3, name, shapes) for name in ("ema", "assistant")}
    expected = lora.merged(base, learnt["ema"], low_rank)
    exported = pipeline.load_model(workdir / "diffusers" / "unet").params
    assert_close(exported, expected, rtol=1e-6)
    assert any((a != b).any() for a, b in zip(leaves(exported), leaves(base)))
    for which, network in (
        ("ema", expected),
        ("assistant", lora.merged(reference, learnt["assistant"], low_rank)),
        ("initial", base),
    ):
        drawn = drawing.load(str(workdir), which).models[DENOISER].params
        assert_close(drawn, network, rtol=1e-6)


@pytest.mark.long
def test_convert_writes_the_very_weights_that_the_run_has_exported(run, tmp_path):
    _, workdir = run
    given = {"step": None, "dtype": "float32", "reference": None}
    convert.to_diffusers(workdir, "ema", tmp_path / "out", **given)
    names = [path.name for path in (workdir / "diffusers" / "unet").glob("*.safetensors")]
    assert names
    for name in names:
        ours, exported = (root / "unet" / name for root in (tmp_path / "out", workdir / FOLDER))
        assert ours.read_bytes() == exported.read_bytes()
    convert.to_diffusers(workdir, "generator", tmp_path / "last", **given)
    last = (tmp_path / "last" / "unet" / names[0]).read_bytes()
    assert last != (workdir / FOLDER / "unet" / names[0]).read_bytes()


@pytest.mark.long
def test_the_ablation_measures_a_run_of_adapters_as_the_whole_network_it_exports(run):
    folder, workdir = run
    mesh = sharding.make_mesh(2, 4)
    parts = assembly.load_parts(config_for(folder, **FIELDS), mesh)
    with contextlib.closing(checkpoint.existing(workdir)) as store:
        found = ablation._average(SimpleNamespace(parts=parts, mesh=mesh), store, 3)
    exported = pipeline.load_model(workdir / FOLDER / "unet").params
    assert_close(found, exported, rtol=1e-6)


@pytest.mark.long
def test_scores_before_a_run_are_those_of_the_base(run):
    folder, workdir = run
    scores = json.loads((workdir / "before_after.json").read_text())
    assert scores["before"] != scores["after"]
    config = config_for(folder, **FIELDS)
    mesh = sharding.make_mesh(8, 1)
    parts = assembly.load_parts(config, mesh)
    assert parts.base is not None and "generator" in parts.frozen()
    alone = assembly.load_parts(config_for(folder, **{**FIELDS, "weights.generator": ""}), mesh)
    assert alone.base is None and "generator" not in alone.frozen()  # shares the reference


@pytest.mark.long
def test_another_base_in_the_place_of_a_runs_is_refused(run, tmp_path):
    folder, workdir = run
    kept = (folder / "generator" / "model.safetensors").read_bytes()
    other = pipeline.load_model(folder / "unet").params
    try:
        weights.save(folder / "generator", other, config=UNET, file_name="model.safetensors")
        with pytest.raises(UserError, match="has other weights than when the run began"):
            drawing.load(str(workdir), "ema")
    finally:
        (folder / "generator" / "model.safetensors").write_bytes(kept)


# Bad input, and the plan.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora.rank": -1}, "lora.rank=-1, expected 0 or more"),
        ({"lora.rank": 4, "lora.alpha": 0.0}, "lora.alpha=0.0, expected more than 0"),
        ({"lora.rank": 4, "lora.targets": ("attn",)}, "lora.targets='attn', expected one of"),
        ({"lora.rank": 4, "lora.generator": False, "lora.assistant": False}, "no network has"),
        ({"lora.rank": 4, "lora.generator": False}, "set compute.loop_networks=False"),
        ({"lora.rank": 4, "weights.assistant": "./a"}, "leave weights.assistant empty"),
    ],
    ids=str,
)
def test_what_cannot_learn_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        checks.check(dry(**changes), 16)
    assert "\n" not in str(error.value)


def test_a_rank_above_a_matrix_and_targets_that_are_not_there_are_refused():
    params = pipeline.abstract_model(CONFIGS["unet"]).params
    with pytest.raises(UserError, match=r"rank=33 .*attn2.to_k, .* of 32 x 64, .* use 32 or less"):
        lora.abstract(params, Lora(33, 64.0, ("attention",)))
    transformer = pipeline.abstract_model(PIXART).params
    with pytest.raises(UserError, match="name nothing that this denoiser has"):
        lora.abstract(transformer, Lora(4, 4.0, ("convolutions",)))


def test_the_plan_of_sdxl_on_one_card_counts_bases_once_and_adapters_alone():
    config = load("sdxl_lora")
    config.dry_run = True
    counts = SDXL | {"vae": 10}
    learnt = plan.Learnt(170_229_760, 170_229_760)
    memory = plan.memory_per_chip(config, counts, 1, learnt)
    assert memory["adapters of generator and assistant, float32"] == 2 * 4 * 170_229_760
    assert memory["reference, bfloat16"] == 2 * SDXL["denoiser"]
    assert memory["base of the generator, bfloat16"] == 2 * SDXL["denoiser"]
    assert plan.checkpoint_bytes(config, learnt) < 3.5e9
    config.weights.generator = ""
    assert "base of the generator, bfloat16" not in plan.memory_per_chip(config, counts, 1, learnt)
    whole = plan.Learnt(SDXL["denoiser"], SDXL["denoiser"])
    assert plan.checkpoint_bytes(dry(), whole) == SDXL["denoiser"] * 4 * 5
