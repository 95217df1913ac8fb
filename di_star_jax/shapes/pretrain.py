# SPDX-License-Identifier: Apache-2.0
"""Makes the shapes checkpoint from nothing:

`python -m di_star_jax.shapes.pretrain --workdir=runs/pretrain`.

Six stages, each resumed where it stopped when the same command runs again:
  data       renders captioned scenes
  vae        autoencoder, 64x64x3 <-> 16x16x4
  text       two text encoders, trained to predict the mean image of a caption
  teacher    SDXL-shaped UNet, trained on eps-prediction together with the text encoders
  reward     CLIP: contrastive, then PickScore's loss on preference pairs
  generator  one-step generator distilled from the teacher by the project's own step with reward 0
Writes `WORKDIR/checkpoint`, a diffusers pipeline folder with `generator/` and `reward/` beside the
usual parts.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags
from flax import nnx

from di_star_jax import (
    diffusion,
    drawing,
    gradients,
    models,
    objectives,
    samplers,
    sharding,
    step,
)
from di_star_jax.errors import run as run_command
from di_star_jax.models.clip import CLIPConfig, CLIPModel
from di_star_jax.models.vae import AutoencoderKL, VAEConfig
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import similarity
from di_star_jax.shapes import oracle, scenes, taste, tokenizer
from di_star_jax.storage import checkpoint, weights

NUM_IMAGES = 40_000
TOKENS = 20  # two specials and the longest caption
RESOLUTION = 64
DISTIL_OMEGA = 5.0
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_HALF_DIFFUSERS = {"file_name": "diffusion_pytorch_model.fp16.safetensors", "dtype": np.float16}
_HALF_CLIP = {"file_name": "model.fp16.safetensors", "dtype": np.float16}

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [16, 24, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "force_upcast": False,
    "scaling_factor": 1.0,
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
}
TEXT_ENCODER_2 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 96, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "norm_eps": 1e-5,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 3, 4],
    "cross_attention_dim": 160,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 64,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

REWARD = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 64,
    "logit_scale_init_value": 2.6592,
    "text_config": {
        "model_type": "clip_text_model",
        "hidden_act": "gelu",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": TOKENS,
        "projection_dim": 64,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_attention_heads": 3,
        "num_hidden_layers": 4,
        "image_size": RESOLUTION,
        "patch_size": 8,
        "projection_dim": 64,
    },
}


def render_dataset(folder: pathlib.Path, count: int) -> tuple[np.ndarray, list[str]]:
    """Renders `count` training scenes once.

    Returns: images uint8 [count, 64, 64, 3] (memory-mapped), captions.
    """
    images_file, captions_file = folder / "images.npy", folder / "captions.json"
    if not captions_file.exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        images, captions = np.empty((count, 64, 64, 3), np.uint8), []
        for i in range(count):
            rng = np.random.default_rng((1, i))
            scene = scenes.sample_scene(rng, held_out=False)
            images[i] = np.round(255.0 * scenes.render(scene, rng))
            captions.append(scene.caption)
            if i % 5000 == 0:
                print(f"data: {i} of {count} scenes", flush=True)
        np.save(images_file, images)
        captions_file.write_text(json.dumps(captions))
    return np.load(images_file, mmap_mode="r"), json.loads(captions_file.read_text())


def adamw(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a twentieth of the peak learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, min(200, steps // 10), steps, peak / 20
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3)
    )


def fit(
    name: str,
    folder: pathlib.Path,
    params,
    loss_fn,
    batch_at,
    optimizer,
    steps: int,
    *,
    ema_decay=0.998,
):
    """Minimises `loss_fn(params, batch, key) -> scalar`, resuming from `folder`.

    Args:
      name: shown in the progress lines.
      folder: of this stage's checkpoints.
      params: initial parameters.
      loss_fn: traced once.
      batch_at: step -> batch; a pure function of the step, so that a resumed run sees the same
        batches.
      optimizer: optax transformation.
      steps: in all.
      ema_decay: per step, of the parameters' average.
    Returns:
      the averaged parameters.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, batch, k):
        loss, grads = jax.value_and_grad(loss_fn)(
            state["params"], batch, jax.random.fold_in(jax.random.key(0), k)
        )
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(ema_decay, (1.0 + k) / (10.0 + k))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state["ema"], params)
        return {"params": params, "opt": opt, "ema": ema}, loss

    state = {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(jnp.copy, params)}
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
        losses, began = [], time.time()
        for k in range(first, steps):
            state, loss = update(state, batch_at(k), np.int32(k))
            losses.append(loss)
            done = k + 1
            if done % 100 == 0 or done == steps:
                left = (time.time() - began) / (done - first) * (steps - done)
                print(
                    f"{name}: step {done} of {steps}, loss {np.mean(jax.device_get(losses)):.4f}, "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )
                losses = []
            if done % 500 == 0 or done == steps:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state["ema"]


