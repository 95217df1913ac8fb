# SPDX-License-Identifier: Apache-2.0
"""How the shapes world's networks are trained from nothing: the stages of `di-star pretrain`."""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from di_star_jax import (
    diffusion,
    drawing,
    gradients,
    log,
    models,
    objectives,
    step,
)
from di_star_jax.errors import UserError
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import DENOISER, conditions
from di_star_jax.pipelines.scheduler import schedule_from_json
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import similarity
from di_star_jax.shapes import datasets, networks, scenes, tokenizer
from di_star_jax.shapes.datasets import to_image
from di_star_jax.shapes.networks import LATENT_SHAPE, RESOLUTION, TOKENS
from di_star_jax.storage import weights
from di_star_jax.storage.checkpoint import Checkpoints

Params = Any
HALF_DIFFUSERS = {"file_name": "diffusion_pytorch_model.fp16.safetensors", "dtype": np.float16}
HALF_CLIP = {"file_name": "model.fp16.safetensors", "dtype": np.float16}


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how fast a network trains.

    Args: learning_rate, the highest; minutes, about, on two cores.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    minutes: int

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
REWARD = Stage("reward, preference", 1500, 48, 3e-4, minutes=3)
# The assistant learns twice as fast.
GENERATOR = Stage("generator", 800, 32, 1e-4, minutes=8)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is made and trained in all."""

    images: int = 40_000
    pairs: int = 10_000
    vae: Stage = VAE
    text: Stage = TEXT
    teacher: Stage = TEACHER
    clip: Stage = CLIP
    reward: Stage = REWARD
    generator: Stage = GENERATOR


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


def adamw(stage: Stage) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a twentieth of the peak learning rate."""
    peak, steps = stage.learning_rate, stage.steps
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(200, steps // 10), steps, peak / 20)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=1e-3)
    )


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
    optimizer = adamw(stage)

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
    graphdefs: dict,
    params: dict,
    heads: dict,
    token_ids: dict[str, jax.Array],
    x0: jax.Array,
) -> jax.Array:
    """How badly linear maps of the three end-of-text states predict the latents, summed.

    Args:
      graphdefs, params: hold 'text_encoder' and 'text_encoder_2'.
      heads: 'mean' [D] and one matrix [width, D] per state.
      token_ids: int32 [B, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      x0: latents [B, D].
    Returns:
      scalar.
    """
    states = {}
    for name, part in SDXL.tokenizers.items():
        out = nnx.merge(graphdefs[part], params[part])(token_ids[name])
        end = token_ids[name].argmax(axis=-1)  # the end-of-text token has the largest id
        states[part] = out.hidden_states_penultimate[jnp.arange(len(end)), end]
    states["pooled"] = out.pooled
    errors = [state @ heads[name] + heads["mean"] - x0 for name, state in states.items()]
    return sum((error**2).mean() for error in errors)


def _heads(x0: np.ndarray) -> dict[str, jax.Array]:
    widths = {
        "text_encoder": networks.TEXT_ENCODER["hidden_size"],
        "text_encoder_2": networks.TEXT_ENCODER_2["hidden_size"],
        "pooled": networks.TEXT_ENCODER_2["projection_dim"],
    }
    heads = {"mean": jnp.asarray(x0.mean(axis=0).ravel())}
    for i, (name, width) in enumerate(widths.items()):
        heads[name] = 0.01 * jax.random.normal(jax.random.key(i), (width, x0[0].size))
    return heads


