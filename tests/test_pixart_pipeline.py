# SPDX-License-Identifier: Apache-2.0
"""PixArt-alpha on a small pipeline of diffusers: conditions, exports, teacher, runs."""

import json
import re
import shutil

import diffusers
import jax
import numpy as np
import pytest
import t5_reference
import torch
import transformers
from test_config import ROOT
from test_convert import _error, _export
from test_export import call_of
from test_sd15 import ASKED, to_nhwc, without_blanks, write_run
from test_train import config_for

from di_star_jax import drawing, train
from di_star_jax.diffusion import FewStep
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.pipelines.pixart import PIXART
from di_star_jax.prompts import spiece, t5
from di_star_jax.storage import checkpoint, folders

SCALED, NOISE = FewStep((440,), "scaled"), FewStep((400,), "noise")
PROMPTS = ["A Red circle, and two birds! ", "snow"]
SIZE = 32  # of the latents, which diffusers' pipeline takes for 256 pixels of its own VAE
CALL = {"height": 2 * SIZE, "width": 2 * SIZE}


def components(tmp):
    """Of a pipeline in diffusers with PixArt's layout."""
    torch.manual_seed(0)
    folder = t5_reference.write_folder(tmp / "vocabulary")
    t5.write_json(folder, folder)
    text = transformers.T5Config(
        vocab_size=2112,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=24,
        sample_size=SIZE,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        scaling_factor=0.18215,
    )
    return {
        "tokenizer": transformers.T5Tokenizer.from_pretrained(folder),
        "text_encoder": transformers.T5EncoderModel(text).eval(),
        "vae": vae,
        "transformer": transformer,
        "scheduler": diffusers.DPMSolverMultistepScheduler(),  # whose defaults PixArt publishes
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pipe = diffusers.PixArtAlphaPipeline(**components(tmp_path_factory.mktemp("t5")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference(theirs, tmp_path_factory):
    """As published: spiece.model alone, and the transformer's class of old."""
    folder = tmp_path_factory.mktemp("pixart") / "reference"
    theirs.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    t5_reference.write_folder(folder / "tokenizer")
    config = folders.read_config(folder, "transformer") | {"_class_name": "Transformer2DModel"}
    folders.write_object(folder / "transformer" / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def loaded(reference):
    return pipeline.load_pipeline(reference)


def noise(batch=2) -> torch.Tensor:
    return torch.randn((batch, 4, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def test_a_published_folder_is_a_pixart(loaded):
    assert loaded.family is PIXART and loaded.form is None
    assert {*loaded.models} == {DENOISER, "vae", "text_encoder"}


def test_condition_and_null_condition_are_those_of_diffusers(loaded, theirs):
    params = {name: model.params for name, model in loaded.models.items()}
    ids = {name: tokenizer(PROMPTS) for name, tokenizer in loaded.tokenizers.items()}
    found = jax.jit(lambda params, ids: loaded.encode_text(params, ids, 256))(params, ids)
    with torch.no_grad():
        context, mask, null, null_mask = theirs.encode_prompt(PROMPTS)
    for ours, states, seen in zip(found, (context, null), (mask, null_mask)):
        seen = seen.numpy().astype(bool)
        np.testing.assert_array_equal(ours.mask, seen)
        np.testing.assert_allclose(ours.context[seen], states.numpy()[seen], atol=1e-5)
        np.testing.assert_array_equal(ours.time_ids, [[256.0, 256.0, 1.0]] * 2)
    assert found[1].mask.sum(axis=1).tolist() == [1, 1], "the end of text alone"


@pytest.mark.parametrize(
    "form", [SCALED, pytest.param(NOISE, marks=pytest.mark.long)], ids=["scaled", "noise"]
)
def test_an_export_draws_in_diffusers_what_we_draw(reference, tmp_path, form):
    run = write_run(reference, tmp_path / "run", form, "transformer")
    _export(run, "ema", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / spiece.FILE).is_file()
    again = drawing.load(str(tmp_path / "out"), "ema")
    assert again.form == form

    call = re.search(r"pipe\((.*)\)\.images", call_of(tmp_path / "out")).group(1)
    how = "timesteps=[440]" if form == SCALED else "num_inference_steps=1"
    assert call == (
        f'"a photo of a cat", {how}, guidance_scale=0, clean_caption=False, '
        "use_resolution_binning=False"
    )
    if form == SCALED:
        assert without_blanks(f"pipe({call}).images") in without_blanks(
            (ROOT / "docs" / "dipp.md").read_text()
        )
    arguments = eval(f"dict({call.split(', ', 1)[1]})")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is diffusers.PixArtAlphaPipeline
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPTS, latents=noise(), output_type="np", **CALL, **arguments).images
    sampling = drawing.sampling_of(ASKED, again)
    ours = drawing.draw_prompts(again, sampling)(PROMPTS, to_nhwc(noise())[None]) / 2 + 0.5
    assert expected.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours, expected, atol=2 / 255)


def test_the_teacher_is_drawn_by_default_as_diffusers_draws_it(loaded, theirs):
    sampling = drawing.sampling_of(ASKED, loaded)
    assert (sampling.sampler, sampling.guidance_scale) == ("dpm_solver_pp", 4.5)
    assert sampling.timesteps.tolist() == np.linspace(0, 999, 21).round()[:0:-1].tolist()
    ours = drawing.draw_prompts(loaded, sampling)(PROMPTS, to_nhwc(noise())) / 2 + 0.5
    as_ours = {"clean_caption": False, "use_resolution_binning": False}
    expected = theirs(PROMPTS, latents=noise(), output_type="np", **as_ours, **CALL).images
    assert expected.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.long
def test_a_run_trains_resumes_and_exports(reference, tmp_path):
    (reference / "prompts.txt").write_text("a b\nc\nd e f\nz\n")
    fields = {
        "weights.generator": str(reference / "transformer"),
        "objective.name": "kl",
        "reward.pickscore": 0.0,
        "eval.metrics": (),
        "eval.prompts": "",
        "eval.teacher": "",
        "train.save_every": 1,
        "data.resolution": 2 * SIZE,
        "decode.resolution": 2 * SIZE,
    }
    for steps in (1, 2):
        config = config_for(reference, **fields, **{"train.steps": steps})
        train.run(config, str(tmp_path / "run"))
    with checkpoint.existing(tmp_path / "run") as store:
        metadata = store.metadata(3)
    assert FewStep(tuple(metadata["generator_timesteps"]), metadata["generator_input"]) == SCALED
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {1, 2, 3} <= {json.loads(line)["step"] for line in lines}
    exported = drawing.load(str(tmp_path / "run" / "diffusers"), "ema")
    assert exported.form == SCALED and exported.family is PIXART


def test_parts_that_do_not_go_together_are_refused_in_one_line(reference, tmp_path):
    config = folders.read_config(reference, "transformer")
    copy = tmp_path / "copy"
    for part in ("", "transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (copy / part).mkdir(exist_ok=True)
        for file in (reference / part).glob("*.json"):
            (copy / part / file.name).write_bytes(file.read_bytes())
    folders.write_object(copy / "transformer" / "config.json", config | {"caption_channels": 32})
    error = _error(pipeline.load_pipeline, copy)
    assert "caption_channels=32, expected 24 as the text's width" in error
    (copy / "text_encoder" / "config.json").unlink()
    assert "text_encoder" in _error(pipeline.load_pipeline, copy)
