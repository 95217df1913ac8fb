# SPDX-License-Identifier: Apache-2.0
"""How the shapes world's networks are trained from nothing, but for what other commands train.

VAE, text encoders, teacher and the CLIP that the reward begins with: stages of `di-star pretrain`.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from di_star_jax import (
    diffusion,
    log,
    models,
)
from di_star_jax.errors import UserError
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.scheduler import schedule_from_json
from di_star_jax.rewards import similarity
from di_star_jax.shapes import datasets, networks
from di_star_jax.shapes.datasets import to_image
from di_star_jax.shapes.worlds import Captions, Reader, World
from di_star_jax.storage import weights
from di_star_jax.storage.checkpoint import Checkpoints

Params = Any
SHIPPED = Path(__file__).parent / "checkpoint"
HALF_DIFFUSERS = {"file_name": "diffusion_pytorch_model.fp16.safetensors", "dtype": np.float16}
HALF_TRANSFORMERS = {"file_name": "model.fp16.safetensors", "dtype": np.float16}


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how fast a network trains.

    Args: learning_rate, the highest; minutes, about, on two cores; optimizer, a key of OPTIMIZERS.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    minutes: int
    optimizer: str = "adamw"

    def rows(
        self,
        seed: int,
        k: int,
        count: int,
    ) -> np.ndarray:
        """Numbers of `count` examples that step k sees; the same ones in a resumed run."""
        return np.random.default_rng((seed, k)).integers(count, size=self.batch_size)


VAE = Stage("vae", 5000, 8, 2e-3, minutes=12)
TEXT = Stage("text", 1000, 256, 2e-3, minutes=3)
TEACHER = Stage("teacher", 4500, 64, 1.5e-3, minutes=30)
CLIP = Stage("CLIP, contrastive", 1500, 96, 1e-3, minutes=5)
PIXART_TEXT = Stage("text", 1500, 256, 2e-3, minutes=6)
PIXART_TEACHER = Stage("teacher", 5000, 64, 1.5e-3, minutes=50, optimizer="muon")


class Network(NamedTuple):
    """What `nnx.merge` takes, or a dict of each by component."""

    graphdef: Any
    params: Params


def init(config: dict, seed: int) -> Network:
    """A network with fresh parameters. Args: config, its config.json."""
    cls, settings = pipeline.model_class(config)
    return Network(*models.init(lambda rngs: cls(settings, rngs=rngs), seed=seed))


# One loop for all stages.


def keep_training(
    folder: Path,
    stage: Stage,
    state: Any,
    update: Callable,
    batch_at: Callable,
) -> Any:
    """The state after all steps of a stage, continuing from the checkpoints in `folder`.

    Args:
      folder: of this stage's checkpoints.
      stage: says how many steps.
      state: at step 0; NamedTuple or dict of trees.
      update: (state, batch, step) -> (state, {name: scalar to show}); may donate the state.
      batch_at: step -> batch.
    """
    shown = collections.deque(maxlen=100)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(folder, keep=1))
        first = checkpoints.latest_step() or 0
        if first > stage.steps:
            raise UserError(
                f"{folder} has done {first} steps, expected at most {stage.steps}, so another "
                "command or version made it; give another --workdir"
            )
        if first:
            state = checkpoints.restore(first, jax.eval_shape(lambda: state))
        if first < stage.steps:
            _say_what_follows(stage, first)
        progress = stack.enter_context(log.Progress(stage.steps, first, f"{stage.name}: step"))
        for k in range(first, stage.steps):
            with log.waiting("compiling the step") if k == first else contextlib.nullcontext():
                state, values = update(state, batch_at(k), np.int32(k))
            shown.append(jax.device_get(values))
            done = k + 1
            progress.update(done, _means(shown))
            if done % 100 == 0 or done == stage.steps:
                checkpoints.save(done, state, {})
    return state


def _say_what_follows(stage: Stage, first: int) -> None:
    since = f" from step {first} on" if first else ""
    minutes = max(1, round(stage.minutes * (1 - first / stage.steps)))
    log.say(
        f"training {stage.name}{since}: {stage.steps} steps, {minutes} minutes on two cores; "
        "stopped, the same command goes on"
    )


def _means(shown: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} {np.mean([values[name] for values in shown]):.4f}" for name in shown[0]
    )


def _rate(stage: Stage) -> optax.Schedule:
    """Warm-up and cosine decay to a twentieth of the peak learning rate."""
    peak, steps = stage.learning_rate, stage.steps
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(200, steps // 10), steps, peak / 20)


def adamw(stage: Stage) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(_rate(stage), b2=0.99, weight_decay=1e-3)


def muon(stage: Stage) -> optax.GradientTransformation:
    """Muon for the matrices between a network's first and last layer, AdamW for all else.

    A transformer learns in half the steps, which take a tenth longer.
    """
    return contrib.muon(
        _rate(stage),
        weight_decay=1e-3,
        adam_b2=0.99,
        muon_weight_dimension_numbers=_inner_matrices,
        consistent_rms=0.2,  # steps as large as AdamW's
    )


def _inner_matrices(params: Params) -> Any:
    """The axes of each matrix that Muon is for, of stacked ones too; None for other parameters."""

    def axes(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        names = [getattr(key, "key", None) for key in path]
        is_inner = names[-1] == "kernel" and "proj_out" not in names and leaf.ndim in (2, 3)
        return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if is_inner else None

    return jax.tree_util.tree_map_with_path(axes, params)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def fit(
    folder: Path,
    stage: Stage,
    params: Params,
    loss_fn: Callable,
    batch_at: Callable,
) -> Params:
    """Parameters that minimise `loss_fn(params, batch, key) -> scalar`, averaged over the steps.

    Args: as of `keep_training`; params, to start from.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[stage.optimizer](stage))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        state: dict,
        batch: Any,
        k: jax.Array,
    ) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.key(0), k)
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(0.998, (1.0 + k) / (10.0 + k))
        ema = optax.incremental_update(params, state["ema"], 1.0 - decay)
        return {"params": params, "opt": opt, "ema": ema}, {"loss": loss}

    state = {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(jnp.copy, params)}
    return keep_training(folder, stage, state, update, batch_at)["ema"]