def train_text(
    folder: Path,
    stage: Stage,
    x0: np.ndarray,
    token_ids: dict[str, np.ndarray],
    configs: dict[str, dict],
) -> tuple[Network, dict]:
    """Text encoders from whose end-of-text states a linear map predicts a caption's mean latents.

    The role of CLIP's training before Stable Diffusion's. What a caption says of where things are
    takes the encoders minutes to learn this way; from eps-prediction alone they had not learnt one
    relation in 5,000 steps.

    Args:
      folder, stage: as of `fit`.
      x0: scaled latents, [N, 16, 16, 4].
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      configs: config.json of text_encoder and text_encoder_2.
    Returns:
      the encoders by component, and the linear maps for `mean_image_loss`.
    """
    encoders = {part: init(config, 11 + i) for i, (part, config) in enumerate(configs.items())}
    graphdefs = {part: encoder.graphdef for part, encoder in encoders.items()}
    params = {part: encoder.params for part, encoder in encoders.items()}

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        del key
        return mean_image_loss(
            graphdefs, params["encoders"], params["heads"], batch["ids"], batch["x0"]
        )

    def batch_at(k: int) -> dict:
        rows = stage.rows(9, k, len(x0))
        return {"x0": x0[rows].reshape(len(rows), -1), "ids": _take(token_ids, rows)}

    start = {"encoders": params, "heads": _heads(x0)}
    trained = fit(folder, stage, start, loss_fn, batch_at)
    return Network(graphdefs, trained["encoders"]), trained["heads"]


