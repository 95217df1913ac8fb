# SPDX-License-Identifier: Apache-2.0
"""The converter and the exported pipeline, on a small SDXL pipeline that diffusers wrote."""

import filecmp
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from di_star_jax import convert, drawing, samplers
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import conditions
from di_star_jax.pipelines.scheduler import schedule_from_json
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.storage import checkpoint, folders, weights

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=16,
    max_position_embeddings=77,
)


def _tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """Knows single letters, which is enough."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def _pipeline(tmp: Path) -> diffusers.StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = _tokenizer(tmp / "vocabulary")
    text = transformers.CLIPTextConfig(
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53, **TEXT
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return diffusers.StableDiffusionXLPipeline(
        vae,
        transformers.CLIPTextModel(text),
        transformers.CLIPTextModelWithProjection(text),
        tokenizer,
        tokenizer,
        unet,
        scheduler,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A pipeline folder in float32."""
    tmp = tmp_path_factory.mktemp("convert")
    _pipeline(tmp).save_pretrained(tmp / "reference")
    return tmp / "reference"


@pytest.fixture(scope="module")
def workdir(reference):
    """A run with a checkpoint at step 30: networks of 1, 2 and 3 times the reference's UNet."""
    config = folders.read_config(reference, "unet")
    params = weights.load(reference / "unet", pipeline.abstract_model(config).params)
    state = {
        name: jax.tree.map(lambda x: np.float32(n) * x, params)
        for n, name in enumerate(("generator", "ema", "assistant"), start=1)
    }
    metadata = {
        "denoiser_config": config,
        "reference": str(reference),
        "generator_timesteps": [999, 749, 499, 249],
    }
    with checkpoint.Checkpoints(reference.parent / "run" / checkpoint.FOLDER, keep=1) as store:
        store.save(30, state, metadata)
    return reference.parent / "run"


def _export(workdir, which, output, *, step=None, dtype="float32", reference=None):
    convert.to_diffusers(workdir, which, output, step=step, dtype=dtype, reference=reference)


def _run(*flags):
    # No network: a mistake here must not depend on it.
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "di_star_jax.convert", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def _error(call, *args, **kw) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def test_the_command_converts_a_pipeline_to_orbax_and_back_without_a_changed_byte(
    reference, tmp_path
):
    there = _run("--to=orbax", f"--input={reference}", f"--output={tmp_path / 'orbax'}")
    assert there.returncode == 0, there.stderr
    checkpoints = checkpoint.existing(tmp_path / "orbax")
    assert set(checkpoints.metadata(0)["configs"]) == {
        "denoiser",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }
    for name in ("vae", "text_encoder_2"):
        model = pipeline.abstract_model(folders.read_config(reference, name))
        restored = checkpoints.restore_item(0, name, model.params)
        expected = weights.load(reference / name, model.params)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), restored, expected))
    _export(tmp_path / "orbax", "denoiser", tmp_path / "back")
    names = [str(path.relative_to(reference)) for path in reference.rglob("*") if path.is_file()]
    assert len(names) > 12
    _, changed, missing = filecmp.cmpfiles(reference, tmp_path / "back", names, shallow=False)
    assert missing == [] and set(changed) <= {n for n in names if n.endswith(".json")}, (
        changed,
        missing,
    )


@pytest.mark.parametrize(
    "which, times",
    [
        pytest.param("generator", 1, marks=pytest.mark.long),
        ("ema", 2),
        pytest.param("assistant", 3, marks=pytest.mark.long),
    ],
)
def test_each_network_of_a_run_becomes_a_pipeline_that_diffusers_loads(
    reference, workdir, tmp_path, which, times
):
    _export(workdir, which, tmp_path / "out")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    original = diffusers.UNet2DConditionModel.from_pretrained(reference / "unet").state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, times * original[name]), name
    expected = diffusers.EulerDiscreteScheduler if which == "assistant" else diffusers.LCMScheduler
    assert type(pipe.scheduler) is expected
    assert (pipe.scheduler.config.beta_end, pipe.scheduler.config.beta_schedule) == (
        0.012,
        "scaled_linear",
    )


