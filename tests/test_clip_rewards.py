# SPDX-License-Identifier: Apache-2.0
"""Rewards that are a CLIP: from files in the published layouts against PyTorch, and several of them
in one run.
"""

import collections
import json
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.torch
import test_blip
import torch
import transformers
from PIL import Image
from test_step import CONFIGS, SCHEDULE, random_model
from test_train import config_for
from torch import nn
from torch.nn import functional
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from di_star_jax import assembly, rewards, sharding
from di_star_jax.errors import UserError
from di_star_jax.evaluation.images import Shot
from di_star_jax.evaluation.scores import by_reward
from di_star_jax.models import published
from di_star_jax.models.clip import CLIPConfig
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.rewards import REWARDS, aesthetic, load_rewards, pixels, similarity
from di_star_jax.rewards.views import VIEWS
from di_star_jax.shapes.tokenizer import END, make_word_tokenizer

FORWARD, GRADIENT = 2e-5, 1e-4  # max|difference| / max|reference|
EIGHT_BIT = 5e-4  # where a value halfway between two levels may be rounded the other way
PROMPTS = ["a red cat", "a blue dog, red", "cat"]
SIZE = 16  # of the tiny models' images
# Height and width: a square; odd ones whose long side is cut off to a whole number; a crop with an
# odd excess, which torchvision and transformers halve differently; an enlargement.
SIZES = [(32, 32), (33, 47), (32, 39), (10, 14)]
MEAN, STD = (
    torch.tensor(v).view(1, 3, 1, 1)
    for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


# open_clip, rewritten: attribute names are the checkpoint's.


class Block(nn.Module):
    def __init__(self, tower):
        super().__init__()
        width = tower.hidden_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, tower.num_attention_heads, batch_first=True)
        self.mlp = nn.Sequential(
            collections.OrderedDict(
                c_fc=nn.Linear(width, tower.intermediate_size),
                gelu=nn.GELU(),
                c_proj=nn.Linear(tower.intermediate_size, width),
            )
        )

    def forward(self, x, mask):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(tower) for _ in range(tower.num_hidden_layers)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, tower, joint):
        super().__init__()
        width, patch = tower.hidden_size, tower.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(
            torch.zeros(1 + (tower.image_size // patch) ** 2, width)
        )
        self.ln_pre, self.transformer, self.ln_post = (
            nn.LayerNorm(width),
            Transformer(tower),
            nn.LayerNorm(width),
        )
        self.proj = nn.Parameter(torch.zeros(width, joint))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
            + self.positional_embedding
        )
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, config):
        super().__init__()
        config = CLIPConfig.from_json(config)
        text, joint = config.text_config, config.projection_dim
        self.visual = Visual(config.vision_config, joint)
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = nn.Parameter(
            torch.zeros(text.max_position_embeddings, text.hidden_size)
        )
        self.transformer, self.ln_final = Transformer(text), nn.LayerNorm(text.hidden_size)
        self.text_projection = nn.Parameter(torch.zeros(text.hidden_size, joint))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def encode_text(self, ids):
        length = ids.shape[1]
        causal = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], causal)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection

    def forward(self, views, ids):
        """Args: normalised images NCHW, token ids. Returns: cosines [B]."""
        return functional.cosine_similarity(self.visual(views), self.encode_text(ids))


# From images NCHW in [-1, 1] to what a network sees.


def _outer(h, w, size):
    """Height and width of which the shorter is `size`."""
    return tuple(int(size * n / min(h, w)) for n in (h, w))


def _normalised(x, size, half):
    top, left = (half(n - size) for n in x.shape[2:])
    return (x[:, :, top : top + size, left : left + size] - MEAN) / STD


def torchvision_view(images, size, *, antialias=True):
    """Resize(size, BICUBIC, antialias) of a tensor in [0, 1], CenterCrop(size), Normalize."""
    x = ((images + 1) / 2).clamp(0, 1)
    x = functional.interpolate(
        x, _outer(*x.shape[2:], size), mode="bicubic", antialias=antialias, align_corners=False
    )
    return _normalised(x, size, lambda rows: round(rows / 2.0))  # halves to the even neighbour


