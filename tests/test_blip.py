# SPDX-License-Identifier: Apache-2.0
"""ImageReward against transformers' BLIP classes and a PyTorch head, from a folder in the published
layout.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from di_star_jax import models, sharding
from di_star_jax.errors import UserError
from di_star_jax.models.blip import BLIPConfig, ImageReward
from di_star_jax.pipelines.folder import Options
from di_star_jax.rewards import imagereward, load_rewards
from di_star_jax.rewards.pixels import CLIP_MEAN, CLIP_STD
from di_star_jax.storage import weights

FORWARD, GRADIENT = 2e-5, 1e-4  # max|difference| / max|reference|
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "##s",
    "red",
    "and",
    ",",
    "!",
]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
CONFIG = {
    **imagereward.PUBLISHED,
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "vision_config": VISION,
}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
PROMPTS = ["a red cat", "a photo of dogs, cats and a red dog!", "cat"]
VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn": "attn",
    "projection": "proj",
    "post_layernorm": "norm",
}


class TorchImageReward(torch.nn.Module):
    """What ImageReward computes, of the classes that rewrite its own."""

    def __init__(self, config, vision):
        super().__init__()
        shared = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
            "hidden_act",
        )
        text = transformers.BlipTextConfig(
            **{k: config[k] for k in shared},
            is_decoder=True,
            bos_token_id=2,
            sep_token_id=3,
            encoder_hidden_size=vision["hidden_size"],
        )
        self.vision = transformers.BlipVisionModel(
            transformers.BlipVisionConfig(**vision, layer_norm_eps=1e-6)
        )
        self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(
            text, add_pooling_layer=False
        )
        linear, drop = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            linear(config["hidden_size"], 1024),
            drop(0.2),
            linear(1024, 128),
            drop(0.2),
            linear(128, 64),
            drop(0.1),
            linear(64, 16),
            linear(16, 1),
        )

    def states(self, pixels, token_ids, mask):
        """Args: pixels NHWC."""
        image = self.vision(pixels.permute(0, 3, 1, 2)).last_hidden_state
        return self.text(
            token_ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            is_decoder=False,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
        ).last_hidden_state

    def forward(self, *inputs):
        return (
            self.layers(self.states(*inputs)[:, 0])[:, 0] - 0.16717362830052426
        ) / 1.0333394966054072


def _randomise(module):
    """Weights of unit gain, and nothing left at zero or one: a mixed-up bias or norm would show.

    Embeddings are small, as real ones are: there, the norms' epsilons count.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(generator=generator)
            if "embedding" in name and p.ndim > 1:
                p.mul_(0.02 / math.sqrt(p[0].numel() if "patch" in name else 1))
            elif p.ndim > 1:
                p.div_(math.sqrt(p[0].numel()))
            else:
                p.mul_(0.2).add_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return module.eval()


def _published_name(name):
    part, rest = name.split(".", 1)
    if part == "layers":
        return f"mlp.{name}"
    if part == "text":
        return f"blip.text_encoder.{rest}"
    for theirs, published in VISION_NAMES.items():
        rest = rest.replace(theirs, published)
    return f"blip.visual_encoder.{rest}"


def _published_tensors(module):
    """A state dict in ImageReward's names, with what its file has beside the weights in use."""
    tensors = {_published_name(name): p.detach().numpy() for name, p in module.named_parameters()}
    return tensors | {
        "blip.vision_proj.weight": np.ones((4, 2), np.float32),
        "blip.vision_proj.bias": np.ones(4, "f"),
        "blip.text_proj.weight": np.ones((4, 2), np.float32),
        "blip.text_proj.bias": np.ones(4, "f"),
        "blip.text_encoder.embeddings.position_ids": np.arange(40)[None],
    }


def _write(folder, tensors, config=CONFIG, words=WORDS):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "med_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def module():
    return _randomise(TorchImageReward(CONFIG, VISION))


@pytest.fixture(scope="module")
def folder(module, tmp_path_factory):
    return _write(tmp_path_factory.mktemp("imagereward"), _published_tensors(module))


def _load(folder, **options):
    return load_rewards({"imagereward": str(folder)}, "", Options(**options))["imagereward"]


