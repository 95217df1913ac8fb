# SPDX-License-Identifier: Apache-2.0
"""The reward against Pillow, against transformers' processor, and against PickScore as transformers
computes it.
"""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from test_config import dry
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from di_star_jax import assembly, checks, models, rewards
from di_star_jax.checks import check
from di_star_jax.cost import plan, report
from di_star_jax.errors import UserError
from di_star_jax.models import clip
from di_star_jax.rewards import pixels, similarity, views
from di_star_jax.rewards.pixels import clip_pixels, clip_pixels_rounded
from di_star_jax.storage import weights

# Height, width and the reward model's image size.
SIZES = [
    (512, 512, 224),
    (1024, 1024, 224),
    (192, 320, 224),
    (320, 192, 224),
    (640, 1024, 224),
    (64, 64, 224),
    (225, 224, 224),
    (64, 64, 64),
]


def _picture(h, w, seed=0):
    """uint8 [h, w, 3]: 1/f noise, crossed by black and white stripes that make a bicubic filter
    overshoot.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]) + 1 / max(h, w)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, h, w))) / frequency, s=(h, w))
    picture = 0.5 + 0.2 * (noise / noise.std()).transpose(1, 2, 0)
    picture[:, w // 4 : w // 2 : 8] = 1.0
    picture[h // 2 : h // 2 + 24 : 5] = 0.0
    return np.uint8(np.clip(picture, 0, 1) * 255 + 0.5)


def _image(picture):
    """[-1, 1] as a decoder gives it."""
    return picture[None].astype(np.float32) / 127.5 - 1


def _processed(picture, size):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return processor(Image.fromarray(picture), return_tensors="np").pixel_values.transpose(
        0, 2, 3, 1
    )


def _levels(normalised):
    """CLIP pixels back to 0..1."""
    return np.asarray(normalised) * pixels.CLIP_STD + pixels.CLIP_MEAN


@pytest.mark.parametrize("h, w, size", SIZES)
def test_rounded_pixels_equal_the_processor_up_to_one_step_of_few_values(h, w, size):
    picture = _picture(h, w)
    ours = jax.jit(pixels.clip_pixels_rounded, static_argnames="size")(_image(picture), size=size)
    steps = np.abs(np.rint(255 * _levels(ours)) - np.rint(255 * _levels(_processed(picture, size))))
    share = np.mean(steps > 0)
    print(f"{h}x{w}->{size} rounded: largest step {steps.max():.0f}, share off {share:.2e}")
    assert ours.shape == (1, size, size, 3) and ours.dtype == jnp.float32
    assert steps.max() <= 1 and np.mean(steps > 0) <= 0.012


@pytest.mark.parametrize("h, w, size", SIZES)
def test_training_pixels_differ_from_the_processor_by_its_rounding_only(h, w, size):
    picture = _picture(h, w)
    ours = jax.jit(pixels.clip_pixels, static_argnames="size")(_image(picture), size=size)
    difference = np.abs(_levels(ours) - _levels(_processed(picture, size)))
    print(f"{h}x{w}->{size} unrounded: mean {difference.mean():.1e}, max {difference.max():.1e}")
    # Half a step from each of two roundings; enlarging does not average the first away, and its
    # weights sum to 1.25 in absolute value.
    mean, largest = (1.2e-3, 4e-3) if min(h, w) >= size else (1 / 3 / 255, 2.25 / 2 / 255)
    assert difference.mean() <= mean and difference.max() <= largest


@pytest.mark.parametrize(
    "n_in, n_out", [(512, 224), (224, 512), (64, 224), (225, 224), (3, 7), (7, 3)]
)
def test_resize_matrix_equals_pillow_on_floats(n_in, n_out):
    rows = np.random.default_rng(0).standard_normal((5, n_in)).astype(np.float32)
    expected = np.asarray(
        Image.fromarray(rows, mode="F").resize((n_out, 5), Image.Resampling.BICUBIC)
    )
    matrix = pixels.resize_matrix(n_in, n_out)
    assert matrix.shape == (n_out, n_in) and matrix.dtype == np.float32
    np.testing.assert_allclose(rows @ matrix.T, expected, atol=2e-6)


def test_an_image_of_the_models_own_size_is_only_normalised():
    np.testing.assert_array_equal(pixels.resize_matrix(64, 64), np.eye(64, dtype=np.float32))


def test_values_outside_the_range_are_clipped_and_get_no_gradient():
    image = jnp.full((1, 8, 8, 3), 0.3).at[0, 2, 2].set(1.5).at[0, 5, 5].set(-1.5)
    seen = clip_pixels(image, size=8)
    np.testing.assert_allclose(_levels(seen)[0, [2, 5], [2, 5]], [[1.0] * 3, [0.0] * 3], atol=1e-6)
    gradient = jax.grad(lambda image: jnp.sum(pixels.clip_pixels(image, size=8)))(image)
    saturated = np.abs(np.asarray(image)) > 1
    assert np.all(gradient[saturated] == 0) and np.all(gradient[~saturated] > 0)


def test_the_training_gradient_is_the_transposed_resize():
    """Away from saturation the map is linear, so a finite step is exact up to rounding."""
    rng = np.random.default_rng(0)
    image, direction = (rng.uniform(-0.4, 0.4, (2, 24, 40, 3)).astype(np.float32) for _ in range(2))
    weights = rng.standard_normal((2, 16, 16, 3)).astype(np.float32)
    value = lambda image: jnp.sum(pixels.clip_pixels(image, size=16) * weights)  # noqa: E731
    gradient = jax.grad(value)(image)
    np.testing.assert_allclose(
        np.sum(gradient * direction), value(image + direction) - value(image), rtol=1e-4
    )
    assert np.all(gradient[:, :, :5] == 0) and np.all(gradient[:, :, -5:] == 0)  # cropped away


@pytest.fixture(scope="module")
def clip_pair():
    """A small random PickScore: transformers' and ours, with the same weights."""
    torch.manual_seed(0)
    tower = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        projection_dim=16,
    )
    reference = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=16,
            vision_config=dict(image_size=48, patch_size=8, **tower),
            text_config=dict(
                vocab_size=50,
                max_position_embeddings=12,
                bos_token_id=48,
                eos_token_id=49,
                pad_token_id=0,
                **tower,
            ),
        )
    ).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    config = clip.CLIPConfig.from_json(reference.config.to_dict())
    graphdef, abstract = models.abstract(lambda rngs: clip.CLIPModel(config, rngs=rngs))
    tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
    return reference, graphdef, weights.params_from_tensors(tensors, abstract)


