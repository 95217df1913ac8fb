# SPDX-License-Identifier: Apache-2.0
"""Our step against PyTorch's, written from the paper over the published code's networks."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity import port, randomise
from test_step import CONFIGS, SCHEDULE, SETTINGS, TEXT, separate

from di_star_jax import assembly, diffusion, gradients
from di_star_jax.cost import peer
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.pipelines.families import FAMILIES
from di_star_jax.pipelines.folder import Model, Pipeline
from di_star_jax.rewards import similarity
from di_star_jax.rewards.pixels import clip_pixels
from di_star_jax.storage import weights

BATCH, LATENT, TOKENS = 2, 12, 8  # 24 pixels, which the reward resizes to 16
GIVEN = dataclasses.replace(SETTINGS, latent_shape=(LATENT, LATENT, 4), weighting="x0")
SHARED = {"vae": CONFIGS["vae"], "reward": CONFIGS["reward"]}
# By class of a pipeline: config.json by component.
TINY = {
    "StableDiffusionXLPipeline": SHARED
    | {part: CONFIGS[part] for part in ("text_encoder", "text_encoder_2")}
    | {"denoiser": CONFIGS["unet"]},
    "StableDiffusionPipeline": SHARED
    | {
        "text_encoder": CONFIGS["text_encoder"],
        "denoiser": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 8,
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        },
    },
    "PixArtAlphaPipeline": SHARED
    | {
        "text_encoder": {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        "denoiser": {
            "_class_name": "Transformer2DModel",  # as published
            "norm_type": "ada_norm_single",
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "sample_size": 128,  # which is told the image's sizes
            "caption_channels": 16,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
    },
}
# What each begins with in its papers, and KL with either space of it.
CHANGES = {
    "StableDiffusionXLPipeline": {},
    "StableDiffusionPipeline": {
        "objective": "kl",
        "generator": FewStep((625,), "scaled"),
    },
    "PixArtAlphaPipeline": {
        "objective": "kl",
        "weighting": "eps",
        "generator": FewStep((440,), "scaled"),
    },
}
LINEAR = diffusion.make_schedule(
    num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
)
SCHEDULES = {"PixArtAlphaPipeline": LINEAR}  # the others have SDXL's


class World:
    """One pipeline's networks in PyTorch and ours, of the same weights, and what a step draws."""

    def __init__(self, name: str):
        # Several wait for each other where other processes keep the cores busy.
        torch.set_num_threads(1)
        self.name, self.family, configs = name, FAMILIES[name], TINY[name]
        self.settings = dataclasses.replace(GIVEN, **CHANGES[name])
        parts = {"generator": "denoiser", "assistant": "denoiser", **{p: p for p in configs}}
        self.torch = {
            net: randomise(peer.network(configs[p], dtype=torch.float32, device="cpu"), seed)
            for seed, (net, p) in enumerate(parts.items())
        }
        ported = {net: port(self.torch[net], configs[p]) for net, p in parts.items()}
        self.models = {net: Model(*ported[net], configs[p]) for net, p in parts.items()}
        rng = np.random.default_rng(0)
        # An end of text is 39 for CLIP, where T5 has its pads, which are 0.
        self.end = 0 if configs["text_encoder"]["model_type"] == "t5" else TEXT["eos_token_id"]
        self.ids = {
            tokenizer: rng.integers(1, 39, (BATCH, TOKENS)).astype(np.int32)
            for tokenizer in (*self.family.tokenizers, "reward")
        }
        for i, row in enumerate(row for ids in self.ids.values() for row in ids):
            row[3 + i % 5 :] = self.end  # at different places
        self.ids["reward"][:, -1] = TEXT["eos_token_id"]
        self.null = np.array([[1] + [self.end] * (TOKENS - 1)], np.int32)
        self.draws = gradients.draw(jax.random.key(3), BATCH, self.settings)

    def theirs(self, **changes) -> peer.Results:
        """Of PyTorch's side. Args: changes, of the settings."""
        draws = self.draws
        drawn = (draws.noise[:, 0], draws.t, draws.eps, draws.t_psi, draws.eps_psi)
        tokenizers, nets = self.family.tokenizers, self.torch
        modules = peer.Modules(
            nets["generator"],
            nets["assistant"],
            nets["denoiser"],
            nets["vae"],
            [nets[part] for part in tokenizers.values()],
            nets["reward"],
        )
        prompts = peer.Prompts(
            [to_torch(self.ids[name]) for name in tokenizers],
            [to_torch(self.null)] * len(tokenizers),
            to_torch(self.ids["reward"]),
        )
        settings = dataclasses.replace(self.settings, **changes)
        method = peer.method_of(settings, job(self.name).kind(), "cpu")
        return peer.step_gradients(
            method, modules, prompts, peer.Draws(*map(to_torch, drawn)), 100.0
        )

    def ours(self):
        """The same of ours."""
        models = self.models
        kept = {part: models[part] for part in (*self.family.parts,)}
        tokenizers = {name: lambda texts: self.null for name in self.family.tokenizers}
        schedule = SCHEDULES.get(self.name, SCHEDULE)
        parts = assembly.Parts(Pipeline(Path(), self.family, kept, tokenizers, schedule), {})

        def reward(params, x0, token_ids, crop):
            image = nnx.merge(models["vae"].graphdef, params["vae"]).decode(x0)
            score = similarity.cosine(
                models["reward"].graphdef,
                clip_pixels,
                params["reward"],
                image,
                token_ids["reward"],
            )
            return 100.0 * score, {"pickscore": score}

        method = gradients.Method(
            functools.partial(nnx.merge, models["denoiser"].graphdef),
            assembly.text_encoder(parts, 2 * LATENT),
            reward,
            schedule,
            self.settings,
        )
        frozen = {name: model.params for name, model in models.items()}
        trained = frozen.pop("generator"), frozen.pop("assistant")
        frozen["reference"] = frozen.pop("denoiser")
        step = jax.jit(functools.partial(separate, method))
        return step(trained, frozen, self.ids, self.draws, jnp.ones(()))


