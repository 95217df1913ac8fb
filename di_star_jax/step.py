# SPDX-License-Identifier: Apache-2.0
"""One training step of Diff-Instruct* as one compiled function.

Draws, both gradients, both updates, the average. The gradients run per device (gradients.py); the
rest is elementwise or drawn, and XLA splits it. B is the global batch.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from di_star_jax import gradients, sharding
from di_star_jax.gradients import Draws, Figures, Method, Params, Settings
from di_star_jax.schemes import SCHEMES


class TrainState(NamedTuple):
    """All that a run changes: a checkpoint holds one item for each field, in this order.

    Beside them it holds `train.metadata_of`; draws and prompts follow from seed and step.
    Parameter trees and moments are float32. balance: [2], of `Settings.balance`, the sum of the
    ratios that were measured, and how many.
    """

    step: jax.Array
    generator: Params
    assistant: Params
    ema: Params
    opt_generator: Any
    opt_assistant: Any
    balance: jax.Array


class Optimizers(NamedTuple):
    """optax transformations of both networks."""

    generator: optax.GradientTransformation
    assistant: optax.GradientTransformation


EMA_RAMP_UP = 0.05  # of the images seen: the average's half-life at most
MEASURED = 20  # steps over which a balance is measured

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, dict, dict, jax.Array], tuple[TrainState, Metrics]]


class AdamW(NamedTuple):
    """AdamW; the rate rises linearly over `lr_warmup_steps`."""

    lr_warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float


def adamw(learning_rate: float, settings: AdamW) -> optax.GradientTransformation:
    """The optimizer of one network.

    At b1 = 0 the first moment is the gradient itself and is not kept: 10 GB less for each of SDXL's
    two networks.
    """
    s = settings
    schedule = rate_schedule(learning_rate, s.lr_warmup_steps)
    adam = optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps)
    if s.b1 == 0.0:
        adam = optax.scale_by_rms(decay=s.b2, eps=s.eps, eps_in_sqrt=False, bias_correction=True)
    return optax.chain(
        adam,
        optax.add_decayed_weights(s.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def rate_schedule(learning_rate: float, lr_warmup_steps: int) -> optax.Schedule:
    """updates done -> the rate of the next one: a linear rise, then constant."""
    first = learning_rate / (lr_warmup_steps + 1)
    return optax.linear_schedule(first, learning_rate, lr_warmup_steps)


def init_state(
    generator: Params,
    assistant: Params,
    optimizers: Optimizers,
) -> TrainState:
    """State at step 0.

    Args: float32 parameter trees (copied, for the state is donated) and their optimizers.
    """

    def copy(tree):
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        generator=copy(generator),
        assistant=copy(assistant),
        ema=copy(generator),
        opt_generator=optimizers.generator.init(generator),
        opt_assistant=optimizers.assistant.init(assistant),
        balance=jnp.zeros(2),
    )


def prompt_batches(settings: Settings) -> int:
    """How many batches of prompts a step takes: each update of the assistant has its own."""
    return settings.assistant_updates + settings.assistant_first


def make_train_step(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """Returns the step, to be jitted with the state donated.

    train_step(state, frozen, token_ids, key) -> (state, metrics):
      state: TrainState.
      frozen: parameters that never change: {'reference': a denoiser's, ...}, see assembly.py.
      token_ids: `prompt_batches` of them, what text encoders and rewards make of B prompts, trees
        of [B, ...].
      key: of the run; the step's number is folded in.
      metrics: float32 scalars; `nonfinite` counts the gradients' non-finite norms, and the step
        whose samples were all dropped.
    """
    if method.settings.assistant_first:
        return _assistant_first(method, optimizers, mesh)
    if method.settings.scheme in SCHEMES:
        return _together(method, optimizers, mesh)
    return _in_turn(method, optimizers, mesh)


def _together(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """Both gradients by a scheme that makes them at once, on the same samples."""
    settings = method.settings
    both_gradients = functools.partial(SCHEMES[settings.scheme], method)
    more = _more_updates(method, optimizers, mesh)

    def train_step(
        state: TrainState,
        frozen: dict,
        token_ids: tuple[dict, ...],
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        trained = (state.generator, state.assistant)
        scale = reward_scale(state.balance, settings)
        batch = (token_ids[0], draw(mesh, key, token_ids[0], settings), scale)
        on_devices = spread(mesh, both_gradients, (trained, frozen), batch, trained, settings)
        grads, figures = on_devices((trained, frozen), batch)

        state, logged = update_generator(state, grads[0], figures, optimizers.generator, settings)
        state, learnt = more(state, frozen, grads[1], figures.assistant, token_ids, key)
        return state, finish(logged | learnt)

    return train_step


def _in_turn(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """The generator learns, then the assistant on the same samples: one gradient at a time.

    Those of SDXL's two networks are 10 GB each.
    """
    settings = method.settings
    of_generator = functools.partial(gradients.of_generator, method)
    of_assistant = functools.partial(gradients.of_samples, method)
    more = _more_updates(method, optimizers, mesh)

    def train_step(
        state: TrainState,
        frozen: dict,
        token_ids: tuple[dict, ...],
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        draws = draw(mesh, key, token_ids[0], settings)
        networks = ((state.generator, state.assistant), frozen)
        batch = (token_ids[0], draws, reward_scale(state.balance, settings))
        on_devices = spread(mesh, of_generator, networks, batch, state.generator, settings)
        grads, figures = on_devices(networks, batch)
        state, logged = update_generator(state, grads, figures, optimizers.generator, settings)

        # Nothing of the second gradient before the first is used up.
        of_samples = (figures.condition, figures.x0)
        state, (condition, x0) = jax.lax.optimization_barrier((state, of_samples))
        networks, batch = (state.assistant, frozen), (condition, draws, x0)
        on_devices = spread(mesh, of_assistant, networks, batch, state.assistant, settings)
        grads, loss = by_itself(on_devices, mesh, state.step)(networks, batch)
        state, learnt = more(state, frozen, grads, loss, token_ids, key)
        return state, finish(logged | learnt)

    return train_step


def by_itself(
    fn: Callable,
    mesh: Mesh,
    step: jax.Array,
) -> Callable:
    """`fn`, with nothing of it done beforehand.

    XLA makes the zeros that the loops of all backward passes begin with in one kernel, and so holds
    both networks' gradients from there on. On GPUs, where it has been seen, `fn` is therefore a
    branch, which is always taken, but XLA cannot know.

    Args: step, of the state.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return fn

    def zeros(*args) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))

    return lambda *args: jax.lax.cond(step >= 0, fn, zeros, *args)