def test_the_exported_pipeline_makes_the_image_of_our_own_sampler(workdir, tmp_path):
    _export(workdir, "generator", tmp_path / "out")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a b c", "z"]
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        prompts,
        latents=noise,
        timesteps=[399],
        guidance_scale=0.0,
        height=16,
        width=16,
        output_type="np",
    ).images

    parts = {
        name: pipeline.load_model(tmp_path / "out" / name)
        for name in ("unet", "vae", *TEXT_ENCODERS)
    }
    ids = {
        name: np.array(
            getattr(pipe, name)(prompts, padding="max_length", truncation=True)["input_ids"]
        )
        for name in ("tokenizer", "tokenizer_2")
    }
    schedule = schedule_from_json(
        folders.read_config(tmp_path / "out", "scheduler", "scheduler_config.json")
    )
    graphs = {name: part.graphdef for name, part in parts.items()}

    @jax.jit
    def sample(params, ids, z):
        condition, _ = conditions(SDXL, SDXL.encode_text(graphs, params, ids), None, 16)
        unet, vae = (nnx.merge(graphs[name], params[name]) for name in ("unet", "vae"))
        return vae.decode(
            samplers.one_step(lambda x, t: unet(x, t, condition), z, np.array([399]), schedule)
        )

    images = sample(
        {name: part.params for name, part in parts.items()},
        ids,
        noise.numpy().transpose(0, 2, 3, 1),
    )
    ours = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
    assert theirs.std() > 0.02, "not a flat image"
    assert np.abs(np.round(255 * ours) - np.round(255 * theirs)).max() <= 1, "2 are allowed"


@pytest.mark.long
def test_a_teacher_is_drawn_by_default_as_the_papers_authors_draw_sdxl(reference):
    """Their notebook: the folder's scheduler, 50 steps, guidance 7.5."""
    loaded = drawing.load(str(reference), "ema")
    sampling = drawing.sampling_of(drawing.Asked(None, None, None, (), None), loaded)
    assert (sampling.sampler, len(sampling.timesteps), sampling.guidance_scale) == (
        "euler",
        50,
        7.5,
    )
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    ours = drawing.draw_prompts(loaded, sampling)(["a b c"], noise.numpy().transpose(0, 2, 3, 1))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(reference)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a b c",
        latents=noise,
        num_inference_steps=50,
        guidance_scale=7.5,
        output_type="np",
    ).images
    assert theirs.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours / 2 + 0.5, theirs, atol=1e-3)


@pytest.mark.long
def test_a_few_step_generator_keeps_its_times_and_draws_what_diffusers_draws(
    workdir, tmp_path, monkeypatch, caplog
):
    _export(workdir, "generator", tmp_path / "out")
    loaded = drawing.load(str(tmp_path / "out"), "ema")
    times = (999, 749, 499, 249)
    form = FewStep(times)
    assert loaded.form == drawing.load(str(workdir), "generator").form == form
    asked = drawing.Asked(None, steps=None, guidance_scale=None, timesteps=(), resolution=None)
    sampling = drawing.sampling_of(asked, loaded)
    assert sampling.sampler == "few_step" and sampling.noise_shape == (4, 8, 8, 4)

    noise = torch.randn((4, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    draw = drawing.draw_prompts(loaded, sampling)
    ours = draw(["a b c"], noise.numpy().transpose(0, 1, 3, 4, 2))

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"):
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.scheduler) is diffusers.LCMScheduler
    assert "generator_timesteps" not in caplog.text, "diffusers says nothing of our field"
    pipe.set_progress_bar_config(disable=True)
    rest = iter(noise[1:])  # the scheduler's own noise, between the steps
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *args, **kw: next(rest)
    )
    theirs = pipe(
        ["a b c"],
        latents=noise[0],
        timesteps=list(times),
        guidance_scale=0.0,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert next(rest, None) is None, "three draws between four steps"
    assert theirs.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours / 2 + 0.5, theirs, atol=2 / 255)