# The UNet's are in test_unet.py too, and SD 1.5's parts are those of the other two.
_MARKS = {
    "StableDiffusionXLPipeline": pytest.mark.long,
    "StableDiffusionPipeline": pytest.mark.long,
}
NAMES = [pytest.param(name, marks=_MARKS.get(name, ())) for name in TINY]


# The whole step beside PyTorch's takes a minute.
_WHOLE = [pytest.param(name, marks=pytest.mark.long) for name in TINY]


@pytest.fixture(scope="module", params=_WHOLE)
def world(request):
    return World(request.param)


def to_torch(x) -> torch.Tensor:
    x = np.asarray(x)
    return (
        torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
        if x.ndim == 4
        else torch.tensor(x).long()
    )


def errors(grads, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """max|a - b| / max|b| by parameter.

    Softmax does not see what a key's bias adds to all of a query's scores: its gradient is rounding
    around zero, and counts over that of the key's weight.
    """
    found = weights.tensors_from_params(grads)
    assert found.keys() == expected.keys()
    return {
        name: float(
            np.abs(found[name] - g.numpy()).max()
            / expected[name.replace("to_k.bias", "to_k.weight")].abs().max()
        )
        for name, g in expected.items()
    }


# As measured 2e-5 and 7e-6; a score network whose x_t passes no gradient on is 4e-1 away, omega =
# 7.6 for 7.5 is 5e-3.
def test_the_step_has_the_gradients_and_losses_of_pytorchs(world):
    (generator, assistant), figures = world.ours()
    expected = world.theirs()
    for name, grads, target in (
        ("generator", generator, expected[0]),
        ("assistant", assistant, expected[1]),
    ):
        found = errors(grads, target)
        worst = max(found, key=found.get)
        median = np.median(list(found.values()))
        print(f"{name}: median {median:.1e}, worst {found[worst]:.1e} of {worst}")
        assert found[worst] <= 1e-4, f"{name}: {found[worst]:.1e} of {worst}"
    logged = figures.rewards["pickscore"], figures.regulariser, figures.assistant
    for name, values, target in zip(("reward", "regulariser", "assistant"), logged, expected[2:]):
        error = float(np.abs(np.asarray(values) - target.numpy()).max() / target.abs().max())
        print(f"{name}: {error:.1e} of {target.tolist()}")
        assert error <= 1e-5, name


def job(name="StableDiffusionXLPipeline", dtype="float32", **changes):
    return peer.Job(
        configs=TINY[name],
        tokenizers=FAMILIES[name].tokenizers,
        settings=dataclasses.replace(GIVEN, **{**CHANGES[name], **changes}),
        batch=2,
        resolution=24,
        dtype=dtype,
        device="cpu",
        compile=False,
        reward_scale=100.0,
    )


@pytest.mark.parametrize("what", peer.WORK)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_each_work_of_the_benchmark_runs(what, dtype, name):
    peer.make(what, job(name, dtype))()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_a_reward_runs_and_a_reward_without_one_is_refused(name):
    networks = {part: config for part, config in TINY[name].items() if part != "reward"}
    without = dataclasses.replace(job(name), configs=networks)
    peer.make("train", without)()
    with pytest.raises(UserError, match="--what=reward without a reward; set reward.pickscore"):
        peer.make("reward", without)


def test_what_pytorchs_side_does_not_have_is_refused():
    for changes in (
        {"objective": "sid"},
        {"scheme": "shared"},
        {"generator": FewStep((999, 499))},
    ):
        with pytest.raises(UserError, match="PyTorch's side has no other"):
            peer.make("train", job(**changes))
    one = {name: config for name, config in job().configs.items() if name != "text_encoder_2"}
    with pytest.raises(UserError, match="text encoders CLIPTextModel with None, expected CLIP.*no"):
        peer.make("sample", dataclasses.replace(job(), configs=one))
