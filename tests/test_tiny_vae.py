# SPDX-License-Identifier: Apache-2.0
"""The tiny decoder against diffusers' AutoencoderTiny, and as what the rewards see."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import test_train
from flax import nnx
from test_config import dry
from test_main import DRY, SDXL, command  # noqa: F401
from test_plan import build_once  # noqa: F401

from di_star_jax import assembly, models, record, sharding, train
from di_star_jax.cost import activations, plan, work
from di_star_jax.cost import compile as aot
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.rewards.reward import Reward

# Of the latents of test_train's pipeline, whose VAE halves.
SMALL = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [2, 1],
}


@pytest.mark.parametrize("batch, height, width, remat", [(3, 6, 10, "none"), (1, 8, 8, "full")])
def test_decoder_and_its_gradients_equal_diffusers(batch, height, width, remat):
    errors = parity.tiny_vae_errors(batch, height, width, remat=remat)
    assert errors.forward <= parity.FORWARD, errors
    assert errors.gradient <= parity.GRADIENT, errors


def test_the_full_size_decoder_has_as_many_parameters_as_diffusers():
    found = plan.parameters(pipeline.abstract_model(published.TINY_VAE).params)
    theirs = parity.torch_tiny_vae(published.TINY_VAE).decoder
    assert found == sum(p.numel() for p in theirs.parameters()) == 1_222_531


def test_on_eight_devices_it_makes_the_same_picture(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 1)  # splits every leaf that can be split
    config = published.TINY_VAE | SMALL
    cls, settings = pipeline.model_class(config)
    graphdef, params = models.init(lambda rngs: cls(settings, rngs=rngs), seed=0)
    latents = 2 * jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    mesh = sharding.make_mesh(2, 2, 2)
    params = jax.device_put(params, sharding.params_sharding(mesh, params))

    def gradient(params, latents):
        decode = nnx.merge(graphdef, params).decode
        image, pull_back = jax.vjp(decode, latents)
        return image, pull_back(image**2)[0]

    batch = sharding.batch_spec()
    specs = (sharding.params_spec(mesh, params), batch)
    spread = jax.jit(sharding.on_each(mesh, gradient, specs, batch))(params, latents)
    alone = jax.jit(gradient)(jax.device_get(params), latents)
    for ours, theirs in zip(spread, alone):
        assert parity.relative(ours, theirs) <= parity.FORWARD


# What the rewards see.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return test_train.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """(diffusers' module, its folder as diffusers writes it, encoder and all)."""
    module = parity.randomise(diffusers.AutoencoderTiny(**SMALL), seed=1)
    out = tmp_path_factory.mktemp("taesd")
    module.save_pretrained(out)
    return module, out


def config_for(folder, tiny, **changes):
    fields = {"decode.view": "tiny", "weights.tiny_vae": str(tiny), **changes}
    return test_train.config_for(folder, **fields)


def parts_of(config):
    return assembly.load_parts(config, sharding.make_mesh(1, 1, devices=jax.devices()[:1]))


def test_the_reward_is_of_the_tiny_decoders_picture_and_its_gradient_reaches_the_latents(
    folder, taesd
):
    module, tiny = taesd
    config = config_for(folder, tiny, **{"reward.pickscore": 15.0})
    parts = parts_of(config)
    seen = []

    def brightness(params, image, text):
        seen.append(image.shape)
        return (image * jnp.arange(3.0)).mean((1, 2, 3))

    parts = parts._replace(rewards={"pickscore": Reward(None, brightness, {}, None, None)})
    reward = assembly.reward_of_latents(config, parts)
    x0 = np.asarray(jax.random.normal(jax.random.key(0), (2, 8, 8, 4)))
    x0_torch = parity.to_nchw(x0).requires_grad_()
    theirs = module.decode(x0_torch).sample
    expected = (theirs * theirs.new_tensor([0.0, 1.0, 2.0])[:, None, None]).mean((1, 2, 3))
    expected.sum().backward()

    def total(x0):
        scores, _ = reward(parts.frozen(), x0, {"pickscore": None}, jnp.zeros((2, 2)))
        return scores.sum(), scores

    gradient, scores = jax.jit(jax.grad(total, has_aux=True))(x0)
    assert seen == [(2, 16, 16, 3)]
    assert parity.relative(scores, 15 * expected.detach().numpy()) <= parity.FORWARD
    assert parity.relative(gradient, 15 * parity.to_nhwc(x0_torch.grad)) <= parity.GRADIENT


def test_other_views_load_no_tiny_decoder(folder):
    for view in ("full", "crop"):
        config = config_for(folder, "./nowhere", **{"decode.view": view})
        assert assembly.load_tiny_vae(config, folder, {}) == {}
        assert "tiny_vae" not in plan.known_models(config).networks


@pytest.mark.long
def test_a_run_learns_through_it_and_its_pictures_are_the_whole_vaes(folder, taesd, tmp_path):
    fields = {"train.steps": 1, "assistant.warmup_steps": 0, "eval_every": 1}
    lines = {}
    for view in ("tiny", "full"):
        workdir = tmp_path / view
        train.run(config_for(folder, taesd[1], **fields, **{"decode.view": view}), str(workdir))
        found = (workdir / "metrics.jsonl").read_text().splitlines()
        lines[view] = {k: v for line in found[::-1] for k, v in json.loads(line).items()}
        index = json.loads((workdir / "diffusers" / "vae" / "config.json").read_text())
        assert index["_class_name"] == "AutoencoderKL"
    before = [lines[view]["eval/pickscore"] for view in ("tiny", "full")]  # at step 0
    assert before[0] == pytest.approx(before[1], rel=1e-5)
    seen = [lines[view]["reward/pickscore"] for view in ("tiny", "full")]
    assert abs(seen[0] - seen[1]) > 1e-4
    assert lines["tiny"]["pull/reward"] > 0
    said = record.read(tmp_path / "tiny")
    assert set(said["weights"]) >= {"weights.tiny_vae", "weights.reference"}


# What it costs.


def test_the_plan_counts_it_and_what_it_saves():
    full, tiny = (plan.make(dry(**{"decode.view": view}), 1, "cpu") for view in ("full", "tiny"))
    assert tiny.parameters == full.parameters | {"tiny_vae": 1_222_531}
    assert (
        tiny.state["other frozen networks, bfloat16"]
        > full.state["other frozen networks, bfloat16"]
    )
    of_image = [made.phases["decoder and reward"].image for made in (tiny, full)]
    assert of_image[0] < 0.8 * of_image[1]
    wide = published.TINY_VAE | {"decoder_block_out_channels": [128] * 4}
    known = tiny.known._replace(networks=tiny.known.networks | {"tiny_vae": wide})
    assert plan.widths(known) == (1.0, 2.0) and plan.widths(tiny.known) == (1.0, 1.0)
    unknown = plan.make(
        dry(**{"decode.view": "tiny", "weights.tiny_vae": "some/decoder"}), 1, "cpu"
    )
    assert unknown.unknown == ["weights.tiny_vae=some/decoder"]


def test_the_decoders_activations_are_of_all_pixels_and_of_its_own():
    sizes = {
        view: activations.activations(dry(**{"decode.view": view, "decode.resolution": 512}))
        for view in ("full", "resized", "tiny")
    }
    assert sizes["tiny"].decoder < sizes["full"].decoder
    assert sizes["tiny"] == sizes["full"]._replace(decoder=sizes["tiny"].decoder)
    whole = dry(**{"decode.view": "tiny", "compute.remat_vae": "none"})
    assert activations.activations(whole).decoder > sizes["tiny"].decoder
    small = dry(**{"decode.view": "tiny", "data.resolution": 512})
    assert activations.activations(small).decoder == pytest.approx(sizes["tiny"].decoder / 4)


def test_its_work_is_a_nineteenth_of_the_whole_decoders(monkeypatch):
    monkeypatch.setattr(work, "_reward", lambda reward, image: work.Pass(0.0, 0.0))
    full, tiny = (
        work._decoder(plan.make(dry(**{"decode.view": view}), 1, "cpu"))
        for view in ("full", "tiny")
    )
    pixels = [128**2, 256**2, 512**2, 1024**2]
    # Three convolutions in each of 3, 3, 3 and 1 blocks, and one after each doubling.
    between = sum(3 * count * n for count, n in zip((3, 3, 3, 1), pixels)) + sum(pixels[1:])
    convolutions = 2 * 9 * (between * 64**2 + pixels[0] * 4 * 64 + pixels[3] * 64 * 3)
    assert tiny == pytest.approx(2 * convolutions, rel=1e-6)  # forward and back to the latents
    assert convolutions == pytest.approx(0.565e12, rel=1e-3)
    assert full / tiny == pytest.approx(19.0, rel=0.01)


def test_a_benchmark_of_the_decoder_is_of_the_one_that_the_reward_sees(folder, taesd):
    config = config_for(folder, taesd[1], **{"mesh.fsdp": 1, "data.batch_size": 1})
    tiny = aot.model_flop("vae", config, jax.devices()[0])
    config.decode.view = "full"
    assert 0 < tiny < aot.model_flop("vae", config, jax.devices()[0])


# What is refused.


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"_class_name": "AutoencoderKL"}, "is of a 'AutoencoderKL', expected AutoencoderTiny; "),
        ({"latent_channels": 16}, "has latent_channels=16, but the VAE of the reference has 4; "),
        (
            {"num_decoder_blocks": [1], "decoder_block_out_channels": [8]},
            "has pixels a latent=1, but the VAE of the reference has 2; ",
        ),
        (
            {"decoder_block_out_channels": [8, 16]},
            "has decoder_block_out_channels=[8, 16], expected one width",
        ),
        ({"act_fn": "silu"}, "has act_fn='silu', the port implements 'relu' only"),
        ({"scaling_factor": 0.13025}, "has scaling_factor=0.13025, the port implements 1.0 only"),
        ({"_class_name": None}, "describes nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_decoder_of_other_latents_or_another_kind_is_refused_before_weights_are_read(
    folder, taesd, tmp_path, changes, said
):
    other = tmp_path / "other"
    other.mkdir()
    known = json.loads((taesd[1] / "config.json").read_text()) | changes
    known = {name: value for name, value in known.items() if value is not None}
    (other / "config.json").write_text(json.dumps(known))
    config = config_for(folder, other)
    for line in (refusal(plan.make, config, 8, "cpu"), refusal(parts_of, config)):
        assert str(other / "config.json") in line and said in line