def _images(batch):
    """8-bit images in [-1, 1] without saturated values, of the model's own size, which makes the
    resize the identity.
    """
    levels = np.random.default_rng(0).integers(1, 255, (batch, 24, 24, 3))
    return np.float32(levels / 127.5 - 1)


def _reference(module, images, prompts):
    """(scores, their gradient to the images, weighted by 1, 2, ...)."""
    images = torch.tensor(images, requires_grad=True)
    pixels = ((images + 1) / 2 - torch.from_numpy(CLIP_MEAN)) / torch.from_numpy(CLIP_STD)
    scores = module(
        pixels, *(torch.from_numpy(prompts[name]).long() for name in ("token_ids", "mask"))
    )
    (scores * torch.arange(1.0, 1 + len(scores))).sum().backward()
    return scores.detach().numpy(), images.grad.numpy()


def _relative(ours, theirs):
    assert ours.shape == theirs.shape
    return np.max(np.abs(np.asarray(ours) - theirs)) / np.max(np.abs(theirs))


@pytest.mark.parametrize("batch, remat", [(1, "none"), (3, "full")])
def test_score_and_its_gradient_to_the_image_equal_transformers(module, folder, batch, remat):
    reward = _load(folder, remat=remat)
    images, prompts = _images(batch), reward.tokenize(PROMPTS[:batch])
    assert prompts["mask"].sum() < prompts["mask"].size
    expected, expected_gradient = _reference(module, images, prompts)

    def loss(images):
        scores = reward.reward(reward.params, images, prompts)
        return jnp.sum(scores * jnp.arange(1.0, 1 + batch)), scores

    # Once in each encoder's scanned block.
    assert str(jax.make_jaxpr(loss)(images)).count("remat") == {"none": 0, "full": 2}[remat]
    gradient, scores = jax.jit(jax.grad(loss, has_aux=True))(images)
    errors = _relative(scores, expected), _relative(gradient, expected_gradient)
    print(
        f"ImageReward forward={errors[0]:.1e} image_gradient={errors[1]:.1e}"
    )  # shown by `pytest -rP`
    assert scores.dtype == jnp.float32
    assert errors[0] <= FORWARD and errors[1] <= GRADIENT


def test_evaluation_scores_the_eight_bit_image(module, folder):
    reward = _load(folder)
    images, prompts = _images(2), reward.tokenize(PROMPTS[:2])
    unrounded = images + np.random.default_rng(1).uniform(
        -0.4 / 127.5, 0.4 / 127.5, images.shape
    ).astype(np.float32)
    scores = jax.jit(reward.evaluate)(reward.params, unrounded, prompts)
    assert _relative(scores, _reference(module, images, prompts)[0]) <= FORWARD


def test_only_what_is_a_token_changes_the_score_and_it_does(folder):
    reward = _load(folder)
    run = jax.jit(
        lambda prompts: reward.reward(reward.params, _images(1).repeat(3, axis=0), prompts)
    )
    prompts = reward.tokenize(PROMPTS)
    scores = run(prompts)
    others = np.where(prompts["mask"] == 1, prompts["token_ids"], 7)
    np.testing.assert_allclose(run({**prompts, "token_ids": others}), scores, rtol=1e-6)
    assert np.min(np.abs(np.diff(np.sort(scores)))) > 1e-3 * np.max(np.abs(scores))
    later = prompts["token_ids"].copy()
    later[:, 2] = 5  # behind [CLS]: attention goes both ways
    assert np.min(np.abs(run({**prompts, "token_ids": later}) - scores)) > 1e-3 * np.max(
        np.abs(scores)
    )


def test_bfloat16_compute_stays_close_and_parameters_have_their_own_dtype(folder):
    images, scores = _images(3), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        reward = _load(folder, dtype=dtype)
        assert {p.dtype for p in jax.tree.leaves(reward.params)} == {jnp.dtype(jnp.float32)}
        scores[dtype] = jax.jit(reward.reward)(reward.params, images, reward.tokenize(PROMPTS))
        assert scores[dtype].dtype == jnp.float32
    error = _relative(scores[jnp.bfloat16], scores[jnp.float32])
    assert 0 < error < 0.05
    half = _load(folder, param_dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}


