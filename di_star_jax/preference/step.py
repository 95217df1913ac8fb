# SPDX-License-Identifier: Apache-2.0
"""One training step on preference pairs as one compiled function, spread over the mesh.

B is the global batch of pairs. The gradient runs per device, as the alignment's does; weights are
normalised over the global batch before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from di_star_jax import sharding, step
from di_star_jax.preference.loss import LOSSES, agreement, weights_of

Params = Any
Score = Callable[[Params, jax.Array, Any], jax.Array]
Arrays = dict[str, Any]  # "pixels", "prompts", "label_0" and "num_examples" of B pairs
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that training changes, and what a checkpoint holds; the data's place is the step."""

    step: jax.Array
    params: Params
    opt: Any


class Optim(NamedTuple):
    """AdamW, and its rate: a linear rise, then a fall to 0 at the last step by `decay`.

    decay: "linear" or "cosine". clip_norm: of the gradient. fixed_blocks: as of
    `scorer.trainable`.
    """

    lr: float
    lr_warmup_steps: int
    decay: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    fixed_blocks: float = 0.0


def rate_schedule(optim: Optim, steps: int) -> optax.Schedule:
    """updates done -> the rate of the next one.

    Source: transformers `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup`.
    """
    falling = max(steps - optim.lr_warmup_steps, 1)
    fall = {
        "linear": optax.linear_schedule(optim.lr, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(optim.lr, falling),
    }[optim.decay]
    if not optim.lr_warmup_steps:
        return fall
    rise = optax.linear_schedule(0.0, optim.lr, optim.lr_warmup_steps)
    return optax.join_schedules([rise, fall], [optim.lr_warmup_steps])


def adamw(
    optim: Optim,
    steps: int,
    learns: Any,
) -> optax.GradientTransformation:
    """PyTorch's AdamW on all parameters, norms and biases too, that learn.

    Args: learns, of `scorer.trainable`.
    """
    return optax.chain(
        optax.adamw(
            rate_schedule(optim, steps),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        ),
        optax.stateless(lambda updates, _: _masked(updates, learns)),
    )


def _masked(tree: Any, learns: Any) -> Any:
    """0 where nothing learns."""
    return jax.tree.map(lambda x, mask: x if np.all(mask == 1.0) else x * mask, tree, learns)


def make_step(
    score: Score,
    loss_name: str,
    optimizer: optax.GradientTransformation,
    settings: tuple[Optim, Any],
    mesh: Mesh,
) -> Callable[[State, Arrays], tuple[State, Metrics]]:
    """Returns the step, to be jitted with the state donated.

    Args: score, as of `Scorer`; loss_name, a key of LOSSES; settings, the optimizer's, and what of
      the parameters learns.
    Returns: train_step(state, arrays) -> (state, metrics).
    """
    loss = LOSSES[loss_name]
    optim, learns = settings

    def per_device(params: Params, arrays: Arrays, weight: jax.Array) -> tuple[Params, tuple]:
        def weighted(params: Params) -> tuple[jax.Array, tuple]:
            scores = score(params, arrays["pixels"], arrays["prompts"])
            each = loss.per_pair(scores, arrays["label_0"])
            return jnp.sum(weight * each), (scores, each)

        grads, results = jax.grad(weighted, has_aux=True)(params)
        return grads, results

    def train_step(state: State, arrays: Arrays) -> tuple[State, Metrics]:
        weight = weights_of(arrays["num_examples"], loss)
        specs = sharding.params_spec(mesh, state.params)
        batch = (arrays, weight)

        def on_device(params, arrays, weight):
            grads, results = per_device(params, arrays, weight)
            return sharding.sum_gradients(grads, specs), results

        in_specs = (specs, *step.batch_specs(batch))
        spread = sharding.on_each(mesh, on_device, in_specs, (specs, sharding.batch_spec()))
        grads, (scores, each) = spread(state.params, *batch)
        grads = _masked(grads, learns)
        learnt = (state.params, state.opt)
        (params, opt), norm = step.update(optimizer, grads, *learnt, optim.clip_norm)
        metrics = {
            "train/loss": jnp.sum(weight * each),
            "train/accuracy": jnp.mean(agreement(scores, arrays["label_0"])),
            "train/grad_norm": norm,
            "nonfinite": step.count_nonfinite(norm),
        }
        if "logit_scale" in params:
            metrics["train/logit_scale"] = jnp.exp(params["logit_scale"])
        return State(state.step + 1, params, opt), metrics

    return train_step


def make_scores(score: Score, mesh: Mesh) -> Callable[[Params, Arrays], jax.Array]:
    """Returns (params, arrays of B pairs) -> float32 [B, 2], the same on every device."""

    def scores(params: Params, arrays: Arrays) -> jax.Array:
        def on_device(params, pixels, prompts):
            return score(params, pixels, prompts)

        batch = (arrays["pixels"], arrays["prompts"])
        specs = sharding.params_spec(mesh, params)
        in_specs = (specs, *step.batch_specs(batch))
        spread = sharding.on_each(mesh, on_device, in_specs, sharding.batch_spec())
        return spread(params, *batch)

    return jax.jit(scores, out_shardings=sharding.replicated(mesh))


def init_state(params: Params, optimizer: optax.GradientTransformation) -> State:
    """State at step 0. Args: params, float32, which are copied."""
    copied = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return State(jnp.zeros((), jnp.int32), copied, optimizer.init(params))