def _take(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


# Teacher.


def train_teacher(
    folder: Path,
    stage: Stage,
    latents: tuple[np.ndarray, np.ndarray],
    token_ids: dict[str, np.ndarray],
    text: tuple[Network, dict],
) -> Network:
    """eps-prediction (Eq. 2.2), the text encoders trained with the UNet.

    `mean_image_loss` stays in the sum: without it the untrained UNet's gradients wipe out what the
    encoders know.

    Args:
      folder, stage: as of `fit`.
      latents: scaled means and standard deviations, [N, 16, 16, 4].
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      text: from `train_text`.
    Returns:
      the networks by component.
    """
    encoders, heads = text
    unet = init(networks.UNET, seed=10)
    graphdefs = encoders.graphdef | {DENOISER: unet.graphdef}

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        ids, x0 = batch["ids"], batch["mean"].reshape(len(batch["mean"]), -1)
        text_loss = mean_image_loss(graphdefs, params["networks"], params["heads"], ids, x0)
        return eps_loss(graphdefs, params["networks"], batch, key) + 0.1 * text_loss

    def batch_at(k: int) -> dict:
        batch = {"mean": latents[0], "std": latents[1], "ids": token_ids}
        return _take(batch, stage.rows(3, k, len(latents[0])))

    start = {"networks": encoders.params | {DENOISER: unet.params}, "heads": heads}
    trained = fit(folder, stage, start, loss_fn, batch_at)
    return Network(graphdefs, trained["networks"])


def eps_loss(
    graphdefs: dict,
    params: dict,
    batch: dict,
    key: jax.Array,
) -> jax.Array:
    """eps-prediction (Eq. 2.2), one caption in ten dropped.

    Times weigh sigma_t^2 / alpha_t^2, within bounds, as if the error of x_0 were minimised: how
    many objects there are, and which is above which, is decided where little of the signal is left,
    and plain eps-prediction hardly looks there.

    Args:
      graphdefs, params: by component.
      batch: 'mean' and 'std' of latents [B, 16, 16, 4], 'ids' as token_ids of `mean_image_loss`.
    Returns:
      scalar.
    """
    of_latents, of_dropped, of_times, of_noise = jax.random.split(key, 4)
    schedule = schedule_from_json(networks.SCHEDULER)
    x0 = batch["mean"] + batch["std"] * jax.random.normal(of_latents, batch["mean"].shape)
    text = SDXL.encode_text(graphdefs, params, batch["ids"])
    condition = _sometimes_null(of_dropped, *conditions(SDXL, text, None, RESOLUTION))
    t = jax.random.randint(of_times, x0.shape[:1], 0, 1000)
    alpha_t, sigma_t = schedule.alpha[t], schedule.sigma[t]
    eps = jax.random.normal(of_noise, x0.shape)
    x_t = diffusion.add_noise(x0, eps, alpha_t, sigma_t)
    error = nnx.merge(graphdefs[DENOISER], params[DENOISER])(x_t, t, condition) - eps
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


def train_reward(
    folder: Path,
    stage: Stage,
    clip: Network,
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Network:
    """PickScore's loss: cross-entropy over the two scaled scores of a preference pair.

    Args:
      folder, stage: as of `fit`.
      clip: from `train_clip`, to start from.
      pairs: uint8 [N, 2, 64, 64, 3], probability [N] that the first is preferred, and captions,
        int32 [N, TOKENS].
    """
    images, prob, ids = pairs

    def loss_fn(
        params: Params,
        batch: dict,
        key: jax.Array,
    ) -> jax.Array:
        del key
        text = similarity.text_embeddings(clip.graphdef, params, batch["ids"])
        scores = []
        for i in range(2):
            image = similarity.image_embeddings(clip.graphdef, params, batch["image"][:, i])
            scores.append(jnp.sum(image * text, axis=-1))
        logits = _logit_scale(params) * jnp.stack(scores, axis=-1)  # [B, 2]
        labels = jnp.stack([batch["prob"], 1.0 - batch["prob"]], axis=-1)
        return optax.softmax_cross_entropy(logits, labels).mean()

    def batch_at(k: int) -> dict:
        rows = stage.rows(6, k, len(ids))
        return {"image": to_image(images[rows]), "prob": prob[rows], "ids": ids[rows]}

    return clip._replace(params=fit(folder, stage, clip.params, loss_fn, batch_at))


# Generator.


def _distillation(graphdefs: dict, optimizers: step.Optimizers) -> Callable:
    """The project's own training step with reward 0, and DMD's normalised gradient.

    docs/ablation.md has what other losses reach in the same time.
    """

    def encode_text(params: dict, token_ids: dict) -> tuple[Any, Any]:
        text = SDXL.encode_text(graphdefs, params, token_ids)
        return conditions(SDXL, text, None, RESOLUTION)

    def no_reward(
        params: dict,
        x0: jax.Array,
        token_ids: dict,
        crop: Any,
    ) -> tuple:
        del params, token_ids, crop
        return jnp.zeros(x0.shape[0]), {}

    settings = gradients.Settings(
        objective="kl",
        omega=networks.OMEGA,
        constants=objectives.Constants(),
        weighting="x0_normalised",
        reduction="mean",
        generator_times=(20, 980),
        assistant_times=(0, 999),
        assistant_updates=1,
        scheme="separate",
        generator=SDXL.one_step,
        latent_shape=LATENT_SHAPE,
        ema_half_life=1100,
        clip_norms=(10.0, 10.0),
    )
    schedule = schedule_from_json(networks.SCHEDULER)
    unet = functools.partial(nnx.merge, graphdefs[DENOISER])
    method = gradients.Method(unet, encode_text, no_reward, schedule, settings)
    train_step = step.make_train_step(method, optimizers, drawing.one_device())
    return jax.jit(train_step, donate_argnums=0)


def distil_generator(
    folder: Path,
    stage: Stage,
    teacher: Network,
    token_ids: dict[str, np.ndarray],
) -> Params:
    """A one-step generator from the teacher, in the role of DMD2-SDXL.

    Args:
      folder, stage: as of `fit`.
      teacher: from `train_teacher`.
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
    Returns:
      the generator's averaged UNet parameters.
    """
    settings = step.AdamW(lr_warmup_steps=50, b1=0.0, b2=0.99, eps=1e-8, weight_decay=0.0)
    optimizers = step.Optimizers(
        generator=step.adamw(stage.learning_rate, settings),
        assistant=step.adamw(2.0 * stage.learning_rate, settings),
    )
    train_step = _distillation(teacher.graphdef, optimizers)
    frozen = dict(teacher.params)
    frozen["reference"] = frozen.pop(DENOISER)

    def update(
        state: step.TrainState,
        ids: dict,
        k: int,
    ) -> tuple[step.TrainState, dict]:
        del k  # the state knows it
        state, values = train_step(state, frozen, (ids,), jax.random.key(7))
        return state, {name: values[name] for name in ("regulariser/loss", "assistant/loss")}

    def batch_at(k: int) -> dict:
        return _take(token_ids, stage.rows(7, k, len(token_ids["tokenizer"])))

    unet = teacher.params[DENOISER]
    state = step.init_state(unet, unet, optimizers)
    return keep_training(folder, stage, state, update, batch_at).ema


# All of it.


def make_tokenizers(out: Path) -> int:
    """Writes tokenizer/ and tokenizer_2/. Returns: their vocabulary's size."""
    words = scenes.words()
    for name, pad_token in (("tokenizer", tokenizer.END), ("tokenizer_2", "!")):
        size = tokenizer.make_word_tokenizer(
            words, out / name, max_length=TOKENS, pad_token=pad_token
        )
    return size


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


def make_teacher(
    workdir: Path,
    sizes: Sizes,
    latents: tuple,
    ids: dict[str, np.ndarray],
    vocab_size: int,
) -> Network:
    """Trains and writes both text encoders and unet/."""
    out, configs = workdir / "checkpoint", networks.text_configs(vocab_size)
    text = train_text(workdir / "text", sizes.text, latents[0], ids, configs)
    teacher = train_teacher(workdir / "teacher", sizes.teacher, latents, ids, text)
    for name, config in configs.items():
        weights.save(out / name, teacher.params[name], config=config, **HALF_CLIP)
    weights.save(out / "unet", teacher.params[DENOISER], config=networks.UNET, **HALF_DIFFUSERS)
    return teacher


def make_reward(
    workdir: Path,
    sizes: Sizes,
    images: np.ndarray,
    ids: np.ndarray,
    vocab_size: int,
) -> None:
    """Trains and writes reward/. Args: images and their captions' ids, as of `train_clip`."""
    out, config = workdir / "checkpoint", networks.reward_config(vocab_size)
    clip = train_clip(workdir / "reward" / "contrastive", sizes.clip, images, ids, config)
    pairs, prob, captions = datasets.render_pairs(workdir / "pairs", sizes.pairs)
    examples = (pairs, prob, Tokenizer(out / "tokenizer")(captions))
    reward = train_reward(workdir / "reward" / "preference", sizes.reward, clip, examples)
    weights.save(out / "reward", reward.params, config=config, **HALF_CLIP)


def run(workdir: Path, sizes: Sizes) -> None:
    """All stages, each continued where it stopped; writes WORKDIR/checkpoint."""
    out = workdir / "checkpoint"
    images, captions = datasets.render_dataset(workdir / "data", sizes.images)
    vocab_size = make_tokenizers(out)
    with log.waiting("tokenising the captions"):
        ids = {name: Tokenizer(out / name)(captions) for name in ("tokenizer", "tokenizer_2")}
    latents = make_latents(workdir, sizes.vae, images)
    teacher = make_teacher(workdir, sizes, latents, ids, vocab_size)
    make_reward(workdir, sizes, images, ids["tokenizer"], vocab_size)
    generator = distil_generator(workdir / "generator", sizes.generator, teacher, ids)
    weights.save(out / "generator", generator, config=networks.UNET, **HALF_DIFFUSERS)
    (out / "scheduler").mkdir(exist_ok=True)
    scheduler = json.dumps(networks.SCHEDULER, indent=2)
    (out / "scheduler" / "scheduler_config.json").write_text(scheduler + "\n", encoding="utf-8")
    (out / "model_index.json").write_text(
        json.dumps(networks.MODEL_INDEX, indent=2) + "\n", encoding="utf-8"
    )
    datasets.write_captions(out)