def test_weights_without_the_decoder_are_refused(folder, taesd, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(taesd[1], broken)
    module = diffusers.AutoencoderTiny(**SMALL | {"num_decoder_blocks": [1, 1]})
    module.save_pretrained(tmp_path / "less")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "less" / name, broken / name)
    line = refusal(parts_of, config_for(folder, broken))
    assert (
        str(broken) in line
        and "missing decoder.layers." in line
        and "encoder.layers" not in (line.replace("decoder.layers", ""))
    )


@pytest.mark.parametrize("view", ["tiny", "full"])
def test_a_folder_that_is_not_there_or_not_named(folder, command, view):  # noqa: F811
    here = [f"--config.weights.reference={folder}", f"--config.decode.view={view}"]
    here.append("--config.mesh.fsdp=8")  # as many devices as the tests have
    code, _, said = command("--workdir=runs/no", SDXL, *here, "--config.weights.tiny_vae=./none")
    assert (code, said.count("\n")) == (2, 1)
    line = "weights.tiny_vae=./none: no such folder"
    assert (line in said) == (view == "tiny")
    code, _, said = command(SDXL, DRY, f"--config.decode.view={view}", "--config.weights.tiny_vae=")
    expected = "error: decode.view='tiny' with weights.tiny_vae='', for no tiny decoder"
    assert (code, said.startswith(expected)) == ((2, True) if view == "tiny" else (0, False))


def test_a_run_cannot_go_on_with_another_decoder(taesd, tmp_path):
    def agree(step, **changes):
        fields = {"decode.view": "tiny", "weights.tiny_vae": str(taesd[1]), **changes}
        config = dry(**{"dry_run": False, **fields})
        record.agree(config, tmp_path, [], "digest", step)

    agree(None)
    agree(1)
    line = refusal(lambda: agree(1, **{"weights.tiny_vae": "madebyollin/taesd"}))
    assert f"weights.tiny_vae was '{taesd[1]}', is 'madebyollin/taesd'" in line
    assert "decode.view was 'tiny', is 'full'" in refusal(
        lambda: agree(1, **{"decode.view": "full"})
    )
    agree(None, **{"decode.view": "full"})
    agree(1, **{"decode.view": "full", "weights.tiny_vae": "madebyollin/taesd"})  # not used