# Autoencoder.


def train_vae(
    folder: Path,
    stage: Stage,
    images: np.ndarray,
) -> Network:
    """L1 + L2 on pixels and on their differences to the neighbour, and a small KL."""
    graphdef, params = init(networks.VAE, seed=0)

    def loss_fn(
        params: Params,
        image: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        vae = nnx.merge(graphdef, params)
        mean, std = vae.encode(image)
        error = vae.decode(mean + std * jax.random.normal(key, mean.shape)) - image
        pixels = jnp.abs(error).mean() + (error**2).mean()
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * jnp.log(std)).mean()
        return pixels + edges + 2e-4 * kl

    def batch_at(k: int) -> np.ndarray:
        return to_image(images[np.sort(stage.rows(2, k, len(images)))])

    return Network(graphdef, fit(folder, stage, params, loss_fn, batch_at))


# Text encoders.


def mean_image_loss(
    reader: Reader,
    params: dict,
    heads: dict,
    token_ids: dict[str, jax.Array],
    x0: jax.Array,
) -> jax.Array:
    """How badly linear maps of a caption's states predict the latents, summed over the states.

    Args:
      reader, token_ids: of the captions, int32 [B, L] by tokenizer.
      params: of the text encoders by component.
      heads: 'mean' [D] and one matrix [width, D] per state.
      x0: latents [B, D].
    Returns:
      scalar.
    """
    states = reader.states(params, token_ids)
    errors = [state @ heads[name] + heads["mean"] - x0 for name, state in states.items()]
    return sum((error**2).mean() for error in errors)


def _heads(states: dict[str, jax.ShapeDtypeStruct], x0: np.ndarray) -> dict[str, jax.Array]:
    heads = {"mean": jnp.asarray(x0.mean(axis=0).ravel())}
    for i, (name, state) in enumerate(states.items()):
        shape = (state.shape[-1], x0[0].size)
        heads[name] = 0.01 * jax.random.normal(jax.random.key(i), shape)
    return heads