def _scores_by_transformers(reference, pixels, ids):
    """The model card's recipe, without the logit scale."""
    image = reference.get_image_features(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    ).pooler_output
    text = reference.get_text_features(torch.from_numpy(ids).long()).pooler_output
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return (image * text).sum(-1).detach().numpy()


@pytest.mark.parametrize("h, w", [(128, 128), (72, 120)])
def test_the_whole_reward_equals_transformers_from_image_to_score(clip_pair, h, w):
    reference, graphdef, params = clip_pair
    pictures = [_picture(h, w, seed) for seed in range(4)]
    images = np.concatenate([_image(p) for p in pictures])
    ids = np.random.default_rng(0).integers(1, 47, (4, 12)).astype(np.int32)
    ids[:, 7:] = 49
    expected = _scores_by_transformers(
        reference, np.concatenate([_processed(p, 48) for p in pictures]), ids
    )

    text = jax.jit(lambda params: similarity.text_embeddings(graphdef, params, ids))(params)
    rounded = jax.jit(
        lambda params: similarity.cosine(graphdef, clip_pixels_rounded, params, images, ids)
    )(params)
    training = jax.jit(
        lambda params: similarity.cosine(graphdef, clip_pixels, params, images, ids)
    )(params)
    errors = [np.abs(np.asarray(score) - expected).max() for score in (rounded, training)]
    print(f"{h}x{w} scores {expected}: rounded, training within {errors[0]:.1e}, {errors[1]:.1e}")
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-6)
    assert (
        rounded.shape == training.shape == (4,) and rounded.dtype == training.dtype == jnp.float32
    )
    assert errors[0] <= 2e-4  # a value halfway between two steps may round the other way
    assert errors[1] <= 1e-3


def test_ascending_the_rewards_gradient_raises_it(clip_pair):
    _, graphdef, params = clip_pair
    ids = np.full((2, 12), 49, np.int32)
    ids[:, :4] = [[3, 1, 4, 1], [5, 9, 2, 6]]

    @jax.jit
    def scores_and_slope(image):
        score, vjp = jax.vjp(
            lambda image: similarity.cosine(graphdef, clip_pixels, params, image, ids), image
        )
        return score, vjp(jnp.ones(2))[0]

    image = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 64, 64, 3)).astype(np.float32)
    _, slope = scores_and_slope(image)
    length = np.sqrt(np.sum(np.square(slope), axis=(1, 2, 3), keepdims=True))
    above, below = (scores_and_slope(image + sign * 0.02 * slope / length)[0] for sign in (1, -1))
    np.testing.assert_allclose((above - below) / 0.04, length.ravel(), rtol=0.02)


