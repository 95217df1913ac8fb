# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.5 on a small pipeline of diffusers: conditions, exports, teacher, runs."""

import json
import logging
import re
import shutil
import warnings

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from test_config import ROOT
from test_convert import TEXT, _error, _export, _run, _tokenizer
from test_export import call_of
from test_fields import OF_SD15
from test_train import config_for

from di_star_jax import drawing, train
from di_star_jax.diffusion import FewStep
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.scheduler import GUIDANCE_SCALE
from di_star_jax.storage import checkpoint, folders, weights

SCALED, NOISE = FewStep((625,), "scaled"), FewStep((399,), "noise")
# As published: what stands in model_index.json beside the parts that are read.
UNUSED = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
PROMPTS = ["a b c", "z"]
ASKED = drawing.Asked(None, None, None, (), None)


def write_sd15(folder):
    """Writes a pipeline with SD 1.5's layout and files into a folder. Returns: folder."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder.parent / f"{folder.name} vocabulary")
    text = transformers.CLIPTextConfig(
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53, **TEXT
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
    )
    diffusers.StableDiffusionPipeline(
        vae,
        transformers.CLIPTextModel(text),
        tokenizer,
        unet,
        diffusers.PNDMScheduler.from_config(OF_SD15),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    folders.write_object(folder.joinpath(*folders.SCHEDULER), OF_SD15)
    index = folders.read_config(folder, name="model_index.json")
    folders.write_object(folder / "model_index.json", index | UNUSED)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"nobody reads this")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_sd15(tmp_path_factory.mktemp("sd15") / "reference")


@pytest.fixture(scope="module")
def loaded(reference):
    return pipeline.load_pipeline(reference)


@pytest.fixture(scope="module")
def theirs(reference):
    """The pipeline in diffusers."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(reference, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(batch=2) -> torch.Tensor:
    return torch.randn((batch, 4, 8, 8), generator=torch.Generator().manual_seed(0))


def to_nhwc(z: torch.Tensor) -> np.ndarray:
    return z.numpy().transpose(0, 2, 3, 1)


# What the network is told.


def test_condition_and_null_condition_are_those_of_diffusers(loaded, theirs):
    assert type(theirs.scheduler) is diffusers.PNDMScheduler
    with torch.no_grad():
        expected = theirs.encode_prompt(PROMPTS, "cpu", 1, True)
    params = {name: model.params for name, model in loaded.models.items()}
    ids = {name: tokenizer(PROMPTS) for name, tokenizer in loaded.tokenizers.items()}
    found = jax.jit(lambda params, ids: loaded.encode_text(params, ids, 16))(params, ids)
    for ours, each in zip(found, expected):
        assert ours.context.shape == (2, 77, 16) and ours.pooled is ours.time_ids is None
        np.testing.assert_allclose(ours.context, each.numpy(), atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # of a prompt and of none


# A one-step generator in diffusers.


def without_blanks(text):
    """Code, however its lines are broken."""
    return "".join(text.split()).replace(",)", ")")


def write_run(reference, folder, form, part="unet"):
    """A run with a checkpoint of a generator, the reference's denoiser."""
    config = folders.read_config(reference, part)
    params = weights.load(reference / part, pipeline.abstract_model(config).params)
    metadata = {
        "denoiser_config": config,
        "reference": str(reference),
        "generator_timesteps": list(form.timesteps),
        "generator_input": form.input,
    }
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER, keep=1) as store:
        store.save(30, {"ema": params}, metadata)
    return folder


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(SCALED, marks=pytest.mark.long),
        pytest.param(NOISE, marks=pytest.mark.long),
    ],
    ids=["scaled", "noise"],
)
def test_an_export_draws_in_diffusers_what_we_draw(reference, tmp_path, caplog, monkeypatch, form):
    run = write_run(reference, tmp_path / "run", form)
    assert drawing.load(str(run), "ema").form == form
    _export(run, "ema", tmp_path / "out")

    index = folders.read_config(tmp_path / "out", name="model_index.json")
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    assert not (tmp_path / "out" / "safety_checker").exists()
    assert (tmp_path / "out" / "feature_extractor" / "preprocessor_config.json").is_file()
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.safety_checker is None and type(pipe.feature_extractor).__name__.startswith("CLIP")
    told = " ".join([caplog.text, *(str(each.message) for each in said)])
    assert not re.search("safety|outdated|_generator", told), told

    call = re.search(r"pipe\((.*)\)\.images", call_of(tmp_path / "out")).group(1)
    assert call == f'"a photo of a cat", timesteps={list(form.timesteps)}, guidance_scale=0'
    if form == SCALED:
        assert without_blanks(f"pipe({call}).images") in without_blanks(
            (ROOT / "docs" / "dipp.md").read_text()
        )
    arguments = eval(f"dict({call.split(', ', 1)[1]})")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS, latents=noise(), output_type="np", **arguments).images
    again = drawing.load(str(tmp_path / "out"), "ema")
    assert again.form == form
    sampling = drawing.sampling_of(ASKED, again)
    ours = drawing.draw_prompts(again, sampling)(PROMPTS, to_nhwc(noise())[None]) / 2 + 0.5
    assert expected.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours, expected, atol=2 / 255)
    other = {"input": "noise" if form.input == "scaled" else "scaled"}
    differs = sampling._replace(settings=other)
    wrong = drawing.draw_prompts(again, differs)(PROMPTS, to_nhwc(noise())[None]) / 2 + 0.5
    assert np.abs(wrong - expected).max() > 4 / 255, "the other form is seen"