def train_text(
    folder: Path,
    stage: Stage,
    x0: np.ndarray,
    captions: Captions,
    configs: dict[str, dict],
) -> tuple[Network, dict]:
    """Text encoders from whose states of a caption a linear map predicts its mean latents.

    The role of CLIP's training before Stable Diffusion's. What a caption says of where things are
    takes the encoders minutes to learn this way; from eps-prediction alone they had not learnt one
    relation in 5,000 steps.

    Args:
      folder, stage: as of `fit`.
      x0: scaled latents, [N, 16, 16, 4].
      captions: N of them.
      configs: config.json of the text encoders by component.
    Returns:
      the encoders by component, and the linear maps for `mean_image_loss`.
    """
    encoders = {part: init(config, 11 + i) for i, (part, config) in enumerate(configs.items())}
    graphdefs = {part: encoder.graphdef for part, encoder in encoders.items()}
    params = {part: encoder.params for part, encoder in encoders.items()}
    reader = captions.reader(graphdefs)

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        del key
        return mean_image_loss(
            reader, params["encoders"], params["heads"], batch["ids"], batch["x0"]
        )

    def batch_at(k: int) -> dict:
        rows = stage.rows(9, k, len(x0))
        return {"x0": x0[rows].reshape(len(rows), -1), "ids": _take(captions.ids, rows)}

    states = jax.eval_shape(reader.states, params, _take(captions.ids, np.arange(1)))
    start = {"encoders": params, "heads": _heads(states, x0)}
    trained = fit(folder, stage, start, loss_fn, batch_at)
    return Network(graphdefs, trained["encoders"]), trained["heads"]


def _take(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


# Teacher.


def train_teacher(
    folder: Path,
    stage: Stage,
    latents: tuple[np.ndarray, np.ndarray],
    captions: Captions,
    text: tuple[Network, dict],
) -> Network:
    """eps-prediction (Eq. 2.2), the text encoders trained with the denoiser.

    `mean_image_loss` stays in the sum: without it the untrained denoiser's gradients wipe out what
    the encoders know.

    Args:
      folder, stage: as of `fit`.
      latents: scaled means and standard deviations, [N, 16, 16, 4].
      captions: N of them.
      text: from `train_text`.
    Returns:
      the networks by component.
    """
    encoders, heads = text
    denoiser = init(captions.world.configs[DENOISER], seed=10)
    graphdefs = encoders.graphdef | {DENOISER: denoiser.graphdef}
    reader = captions.reader(graphdefs)

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        ids, x0 = batch["ids"], batch["mean"].reshape(len(batch["mean"]), -1)
        text_loss = mean_image_loss(reader, params["networks"], params["heads"], ids, x0)
        return eps_loss(reader, params["networks"], batch, key) + 0.1 * text_loss

    def batch_at(k: int) -> dict:
        batch = {"mean": latents[0], "std": latents[1], "ids": captions.ids}
        return _take(batch, stage.rows(3, k, len(latents[0])))

    start = {"networks": encoders.params | {DENOISER: denoiser.params}, "heads": heads}
    trained = fit(folder, stage, start, loss_fn, batch_at)
    return Network(graphdefs, trained["networks"])


def eps_loss(
    reader: Reader,
    params: dict,
    batch: dict,
    key: jax.Array,
) -> jax.Array:
    """eps-prediction (Eq. 2.2), one caption in ten dropped.

    Times weigh sigma_t^2 / alpha_t^2, within bounds, as if the error of x_0 were minimised: how
    many objects there are, and which is above which, is decided where little of the signal is left,
    and plain eps-prediction hardly looks there.

    Args:
      reader: of the networks.
      params: by component.
      batch: 'mean' and 'std' of latents [B, 16, 16, 4], 'ids' as token_ids of `mean_image_loss`.
    Returns:
      scalar.
    """
    of_latents, of_dropped, of_times, of_noise = jax.random.split(key, 4)
    schedule = schedule_from_json(reader.world.scheduler)
    x0 = batch["mean"] + batch["std"] * jax.random.normal(of_latents, batch["mean"].shape)
    condition = _sometimes_null(of_dropped, *reader.conditions(params, batch["ids"]))
    t = jax.random.randint(of_times, x0.shape[:1], 0, 1000)
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    eps = jax.random.normal(of_noise, x0.shape)
    x_t = diffusion.add_noise(x0, eps, alpha_t, sigma_t)
    denoiser = nnx.merge(reader.graphdefs[DENOISER], params[DENOISER])
    error = denoiser(x_t, t, condition) - eps
    weight = jnp.clip((sigma_t / alpha_t) ** 2, 0.3, 5.0)
    return (weight * (error**2).mean((1, 2, 3))).mean()


def _sometimes_null(
    key: jax.Array,
    condition: Any,
    null: Any,
) -> Any:
    """Each sample's condition, or the null condition for one in ten."""
    drop = jax.random.bernoulli(key, 0.1, jax.tree.leaves(condition)[0].shape[:1])
    return jax.tree.map(
        lambda c, n: jnp.where(diffusion.per_sample(drop, c), n, c), condition, null
    )


# Reward.


def _logit_scale(params: Params) -> jax.Array:
    return jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))