def test_a_reward_model_in_bfloat16_returns_float32_scores(clip_pair):
    _, graphdef, params = clip_pair
    config = nnx.merge(graphdef, params).config
    half, _ = models.abstract(lambda rngs: clip.CLIPModel(config, rngs=rngs, dtype=jnp.bfloat16))
    image, ids = _image(_picture(64, 64)), np.full((1, 12), 49, np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef):
        return (
            similarity.text_embeddings(graphdef, params, ids),
            similarity.cosine(graphdef, clip_pixels, params, image, ids),
        )

    text, score = run(half)
    assert text.dtype == score.dtype == jnp.float32
    np.testing.assert_allclose(score, run(graphdef)[1], atol=0.02)


def test_a_score_in_slices_is_the_same_with_its_gradient():
    x0, weight = jax.random.normal(jax.random.key(0), (6, 4, 4, 2)), jnp.arange(6.0)
    ids = jnp.arange(6)

    def score(x, w, ids):
        value = jnp.sin(x).sum((1, 2, 3)) * w
        return value, {"each": value + ids}

    for size in (0, 2, 6):

        def loss(x, size=size):
            value, rest = views.in_slices(score, size)(x, weight, ids)
            return (value**2).sum(), rest["each"]

        (value, each), grad = jax.value_and_grad(loss, has_aux=True)(x0)
        expected = jax.value_and_grad(lambda x: (score(x, weight, ids)[0] ** 2).sum())(x0)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(each, score(x0, weight, ids)[1]["each"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grad, expected[1], rtol=1e-4, atol=1e-5)


def test_views_are_the_whole_a_smaller_picture_and_a_window():
    latents = jnp.arange(2 * 8 * 8, dtype=jnp.float32).reshape(2, 8, 8, 1)
    crop = jnp.array([[0.0, 0.0], [0.99, 0.5]])
    assert views.VIEWS["full"](latents, crop, 4) is latents
    resized = views.VIEWS["resized"](latents, crop, 4)
    assert resized.shape == (2, 4, 4, 1)
    np.testing.assert_allclose(resized.mean((1, 2, 3)), latents.mean((1, 2, 3)), rtol=1e-5)
    window = views.VIEWS["crop"](latents, crop, 4)
    np.testing.assert_array_equal(window[0], latents[0, :4, :4])
    np.testing.assert_array_equal(window[1], latents[1, 4:, 2:6])


def test_the_readmes_own_reward_works_from_config_to_score(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    code = readme.split("## A reward of your own")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "brightness.py").write_text(code)
    spec = importlib.util.spec_from_file_location("brightness", tmp_path / "brightness.py")
    brightness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(brightness)
    monkeypatch.setitem(rewards.REWARDS, "brightness", brightness.ENTRY)
    config = dry(**{"reward.pickscore": 0.0, "eval.metrics": ()})
    config.reward.brightness = 5.0
    check(config, 16)
    assert report.describe(plan.make(config, 16, "cpu"))
    assert assembly.reward_sources(config) == {"brightness": ""}
    loaded = rewards.load_rewards(assembly.reward_sources(config), str(tmp_path))["brightness"]
    images = jnp.stack([jnp.full((4, 4, 3), -0.5), jnp.full((4, 4, 3), 0.25)])
    np.testing.assert_allclose(
        loaded.reward(loaded.params, images, loaded.tokenize(["dark", "light"])), [-0.5, 0.25]
    )


OWN = """
import jax.numpy as jnp
import numpy as np

def brightness(images):
    return images.mean((1, 2, 3))

def longer_is_brighter(images, prompts):
    return images.mean((1, 2, 3)) * prompts

def tokenize(prompts):
    return np.array([len(prompt) for prompt in prompts], np.float32)

def one_number(images):
    return images.mean()

def of_integers(images):
    return (images.mean((1, 2, 3)) > 0).astype(int)

def in_numpy(images):
    return np.mean(np.asarray(images), (1, 2, 3))

def of_three(images, prompts, more):
    return images.mean((1, 2, 3))

def without_gradient(images):
    return jnp.asarray(float(images.mean()) * jnp.ones(2))

def pickscore(images):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's file; what is added to the table is gone afterwards."""
    monkeypatch.setattr(rewards, "REWARDS", rewards.REWARDS.copy())
    for module in (assembly, plan, checks):
        monkeypatch.setattr(module, "REWARDS", rewards.REWARDS)
    file = tmp_path / "my.py"
    file.write_text(OWN)
    return file


@pytest.mark.case("first hour 28")
@pytest.mark.long
def test_a_function_of_the_users_own_file_is_a_reward_from_config_to_score(own, tmp_path):
    changes = {"reward.pickscore": 0.0, "eval.metrics": ("brightness",)}
    config = dry(**changes, **{"reward.custom": f"{own}:brightness", "reward.custom_scale": 5.0})
    check(config, 16)
    assert rewards.scales_of(config.reward)["brightness"] == 5.0
    assert any("brightness" in line for line in report.describe(plan.make(config, 16, "cpu")))
    sources = assembly.reward_sources(config)
    assert sources == {"brightness": ""}
    loaded = rewards.load_rewards(sources, str(tmp_path))["brightness"]
    images = jnp.stack([jnp.full((4, 4, 3), -0.5), jnp.full((4, 4, 3), 0.25)])
    prompts = loaded.tokenize(["dark", "light"])
    np.testing.assert_allclose(loaded.reward(loaded.params, images, prompts), [-0.5, 0.25])
    gradient = jax.grad(lambda x: loaded.reward(loaded.params, x, prompts).sum())(images)
    np.testing.assert_allclose(gradient, np.full((2, 4, 4, 3), 1 / 48), rtol=1e-6)
    as_file = 2 * np.round((np.array([-0.5, 0.25]) + 1) * 127.5) / 255 - 1
    np.testing.assert_allclose(loaded.evaluate({}, images, prompts), as_file, atol=1e-6)


@pytest.mark.case("first hour 28")
def test_a_function_of_the_users_own_reads_prompts_through_its_files_tokenize(own):
    name = rewards.add(f"{own}:longer_is_brighter")
    loaded = rewards.load_rewards({name: ""}, "")[name]
    images = jnp.full((2, 4, 4, 3), 0.5)
    scores = jax.jit(loaded.reward)(loaded.params, images, loaded.tokenize(["a", "abc"]))
    np.testing.assert_allclose(scores, [0.5, 1.5])
    assert loaded.shapes.shape == (1,) and loaded.shapes.dtype == np.float32


@pytest.mark.case("first hour 28")
@pytest.mark.parametrize(
    "name, message",
    [
        ("brightnes", "has no function brightnes; it has brightness, .*, did you mean brightness"),
        ("one_number", r"it makes float32 of shape \[\], expected a number for each image"),
        ("of_integers", r"it makes int32 of shape \[2\], expected a number for each image: float"),
        ("in_numpy", r"a trial on images \[2, 1024, 1024, 3\] ends with TracerArrayConversionErr"),
        ("without_gradient", "ends with ConcretizationTypeError"),
        ("of_three", r"has 3 parameters, expected \(images\) or \(images, prompts\)"),
        ("pickscore", "there is a reward pickscore already; rename the function"),
    ],
)
def test_a_function_that_is_no_reward_is_refused_before_anything_is_compiled(own, name, message):
    with pytest.raises(UserError, match=message) as error:
        check(dry(**{"reward.custom": f"{own}:{name}"}), 16)
    assert "\n" not in str(error.value) and str(own) in str(error.value)


@pytest.mark.case("first hour 28")
@pytest.mark.parametrize(
    "spec, content, message",
    [
        ("{}/none.py:f", "", "no file .*none.py; give FILE:FUNCTION"),
        ("{}/b.py", "", "expected FILE:FUNCTION such as my.py:brightness"),
        ("{}/b.py:f", "def f(:", "the file fails with SyntaxError"),
        ("{}/b.py:f", "import nothere", "the file fails with ModuleNotFoundError: No module"),
        (
            "{}/b.py:f",
            "def f(images, prompts): return prompts",
            "has no tokenize",
        ),
    ],
)
def test_a_file_that_holds_no_reward_is_refused(tmp_path, spec, content, message):
    (tmp_path / "b.py").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        rewards.add(spec.format(tmp_path))
    assert "\n" not in str(error.value)