def to_image(uint8: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return uint8.astype(np.float32) / 127.5 - 1.0


def train_vae(folder: pathlib.Path, images: np.ndarray, steps: int = 5000, batch_size: int = 8):
    """L1 + L2 on pixels and on their differences to the neighbour, and a small KL.

    Returns: (graphdef, params).
    """
    graphdef, params = models.init(
        lambda rngs: AutoencoderKL(VAEConfig.from_json(VAE), rngs=rngs), seed=0
    )

    def loss_fn(params, image, key):
        vae = nnx.merge(graphdef, params)
        mean, std = vae.encode(image)
        out = vae.decode(mean + std * jax.random.normal(key, mean.shape))
        error = out - image
        pixels = jnp.abs(error).mean() + (error**2).mean()
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        kl = 0.5 * (mean**2 + std**2 - 1.0 - 2.0 * jnp.log(std)).mean()
        return pixels + edges + 2e-4 * kl

    def batch_at(step):
        return to_image(
            images[np.sort(np.random.default_rng((2, step)).integers(len(images), size=batch_size))]
        )

    return graphdef, fit("vae", folder, params, loss_fn, batch_at, adamw(2e-3, steps), steps)


def encode_dataset(
    folder: pathlib.Path, graphdef, params, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of all latents, [N, 16, 16, 4] float32 each, of a VAE with
    scaling factor 1.
    """
    file = folder / "latents.npz"
    if not file.exists():
        encode = jax.jit(lambda image: nnx.merge(graphdef, params).encode(image))
        parts = [
            jax.device_get(encode(to_image(images[i : i + 500])))
            for i in range(0, len(images), 500)
        ]
        np.savez(
            file,
            mean=np.concatenate([p[0] for p in parts]),
            std=np.concatenate([p[1] for p in parts]),
        )
    stored = np.load(file)
    return stored["mean"], stored["std"]


def mean_image_loss(
    graphdefs: dict, params: dict, heads: dict, token_ids: dict[str, jax.Array], x0: jax.Array
) -> jax.Array:
    """How badly linear maps of the end-of-text states predict the latents, summed over the three
    states.

    Args:
      graphdefs, params: hold 'text_encoder' and 'text_encoder_2'.
      heads: 'mean' [D] and one matrix [width, D] per state.
      token_ids: int32 [B, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      x0: latents [B, D].
    Returns:
      scalar.
    """
    states = {}
    for part, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        out = nnx.merge(graphdefs[part], params[part])(token_ids[name])
        end = token_ids[name].argmax(axis=-1)  # the end-of-text token has the largest id
        states[part] = out.hidden_states_penultimate[jnp.arange(len(end)), end]
    states["pooled"] = out.pooled
    return sum(
        ((state @ heads[name] + heads["mean"] - x0) ** 2).mean() for name, state in states.items()
    )


def train_text(
    folder: pathlib.Path,
    x0: np.ndarray,
    token_ids: dict[str, np.ndarray],
    configs: dict[str, dict],
    steps: int = 1000,
    batch_size: int = 256,
):
    """Text encoders from whose end-of-text states a linear map predicts a caption's mean latents.

    The role of CLIP's training before Stable Diffusion's. What a caption says of where things are
    takes the encoders minutes to learn this way; from eps-prediction alone they had not learnt one
    relation in 5,000 steps.

    Args:
      folder: of the checkpoints.
      x0: scaled latents, [N, 16, 16, 4].
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      configs: config.json of text_encoder and text_encoder_2.
      steps, batch_size: of training.
    Returns:
      (graphdefs, params, heads): dicts by component, and the linear maps for `mean_image_loss`.
    """
    graphdefs, params = {}, {}
    for i, (part, config) in enumerate(configs.items()):
        cls, settings = pipeline.model_class(config)
        graphdefs[part], params[part] = models.init(
            lambda rngs: cls(settings, rngs=rngs), seed=11 + i
        )
    widths = {
        "text_encoder": TEXT_ENCODER["hidden_size"],
        "text_encoder_2": TEXT_ENCODER_2["hidden_size"],
        "pooled": TEXT_ENCODER_2["projection_dim"],
    }
    heads = {
        name: 0.01 * jax.random.normal(jax.random.key(i), (width, x0[0].size))
        for i, (name, width) in enumerate(widths.items())
    }

    def loss_fn(params, batch, key):
        del key
        return mean_image_loss(
            graphdefs, params["encoders"], params["heads"], batch["ids"], batch["x0"]
        )

    def batch_at(step):
        rows = np.random.default_rng((9, step)).integers(len(x0), size=batch_size)
        return {
            "x0": x0[rows].reshape(batch_size, -1),
            "ids": {k: v[rows] for k, v in token_ids.items()},
        }

    start = {"encoders": params, "heads": heads | {"mean": jnp.asarray(x0.mean(axis=0).ravel())}}
    trained = fit("text", folder, start, loss_fn, batch_at, adamw(2e-3, steps), steps)
    return graphdefs, trained["encoders"], trained["heads"]


def train_teacher(
    folder: pathlib.Path,
    latents: tuple[np.ndarray, np.ndarray],
    token_ids: dict[str, np.ndarray],
    text: tuple[dict, dict, dict],
    steps: int = 3000,
    batch_size: int = 64,
):
    """eps-prediction (Eq. 2.2), the text encoders trained with the UNet, one caption in ten
    dropped.

    Times weigh sigma_t^2 / alpha_t^2, within bounds, as if the error of x_0 were minimised: how
    many objects there are, and which is above which, is decided where little of the signal is left,
    and plain eps-prediction hardly looks there. `mean_image_loss` stays in the sum: without it the
    untrained UNet's gradients wipe out what the encoders know.

    Args:
      folder: of the checkpoints.
      latents: scaled means and standard deviations, [N, 16, 16, 4].
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      text: from `train_text`.
      steps, batch_size: of training.
    Returns:
      (graphdefs, params), dicts by component.
    """
    cls, settings = pipeline.model_class(UNET)
    graphdef, unet = models.init(lambda rngs: cls(settings, rngs=rngs), seed=10)
    graphdefs = text[0] | {"unet": graphdef}
    schedule = diffusion.schedule_from_json(SCHEDULER)
    mean, std = latents

    def loss_fn(params, batch, key):
        keys = jax.random.split(key, 4)
        networks, ids = params["networks"], batch["ids"]
        x0 = batch["mean"] + batch["std"] * jax.random.normal(keys[0], batch["mean"].shape)
        condition, null = pipeline.encode_text(graphdefs, networks, ids, RESOLUTION)
        drop = jax.random.bernoulli(keys[1], 0.1, x0.shape[:1])
        condition = jax.tree.map(
            lambda c, n: jnp.where(diffusion.per_sample(drop, c), n, c), condition, null
        )
        t = jax.random.randint(keys[2], x0.shape[:1], 0, 1000)
        eps = jax.random.normal(keys[3], x0.shape)
        x_t = diffusion.add_noise(x0, eps, schedule.alpha[t], schedule.sigma[t])
        error = (
            (nnx.merge(graphdefs["unet"], networks["unet"])(x_t, t, condition) - eps) ** 2
        ).mean((1, 2, 3))
        weight = jnp.clip((schedule.sigma[t] / schedule.alpha[t]) ** 2, 0.3, 5.0)
        text_loss = mean_image_loss(
            graphdefs, networks, params["heads"], ids, batch["mean"].reshape(len(t), -1)
        )
        return (weight * error).mean() + 0.1 * text_loss

    def batch_at(step):
        rows = np.random.default_rng((3, step)).integers(len(mean), size=batch_size)
        return {
            "mean": mean[rows],
            "std": std[rows],
            "ids": {k: v[rows] for k, v in token_ids.items()},
        }

    start = {"networks": text[1] | {"unet": unet}, "heads": text[2]}
    trained = fit("teacher", folder, start, loss_fn, batch_at, adamw(1.5e-3, steps), steps)
    return graphdefs, trained["networks"]


def render_pairs(folder: pathlib.Path, count: int) -> dict[str, np.ndarray]:
    """Preference pairs, made once: images uint8 [count, 2, 64, 64, 3], prob [count] that the first
    is preferred.

    The captions are in `captions.json` beside it.
    """
    if not (folder / "captions.json").exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        images, prob, captions = (
            np.empty((count, 2, 64, 64, 3), np.uint8),
            np.empty(count, np.float32),
            [],
        )
        for i in range(count):
            rng = np.random.default_rng((4, i))
            scene = scenes.sample_scene(rng, held_out=False)
            *pair, prob[i] = taste.preference_pair(scene, rng)
            images[i] = np.round(255.0 * np.stack(pair))
            captions.append(scene.caption)
        np.savez(folder / "pairs.npz", images=images, prob=prob)
        (folder / "captions.json").write_text(json.dumps(captions))
    return dict(np.load(folder / "pairs.npz"))


def _logit_scale(params) -> jax.Array:
    return jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))


def train_clip(
    folder: pathlib.Path,
    images: np.ndarray,
    ids: np.ndarray,
    config: dict,
    steps: int = 1500,
    batch_size: int = 96,
    seed: int = 20,
):
    """CLIP's contrastive loss on images and their captions.

    Args:
      folder: of the checkpoints.
      images, ids: uint8 [N, 64, 64, 3] and their captions, int32 [N, TOKENS].
      config: the CLIPModel's config.json.
      steps, batch_size: of training. seed: of the first parameters.
    Returns:
      (graphdef, params)
    """
    graphdef, params = models.init(
        lambda rngs: CLIPModel(CLIPConfig.from_json(config), rngs=rngs), seed=seed
    )

    def contrastive(params, batch, key):
        del key
        text = similarity.text_embeddings(graphdef, params, batch["ids"])
        image = similarity.image_embeddings(graphdef, params, batch["image"])
        logits = _logit_scale(params) * image @ text.T  # [B, B]
        labels = jnp.arange(len(logits))
        pull = optax.softmax_cross_entropy_with_integer_labels
        return (pull(logits, labels).mean() + pull(logits.T, labels).mean()) / 2

    def images_at(step):
        rows = np.sort(np.random.default_rng((5, step)).integers(len(images), size=batch_size))
        return {"image": to_image(images[rows]), "ids": ids[rows]}

    return graphdef, fit(
        "CLIP, contrastive", folder, params, contrastive, images_at, adamw(1e-3, steps), steps
    )


def train_reward(
    folder: pathlib.Path,
    clip: tuple,
    pairs: dict[str, np.ndarray],
    pair_ids: np.ndarray,
    steps: int = 1500,
    batch_size: int = 48,
):
    """PickScore's loss: cross-entropy over the two scaled scores of a preference pair.

    Args:
      folder: of the checkpoints.
      clip: from `train_clip`, to start from.
      pairs, pair_ids: from `render_pairs`, with their captions, int32 [N, TOKENS].
      steps, batch_size: of training.
    Returns:
      (graphdef, params)
    """
    graphdef, params = clip

    def preference(params, batch, key):
        del key
        text = similarity.text_embeddings(graphdef, params, batch["ids"])
        scores = [
            jnp.sum(
                similarity.image_embeddings(graphdef, params, batch["image"][:, i]) * text, axis=-1
            )
            for i in range(2)
        ]
        logits = _logit_scale(params) * jnp.stack(scores, axis=-1)  # [B, 2]
        labels = jnp.stack([batch["prob"], 1.0 - batch["prob"]], axis=-1)
        return optax.softmax_cross_entropy(logits, labels).mean()

    def pairs_at(step):
        rows = np.random.default_rng((6, step)).integers(len(pair_ids), size=batch_size)
        return {
            "image": to_image(pairs["images"][rows]),
            "prob": pairs["prob"][rows],
            "ids": pair_ids[rows],
        }

    return graphdef, fit(
        "reward, preference", folder, params, preference, pairs_at, adamw(3e-4, steps), steps
    )


def distil_generator(
    folder: pathlib.Path,
    graphdefs: dict,
    teacher: dict,
    token_ids: dict[str, np.ndarray],
    training_steps: int = 450,
    batch_size: int = 32,
):
    """A one-step generator from the teacher: the project's own step with reward 0, in the role of
    DMD2-SDXL.

    Args:
      folder: of the checkpoints.
      graphdefs, teacher: from `train_teacher`.
      token_ids: int32 [N, TOKENS] under 'tokenizer' and 'tokenizer_2'.
      training_steps, batch_size: of training.
    Returns:
      the generator's averaged UNet parameters.
    """
    networks = gradients.Networks(
        unet=lambda params, x_t, t, condition: nnx.merge(graphdefs["unet"], params)(
            x_t, t, condition
        ),
        encode_text=lambda params, ids: pipeline.encode_text(graphdefs, params, ids, RESOLUTION),
        reward=lambda params, x0, ids, crop: (jnp.zeros(x0.shape[0]), {}),
    )
    settings = gradients.Settings(
        objective="di_star",
        omega=DISTIL_OMEGA,
        constants=objectives.Constants(0.00054, alpha_cfg=0.0, sid_alpha=1.0),
        weighting="eps",
        reduction="sum",
        generator_times=(20, 980),
        assistant_times=(0, 999),
        assistant_updates=1,
        sharing="x0",
        generator_timesteps=(399,),
        latent_shape=(16, 16, 4),
        ema_decay=0.98,
    )
    schedule = diffusion.schedule_from_json(SCHEDULER)
    opts = [
        step.adamw(
            rate, lr_warmup_steps=50, b1=0.0, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=10.0
        )
        for rate in (1e-4, 2e-4)
    ]
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    update = jax.jit(
        step.make_train_step(networks, settings, schedule, *opts, mesh), donate_argnums=0
    )
    state = step.init_state(teacher["unet"], teacher["unet"], *opts)
    store = checkpoint.Checkpoints(folder, keep=1)
    first = store.latest_step() or 0
    if first:
        state = store.restore(first, jax.eval_shape(lambda: state))
    began = time.time()
    for k in range(first, training_steps):
        rows = np.random.default_rng((7, k)).integers(len(token_ids["tokenizer"]), size=batch_size)
        state, values = update(
            state, teacher, {n: ids[rows] for n, ids in token_ids.items()}, jax.random.key(7)
        )
        done = k + 1
        if done % 50 == 0:
            left = (time.time() - began) / (done - first) * (training_steps - done)
            print(
                f"generator: step {done} of {training_steps}, regulariser {values['regulariser/loss']:.2f}, assistant "
                f"{values['assistant/loss']:.4f}, {left / 60:.0f} min left",
                flush=True,
            )
        if done % 100 == 0 or done == training_steps:
            store.save(done, state, {})
    store.close()
    return state.ema


def caption_ids(folder: pathlib.Path, captions: list[str]) -> np.ndarray:
    """Token ids, int32 [N, TOKENS], by the tokenizer in `folder`."""
    return Tokenizer(folder)(captions)


def accuracy(draw, captions: list[str], seed: int, batch_size: int = 100) -> float:
    """Share of stated attributes that the oracle reads back. Args: draw from `drawing.make_draw`."""
    counts = np.zeros(2)
    for start in range(0, len(captions), batch_size):
        texts = captions[start : start + batch_size]
        z = jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), start), (len(texts), 16, 16, 4)
        )
        for text, image in zip(texts, draw(texts, z)):
            counts += oracle.attributes(scenes.parse(text), (image + 1.0) / 2.0)
    return float(counts[0] / counts[1])


def report(folder: pathlib.Path) -> dict[str, float]:
    """What the shipped checkpoint can do on 500 held-out captions: attributes right, teacher and
    generator.
    """
    captions = (folder / "prompts_held_out.txt").read_text().splitlines()
    loaded = pipeline.load_pipeline(folder)
    teacher = drawing.make_draw(
        loaded,
        sampler="euler",
        timesteps=samplers.leading_timesteps(50),
        guidance_scale=DISTIL_OMEGA,
    )
    generator = loaded._replace(
        models=loaded.models | {"unet": pipeline.load_model(folder / "generator")}
    )
    one_step = drawing.make_draw(
        generator, sampler="few_step", timesteps=np.array([399]), guidance_scale=1.0
    )
    return {
        "teacher, 50 guided steps": accuracy(teacher, captions, seed=1),
        "initial generator, one step": accuracy(
            lambda texts, z: one_step(texts, z[None]), captions, seed=2
        ),
    }


def write_captions(folder: pathlib.Path) -> None:
    """prompts.txt: 5,000 training captions; prompts_held_out.txt: 500 that no stage has seen."""
    for name, count, held_out in (
        ("prompts.txt", 5000, False),
        ("prompts_held_out.txt", 500, True),
    ):
        rng = np.random.default_rng(8)
        captions = dict.fromkeys(
            scenes.sample_scene(rng, held_out=held_out).caption for _ in range(2 * count)
        )
        (folder / name).write_text("".join(caption + "\n" for caption in list(captions)[:count]))


def run(workdir: pathlib.Path) -> None:
    """All stages, each continued where it stopped; writes WORKDIR/checkpoint and prints what it can
    do.
    """
    out = workdir / "checkpoint"
    images, captions = render_dataset(workdir / "data", NUM_IMAGES)
    ids = {}
    for name, pad_token in (("tokenizer", tokenizer.END), ("tokenizer_2", "!")):
        size = tokenizer.make_word_tokenizer(
            scenes.words(), out / name, max_length=TOKENS, pad_token=pad_token
        )
        ids[name] = caption_ids(out / name, captions)
    special = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}

    vae_graphdef, vae = train_vae(workdir / "vae", images)
    mean, std = encode_dataset(workdir / "data", vae_graphdef, vae, images)
    scaling_factor = float(
        1.0 / np.sqrt((mean**2 + std**2).mean())
    )  # latents of unit variance, as SDXL's
    weights.save(
        out / "vae", vae, config={**VAE, "scaling_factor": scaling_factor}, **_HALF_DIFFUSERS
    )

    x0 = (mean * scaling_factor, std * scaling_factor)
    configs = {
        "text_encoder": {**TEXT_ENCODER, **special},
        "text_encoder_2": {**TEXT_ENCODER_2, **special},
    }
    text = train_text(workdir / "text", x0[0], ids, configs)
    graphdefs, teacher = train_teacher(workdir / "teacher", x0, ids, text)
    configs["unet"] = UNET
    for name, config in configs.items():
        weights.save(
            out / name,
            teacher[name],
            config=config,
            **(_HALF_DIFFUSERS if name == "unet" else _HALF_CLIP),
        )

    pairs = render_pairs(workdir / "pairs", 10_000)
    pair_ids = caption_ids(
        out / "tokenizer", json.loads((workdir / "pairs" / "captions.json").read_text())
    )
    config = {**REWARD, "text_config": {**REWARD["text_config"], **special}}
    clip = train_clip(workdir / "reward" / "contrastive", images, ids["tokenizer"], config)
    _, reward = train_reward(workdir / "reward" / "preference", clip, pairs, pair_ids)
    weights.save(out / "reward", reward, config=config, **_HALF_CLIP)

    generator = distil_generator(workdir / "generator", graphdefs, teacher, ids)
    weights.save(out / "generator", generator, config=UNET, **_HALF_DIFFUSERS)

    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    write_captions(out)
    for name, value in report(out).items():
        print(f"attributes right on 500 held-out captions, {name}: {100 * value:.1f} %")


def main() -> None:
    run(pathlib.Path(flags.FLAGS.workdir))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder for data, stages and the result.", required=True)
    run_command(main)
