# SPDX-License-Identifier: Apache-2.0
"""Every objective where its optimum is known, with the real training step:

`di-star optimum --out=runs/optimum`.

Reference, generator and assistant are mixtures of four Gaussians in the plane, on a ring. The
generator reads its mode off the angle of its noise, so that, unlike a network, it can be any of
them exactly; the assistant predicts the noise of any of them exactly. What is trained are the
modes' means and covariances. Prints and writes OUT/mixture.md.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from di_star_jax import gradients, log, sharding, step
from di_star_jax.command import run as run_command
from di_star_jax.errors import check_all
from di_star_jax.models.unet import Condition
from di_star_jax.objectives import Constants
from di_star_jax.storage import files
from di_star_jax.studies import quadrature
from di_star_jax.studies.mixture import ONE_STEP, SCHEDULE, TITLE
from di_star_jax.studies.page import with_section
from di_star_jax.studies.quadrature import Mixture, Reference

WEIGHTS = np.array([0.3, 0.3, 0.25, 0.15])
ANGLES = np.array([0.3, 1.9, 3.4, 5.0])
BATCH = 512
HEADING = "Where the optimum is known"


class Modes(NamedTuple):
    """What is trained, of four modes. mean: [4, 2]; factor: [4, 3], as of `Mixture`."""

    mean: jax.Array
    factor: jax.Array


def ring(
    radius: float,
    stds: tuple[float, float],
    turn: float = 0.0,
) -> Mixture:
    """Modes on a circle about 0, ellipses whose axes point to it and along it.

    Args: stds, along these axes; turn, radians by which the modes are off their angles.
    """
    towards = np.stack([np.cos(ANGLES + turn), np.sin(ANGLES + turn)], axis=-1)
    along = np.stack([-towards[:, 1], towards[:, 0]], axis=-1)
    axes = np.stack([towards, along], axis=-1) * np.array(stds)
    factor = np.linalg.cholesky(axes @ axes.swapaxes(-1, -2))
    return Mixture(WEIGHTS, radius * towards, factor[:, [0, 1, 1], [0, 0, 1]])


REFERENCE = Reference(cond=ring(1.5, (0.35, 0.2)), null=ring(1.4, (0.42, 0.25)))
STARTS = (ring(0.7, (0.6, 0.6), -0.3), ring(2.0, (0.1, 0.15), 0.4))


def reward(x0: jax.Array) -> jax.Array:
    """-|x_0|^2 / 2, which draws all modes alike to the middle. Args: [B, 2]. Returns: [B]."""
    return -0.5 * jnp.sum(x0 * x0, axis=-1)


# Completing the square: N(m, S) exp(-a |x|^2 / 2) is normal with precision S^-1 + a, and on a ring
# of equal ellipses all modes keep their weights.
def tilted(mixture: Mixture, strength: float, noise: float = 0.0) -> Mixture:
    """The mixture times exp(strength reward), where both are noised by `noise`.

    Args: noise, sigma_t / alpha_t.
    """
    cov = np.asarray(quadrature.covariance(mixture.factor)) + noise**2 * np.eye(2)
    new = np.linalg.inv(np.linalg.inv(cov) + strength * np.eye(2))
    mean = np.einsum("kij,kj->ki", new @ np.linalg.inv(cov), mixture.mean)
    factor = np.linalg.cholesky(new - noise**2 * np.eye(2))
    return Mixture(mixture.weight, mean, factor[:, [0, 1, 1], [0, 0, 1]])


# ---- the three networks ----


def sample(modes: Modes, z: jax.Array) -> jax.Array:
    """x_0 [B, 2], exactly of the modes, of z [B, 2], standard normal.

    z's angle lies in the sector of a mode, as wide as its weight, and where in the sector is again
    uniform: an angle of new noise for that mode.
    """
    turns = jnp.arctan2(z[:, 1], z[:, 0]) / (2 * jnp.pi) % 1.0
    ends = jnp.cumsum(jnp.asarray(WEIGHTS, z.dtype))
    mode = jnp.minimum(jnp.sum(turns[:, None] >= ends, axis=-1), len(WEIGHTS) - 1)
    weight = jnp.asarray(WEIGHTS, z.dtype)[mode]
    angle = 2 * jnp.pi * (turns - ends[mode] + weight) / weight
    length = jnp.sqrt(jnp.sum(z * z, axis=-1))
    u, v = length * jnp.cos(angle), length * jnp.sin(angle)
    a, b, c = jnp.moveaxis(modes.factor[mode], -1, 0)
    return modes.mean[mode] + jnp.stack([a * u, b * u + c * v], axis=-1)


def generate(
    modes: Modes,
    z: jax.Array,
    t: jax.Array,
    condition: Condition,
) -> jax.Array:
    """`sample` as a noise prediction eps [B, 2], from which the step makes x_0 again."""
    del condition
    alpha, sigma = SCHEDULE.alpha[t][:, None], SCHEDULE.sigma[t][:, None]
    return (z - alpha * sample(modes, z)) / sigma


def noise_of(
    modes: Modes,
    weight: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """The exact noise prediction -sigma_t grad log q_t(x_t) [B, 2].

    Args: modes, weight: of all samples, or [B, ...] of each.
    """
    alpha, sigma = SCHEDULE.alpha[t][:, None], SCHEDULE.sigma[t][:, None]
    a, b, c = jnp.moveaxis(modes.factor, -1, 0)
    uu = (alpha * a) ** 2 + sigma**2
    uv = alpha**2 * a * b
    vv = alpha**2 * (b * b + c * c) + sigma**2
    det = uu * vv - uv**2
    u, v = jnp.moveaxis(x_t[:, None] - alpha[..., None] * modes.mean, -1, 0)
    to_u, to_v = (vv * u - uv * v) / det, (uu * v - uv * u) / det
    logs = jnp.log(weight) - 0.5 * (jnp.log(det) + u * to_u + v * to_v)
    share = jax.nn.softmax(logs, axis=-1)
    return sigma * jnp.stack([jnp.sum(share * to_u, -1), jnp.sum(share * to_v, -1)], axis=-1)


def predict(
    modes: Modes,
    x_t: jax.Array,
    t: jax.Array,
    condition: Condition,
) -> jax.Array:
    """The assistant: `noise_of` its modes."""
    del condition
    return noise_of(modes, jnp.asarray(WEIGHTS, x_t.dtype), x_t, t)


def know(
    reference: Reference,
    x_t: jax.Array,
    t: jax.Array,
    condition: Condition,
) -> jax.Array:
    """The reference: of its conditional mixture, or of the unconditional one at zeros."""
    given = condition.pooled[:, :1] > 0

    def chosen(cond, null):
        of_each = given.reshape(-1, *[1] * np.ndim(cond))
        return jnp.where(of_each, jnp.asarray(cond, x_t.dtype), jnp.asarray(null, x_t.dtype))

    mixture = jax.tree.map(chosen, reference.cond, reference.null)
    return noise_of(Modes(mixture.mean, mixture.factor), mixture.weight, x_t, t)


NETWORKS = {"generator": generate, "assistant": predict, "reference": know}


def denoiser(params: dict) -> Callable:
    """The step's `denoiser`. Args: {a key of NETWORKS: its parameters}."""
    ((role, given),) = params.items()

    def network(x_t: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        return NETWORKS[role](given, x_t, t, condition)

    return network


def encode_text(frozen: dict, token_ids: dict) -> tuple[Condition, Condition]:
    """No prompts: ones, or zeros for none."""
    del frozen
    ones = jnp.ones((len(token_ids["prompt"]), 1))
    condition = Condition(ones[..., None], ones)
    return condition, jax.tree.map(jnp.zeros_like, condition)


# ---- a run ----

SETTINGS = gradients.Settings(
    objective="di_star",
    omega=1.0,
    constants=Constants(),
    weighting="x0",
    reduction="sum",
    generator_times=(20, 980),
    assistant_times=(0, 999),
    assistant_updates=1,
    scheme="separate",
    generator=ONE_STEP,
    latent_shape=(2,),
    ema_half_life=50_000,
    clip_norms=(20.0, 20.0),
)


class Row(NamedTuple):
    """changes: in SETTINGS. scale: of the reward."""

    changes: dict[str, Any]
    scale: float = 0.0

    @property
    def settings(self) -> gradients.Settings:
        return dataclasses.replace(SETTINGS, **self.changes)


_FIRST = {"assistant_first": True}
KL = {"objective": "kl"}
_NORMALISED = {"weighting": "x0_normalised"}
# Away from the reference the published c leaves a kink, which no quadrature takes exactly.
_SMOOTH = Constants(huber_c=0.1)
_L2 = {"constants": Constants(distance="l2")}
_HALF = {"objective": "sid", "constants": Constants(sid_alpha=0.5)}
# Their optimum is the reference itself: Theorem 3.1, and KL's own.
_FREE = {
    "di_star": Row({}),
    "di_star, the assistant first": Row(_FIRST),
    "di_star in eps": Row({"weighting": "eps"}),
    "di_star, power 1.5": Row({"constants": Constants(distance="power", power=1.5)}),
    "di_star_l2": Row(_L2 | _NORMALISED),
    "sid, alpha 0.5": Row(_HALF | _NORMALISED),
    "kl": Row(KL),
    "kl in score": Row(KL | {"weighting": "score"}),
    "dmd": Row(KL | _NORMALISED | {"reduction": "mean"}),
}
# The reference times exp(4 reward).
_TILTED = {"kl at t = 0": Row(KL | {"generator_times": (0, 0)}, 0.0034)}
_BY_QUADRATURE = {
    "kl": Row(KL, 0.05),
    "kl_outside, alpha_cfg 1": Row(
        {"objective": "kl_outside", "constants": Constants(alpha_cfg=1.0)}, 0.05
    ),
    "di_star": Row({}, 0.2),
    "di_star, c 0.1": Row({"constants": _SMOOTH}, 0.3),
    "di_star, c 0.1, omega 2": Row({"constants": _SMOOTH, "omega": 2.0}, 0.2),
    "di_star_outside, c 0.1, alpha_cfg 1": Row(
        {"objective": "di_star_outside", "constants": _SMOOTH._replace(alpha_cfg=1.0)}, 0.2
    ),
    "di_star, l2, omega 2": Row(_L2 | {"omega": 2.0}, 0.1),
    "sid, alpha 0.5": Row(_HALF, 0.1),
}
ROWS = _FREE | {
    f"{name}, reward x {row.scale:g}": row for name, row in (_TILTED | _BY_QUADRATURE).items()
}


class Plan(NamedTuple):
    """Blocks of steps to come near in, and to average over; steps of a block; rates."""

    approach: int = 16
    averaged: int = 16
    block: int = 125
    rates: tuple[float, float] = (1e-2, 1e-3)


def optimizer(plan: Plan, times: float = 1.0) -> optax.GradientTransformation:
    """The project's AdamW, without decay of weights, which would move the optimum.

    Its rate falls over the approach, and then stays.
    """
    first, last = plan.rates
    steps = plan.approach * plan.block
    rate = optax.cosine_decay_schedule(times * first, steps, last / first)
    adamw = step.adamw(1.0, step.AdamW(0, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.0))
    return optax.chain(adamw, optax.scale_by_schedule(rate))


def measured(modes: Modes) -> jax.Array:
    """Means, then covariances (uu, uv, vv), [20]."""
    a, b, c = jnp.moveaxis(modes.factor, -1, 0)
    cov = jnp.stack([a * a, a * b, b * b + c * c], axis=-1)
    return jnp.concatenate([modes.mean.reshape(-1), cov.reshape(-1)])


def follow(row: Row, starts: tuple[Mixture, ...], plan: Plan) -> np.ndarray:
    """The mean of `measured` in each averaged block, [starts, blocks, 20]."""

    def scaled_reward(frozen, x0, token_ids, crop):
        return row.scale * reward(x0), {}

    settings = row.settings
    method = gradients.Method(denoiser, encode_text, scaled_reward, SCHEDULE, settings)
    optimizers = step.Optimizers(optimizer(plan), optimizer(plan, 2.0))
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    train_step = step.make_train_step(method, optimizers, mesh)
    token_ids = ({"prompt": jnp.zeros(BATCH)},) * step.prompt_batches(settings)
    frozen = {"reference": {"reference": REFERENCE}}

    def begin(start: Modes) -> step.TrainState:
        return step.init_state({"generator": start}, {"assistant": start}, optimizers)

    def run_block(state: step.TrainState, key: jax.Array) -> tuple[step.TrainState, jax.Array]:
        def one(carry, _):
            state, total = carry
            state, _ = train_step(state, frozen, token_ids, key)
            return (state, total + measured(state.generator["generator"])), None

        zeros = jnp.zeros(5 * len(WEIGHTS))
        (state, total), _ = jax.lax.scan(one, (state, zeros), length=plan.block)
        return state, total / plan.block

    given = [
        np.stack(leaves).astype(np.float32) for leaves in zip(*(start[1:] for start in starts))
    ]
    states = jax.jit(jax.vmap(begin))(Modes(*given))
    keys = jax.random.split(jax.random.key(0), len(starts))
    run_blocks = jax.jit(jax.vmap(run_block), donate_argnums=0)
    blocks = []
    for _ in range(plan.approach + plan.averaged):
        states, block = run_blocks(states, keys)
        blocks.append(np.asarray(block))
    return np.stack(blocks[plan.approach :], axis=1)


# ---- what it ends at ----


class Result(NamedTuple):
    """found: as of `follow`. best: the optimum, and wanted, [20], `measured` of it."""

    found: np.ndarray
    best: Mixture
    wanted: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """[starts, 20]."""
        return self.found.mean(axis=1) - self.wanted

    @property
    def in_standard_errors(self) -> np.ndarray:
        """[starts, 20], with the blocks' means as the samples."""
        blocks = self.found.shape[1]
        return self.error / (self.found.std(axis=1, ddof=1) / math.sqrt(blocks))


def optimum_of(row: Row) -> Mixture:
    """Where the row must end: in closed form where there is one, or else by quadrature."""
    settings = row.settings
    is_free = not row.scale and settings.omega == 1.0 and not settings.constants.alpha_cfg
    if is_free:
        return REFERENCE.cond
    definition = quadrature.define(settings, row.scale)
    if len(definition.share) > 1:
        return quadrature.optimum(REFERENCE, definition)
    # The reward is of x_0, the divergence of x_t, which at one time is as that of x_t / alpha_t.
    strength = row.scale / float(definition.rates["kl"][0])
    return tilted(REFERENCE.cond, strength, float(definition.sigma[0] / definition.alpha[0]))


def run_row(row: Row, plan: Plan, starts: tuple[Mixture, ...] = STARTS) -> Result:
    """An objective from its starts, and where it should have ended."""
    best = optimum_of(row)
    wanted = measured(Modes(*(jnp.asarray(x, jnp.float32) for x in best[1:])))
    return Result(follow(row, starts, plan), best, np.asarray(wanted))


def modes_of(blocks: np.ndarray) -> Mixture:
    """The mixture whose means and covariances are those of a run. Args: [blocks, 20]."""
    count = len(WEIGHTS)
    mean, cov = np.split(blocks.mean(axis=0), [2 * count])
    uu, uv, vv = cov.reshape(count, 3).T
    factor = np.linalg.cholesky(np.stack([uu, uv, uv, vv], axis=-1).reshape(count, 2, 2))
    return Mixture(WEIGHTS, mean.reshape(count, 2), factor[:, [0, 1, 1], [0, 0, 1]])


def table(results: dict[str, Result]) -> str:
    """Markdown; what the starts reach stands side by side."""
    header = [
        "objective",
        "the optimum's KL from the reference",
        "KL from the optimum",
        "largest error of a mean",
        "of a covariance",
        "in standard errors, rms",
        "largest",
    ]
    means = 2 * len(WEIGHTS)
    rows = []
    for name, result in results.items():
        ends = [quadrature.divergence(modes_of(found), result.best) for found in result.found]
        moved = quadrature.divergence(result.best, REFERENCE.cond)
        error, standard = np.abs(result.error), np.abs(result.in_standard_errors)
        cells = [
            f"{moved:.4f}",
            _cell(ends, "{:.0e}"),
            _cell(error[:, :means].max(axis=1), "{:.4f}"),
            _cell(error[:, means:].max(axis=1), "{:.4f}"),
            _cell(np.sqrt((standard**2).mean(axis=1)), "{:.2f}"),
            _cell(standard.max(axis=1), "{:.1f}"),
        ]
        rows.append([name, *cells])
    return log.markdown_table(header, rows)


def _cell(values: Iterable[float], form: str) -> str:
    return " / ".join(form.format(value) for value in values)


def run(plan: Plan) -> dict[str, Result]:
    """All rows, two at a time: much of their time goes to the compiler, on one thread."""
    results = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = {name: pool.submit(run_row, row, plan) for name, row in ROWS.items()}
        for i, (name, future) in enumerate(waiting.items()):
            results[name] = future.result()
            log.say(f"{i + 1} of {len(ROWS)}, {name}: {summary(results[name])}")
    return results


def summary(result: Result) -> str:
    """One line."""
    standard = np.sqrt((result.in_standard_errors**2).mean(axis=1))
    return (
        f"off by {np.abs(result.error).max():.4f} at most, rms "
        f"{_cell(standard, '{:.2f}')} standard errors"
    )


def described(results: dict[str, Result], plan: Plan) -> str:
    """The page's section."""
    every = np.abs(np.concatenate([r.in_standard_errors.reshape(-1) for r in results.values()]))
    beyond = [f"{np.mean(every > errors):.1%} beyond {errors}" for errors in (2, 3, 4)]
    return f"""Reference, generator and assistant are mixtures of four Gaussians on a ring, with \
weights {", ".join(f"{w:g}" for w in WEIGHTS)}. The
generator reads its mode off the angle of its noise, so that, unlike a network, it can be any such
mixture exactly; the assistant predicts the noise of any of them exactly. Means and covariances, 20
numbers, are trained by the project's own step: weighting x0, times 20 to 980, AdamW with b1 = 0,
both networks at once, batch {BATCH}, but where a row says otherwise; rates and the missing decay of
weights are this study's. The reward is -|x|^2 / 2. Made by `python -m di_star_jax.studies.optimum
--out=docs`.

The optimum is known without a sample. Without reward and guidance it is the reference, for every
objective. KL at the least noise (t = 0) ends at the reference times exp(4 reward), noised by
sigma_0 / alpha_0. All others end where the derivative of Eq. 3.3 vanishes, found in float64 by
Gauss's quadratures, with none of the code that trains. Objectives with x0_normalised are here
without a reward alone: their divisor differs from sample to sample, so they minimise no divergence.

Two starts, side by side: near the middle and wide, and further out, turned and narrow. A run is
{plan.approach * plan.block} steps to come near and {plan.averaged * plan.block} of which the mean \
is taken; its standard error is of {plan.averaged} blocks' means. Noise alone has an
rms of about 1.07; of all {every.size} numbers {", ".join(beyond)} standard errors (noise alone: \
6.4 %, 0.9 %, 0.1 %).

{table(results)}
"""


def main() -> None:
    out = flags.FLAGS.out
    check_all(lambda: files.writable_folder(out, "--out"))
    page, plan = files.expand(out) / "mixture.md", Plan()
    results = run(plan)
    print(table(results))
    files.write_text(page, with_section(page, TITLE, HEADING, described(results, plan)))
    log.say(f"wrote mixture.md in {out}")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "Folder for mixture.md.", required=True)


if __name__ == "__main__":
    define_flags()
    run_command(main)