def test_weights_split_over_eight_devices_give_the_same_scores(folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    mesh = sharding.make_mesh(1, 8)
    whole, split = (
        _load(folder),
        _load(folder, shardings=lambda tree: sharding.params_sharding(mesh, tree)),
    )
    assert split.params["blip"]["visual_encoder"]["cls_token"].addressable_shards[0].data.shape == (
        1,
        1,
        4,
    )
    images, prompts = _images(8), whole.tokenize([*PROMPTS, *PROMPTS, *PROMPTS[:2]])
    batch = sharding.batch_spec()
    run = jax.jit(
        sharding.on_each(
            mesh, split.reward, (sharding.params_spec(mesh, split.params), batch, batch), batch
        )
    )
    np.testing.assert_allclose(
        run(split.params, images, prompts),
        jax.jit(whole.reward)(whole.params, images, prompts),
        rtol=1e-4,
        atol=1e-5,
    )


def test_prompts_become_35_lower_case_word_pieces_that_begin_with_cls(folder):
    reward = _load(folder)
    prompts = reward.tokenize(["A Photo of Cáts!", "dog, " * 30])
    expected = [
        WORDS.index(word) for word in ("[CLS]", "a", "photo", "of", "cat", "##s", "!", "[SEP]")
    ]
    np.testing.assert_array_equal(prompts["token_ids"][0], expected + [0] * 27)
    np.testing.assert_array_equal(prompts["mask"][0], [1] * 8 + [0] * 27)
    dogs = [WORDS.index(word) for word in ("[CLS]", *["dog", ","] * 16, "dog", "[SEP]")]
    np.testing.assert_array_equal(prompts["token_ids"][1], dogs)
    assert prompts["mask"][1].all()
    for name, shape in reward.shapes.items():
        assert prompts[name][:1].shape == shape.shape and prompts[name].dtype == shape.dtype
    assert prompts.keys() == reward.shapes.keys()


def _refused(load):
    with pytest.raises(UserError) as error:
        load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_models_weights_are_refused_in_one_line(module, tmp_path):
    clip = {"text_model.final_layer_norm.weight": np.ones(24, np.float32)}
    message = _refused(lambda: _load(_write(tmp_path / "clip", clip)))
    assert (
        "does not fit the model: 108 tensors missing" in message
        and "missing blip.text_encoder" in message
    )
    deeper = _published_tensors(module) | {
        "blip.text_encoder.encoder.layer.2.output.dense.bias": np.ones(24, "f")
    }
    message = _refused(lambda: _load(_write(tmp_path / "deeper", deeper)))
    assert "1 extra" in message and "layer.2.output.dense.bias [24]" in message


def test_a_missing_file_is_named_with_its_source(folder, tmp_path):
    assert "no folder" in _refused(lambda: _load(tmp_path / "nothing"))
    assert "lacks med_config.json (from THUDM/ImageReward" in _refused(
        lambda: imagereward.read_config(tmp_path)
    )
    message = _refused(lambda: _load(tmp_path))
    for words in (
        "lacks model.safetensors (ImageReward.pt of THUDM/ImageReward",
        "med_config.json (from THUDM/",
        "vocab.txt (from google-bert/bert-base-uncased",
    ):
        assert words in message
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    message = _refused(lambda: _load(tmp_path))
    assert "lacks model.safetensors" in message and "vocab.txt" not in message
    assert imagereward.read_config(tmp_path) == CONFIG
    torch.save({"mlp.layers.0.bias": torch.ones(3)}, tmp_path / "ImageReward.pt")
    assert "is a pickle" in _refused(lambda: _load(tmp_path))


def test_another_vocabulary_is_refused_in_one_line(module, tmp_path):
    message = _refused(
        lambda: _load(_write(tmp_path, _published_tensors(module), words=WORDS[:-1]))
    )
    assert (
        "vocab.txt has 14 tokens, expected the model's 15" in message
        and "bert-base-uncased" in message
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "clip"}, "model_type='clip', the port implements 'bert' only"),
        ({"hidden_act": "relu"}, "hidden_act='relu', the port implements 'gelu' only"),
        (
            {"num_attention_heads": 5},
            "hidden_size=24, which is not divisible by num_attention_heads=5",
        ),
        (
            {"vision_config": {**VISION, "patch_size": 7}},
            "image_size=24, which is not divisible by patch_size=7",
        ),
        (
            {"vision_config": {**VISION, "num_attention_heads": 3}},
            "hidden_size=32, which is not divisible by num_att",
        ),
    ],
)
def test_a_config_that_the_port_does_not_implement_is_refused_in_one_line(change, message):
    assert message in _refused(lambda: imagereward.abstract({**CONFIG, **change}, Options()))


