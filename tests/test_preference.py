# SPDX-License-Identifier: Apache-2.0
"""Training a reward: losses, gradients and steps against PyTorch, and what it is measured by."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_blip
import torch
import transformers
from test_clip_rewards import SIZE, tiny, transformers_clip
from torch.nn import functional

from di_star_jax import sharding
from di_star_jax.pipelines.folder import Model, Options, abstract_model
from di_star_jax.preference import loss as losses
from di_star_jax.preference import scorer as networks
from di_star_jax.preference import step
from di_star_jax.preference.loss import LOSSES
from di_star_jax.storage import weights

FORWARD, GRADIENT = 2e-5, 1e-4  # max|difference| / max|reference|
VOCAB = 11
CLIP = tiny(VOCAB)
LABELS = np.float32([1, 0, 0.5, 1, 0.5, 0, 1, 0])
EXAMPLES = np.float32([1, 4, 2, 1, 8, 1, 3, 2])
SGD = step.Optim(1.0, 0, "linear", 0.9, 0.999, 1e-8, 0.0, 1e30)


def close(ours, theirs, bound):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), 1e-30)


# Against PyTorch.


def pair_batch(size=SIZE, count=8, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB - 1, (count, 8))
    ids[:, -1] = VOCAB - 1  # the end of the text
    return {
        "pixels": rng.integers(0, 256, (count, 2, size, size, 3), np.uint8),
        "label_0": LABELS[:count],
        "num_examples": EXAMPLES[:count],
        "prompts": ids.astype(np.int32),
    }


def torch_pixels(batch):
    mean, std = torch.tensor(networks.CLIP_MEAN), torch.tensor(networks.CLIP_STD)
    pixels = (torch.tensor(batch["pixels"]).float() / 255 - mean) / std
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)  # the pictures of a pair one after another


def torch_pickscore(module, batch):
    """PickScore's criterion, plainly: per pair, and weighted over the batch."""
    ids = torch.tensor(batch["prompts"]).long()
    text = module.get_text_features(input_ids=ids).pooler_output
    image = module.get_image_features(pixel_values=torch_pixels(batch)).pooler_output
    image = image.unflatten(0, (-1, 2))
    cosine = functional.cosine_similarity(text[:, None], image, dim=-1)
    logits = module.logit_scale.exp() * cosine
    label_0 = torch.tensor(batch["label_0"])
    to_first = functional.cross_entropy(
        logits, torch.zeros(len(ids), dtype=torch.long), reduction="none"
    )
    to_second = functional.cross_entropy(
        logits, torch.ones(len(ids), dtype=torch.long), reduction="none"
    )
    each = label_0 * to_first + (1 - label_0) * to_second
    each = each + math.log(0.5) * (label_0 == 0.5)
    weight = 1 / torch.tensor(batch["num_examples"])
    return (weight * each).sum() / weight.sum()


@pytest.fixture(scope="module")
def clip():
    """(torch's module, our scorer with its weights)."""
    module = transformers_clip(CLIP)
    tensors = {name: p.detach().numpy() for name, p in module.state_dict().items()}
    model = abstract_model(CLIP)
    params = weights.params_from_tensors(tensors, model.params)
    return module, networks.of_clip(model._replace(params=params), None)


def mesh_of(data, fsdp):
    return sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])


def step_of(scorer, loss, optim, optimizer, mesh):
    learns = networks.trainable(scorer.model.params, optim.fixed_blocks)
    optimizer = optimizer or step.adamw(optim, 4, learns)
    update = step.make_step(scorer.score, loss, optimizer, (optim, learns), mesh)
    state = step.init_state(scorer.model.params, optimizer)
    state = jax.device_put(state, sharding.params_sharding(mesh, state))
    return jax.jit(update), state


def gradients(scorer, loss, batch, mesh):
    """(the metrics of a step, its gradients in PyTorch's names and layout)."""
    large = 2.0**10  # so that what a parameter rounds by is small beside its step
    update, state = step_of(scorer, loss, SGD, optax.sgd(large), mesh)
    after, metrics = update(state, sharding.place_batch(batch, mesh, len(batch["label_0"])))
    taken = jax.tree.map(
        lambda a, b: (np.asarray(a) - np.asarray(b)) / large, state.params, after.params
    )
    return metrics, weights.tensors_from_params(taken)