def test_a_denoisers_folder_alone_is_a_generator_of_the_familys_form(reference):
    alone = drawing.load(str(reference / "unet"), "ema", reference=str(reference))
    assert alone.form == SCALED
    sampling = drawing.sampling_of(ASKED, alone)
    assert sampling.timesteps.tolist() == [625] and sampling.settings == {"input": "scaled"}


# The teacher.


@pytest.mark.parametrize(
    "sampler, scheduler",
    [
        pytest.param("euler", diffusers.EulerDiscreteScheduler, marks=pytest.mark.slow),
        pytest.param("ddim", diffusers.DDIMScheduler, marks=pytest.mark.long),
        pytest.param(
            "dpm_solver_pp", diffusers.DPMSolverMultistepScheduler, marks=pytest.mark.long
        ),
    ],
)
def test_the_teacher_is_drawn_as_diffusers_draws_it(loaded, theirs, sampler, scheduler):
    sampling = drawing.sampling_of(ASKED._replace(sampler=sampler, steps=20), loaded)
    assert sampling.guidance_scale == 7.5 and GUIDANCE_SCALE not in loaded.scheduler.config
    ours = drawing.draw_prompts(loaded, sampling)(PROMPTS, to_nhwc(noise())) / 2 + 0.5
    pipe = diffusers.StableDiffusionPipeline(
        **{**theirs.components, "scheduler": scheduler.from_config(theirs.scheduler.config)},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPTS,
        latents=noise(),
        num_inference_steps=20,
        guidance_scale=7.5,
        output_type="np",
    ).images
    assert expected.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours, expected, atol=1e-4)


# A run.


@pytest.mark.long
@pytest.mark.parametrize("form", [SCALED, NOISE], ids=lambda form: form.input)
def test_a_run_trains_resumes_and_exports(reference, tmp_path, form):
    (reference / "prompts.txt").write_text("a b\nc\nd e f\nz\n")
    says = {} if form == SCALED else {"generator.timesteps": (399,), "generator.input": "noise"}
    fields = {
        "weights.generator": str(reference / "unet"),
        "objective.name": "kl",
        "reward.pickscore": 0.0,
        "eval.metrics": (),
        "eval.prompts": "",
        "eval.teacher": "",
        "train.save_every": 1,
        **says,
    }
    for steps in (1, 2):
        config = config_for(reference, **fields, **{"train.steps": steps})
        train.run(config, str(tmp_path / "run"))
    with checkpoint.existing(tmp_path / "run") as store:
        metadata = store.metadata(3)
    assert (metadata["generator_timesteps"], metadata["generator_input"]) == (
        list(form.timesteps),
        form.input,
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {1, 2, 3} <= {json.loads(line)["step"] for line in lines}
    exported = drawing.load(str(tmp_path / "run" / "diffusers"), "ema")
    assert exported.form == form and exported.family.name == "SD 1.5"
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "diffusers")


# What does not go together.


def test_a_denoiser_of_sdxl_is_refused_in_one_line(reference, tmp_path):
    copy = shutil.copytree(reference, tmp_path / "copy")
    config = folders.read_config(copy, "unet")
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    folders.write_object(copy / "unet" / "config.json", config | added)
    error = _error(pipeline.load_pipeline, copy)
    assert "addition_embed_type='text_time', expected None as SD 1.5" in error
    folders.write_object(copy / "unet" / "config.json", config | {"cross_attention_dim": 32})
    error = _error(pipeline.load_pipeline, copy)
    assert "cross_attention_dim=32, expected 16 as the text's width" in error
    alone = shutil.copytree(copy / "unet", tmp_path / "alone")
    error = _error(pipeline.check_like, alone, folders.read_config(reference, "unet"))
    assert "cross_attention_dim=32, but the reference has 16" in error


def test_a_pipeline_of_another_class_is_refused_with_exit_code_two(reference, tmp_path):
    copy = shutil.copytree(reference, tmp_path / "copy")
    index = folders.read_config(copy, name="model_index.json")
    folders.write_object(copy / "model_index.json", index | {"_class_name": "FluxPipeline"})
    run = _run("--to=orbax", f"--input={copy}", f"--output={tmp_path / 'out'}")
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "model_index.json has _class_name='FluxPipeline', expected " in run.stderr
    assert "StableDiffusionXLPipeline" in run.stderr and not (tmp_path / "out").exists()