def test_inputs_of_a_wrong_size_are_refused_in_one_line():
    config = BLIPConfig.from_json(CONFIG)
    graphdef, params = models.abstract(lambda rngs: ImageReward(config, rngs=rngs))
    ids, pixels = jnp.ones((1, 41), jnp.int32), jnp.ones((1, 24, 24, 3))

    def run(*inputs):
        return jax.eval_shape(lambda params: nnx.merge(graphdef, params)(*inputs), params)

    assert "got 41 token ids per prompt, the BLIP model takes at most 40" in _refused(
        lambda: run(pixels, ids, ids)
    )
    message = _refused(lambda: run(pixels[:, 1:], ids[:, 1:], ids[:, 1:]))
    assert "got pixels (23, 24, 3), the BLIP model takes (24, 24, 3)" in message


def _names(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    keys = [weights.torch_keys(tuple(k.key for k in path), leaf) for path, leaf in leaves]
    return {name for key in keys for name in ([key] if isinstance(key, str) else key)}


def test_the_full_size_model_has_the_published_parameter_counts_and_traces():
    assert BLIPConfig.from_json(imagereward.PUBLISHED) == BLIPConfig()
    with torch.device("meta"):
        reference = TorchImageReward(imagereward.PUBLISHED, LARGE)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def ours(tree):
        return sum(math.prod(p.shape) for p in jax.tree.leaves(tree))

    options = Options(dtype=jnp.bfloat16, remat="full", kernel="splash")
    reward = imagereward.abstract(imagereward.PUBLISHED, options)
    assert ours(reward.params["blip"]["visual_encoder"]) == count(reference.vision) == 303_301_632
    assert ours(reward.params["blip"]["text_encoder"]) == count(reference.text) == 141_977_088
    assert ours(reward.params["mlp"]) == count(reference.layers) == 927_969
    assert _names(reward.params) == {
        _published_name(name) for name, _ in reference.named_parameters()
    }
    images = jax.ShapeDtypeStruct((2, 1024, 1024, 3), jnp.float32)
    prompts = {
        name: jax.ShapeDtypeStruct((2, *shape.shape[1:]), shape.dtype)
        for name, shape in reward.shapes.items()
    }
    scores = jax.eval_shape(reward.reward, reward.params, images, prompts)
    assert scores.shape == (2,) and scores.dtype == jnp.float32


@pytest.mark.long
def test_the_full_size_model_equals_transformers():
    """Takes about 6 GB and a minute."""
    module = _randomise(TorchImageReward(imagereward.PUBLISHED, LARGE))
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, 224, 224, 3)).astype(np.float32)
    ids = rng.integers(1000, 30522, (1, 35)).astype(np.int32)
    mask = np.int32(np.arange(35) < 20)[None]
    graphdef, tree = models.abstract(
        lambda rngs: ImageReward(BLIPConfig.from_json(imagereward.PUBLISHED), rngs=rngs)
    )
    tensors = {_published_name(name): p.detach().numpy() for name, p in module.named_parameters()}
    params = weights.params_from_tensors(tensors, tree)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        return model(pixels, ids, mask), model.blip(pixels, ids, mask)

    ours = run(params)
    inputs = torch.from_numpy(pixels), torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        expected = module(*inputs), module.states(*inputs)
    score, states = (_relative(o, e.numpy()) for o, e in zip(ours, expected))
    print(f"ImageReward, full size: score={score:.1e} text_states={states:.1e}")
    assert max(score, states) <= 1e-4  # 36 layers deep