@pytest.mark.long
@pytest.mark.parametrize("data, fsdp", [(2, 1), (1, 2)])
def test_a_steps_loss_and_gradients_equal_pytorch_on_two_devices(clip, monkeypatch, data, fsdp):
    monkeypatch.setattr(sharding, "SMALL", 64)  # split what is split of large models
    module, scorer = clip
    batch = pair_batch()
    expected = torch_pickscore(module, batch)
    module.zero_grad()
    expected.backward()
    metrics, grads = gradients(scorer, "pickscore", batch, mesh_of(data, fsdp))
    close(metrics["train/loss"], expected.detach(), FORWARD)
    theirs = {name: p.grad.numpy() for name, p in module.named_parameters()}
    assert grads.keys() == theirs.keys() and "logit_scale" in grads
    largest = max(np.abs(grad).max() for grad in theirs.values())
    for name, grad in theirs.items():
        # That of a key's bias is nothing but rounding.
        assert np.abs(grads[name] - grad).max() <= GRADIENT * np.abs(grad).max() + 1e-6 * largest


@pytest.mark.slow
def test_steps_of_training_equal_pytorchs_adamw_with_warm_up_decay_and_clipping(clip):
    module, scorer = clip
    module = transformers_clip(CLIP)  # the fixture's is not to be trained
    # A large eps: a gradient that is 0 but for rounding would else be a step of full length.
    optim = step.Optim(1e-2, 2, "linear", 0.9, 0.999, 1e-3, 0.3, 0.5)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 4)
    mesh = mesh_of(1, 1)
    update, state = step_of(scorer, "pickscore", optim, None, mesh)
    for k in range(4):
        batch = pair_batch(seed=k)
        optimizer.zero_grad()
        torch_pickscore(module, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm)
        optimizer.step()
        schedule.step()
        state, metrics = update(state, sharding.place_batch(batch, mesh, len(LABELS)))
        close(metrics["train/grad_norm"], norm, 1e-3)
        assert norm > optim.clip_norm
    ours = weights.tensors_from_params(state.params)
    for name, p in module.named_parameters():
        close(ours[name], p.detach(), 2e-4)


@pytest.mark.long
def test_imagereward_loss_on_its_network_equals_pytorch(tmp_path):
    module = test_blip._randomise(test_blip.TorchImageReward(test_blip.CONFIG, test_blip.VISION))
    folder = test_blip._write(tmp_path / "weights", test_blip._published_tensors(module))
    scorer = networks.read(str(folder), "", Options())
    params = networks.load(scorer, str(folder), scorer.model.params)
    scorer = scorer._replace(model=scorer.model._replace(params=params))
    batch = pair_batch(test_blip.VISION["image_size"], 4)
    batch["label_0"] = np.float32([1, 0, 0, 1])
    batch["prompts"] = scorer.tokenize([*test_blip.PROMPTS, "a dog"])

    twice = {
        name: torch.tensor(ids).long().repeat_interleave(2, 0)
        for name, ids in batch["prompts"].items()
    }
    pixels = torch_pixels(batch).permute(0, 2, 3, 1)
    raw = module(pixels, twice["token_ids"], twice["mask"]) * 1.0333394966054072
    better, worse = raw.view(-1, 2).flip(1)[[1, 2]], raw.view(-1, 2)[[0, 3]]
    apart = torch.cat([better, worse])
    expected = -functional.logsigmoid(apart[:, 0] - apart[:, 1]).mean()
    expected.backward()
    metrics, grads = gradients(scorer, "imagereward", batch, mesh_of(2, 1))
    close(metrics["train/loss"], expected.detach(), FORWARD)
    for name in ("layers.0.weight", "text.encoder.layer.1.attention.self.value.weight"):
        theirs = dict(module.named_parameters())[name].grad
        close(grads[test_blip._published_name(name)], theirs, GRADIENT)


# What stays, and what it is chosen by.