def _more_updates(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Callable:
    """Returns the assistant's update, and its further ones, if there are any.

    more(state, frozen, grads, loss [B], token_ids, key) -> state, metrics.
    """
    settings = method.settings
    learn = make_assistant_update(method, optimizers.assistant, mesh)

    def more(
        state: TrainState,
        frozen: dict,
        grads: Params,
        loss: jax.Array,
        token_ids: tuple[dict, ...],
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        learnt = (state.assistant, state.opt_assistant)
        learnt, norm = update(optimizers.assistant, grads, *learnt, settings.clip_norms[1])
        logged = assistant_metrics(loss, norm, settings)
        if settings.assistant_updates > 1:
            networks = (state.generator, frozen)
            learnt, logged = assistant_updates(learn, learnt, networks, token_ids[1:], key)
        return state._replace(assistant=learnt[0], opt_assistant=learnt[1]), logged

    return more


def _assistant_first(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """The assistant's updates on fresh samples, then the generator's against what it has learnt.

    As in the code of Diff-Instruct, SiD-LSG and Uni-Instruct.
    """
    settings = method.settings
    gradient = functools.partial(gradients.of_generator, method)
    learn = make_assistant_update(method, optimizers.assistant, mesh)

    def train_step(
        state: TrainState,
        frozen: dict,
        token_ids: tuple[dict, ...],
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        learnt = (state.assistant, state.opt_assistant)
        networks = (state.generator, frozen)
        learnt, of_assistant = assistant_updates(learn, learnt, networks, token_ids[1:], key)
        state = state._replace(assistant=learnt[0], opt_assistant=learnt[1])

        networks = ((state.generator, state.assistant), frozen)
        scale = reward_scale(state.balance, settings)
        batch = (token_ids[0], draw(mesh, key, token_ids[0], settings), scale)
        on_devices = spread(mesh, gradient, networks, batch, state.generator, settings)
        grads, figures = on_devices(networks, batch)
        state, logged = update_generator(state, grads, figures, optimizers.generator, settings)
        return state, finish(logged | of_assistant)

    return train_step


def make_warmup_step(
    method: Method,
    optimizers: Optimizers,
    mesh: Mesh,
) -> Step:
    """As `make_train_step`, of the assistant alone on the frozen generator."""
    learn = make_assistant_update(method, optimizers.assistant, mesh)

    def warmup_step(
        state: TrainState,
        frozen: dict,
        token_ids: tuple[dict, ...],
        key: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        learnt = (state.assistant, state.opt_assistant)
        networks = (state.generator, frozen)
        batches = token_ids[: method.settings.assistant_updates]
        learnt, logged = assistant_updates(learn, learnt, networks, batches, key)
        state = state._replace(step=state.step + 1, assistant=learnt[0], opt_assistant=learnt[1])
        return state, finish(logged)

    return warmup_step


def make_assistant_update(
    method: Method,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> Callable:
    """Returns one step of denoising score matching on fresh samples of the generator.

    learn((assistant, opt_state), (generator, frozen), token_ids, key) -> the first two, metrics.
    """
    settings = method.settings
    gradient = functools.partial(gradients.of_assistant, method)

    def learn(
        learnt: tuple,
        networks: tuple,
        token_ids: dict,
        key: jax.Array,
    ) -> tuple[tuple, Metrics]:
        given = ((learnt[0], *networks),)
        batch = (token_ids, draw(mesh, key, token_ids, settings))
        on_devices = spread(mesh, gradient, given, batch, learnt[0], settings)
        grads, loss = on_devices(given, batch)
        learnt, norm = update(optimizer, grads, *learnt, settings.clip_norms[1])
        return learnt, assistant_metrics(loss, norm, settings)

    return learn


def assistant_updates(
    learn: Callable,
    learnt: tuple,
    networks: tuple,
    token_ids: tuple[dict, ...],
    key: jax.Array,
) -> tuple[tuple, Metrics]:
    """An update for each batch of prompts, each with its own noise and samples.

    Args: networks, of the generator and frozen; key, of the step. Returns: what has learnt; the
    last one's metrics.
    """
    # The step's own key is that of the batch that the generator learns from.
    keys = [jax.random.fold_in(key, i + 1) for i in range(len(token_ids))]
    learnt, logged = learn(learnt, networks, token_ids[0], keys[0])
    if len(keys) == 1:
        return learnt, logged

    def another(learnt, turn):
        return learn(learnt, networks, *turn)

    # One traced body for all others. The first stays outside the loop: on CPU a convolution's
    # gradient is 15 times slower inside of one.
    turns = (jax.tree.map(lambda *ids: jnp.stack(ids), *token_ids[1:]), jnp.stack(keys[1:]))
    learnt, history = jax.lax.scan(another, learnt, turns)
    return learnt, jax.tree.map(lambda values: values[-1], history)


def update_generator(
    state: TrainState,
    grads: Params,
    figures: Figures,
    optimizer: optax.GradientTransformation,
    settings: Settings,
) -> tuple[TrainState, Metrics]:
    """The state after the generator's update, counted and averaged, and what it logs."""
    learnt = (state.generator, state.opt_generator)
    (generator, opt), norm = update(optimizer, grads, *learnt, settings.clip_norms[0])
    decay = ema_decay(state.step, len(figures.gap), settings)
    after = state._replace(
        step=state.step + 1,
        generator=generator,
        ema=optax.incremental_update(generator, state.ema, 1.0 - decay),
        opt_generator=opt,
        balance=measured_balance(state.balance, figures.pull, settings),
    )
    scale = reward_scale(state.balance, settings)
    return after, generator_metrics(figures, norm, scale, settings)


# Half-life min(H, 0.05 images seen): SiD, Diff-Instruct, Uni-Instruct. Without the second, a short
# run's average would be of its beginning.
def ema_decay(
    step: jax.Array,
    batch: int,
    settings: Settings,
) -> jax.Array:
    """What is left of the average at the update that ends a step. Args: step, done before it."""
    seen = jnp.maximum(step - settings.warmup_steps, 0) * jnp.float32(batch)
    half_life = jnp.minimum(settings.ema_half_life, EMA_RAMP_UP * seen)
    return jnp.where(half_life > 0, 0.5 ** (batch / jnp.maximum(half_life, 1e-8)), 0.0)


def reward_scale(balance: jax.Array, settings: Settings) -> jax.Array:
    """What the reward's gradient is multiplied with. Args: balance, of the state.

    With a balance it is measured over the first MEASURED steps, and fixed from there; the very
    first step is the regulariser's alone.
    """
    if not settings.balance:
        return jnp.ones(())
    total, count = balance
    return settings.balance * total / jnp.maximum(count, 1.0)


def measured_balance(
    balance: jax.Array,
    pull: gradients.Pull,
    settings: Settings,
) -> jax.Array:
    """`TrainState.balance` after one more step: the regulariser's pull over the reward's."""
    if not settings.balance:
        return balance
    of_regulariser, of_reward = (_mean(norm, pull.kept) for norm in (pull.regulariser, pull.reward))
    ratio = of_regulariser / jnp.maximum(of_reward, 1e-30)
    counts = (balance[1] < MEASURED) & (of_reward > 0) & jnp.isfinite(ratio)
    return jnp.where(counts, balance + jnp.stack([ratio, jnp.ones(())]), balance)


def update(
    optimizer: optax.GradientTransformation,
    grads: Params,
    params: Params,
    opt_state: Any,
    clip_norm: float,
) -> tuple[tuple[Params, Any], jax.Array]:
    """((params, opt_state) after one step of optax, the gradient's norm before it was clipped)."""
    norm = optax.global_norm(grads)
    shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
    clipped = jax.tree.map(lambda g: g * shrink, grads)
    updates, opt_state = optimizer.update(clipped, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), norm


def assistant_metrics(
    loss: jax.Array,
    norm: jax.Array,
    settings: Settings,
) -> Metrics:
    """Of one update. Args: loss [B]; norm, of its gradient."""
    return {
        "assistant/loss": jnp.mean(loss),
        "assistant/grad_norm": norm,
        "assistant/clipped": (norm > settings.clip_norms[1]).astype(jnp.float32),
    }


def generator_metrics(
    figures: Figures,
    norm: jax.Array,
    scale: jax.Array,
    settings: Settings,
) -> Metrics:
    """Of the generator's update, over the samples that were kept.

    Args: norm, of its gradient; scale, of the reward.
    """
    pull = figures.pull
    mean = functools.partial(_mean, kept=pull.kept)
    regulariser = mean(figures.regulariser)
    reward = mean(figures.reward)
    dropped = jnp.sum(1.0 - pull.kept)
    return {
        "generator/loss": regulariser - scale * reward,
        "generator/grad_norm": norm,
        "generator/clipped": (norm > settings.clip_norms[0]).astype(jnp.float32),
        "generator/x0_std": jnp.std(figures.x0),
        "generator/dropped": dropped,
        "regulariser/loss": regulariser,
        "pull/regulariser": mean(pull.regulariser),
        "reward/total": reward,
        "pull/reward": scale * mean(pull.reward),
        "pull/cosine": mean(pull.cosine),
        "pull/reward_scale": scale,
        **{f"reward/{name}": mean(values) for name, values in figures.rewards.items()},
        **{
            f"reward/{name}/std": _std(values, pull.kept)
            for name, values in figures.rewards.items()
        },
        **gaps(figures, settings.generator_times),
        "nonfinite": (dropped == len(pull.kept)).astype(jnp.float32),
    }


def gaps(figures: Figures, times: tuple[int, int]) -> Metrics:
    """The mean score gap of each quarter of the times; NaN where no sample fell into one."""
    first, last = times
    quarter = (figures.t - first) * 4 // (last + 1 - first)
    return {
        f"gap/quarter_{i + 1}": jnp.mean(
            figures.gap, where=(quarter == i) & (figures.pull.kept > 0)
        )
        for i in range(4)
    }


def _mean(values: jax.Array, kept: jax.Array) -> jax.Array:
    """Over the samples that were kept; 0 where none was."""
    total = jnp.sum(values, where=kept > 0)
    return total / jnp.maximum(jnp.sum(kept), 1.0)


def _std(values: jax.Array, kept: jax.Array) -> jax.Array:
    return jnp.sqrt(_mean((values - _mean(values, kept)) ** 2, kept))


def finish(metrics: Metrics) -> Metrics:
    """A step's metrics, with the norms that are not finite counted."""
    norms = [value for name, value in metrics.items() if name.endswith("/grad_norm")]
    return metrics | {"nonfinite": metrics.get("nonfinite", 0.0) + count_nonfinite(*norms)}


def count_nonfinite(*norms: jax.Array) -> jax.Array:
    """How many of the norms are not finite, float32."""
    return sum((~jnp.isfinite(norm)).astype(jnp.float32) for norm in norms)


def draw(
    mesh: Mesh,
    key: jax.Array,
    token_ids: dict,
    settings: Settings,
) -> Draws:
    """The same draws on any mesh, each device making its own part."""
    batch = jax.tree.leaves(token_ids)[0].shape[0]
    draws = gradients.draw(key, batch, settings)
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)),
        draws,
        batch_specs(draws),
    )


def batch_specs(tree: Any) -> Any:
    """Splits every leaf's first axis, the batch; scalars are everywhere the same."""
    return jax.tree.map(lambda x: sharding.batch_spec() if x.ndim else PartitionSpec(), tree)


def spread(
    mesh: Mesh,
    fn: Callable,
    networks: tuple,
    batch: tuple,
    summed: Any,
    settings: Settings,
) -> Callable:
    """fn(*networks, *batch) -> (gradients like `summed`, per-sample results), over all devices.

    Args: networks, batch, summed: the trees themselves, for their shapes.
    Returns: a function (networks, batch) -> (gradients, results) of the whole batch.
    """
    specs = sharding.params_spec(mesh, summed)
    parts = settings.microbatches

    def per_device(networks, batch):
        if parts > 1:
            grads, results = in_microbatches(functools.partial(fn, *networks), parts, batch)
        else:
            grads, results = fn(*networks, *batch)
        return row_major(sharding.sum_gradients(grads, specs)), results

    in_specs = (sharding.params_spec(mesh, networks), batch_specs(batch))
    return sharding.on_each(mesh, per_device, in_specs, (specs, sharding.batch_spec()))


def row_major(grads: Params) -> Params:
    """Gradients, those of convolutions in the layout that their kernels have.

    Else XLA turns kernels, moments and the average to the layout of its convolutions and back.
    """

    def placed(grad: jax.Array) -> jax.Array:
        is_kernel = grad.ndim == 4
        return with_layout_constraint(grad, Layout((0, 1, 2, 3))) if is_kernel else grad

    return jax.tree.map(placed, grads)


def in_microbatches(
    fn: Callable,
    count: int,
    batch: tuple,
) -> tuple[Any, Any]:
    """fn(*batch) -> (gradients, per-sample results) in `count` parts, one after the other.

    Args: count, a divisor of the batch; batch, trees whose leaves' first axis is the batch, but for
      scalars.
    Returns: the parts' mean gradients and their results one after the other, as of one call.
    """

    def cut(x):
        return x.reshape(count, -1, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, (count,))

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def one(sums, part):
        grads, results = fn(*part)
        return jax.tree.map(lambda total, grad: total + grad / count, sums, grads), results

    sums, results = jax.lax.scan(one, zeros, parts)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