def pillow_view(images, size):
    """Pillow's resize without its rounding: width first, in range after each pass; transformers'
    crop.
    """
    x = ((images + 1) / 2).clamp(0, 1)
    h, w = _outer(*x.shape[2:], size)
    for shape in ((x.shape[2], w), (h, w)):
        x = functional.interpolate(
            x, shape, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    return _normalised(x, size, lambda rows: rows // 2)


def _nchw(images):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def with_gradient(score, images):
    """(score(images NCHW) [B], gradient NHWC of its sum weighted by 1, 2, ...)."""
    x = _nchw(images).requires_grad_()
    scores = score(x)
    (scores * torch.arange(1.0, 1 + len(scores))).sum().backward()
    return scores.detach().numpy(), x.grad.permute(0, 2, 3, 1).numpy()


def our_gradient(reward, params, images, texts):
    """As `with_gradient`, of Reward.reward; inside of jit."""
    scores, pull_back = jax.vjp(lambda images: reward.reward(params, images, texts), images)
    return scores, pull_back(jnp.arange(1.0, 1 + len(scores)))[0]


def assert_equal(what, ours, theirs, limit):
    error = parity.relative(ours, theirs)
    print(f"{what}: {error:.1e}")  # shown by `pytest -rP`
    assert error <= limit, f"{what}: {error}"


def images_of(h, w, batch=3):
    """Float images, some values out of range, and 8-bit ones uint8: coarse patterns, with noise
    that overshoots.
    """
    rng = np.random.default_rng(h * w)
    coarse = (
        rng.uniform(-1, 1, (batch, 4, 4, 3))
        .repeat(-(-h // 4), axis=1)
        .repeat(-(-w // 4), axis=2)[:, :h, :w]
    )
    images = np.float32(coarse + rng.uniform(-0.3, 0.3, coarse.shape))
    return images, np.uint8(np.clip((images + 1) * 127.5, 0, 255))


def almost(levels):
    """8-bit images in [-1, 1], off by less than half of a level: as a file has them again."""
    return np.float32(
        levels / 127.5 - 1 + np.random.default_rng(0).uniform(-0.4, 0.4, levels.shape) / 127.5
    )


def unit_nchw(levels):
    """8-bit images in [-1, 1], as torch takes them."""
    return _nchw(levels.astype(np.float32) / 127.5 - 1)


# Tiny models in the published layouts.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(folder, vocabulary's size)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, make_word_tokenizer(
        ["a", "red", "blue", "cat", "dog", "circle", "square"], folder, max_length=8, pad_token=END
    )


def tiny(vocab_size, act="gelu"):
    tower = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": act,
        "projection_dim": 12,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 12,
        "text_config": {
            **tower,
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "intermediate_size": 56,
            "max_position_embeddings": 8,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        "vision_config": {
            **tower,
            "hidden_size": 32,
            "intermediate_size": 72,
            "image_size": SIZE,
            "patch_size": 4,
        },
    }


def write_open_clip(folder, module, config):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(module.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_clip(config):
    config = {
        name: value for name, value in config.items() if name not in ("architectures", "model_type")
    }
    return parity.randomise(transformers.CLIPModel(transformers.CLIPConfig(**config)))


def head(width):
    """LAION's MLP, whose state dict has its keys."""
    linear, drop = nn.Linear, nn.Dropout
    layers = nn.Sequential(
        linear(width, 1024),
        drop(0.2),
        linear(1024, 128),
        drop(0.2),
        linear(128, 64),
        drop(0.1),
        linear(64, 16),
        linear(16, 1),
    )
    return parity.randomise(nn.ModuleDict({"layers": layers}), seed=1)


def write_aesthetic(folder, reference, mlp):
    reference.save_pretrained(folder)
    safetensors.torch.save_file(mlp.state_dict(), folder / aesthetic.HEAD)
    return folder


def aesthetic_score(reference, mlp, views):
    embedding = reference.get_image_features(views).pooler_output
    return mlp["layers"](embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]


def cosine_score(reference, views, ids):
    image = reference.get_image_features(views).pooler_output
    text = reference.get_text_features(torch.from_numpy(ids).long()).pooler_output
    return functional.cosine_similarity(image, text)


def load(name, folder, tokenizer, **options):
    """A reward. Args: tokenizer, the fixture's."""
    return load_rewards({name: str(folder)}, str(tokenizer[0]), pipeline.Options(**options))[name]


@pytest.fixture(scope="module")
def hps(tokenizer, tmp_path_factory):
    """(PyTorch's, ours, its legacy sibling, folder)."""
    config = tiny(tokenizer[1])
    module = parity.randomise(OpenClip(config))
    folder = write_open_clip(tmp_path_factory.mktemp("hps"), module, config)
    return (
        module,
        *(load(name, folder, tokenizer) for name in ("hpsv21", "hpsv21_legacy")),
        folder,
    )


# HPSv2.


@pytest.mark.parametrize("h, w", SIZES)
def test_hpsv2_equals_open_clip_with_torchvisions_preprocessing(hps, h, w):
    module, ours, _, _ = hps
    images, _ = images_of(h, w)
    texts = ours.tokenize(PROMPTS)
    ids = torch.from_numpy(texts).long()
    expected, expected_gradient = with_gradient(
        lambda x: module(torchvision_view(x, SIZE), ids), images
    )
    scores, gradient = jax.jit(lambda params, images: our_gradient(ours, params, images, texts))(
        ours.params, images
    )
    assert scores.shape == (3,) and scores.dtype == jnp.float32
    assert_equal("training", scores, expected, FORWARD)
    assert_equal("image gradient", gradient, expected_gradient, GRADIENT)


@pytest.mark.parametrize("h, w", [(33, 47), (10, 14)])
def test_hpsv2_is_evaluated_of_the_eight_bit_image_with_and_as_legacy_without_antialiasing(
    hps, h, w
):
    module, ours, legacy, _ = hps
    _, levels = images_of(h, w)
    texts = ours.tokenize(PROMPTS)
    with torch.no_grad():
        expected = [
            module(
                torchvision_view(unit_nchw(levels), SIZE, antialias=antialias),
                torch.from_numpy(texts).long(),
            ).numpy()
            for antialias in (True, False)
        ]
    found = jax.jit(
        lambda params, images: [reward.evaluate(params, images, texts) for reward in (ours, legacy)]
    )(ours.params, almost(levels))
    for what, a, b in zip(("antialiased", "not antialiased"), found, expected):
        assert_equal(what, a, b, FORWARD)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # or this could not tell them apart


@pytest.mark.parametrize("h, w", [(300, 431), (331, 224), (100, 150)])
def test_views_of_full_size_equal_torch_and_so_do_their_gradients(h, w):
    images, levels = images_of(h, w, batch=1)
    weight = np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32)
    for ours, theirs in (
        (pixels.tensor_pixels, torchvision_view),
        (pixels.clip_pixels, pillow_view),
    ):
        x = _nchw(images).requires_grad_()
        expected = theirs(x, 224)
        (expected * _nchw(weight)).sum().backward()
        view, pull_back = jax.vjp(lambda image, ours=ours: ours(image, size=224), images)
        np.testing.assert_allclose(
            view, parity.to_nhwc(expected), atol=5e-5
        )  # torch computes weights in float32
        gradient = parity.to_nhwc(x.grad)
        # A value that meets the range's end within rounding is clipped by one and not by the other.
        wrong = np.abs(pull_back(weight)[0] - gradient) > 1e-4 * np.abs(gradient).max()
        assert np.mean(wrong) < 1e-4
    aliased = torchvision_view(unit_nchw(levels), 224, antialias=False)
    np.testing.assert_allclose(
        pixels.tensor_pixels_aliased(almost(levels), size=224), parity.to_nhwc(aliased), atol=5e-5
    )


def test_hpsv2_without_a_config_is_vit_h_14(tmp_path):
    assert REWARDS["hpsv2"].read_config(tmp_path) == published.CLIP_H14


# CLIPScore and the aesthetic predictor.


def _processed(levels):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return processor([Image.fromarray(x) for x in levels], return_tensors="pt").pixel_values


@pytest.mark.parametrize("act, h, w", [("quick_gelu", 32, 39), ("gelu", 10, 14)])
def test_clipscore_equals_transformers_with_its_processor(tokenizer, tmp_path, act, h, w):
    reference = transformers_clip(tiny(tokenizer[1], act))
    reference.save_pretrained(tmp_path)
    ours = load("clipscore", tmp_path, tokenizer)
    images, levels = images_of(h, w)
    texts = ours.tokenize(PROMPTS)
    expected, expected_gradient = with_gradient(
        lambda x: cosine_score(reference, pillow_view(x, SIZE), texts), images
    )
    with torch.no_grad():
        evaluated = cosine_score(reference, _processed(levels), texts).numpy()
    run = jax.jit(
        lambda params, images, eight_bit: (
            *our_gradient(ours, params, images, texts),
            ours.evaluate(params, eight_bit, texts),
        )
    )
    scores, gradient, ours_evaluated = run(ours.params, images, almost(levels))
    assert scores.shape == ours_evaluated.shape == (3,)
    assert_equal("training", scores, expected, FORWARD)
    assert_equal("image gradient", gradient, expected_gradient, GRADIENT)
    assert_equal("evaluation", ours_evaluated, evaluated, EIGHT_BIT)


def open_clip_tensors(reference):
    """A transformers `CLIPModel`'s tensors as open_clip stores them."""
    state, tensors = reference.state_dict(), {}
    towers = {"visual.": "vision_model.", "": "text_model."}
    for prefix, tower in towers.items():
        for i in range(2):
            theirs, block = f"{tower}encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(
                    [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in ("q", "k", "v")]
                )
                for name, old in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    tensors[f"{block}{name}.{kind}"] = state[f"{theirs}{old}.{kind}"]
    for kind in ("weight", "bias"):
        for name, old in (
            ("visual.ln_pre", "vision_model.pre_layrnorm"),
            ("visual.ln_post", "vision_model.post_layernorm"),
            ("ln_final", "text_model.final_layer_norm"),
        ):
            tensors[f"{name}.{kind}"] = state[f"{old}.{kind}"]
    images, words = "vision_model.embeddings.", "text_model.embeddings."
    return tensors | {
        "visual.conv1.weight": state[f"{images}patch_embedding.weight"],
        "visual.class_embedding": state[f"{images}class_embedding"],
        "visual.positional_embedding": state[f"{images}position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "token_embedding.weight": state[f"{words}token_embedding.weight"],
        "positional_embedding": state[f"{words}position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
    }


def test_open_clips_names_and_transformers_names_load_the_same_parameters(tokenizer, tmp_path):
    config = tiny(tokenizer[1])
    reference = transformers_clip(config)
    reference.save_pretrained(tmp_path / "transformers")
    module = OpenClip(config)
    module.load_state_dict(open_clip_tensors(reference))
    write_open_clip(tmp_path / "open_clip", module, config)
    one, other = (
        load("clipscore", tmp_path / name, tokenizer).params
        for name in ("transformers", "open_clip")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_aesthetic_score_equals_a_clip_and_laions_mlp(tokenizer, tmp_path):
    reference, mlp = transformers_clip(tiny(tokenizer[1], "quick_gelu")), head(12)
    ours = load("aesthetic", write_aesthetic(tmp_path, reference, mlp), [Path("none")])
    images, levels = images_of(24, 40)
    texts = ours.tokenize(PROMPTS)
    expected, expected_gradient = with_gradient(
        lambda x: aesthetic_score(reference, mlp, pillow_view(x, SIZE)), images
    )
    with torch.no_grad():
        evaluated = aesthetic_score(reference, mlp, _processed(levels)).numpy()

    @jax.jit
    def run(params, images, eight_bit, texts):
        return *our_gradient(ours, params, images, texts), ours.evaluate(params, eight_bit, texts)

    scores, gradient, ours_evaluated = run(ours.params, images, almost(levels), texts)
    assert scores.shape == (3,) and scores.dtype == jnp.float32
    assert_equal("training", scores, expected, FORWARD)
    assert_equal("image gradient", gradient, expected_gradient, GRADIENT)
    assert_equal("evaluation", ours_evaluated, evaluated, EIGHT_BIT)
    others = run(ours.params, images, almost(levels), ours.tokenize(["red", "a", "dog"]))
    np.testing.assert_array_equal(others[0], scores)


@pytest.mark.parametrize("name", [name for name, entry in REWARDS.items() if entry.is_clip])
def test_features_are_the_clips_embeddings_of_the_eight_bit_image(tokenizer, tmp_path, name):
    """Of whichever reward: transformers' processor and model, and the CLIP loaded by itself."""
    reference = transformers_clip(tiny(tokenizer[1], "quick_gelu"))
    write_aesthetic(tmp_path, reference, head(12))
    ours = load(name, tmp_path, tokenizer)
    _, levels = images_of(24, 40)
    with torch.no_grad():
        expected = reference.get_image_features(_processed(levels)).pooler_output
        expected = functional.normalize(expected).numpy()
    clip = pipeline.load_model(tmp_path)
    found, alone = jax.jit(
        lambda params, clip_params, images: (
            ours.features(params, images),
            similarity.image_embeddings(
                clip.graphdef, clip_params, images, pixels=pixels.clip_pixels_rounded
            ),
        )
    )(ours.params, clip.params, almost(levels))
    assert found.shape == (3, 12) and found.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found, alone)
    assert_equal("features", found, expected, EIGHT_BIT)


def test_clipscores_name_is_that_of_its_model():
    names = [
        similarity.model_name(config)
        for config in (
            published.CLIP_B32,
            published.CLIP_L14,
            published.CLIP_G14,
            published.CLIP_H14,
            tiny(100),
        )
    ]
    assert names == ["ViT-B/32", "ViT-L/14", "ViT-g/14", "ViT-H/14", "ViT-32/4"]


def test_half_precision_is_of_the_towers_and_never_of_the_score(tokenizer, hps, tmp_path):
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    write_aesthetic(tmp_path, transformers_clip(tiny(tokenizer[1])), head(12))
    for ours, half in (
        (load("hpsv2", hps[3], tokenizer, **options), lambda params: params),
        (load("aesthetic", tmp_path, tokenizer, **options), lambda params: params["clip"]),
    ):
        images, texts = jnp.zeros((2, SIZE, SIZE, 3)), ours.tokenize(PROMPTS[:2])
        assert {x.dtype for x in jax.tree.leaves(half(ours.params))} == {jnp.dtype(jnp.bfloat16)}
        scores = jax.eval_shape(ours.reward, ours.params, images, texts)
        assert scores.shape == (2,) and scores.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(ours.params["head"])} == {jnp.dtype(jnp.float32)}


# Several devices.


@pytest.mark.long
def test_scores_and_gradients_on_eight_devices_equal_those_on_one(hps, tokenizer, monkeypatch):
    _, ours, _, folder = hps
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    mesh = sharding.make_mesh(2, 2, 2)
    split = load(
        "hpsv2", folder, tokenizer, shardings=lambda tree: sharding.params_sharding(mesh, tree)
    )
    assert split.params["visual_projection"]["kernel"].addressable_shards[0].data.shape == (8, 12)
    images, levels = images_of(24, 40, batch=8)
    captions = [*PROMPTS, *PROMPTS, *PROMPTS[:2]]
    texts, batch = ours.tokenize(captions), sharding.batch_spec()

    def per_image(params, images, texts):
        scores, pull_back = jax.vjp(lambda images: ours.reward(params, images, texts), images)
        return scores, pull_back(jnp.ones_like(scores))[0]

    spread = sharding.on_each(
        mesh, per_image, (sharding.params_spec(mesh, split.params), batch, batch), batch
    )
    found = jax.jit(spread)(split.params, images, texts)
    *expected, evaluated = jax.jit(
        lambda params: (
            *per_image(params, images, texts),
            ours.evaluate(params, levels.astype(np.float32) / 127.5 - 1, texts),
        )
    )(ours.params)
    for name, a, b in zip(("scores", "gradient"), found, expected):
        assert_equal(f"{name} on eight devices", a, b, GRADIENT)
    shots = [Shot(i, 0, text, Path()) for i, text in enumerate(captions)]
    assert_equal(
        "by_reward",
        by_reward(split, mesh, 8)(shots[:7], levels[:7]),
        evaluated[:7],
        FORWARD,
    )


# Several rewards in one run.


class Run(NamedTuple):
    """What a run's rewards are made of, with the parameters that they need."""

    parts: assembly.Parts
    params: dict
    decode: Callable
    reward: Callable
    latent_shape: tuple[int, int, int]


SCALES = {"pickscore": 100.0, "hpsv21": 50.0, "imagereward": -2.0, "aesthetic": 0.0, "hpsv2": 0.0}


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """(config with changed fields, Run of a config) over a tiny VAE and four rewards; other
    models are shapes.
    """
    folder = tmp_path_factory.mktemp("mixture")
    config = tiny(tokenizer[1])
    transformers_clip(config).save_pretrained(folder / "pickscore")
    write_open_clip(folder / "hps", parity.randomise(OpenClip(config), seed=3), config)
    write_aesthetic(folder / "aesthetic", transformers_clip(config), head(12))
    test_blip._write(
        folder / "imagereward",
        test_blip._published_tensors(
            test_blip._randomise(test_blip.TorchImageReward(test_blip.CONFIG, test_blip.VISION))
        ),
    )
    fields = {f"reward.{name}": scale for name, scale in SCALES.items()} | {
        f"weights.{name}": str(folder / place)
        for name, place in (
            ("pickscore", "pickscore"),
            ("hpsv21", "hps"),
            ("aesthetic", "aesthetic"),
            ("imagereward", "imagereward"),
        )
    }
    fields |= {"eval.metrics": ("pickscore", "aesthetic"), "decode.resolution": 8}
    networks = {
        name: pipeline.abstract_model(CONFIGS[part.folder]) for name, part in SDXL.parts.items()
    }
    networks["vae"] = networks["vae"]._replace(params=random_model(CONFIGS["vae"], seed=0)[1])
    loaded = {}

    def assemble(config):
        sources = assembly.reward_sources(config)
        for name in sources.keys() - loaded.keys():
            loaded.update(rewards.load_rewards({name: sources[name]}, str(tokenizer[0])))
        reference = pipeline.Pipeline(folder, SDXL, networks, {}, SCHEDULE)
        parts = assembly.Parts(reference, {name: loaded[name] for name in sources})
        params = {name: parts.frozen()[name] for name in ("vae", "rewards")}
        return Run(
            parts,
            params,
            assembly.decoder(parts),
            assembly.reward_of_latents(config, parts),
            parts.latent_shape(config.data.resolution),
        )

    return lambda **changes: config_for(folder, **{**fields, **changes}), assemble


def mixed(mixed_run):
    """jitted (params, x0, token_ids, crop) -> (total [B], each by name, gradient of the totals
    weighted by 1, 2, ...).
    """

    @jax.jit
    def run(params, x0, token_ids, crop):
        total, pull_back, each = jax.vjp(
            lambda x0: mixed_run.reward(params, x0, token_ids, crop), x0, has_aux=True
        )
        return total, each, pull_back(jnp.arange(1.0, 1 + len(total)))[0]

    return run


def mixture_inputs(mixed_run):
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (4, *mixed_run.latent_shape))
    texts = ["a red circle", "a blue square", "square", "a red cat and a blue dog"]
    return (
        x0,
        mixed_run.parts.tokenize(texts),
        jax.random.uniform(jax.random.key(1), (4, 2)),
    )


def one_by_one(mixed_run, view, crop, token_ids):
    """jitted (params, x0) -> each reward [B] by name, of all decoded views at once."""

    @jax.jit
    def run(params, x0):
        image = mixed_run.decode(params, VIEWS[view](x0, crop, 4))  # 8 pixels of a VAE that halves
        return {
            name: reward.reward(params["rewards"][name], image, token_ids[name])
            for name, reward in mixed_run.parts.rewards.items()
        }

    return run


def weighted(scores):
    return sum(SCALES[name] * score for name, score in scores.items())


@pytest.mark.long
def test_the_rewards_of_a_run_add_up_by_their_scales_and_are_each_returned(mixture):
    """In slices of a random window, which must change nothing."""
    config, assemble = mixture
    mixed_run = assemble(config(**{"decode.view": "crop", "decode.slice": 2}))
    # hpsv2 is off and not asked for: it is not even loaded.
    assert set(mixed_run.parts.rewards) == {"pickscore", "hpsv21", "imagereward", "aesthetic"}
    x0, token_ids, crop = mixture_inputs(mixed_run)
    assert set(token_ids["imagereward"]) == {"token_ids", "mask"}
    total, each, gradient = mixed(mixed_run)(mixed_run.params, x0, token_ids, crop)
    alone = one_by_one(mixed_run, "crop", crop, token_ids)
    expected = alone(mixed_run.params, x0)
    assert set(each) == set(expected)
    for name, score in expected.items():
        assert score.shape == (4,) and np.ptp(score) > 1e-3
        np.testing.assert_allclose(each[name], score, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, weighted(expected), rtol=1e-4)
    # Along its own gradient the sum rises by the gradient's length.
    length = jnp.sqrt((gradient**2).sum())
    above, below = (
        weighted(alone(mixed_run.params, x0 + h * gradient / length)) for h in (0.01, -0.01)
    )
    np.testing.assert_allclose(
        ((above - below) / 0.02 * jnp.arange(1.0, 5.0)).sum(), length, rtol=0.01
    )


@pytest.mark.slow
def test_several_rewards_of_a_smaller_picture_are_those_of_the_latents_resized(mixture):
    config, assemble = mixture
    mixed_run = assemble(config(**{"decode.view": "resized", "reward.imagereward": 0.0}))
    x0, token_ids, crop = mixture_inputs(mixed_run)
    total, each = jax.jit(mixed_run.reward)(mixed_run.params, x0, token_ids, crop)
    expected = one_by_one(mixed_run, "resized", crop, token_ids)(mixed_run.params, x0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), each, expected
    )
    np.testing.assert_allclose(total, weighted(expected), rtol=1e-4)


def test_a_reward_of_scale_zero_leaves_no_trace_in_the_gradient(mixture):
    config, assemble = mixture
    only = {
        "reward.pickscore": 0.0,
        "reward.hpsv21": 0.0,
        "reward.imagereward": 0.0,
        "eval.metrics": ("aesthetic",),
    }
    mixed_run = assemble(config(**only))
    total, each, gradient = mixed(mixed_run)(mixed_run.params, *mixture_inputs(mixed_run))
    assert set(each) == {"aesthetic"} and np.ptp(each["aesthetic"]) > 0
    assert not total.any() and not gradient.any()


def test_the_readmes_own_reward_gives_the_latents_a_gradient(mixture, monkeypatch):
    readme = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    code = readme.split("## A reward of your own")[1].split("```python\n")[1].split("```")[0]
    brightness = types.ModuleType("brightness")
    exec(code, brightness.__dict__)  # noqa: S102
    monkeypatch.setitem(rewards.REWARDS, "brightness", brightness.ENTRY)
    make_config, assemble = mixture
    config = make_config(**{f"reward.{name}": 0.0 for name in SCALES} | {"eval.metrics": ()})
    with config.unlocked():
        config.reward.brightness = 5.0
    mixed_run = assemble(config)
    assert list(mixed_run.parts.rewards) == ["brightness"]
    x0, *others = mixture_inputs(mixed_run)
    run = mixed(mixed_run)
    total, each, gradient = run(mixed_run.params, x0, *others)
    image = jax.jit(mixed_run.decode)(mixed_run.params, x0)
    np.testing.assert_allclose(each["brightness"], image.mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, 5.0 * each["brightness"], rtol=1e-5)
    length = jnp.sqrt((gradient**2).sum())
    above, below = (
        run(mixed_run.params, x0 + h * gradient / length, *others)[0] for h in (0.02, -0.02)
    )
    np.testing.assert_allclose(
        ((above - below) / 0.04 * jnp.arange(1.0, 5.0)).sum(), length, rtol=0.02
    )


# Bad input.


def _refused(load, *args, **kw):
    with pytest.raises(UserError) as error:
        load(*args, **kw)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("hpsv2", "HPS_v2_compressed.pt (2.0)"),
        ("hpsv21", "HPS_v2.1_compressed.pt (2.1) of xswu/HPSv2"),
        ("clipscore", "openai/clip-vit-base-patch32"),
        ("clipscore_l14", "openai/clip-vit-large-patch14"),
        ("aesthetic", "improved-aesthetic-predictor"),
    ],
)
def test_a_missing_folder_or_file_is_named_with_its_source(tokenizer, tmp_path, name, wanted):
    message = _refused(rewards.load_rewards, {name: str(tmp_path / "none")}, str(tokenizer[0]))
    assert f"no folder {tmp_path / 'none'} for {name}" in message and wanted in message
    (tmp_path / "config.json").write_text(json.dumps(tiny(tokenizer[1])))
    torch.save({"state_dict": {}}, tmp_path / "pytorch_model.bin")  # a pickle is no weights
    message = _refused(rewards.load_rewards, {name: str(tmp_path)}, str(tokenizer[0]))
    assert (
        str(tmp_path) in message
        and "model.safetensors" in message
        and wanted.split(" of ")[0].split("-")[0] in message
    )


def test_an_aesthetic_folder_says_what_of_its_two_files_is_missing_or_does_not_fit(
    tokenizer, tmp_path
):
    reference = transformers_clip(tiny(tokenizer[1]))
    reference.save_pretrained(tmp_path)
    message = _refused(load, "aesthetic", tmp_path, tokenizer)
    assert (
        f"lacks {aesthetic.HEAD} (converted once" in message and "model.safetensors" not in message
    )
    safetensors.torch.save_file(head(10).state_dict(), tmp_path / aesthetic.HEAD)
    assert "layers.0.weight is [1024, 10], expected [1024, 12]" in _refused(
        load, "aesthetic", tmp_path, tokenizer
    )
    (tmp_path / "model.safetensors").unlink()
    message = _refused(load, "aesthetic", tmp_path, tokenizer)
    assert (
        "lacks model.safetensors (of openai/clip-vit-large-patch14" in message
        and "converted" not in message
    )


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "aesthetic"])
@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
            "holds a CLIPTextModel, expected a CLIPModel",
        ),
        ({"_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, expected a CLIPModel"),
        ({"architectures": ["BlipModel"]}, "describes BlipModel, expected one of"),
        (
            {"architectures": ["CLIPModel"], "model_type": "siglip"},
            "model_type='siglip', expected 'clip'",
        ),
    ],
)
def test_another_kind_of_model_is_refused_in_one_line(tokenizer, tmp_path, name, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("model.safetensors", aesthetic.HEAD):
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / file)
    assert message in _refused(load, name, tmp_path, tokenizer)


