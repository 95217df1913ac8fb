# SPDX-License-Identifier: Apache-2.0
"""Every objective on a mixture in the plane, with the real training step:

`di-star mixture --out=runs/mixture`.

The reference is the exact score of the mixture; generator and assistant are small networks. Each
objective trains a one-step generator to convergence, without a reward and with two strengths of one
that is highest at a single mode. Writes OUT/mixture.md and OUT/mixture.png at the end; nothing is
kept of a run that was stopped.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from di_star_jax import diffusion, gradients, log, objectives, samplers, sharding, step
from di_star_jax.command import run as run_command
from di_star_jax.errors import check_all
from di_star_jax.models.unet import Condition
from di_star_jax.storage import files
from di_star_jax.studies.page import check_matplotlib, with_section

SCHEDULE = diffusion.make_schedule(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)
ONE_STEP = diffusion.FewStep((399,))  # as SDXL's
CENTRES = np.array([[-1.4, -0.8], [1.4, -0.8], [0.0, 1.6], [0.0, 0.1]], np.float32)
MODE_WEIGHTS = np.array([0.3, 0.3, 0.25, 0.15], np.float32)
STD = 0.25  # of each mode
TITLE = "Every objective on a mixture in the plane"
HEADING = "Small networks"
DRAWN = 4000  # samples in a picture
_CROSS = {"marker": "+", "color": "#c0392b"}
_INK = "#1f4e79"
REWARD_SCALES = (0.0, 1.0, 4.0)
BATCH = 512
CHUNK = 250  # steps in one call, between two of which Ctrl-C is heard
GRID = np.linspace(-3.0, 3.0, 121)  # edges of the histogram's bins
METHODS = {  # name: what it changes in SETTINGS
    "di_star": {},
    "di_star_l2": {
        "constants": objectives.Constants(distance="l2"),
        "weighting": "x0_normalised",
    },
    "sid, alpha 0.5": {
        "objective": "sid",
        "constants": objectives.Constants(sid_alpha=0.5),
        "weighting": "x0_normalised",
    },
    "kl": {"objective": "kl"},
    "dmd": {"objective": "kl", "weighting": "x0_normalised"},
    "reward_only": {"objective": "reward_only"},
}
SETTINGS = gradients.Settings(
    objective="di_star",
    omega=1.0,
    constants=objectives.Constants(),
    weighting="x0",
    reduction="sum",
    generator_times=(20, 980),
    assistant_times=(0, 999),
    assistant_updates=3,
    scheme="separate",
    generator=ONE_STEP,
    latent_shape=(2,),
    ema_half_life=70_000,
    clip_norms=(2.0, 2.0),
)


def reward(x0: jax.Array) -> jax.Array:
    """Highest, 1, at the second mode, and wide enough to be felt at the others.

    Args: [B, 2]. Returns: [B].
    """
    return jnp.exp(-((x0 - CENTRES[1]) ** 2).sum(-1) / 8.0)


def exact_eps(x_t: jax.Array, t: jax.Array) -> jax.Array:
    """The mixture's noise prediction. Args: x_t [B, 2], t [B]. Returns: [B, 2]."""

    def log_density(x, alpha, sigma):
        variance = (alpha * STD) ** 2 + sigma**2
        return jax.nn.logsumexp(
            -0.5 * ((x - alpha * CENTRES) ** 2).sum(-1) / variance + jnp.log(MODE_WEIGHTS)
        )

    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    return -sigma[:, None] * jax.vmap(jax.grad(log_density))(x_t, alpha, sigma)


def init_network(seed: int, width: int = 128) -> dict:
    """Parameters of a network (x_t, t) -> eps with three hidden layers."""
    shapes = [(2 + 16, width), (width, width), (width, width), (width, 2)]
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(key, shape) * (2.0 / shape[0]) ** 0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for i, (key, shape) in enumerate(zip(keys, shapes))
    }