@pytest.mark.long
def test_an_export_that_does_not_say_its_times_is_drawn_in_one_step(workdir, tmp_path):
    _export(workdir, "ema", tmp_path / "out")
    file = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text())
    assert scheduler.pop("_generator_timesteps") == [999, 749, 499, 249]
    file.write_text(json.dumps(scheduler))
    assert drawing.load(str(tmp_path / "out"), "ema").form == FewStep((399,))
    _export(workdir, "assistant", tmp_path / "teacher")
    assert drawing.load(str(tmp_path / "teacher"), "ema").form is None


def test_a_reference_in_half_precision_files_gives_its_numbers_as_a_variant_or_without(
    reference, workdir, tmp_path
):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(reference, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.rmtree(tmp_path / "half" / "vae")
    pipe.vae.save_pretrained(tmp_path / "half" / "vae", variant="fp16", max_shard_size="10KB")
    assert len(list((tmp_path / "half" / "vae").glob("*.fp16-*.safetensors"))) > 1
    half = {"reference": str(tmp_path / "half")}
    _export(workdir, "generator", tmp_path / "out", dtype="float16", **half)
    weights_files = [path.name for path in (tmp_path / "out").rglob("*.safetensors")]
    assert len(weights_files) == 4 and all("fp16" in name for name in weights_files)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "out", dtype=torch.float16, variant="fp16"
    )
    _export(workdir, "generator", tmp_path / "plain", **half)
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "plain")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for (name, a), b, c in zip(
            getattr(pipe, part).state_dict().items(),
            getattr(again, part).state_dict().values(),
            getattr(plain, part).state_dict().values(),
        ):
            assert b.dtype == torch.float16 and torch.equal(a, b), (part, name)
            assert part == "unet" or torch.equal(c, a.float()), (part, name)


def test_a_single_unet_goes_to_orbax_and_back(reference, tmp_path):
    convert.to_orbax(reference / "unet", tmp_path / "orbax")
    _export(
        tmp_path / "orbax" / "0", "denoiser", tmp_path / "back"
    )  # one checkpoint's own folder will do
    assert (tmp_path / "back" / Path(UNET_FILE).name).read_bytes() == (
        reference / UNET_FILE
    ).read_bytes()
    convert.to_orbax(reference / "vae", tmp_path / "vae")
    error = _error(_export, tmp_path / "vae", "denoiser", tmp_path / "x")
    assert "expected one with a denoiser" in error


def test_only_data_is_copied_from_the_reference(reference, workdir, tmp_path):
    copy = shutil.copytree(reference, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer.py").write_text("raise SystemExit")
    (copy / "vae" / "old.bin").write_bytes(b"\x80\x02")
    _export(workdir, "ema", tmp_path / "out", reference=str(copy))
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes - {".txt"} == {".json", ".safetensors", ".md"}


def test_wrong_input_is_one_line_and_leaves_nothing(reference, workdir, tmp_path):
    output = tmp_path / "out"
    assert "there are [30]" in _error(_export, workdir, "ema", output, step=29)
    assert "has no 'denoiser'" in _error(_export, workdir, "denoiser", output)
    assert "no folder" in _error(_export, tmp_path / "nowhere", "ema", output)
    assert "no folder" in _error(_export, workdir, "ema", output, reference=str(tmp_path / "moved"))
    copy = shutil.copytree(reference, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder_2")
    assert "the reference has no folder" in _error(
        _export, workdir, "ema", output, reference=str(copy)
    )
    shutil.move(
        copy / "vae" / "diffusion_pytorch_model.safetensors",
        copy / "vae" / "diffusion_pytorch_model.bin",
    )
    assert "is a pickle" in _error(convert.to_orbax, copy / "vae", output)
    assert os.listdir(tmp_path) == ["copy"]
    assert "is not empty" in _error(convert.to_orbax, reference, copy)
    assert "is no model folder" in _error(_export, workdir, "ema", tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--to=orbax", "--input=nobody/nothing", "--output=out"], ["nobody/nothing", "Hub"]),
        (["--to=orbax", "--input=./nowhere", "--output=out"], ["no folder ./nowhere"]),
        (["--to=torch", "--input=a", "--output=b"], ["torch", "orbax, diffusers"]),
    ],
)
def test_wrong_flags_end_with_one_line_and_exit_code_two(flags, words, tmp_path):
    run = _run(*flags)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: "), run.stderr
    assert all(word in run.stderr for word in words), run.stderr