def test_another_metrics_weights_are_refused_in_one_line(tokenizer, hps, tmp_path):
    # Without its config.json the published file is taken for ViT-H/14.
    (tmp_path / "model.safetensors").write_bytes((hps[3] / "model.safetensors").read_bytes())
    message = _refused(load, "hpsv2", tmp_path, tokenizer)
    assert "does not fit the model" in message and "832 tensors missing" in message
    # open_clip's names are for HPSv2 and CLIPScore.
    message = _refused(load, "pickscore", hps[3], tokenizer)
    assert "does not fit the model" in message and "missing" in message


# Full size.


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


FULL = pipeline.Options(dtype=jnp.bfloat16, remat="full", kernel="splash")


def full_scores(ours, size=1024):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    texts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), ours.shapes)
    return [jax.eval_shape(run, ours.params, images, texts) for run in (ours.reward, ours.evaluate)]


@pytest.mark.parametrize(
    "name, config, expected",
    [
        ("pickscore", published.CLIP_H14, 986_109_441),
        ("hpsv2", published.CLIP_H14, 986_109_441),
        ("hpsv21_legacy", published.CLIP_H14, 986_109_441),
        ("clipscore", published.CLIP_B32, 151_277_313),
        ("clipscore", published.CLIP_L14, 427_616_513),
        ("clipscore", published.CLIP_G14, 1_366_678_273),
    ],
)
def test_full_size_models_have_the_published_parameter_counts_and_score(name, config, expected):
    with torch.device("meta"):
        assert parameters(OpenClip(config)) == expected
    ours = REWARDS[name].abstract(config, FULL)
    assert count(ours.params) == expected
    assert all(scores.shape == (2,) and scores.dtype == jnp.float32 for scores in full_scores(ours))