def train_clip(
    folder: Path,
    stage: Stage,
    images: np.ndarray,
    ids: np.ndarray,
    config: dict,
    seed: int = 20,
) -> Network:
    """CLIP's contrastive loss on images and their captions.

    Args:
      folder, stage: as of `fit`.
      images, ids: uint8 [N, 64, 64, 3] and their captions, int32 [N, TOKENS].
      config: the CLIPModel's config.json.
      seed: of the first parameters.
    """
    graphdef, params = init(config, seed)

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        del key
        text = similarity.text_embeddings(graphdef, params, batch["ids"])
        image = similarity.image_embeddings(graphdef, params, batch["image"])
        logits = _logit_scale(params) * image @ text.T  # [B, B]
        labels = jnp.arange(len(logits))
        pull = optax.softmax_cross_entropy_with_integer_labels
        return (pull(logits, labels).mean() + pull(logits.T, labels).mean()) / 2

    def batch_at(k: int) -> dict:
        rows = np.sort(stage.rows(5, k, len(images)))
        return {"image": to_image(images[rows]), "ids": ids[rows]}

    return Network(graphdef, fit(folder, stage, params, loss_fn, batch_at))


# Stages that write their part of the checkpoint.


def make_latents(
    workdir: Path,
    stage: Stage,
    images: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains and writes vae/. Returns: scaled means and standard deviations of all latents."""
    vae = train_vae(workdir / "vae", stage, images)
    mean, std = datasets.encode(workdir / "data", *vae, images)
    scale = float(1.0 / np.sqrt((mean**2 + std**2).mean()))  # to unit variance, as SDXL's
    config = networks.VAE | {"scaling_factor": scale}
    weights.save(workdir / "checkpoint" / "vae", vae.params, config=config, **HALF_DIFFUSERS)
    return mean * scale, std * scale


def shipped_latents(workdir: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `make_latents`, by the package's own VAE, which is copied."""
    vae = pipeline.load_model(SHIPPED / "vae")
    # Of scaling factor 1, as `datasets.encode` wants it.
    graphdef, _ = init(networks.VAE, seed=0)
    mean, std = datasets.encode(workdir / "data", graphdef, vae.params, images)
    shutil.copytree(SHIPPED / "vae", workdir / "checkpoint" / "vae", dirs_exist_ok=True)
    scale = vae.config["scaling_factor"]
    return mean * scale, std * scale


def make_teacher(
    workdir: Path,
    text_stage: Stage,
    teacher_stage: Stage,
    latents: tuple,
    captions: Captions,
    vocab_size: int,
) -> None:
    """Trains and writes the text encoders and the denoiser."""
    out, world = workdir / "checkpoint", captions.world
    configs = world.text_configs(vocab_size)
    text = train_text(workdir / "text", text_stage, latents[0], captions, configs)
    teacher = train_teacher(workdir / "teacher", teacher_stage, latents, captions, text)
    for name, config in configs.items():
        weights.save(out / name, teacher.params[name], config=config, **HALF_TRANSFORMERS)
    save_denoiser(out / world.family.parts[DENOISER].folder, teacher.params[DENOISER], world)


def save_denoiser(
    folder: Path,
    params: Params,
    world: World,
) -> None:
    """Writes a teacher's or a generator's folder."""
    weights.save(folder, params, config=world.configs[DENOISER], **HALF_DIFFUSERS)


def make_clip(
    workdir: Path,
    stage: Stage,
    images: np.ndarray,
    ids: np.ndarray,
    vocab_size: int,
) -> None:
    """Trains and writes clip/. Args: images and their captions' ids, as of `train_clip`."""
    config = networks.reward_config(vocab_size)
    clip = train_clip(workdir / "clip", stage, images, ids, config)
    folder = workdir / "checkpoint" / "clip"
    weights.save(folder, clip.params, config=config, **HALF_TRANSFORMERS)


def write_index(out: Path, world: World) -> None:
    """Writes what makes a checkpoint's folder a pipeline's."""
    contents = {
        out / "scheduler" / "scheduler_config.json": world.scheduler,
        out / "model_index.json": world.index,
    }
    for file, content in contents.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