@pytest.mark.long
def test_fixed_blocks_and_what_is_before_them_stay_and_the_others_learn(clip):
    _, scorer = clip
    optim = SGD._replace(lr=0.1, weight_decay=0.5, fixed_blocks=0.5)
    mesh = mesh_of(1, 1)
    update, state = step_of(scorer, "pickscore", optim, None, mesh)
    after, _ = update(state, sharding.place_batch(pair_batch(), mesh, len(LABELS)))
    before, now = (weights.tensors_from_params(s.params) for s in (state, after))
    stays = {name for name in now if np.array_equal(before[name], now[name])}
    fixed = (".embeddings.", ".pre_layrnorm.", ".layers.0.")
    assert stays == {name for name in now if any(part in name for part in fixed)}
    assert any(".layers.0." in name for name in stays) and "logit_scale" not in stays


def test_the_loss_of_a_pair_has_its_closed_form():
    scores = jnp.array([[2.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    sigmoid = 1 / (1 + math.exp(-2.0))
    close(
        losses.pickscore(scores, jnp.array([1.0, 0.0, 0.5])),
        [-math.log(sigmoid), -math.log(1 - sigmoid), 0.0],
        1e-6,
    )
    close(
        losses.imagereward(scores, jnp.array([1.0, 0.0, 1.0])),
        [-math.log(sigmoid), -math.log(1 - sigmoid), math.log(2.0)],
        1e-6,
    )
    # A tie's constant is no gradient, and less than the tie's own probability costs.
    apart = jnp.array([[2.0, 0.0]])
    assert losses.pickscore(apart, jnp.array([0.5]))[0] > 0


def test_a_prompt_weighs_once_however_many_pairs_it_has():
    weight = losses.weights_of(jnp.array([1.0, 2.0, 2.0, 4.0]), LOSSES["pickscore"])
    close(weight, np.array([1, 0.5, 0.5, 0.25]) / 2.25, 1e-6)
    close(losses.weights_of(jnp.array([1.0, 2.0]), LOSSES["imagereward"]), [0.5, 0.5], 1e-6)


def test_accuracy_gives_a_tie_half_and_with_a_threshold_ties_are_predicted():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.1], [3.0, 0.0], [0.0, 0.0]])
    label_0 = np.array([1.0, 1.0, 0.5, 0.5, 0.0])
    close(losses.agreement(scores, label_0), [1, 0, 0.5, 0.5, 0.5], 1e-6)
    # Probabilities differ by .462, .462, .05, .905 and 0: a tie is the fifth alone at 0, and from
    # .1 on the third too.
    assert losses.accuracy_with_ties(scores, label_0, 0.0) == pytest.approx(2.5 / 5)
    assert losses.accuracy_with_ties(scores, label_0, 0.1) == pytest.approx(3.0 / 5)
    assert losses.accuracy_with_ties(scores, label_0, 1.0) == pytest.approx(3.5 / 5)
    assert losses.best_threshold(scores, label_0) == (1.0, pytest.approx(0.7))


@pytest.mark.parametrize("decay, middle", [("linear", 0.5), ("cosine", 0.5)])
def test_the_rate_rises_and_falls_to_nothing(decay, middle):
    optim = SGD._replace(lr=2.0, lr_warmup_steps=10, decay=decay)
    rate = step.rate_schedule(optim, 30)
    close([rate(0), rate(5), rate(10), rate(20), rate(30)], [0, 1, 2, 2 * middle, 0], 1e-6)
    assert step.rate_schedule(optim._replace(lr_warmup_steps=0), 30)(0) == 2.0


def test_a_full_size_clip_has_the_published_parameters_and_traces():
    from di_star_jax.models import published
    from di_star_jax.preference.fit import abstract_state

    model = abstract_model(published.CLIP_H14 | {"architectures": ["CLIPModel"]})
    scorer = networks.of_clip(Model(*model), None)
    learns = networks.trainable(model.params, 0.0)
    state = abstract_state(scorer, step.adamw(SGD, 10, learns), mesh_of(1, 1))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)) == 986_109_441
    pixels = jax.ShapeDtypeStruct((4, 2, 224, 224, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((4, 77), jnp.int32)
    assert jax.eval_shape(scorer.score, state.params, pixels, ids).shape == (4, 2)