def network(
    params: dict,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Args: x_t [B, 2], t [B]. Returns: eps [B, 2]."""
    angles = (t[:, None] / 1000.0) * 2.0 ** jnp.arange(8)
    h = jnp.concatenate([x_t, jnp.sin(angles), jnp.cos(angles)], axis=-1)
    for i, layer in enumerate(params.values()):
        h = h @ layer["kernel"] + layer["bias"]
        h = jax.nn.silu(h) if i + 1 < len(params) else h
    return h


def denoiser(params: dict | tuple) -> Callable:
    """The step's `denoiser`: the reference has no parameters, for it is exact."""

    def predict(
        x_t: jax.Array,
        t: jax.Array,
        condition: Condition | None,
    ) -> jax.Array:
        del condition
        return network(params, x_t, t) if params else exact_eps(x_t, t)

    return predict


def encode_text(frozen: dict, token_ids: dict) -> tuple[Condition, Condition]:
    """No prompts: a condition that says the batch's size alone."""
    del frozen, token_ids
    condition = Condition(jnp.zeros((BATCH, 1, 1)))
    return condition, condition


def sample_mixture(key: jax.Array, count: int) -> jax.Array:
    """[count, 2] exact samples."""
    key_mode, key_eps = jax.random.split(key)
    mode = jax.random.choice(key_mode, len(CENTRES), (count,), p=MODE_WEIGHTS)
    return jnp.asarray(CENTRES)[mode] + STD * jax.random.normal(key_eps, (count, 2))


def run_steps(
    update: Callable,
    state: Any,
    count: int,
) -> Any:
    """`count` calls of state = update(state, k), compiled as loops of CHUNK."""
    body = jax.jit(
        lambda state, first, last: jax.lax.fori_loop(
            first, last, lambda k, state: update(state, k), state
        )
    )
    for first in range(0, count, CHUNK):
        state = jax.block_until_ready(body(state, first, min(first + CHUNK, count)))
    return state


def pretrain(steps: int) -> dict:
    """A network that knows the mixture's scores.

    Generator and assistant start from it, as DI*'s do from SDXL.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = init_network(0)

    def loss(params: dict, k: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), k), 3)
        x0, eps = sample_mixture(keys[0], BATCH), jax.random.normal(keys[1], (BATCH, 2))
        t = jax.random.randint(keys[2], (BATCH,), 0, 1000)
        x_t = diffusion.add_noise(x0, eps, SCHEDULE.alpha[t], SCHEDULE.sigma[t])
        return objectives.denoising_score_matching(network(params, x_t, t), eps).mean()

    def update(state: tuple, k: jax.Array) -> tuple:
        params, opt = state
        updates, opt = optimizer.update(jax.grad(loss)(params, k), opt)
        return optax.apply_updates(params, updates), opt

    return run_steps(update, (params, optimizer.init(params)), steps)[0]


def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(rate, steps, 0.1)
    return optax.adam(schedule, b1=0.0)


def train(
    start: dict,
    settings: gradients.Settings,
    scale: float,
    steps: int,
) -> dict:
    """The generator's averaged parameters after `steps` of the project's own step."""

    def scaled_reward(frozen, x0, token_ids, crop):
        return scale * reward(x0), {}

    method = gradients.Method(denoiser, encode_text, scaled_reward, SCHEDULE, settings)
    optimizers = step.Optimizers(_optimizer(3e-4, steps), _optimizer(1e-3, steps))
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    train_step = step.make_train_step(method, optimizers, mesh)
    token_ids = ({"prompt": jnp.zeros(BATCH)},) * step.prompt_batches(settings)
    key = jax.random.key(2)

    def update(state: step.TrainState, k: jax.Array) -> step.TrainState:
        del k  # the state counts its steps
        return train_step(state, {"reference": ()}, token_ids, key)[0]

    return run_steps(update, step.init_state(start, start, optimizers), steps).ema


def measure(x0: np.ndarray) -> dict[str, float | list[float]]:
    """KL(samples | mixture) over bins of 0.05, mean reward, share of samples by nearest mode.

    Args: [N, 2].
    """
    count, _, _ = np.histogram2d(x0[:, 0], x0[:, 1], bins=(GRID, GRID))
    q = np.maximum(_mass(), 1e-12)
    p = count / len(x0)  # samples beyond the grid are missing from p: their share is `outside`
    nearest = ((x0[:, None] - CENTRES) ** 2).sum(-1).argmin(-1)
    return {
        "kl": float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))),
        "outside": float(1 - p.sum()),
        "reward": float(reward(jnp.asarray(x0)).mean()),
        "modes": (np.bincount(nearest, minlength=len(CENTRES)) / len(x0)).tolist(),
    }


def _mass() -> np.ndarray:
    """The mixture's, by bin of GRID."""
    middle = (GRID[1:] + GRID[:-1]) / 2
    points = np.stack(np.meshgrid(middle, middle, indexing="ij"), axis=-1)
    squares = ((points[..., None, :] - CENTRES) ** 2).sum(-1)
    density = (MODE_WEIGHTS * np.exp(-squares / (2 * STD**2))).sum(-1)
    return density / density.sum()


def draw(generator: dict, count: int = 200_000) -> np.ndarray:
    """[count, 2] samples of a one-step generator, the same noise for all."""
    z = jax.random.normal(jax.random.key(3), (count, 2))
    x0 = samplers.one_step(
        lambda x_t, t: network(generator, x_t, t), z, np.array(ONE_STEP.timesteps), SCHEDULE
    )
    return np.asarray(x0)


def table(results: dict[str, dict]) -> str:
    """Markdown. Args: measures by 'name | reward scale'."""
    header = [
        "objective",
        "reward scale",
        "KL to the mixture",
        "mean reward",
        "share of each mode",
    ]
    rows = []
    for name, m in results.items():
        shares = " ".join(f"{share:.2f}" for share in m["modes"])
        rows.append([*name.split(" | "), f"{m['kl']:.3f}", f"{m['reward']:.3f}", shares])
    return log.markdown_table(header, rows) + "\n"


def figure(samples: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Scatter plots, a row per reward scale. Args: [N, 2] by 'name | reward scale'."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = len(METHODS) + 1
    fig = Figure(figsize=(2.1 * columns, 2.3 * len(REWARD_SCALES) + 0.3), layout="constrained")
    axes = fig.subplots(len(REWARD_SCALES), columns, squeeze=False)
    for i, scale in enumerate(REWARD_SCALES):
        for axis, name in zip(axes[i], ["mixture", *METHODS]):
            x0 = samples["mixture | -" if name == "mixture" else f"{name} | {scale:g}"][:DRAWN]
            axis.scatter(x0[:, 0], x0[:, 1], s=1, alpha=0.3, linewidths=0, color=_INK)
            axis.scatter(*CENTRES[1], s=120, linewidths=0.9, **_CROSS)
            axis.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
            axis.set_title(
                f"{name}\nreward x {scale:g}" if name != "mixture" else "mixture", fontsize=8
            )
    dot = {"linestyle": "none", "marker": "o", "markersize": 2, "color": _INK}
    cross = {"linestyle": "none", "markersize": 11, **_CROSS}
    fig.legend(
        handles=[
            Line2D([], [], label="where the reward is highest", **cross),
            Line2D([], [], label=f"{DRAWN:,} samples of the generator, or of the mixture", **dot),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    fig.savefig(path, dpi=110)


def run(out: pathlib.Path, steps: int) -> None:
    """All objectives; prints and writes the table and the figure. Args: out, a folder."""
    with log.waiting(f"training the network that all start from, {steps} steps"):
        start = pretrain(steps)
    samples = {
        "mixture | -": np.asarray(sample_mixture(jax.random.key(4), 200_000)),
        "start | -": draw(start),
    }
    todo = [(name, scale) for name in METHODS for scale in REWARD_SCALES]
    began = time.monotonic()
    for i, (name, scale) in enumerate(todo):
        settings = dataclasses.replace(SETTINGS, **METHODS[name])
        each = (time.monotonic() - began) / max(i, 1)
        left = f"{log.duration(each * (len(todo) - i))} left in all" if i else ""
        with log.waiting(f"training {i + 1} of {len(todo)}, {name} with reward x {scale:g}", left):
            x0 = draw(train(start, settings, scale, steps))
        samples[f"{name} | {scale:g}"] = x0
        log.say(f"{name}, reward x {scale:g}: {json.dumps(measure(x0))}")
    write_page(out / "mixture.md", {name: measure(x0) for name, x0 in samples.items()}, steps)
    figure(samples, out / "mixture.png")


def write_page(
    path: pathlib.Path,
    results: dict[str, dict],
    steps: int,
) -> None:
    """The page's section of what was measured; all others, and its conclusion, are kept."""
    centres = ", ".join(f"({x:.1f}, {y:.1f})" for x, y in CENTRES)
    weights = ", ".join(f"{w:g}" for w in MODE_WEIGHTS)
    text = f"""A one-step generator of four layers, the exact score of a mixture of four modes as \
the reference, {steps} steps of {BATCH}
samples by the project's own step; made by `python -m di_star_jax.studies.mixture --out=docs \
--steps={steps}`. A network
cannot tear its samples apart, so none of them reaches the mixture. The reward is highest at the
second mode (the cross). Modes are listed in the order {centres};
their weights are {weights}.

{table(results)}
![samples of every objective](mixture.png)
"""
    files.write_text(path, with_section(path, TITLE, HEADING, text))


def main() -> None:
    out = flags.FLAGS.out
    check_all(check_matplotlib, lambda: files.writable_folder(out, "--out"))
    run(files.expand(out), flags.FLAGS.steps)
    log.say(f"wrote mixture.md and mixture.png in {out}")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("out", None, "Folder for mixture.md and mixture.png.", required=True)
    flags.DEFINE_integer(
        "steps", 4000, "Steps of the generator, with each objective.", lower_bound=1
    )


if __name__ == "__main__":
    define_flags()
    run_command(main)