def test_the_full_size_aesthetic_predictor_has_the_published_parameter_counts_and_scores():
    config = transformers.CLIPVisionConfig(
        **published.CLIP_L14["vision_config"], projection_dim=768
    )
    with torch.device("meta"):
        tower = transformers.CLIPVisionModelWithProjection(config)
    mlp = head(768)
    ours = aesthetic.abstract(published.CLIP_L14, FULL)
    assert count(ours.params["clip"]) == parameters(tower) == 303_966_208
    assert count(ours.params["head"]) == parameters(mlp) == 927_969
    assert all(scores.shape == (2,) and scores.dtype == jnp.float32 for scores in full_scores(ours))


def full_inputs():
    """A square image of SDXL's size, and a prompt of 20 random tokens."""
    ids = np.full((1, 77), 49407, np.int32)
    ids[0, 0], ids[0, 1:20] = 49406, np.random.default_rng(0).integers(1000, 40000, 19)
    return np.clip(images_of(1024, 1024, batch=1)[0], -1, 1), ids


@pytest.mark.long
def test_full_size_hpsv2_equals_open_clip(tokenizer, tmp_path):
    """Takes about 10 GB and two minutes."""
    module = parity.randomise(OpenClip(published.CLIP_H14))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "model.safetensors")
    images, ids = full_inputs()
    with torch.no_grad():
        expected = module(
            torchvision_view(_nchw(images), 224), torch.from_numpy(ids).long()
        ).numpy()
    del module
    ours = load("hpsv2", tmp_path, tokenizer)
    scores = jax.jit(ours.reward)(ours.params, images, ids)
    print(f"HPSv2, full size: {scores} against {expected}")
    np.testing.assert_allclose(scores, expected, atol=2e-6)


@pytest.mark.long
def test_full_size_clipscore_and_aesthetic_equal_transformers(tokenizer, tmp_path):
    """Takes about 6 GB and a minute."""
    reference, mlp = transformers_clip(published.CLIP_L14), head(768)
    write_aesthetic(tmp_path, reference, mlp)
    images, ids = full_inputs()
    views = pillow_view(_nchw(images), 224)
    with torch.no_grad():
        cosine = cosine_score(reference, views, ids).numpy()
        beauty = aesthetic_score(reference, mlp, views).numpy()
    for name, expected in (("clipscore", cosine), ("aesthetic", beauty)):
        ours = load(name, tmp_path, tokenizer)
        scores = jax.jit(ours.reward)(
            ours.params, images, ids if name == "clipscore" else ours.tokenize(["a"])
        )
        print(f"{name}, full size: {scores} against {expected}")
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
