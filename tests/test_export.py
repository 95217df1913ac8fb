# SPDX-License-Identifier: Apache-2.0
"""Exports as their users call them, and what an export may overwrite, copy and expect."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from test_convert import _error, _export, _pipeline
from test_train import config_for

from di_star_jax import convert, drawing, train
from di_star_jax.checks import check_workdir
from di_star_jax.diffusion import FewStep
from di_star_jax.evaluation.job import Request
from di_star_jax.evaluation.run import evaluate
from di_star_jax.pipelines import export
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import checkpoint, files, folders, weights

ONE, TWO, ODD = (399,), (999, 499), (900, 500)
ASKED = drawing.Asked(None, None, None, (), None)
PROMPT = "a photo of a cat"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A pipeline folder in float32, and one with nothing but half-precision files beside it."""
    tmp = tmp_path_factory.mktemp("export")
    pipe = _pipeline(tmp)
    pipe.save_pretrained(tmp / "reference")
    pipe.to(torch.float16).save_pretrained(tmp / "half", variant="fp16")
    return tmp / "reference"


@pytest.fixture(scope="module")
def workdir_of(reference, tmp_path_factory):
    """workdir_of(times) -> a run of a generator, trained from the half-precision reference."""
    config = folders.read_config(reference, "unet")
    params = weights.load(reference / "unet", pipeline.abstract_model(config).params)
    made = {}

    def make(times):
        if times not in made:
            metadata = {
                "denoiser_config": config,
                "reference": str(reference.parent / "half"),
                "generator_timesteps": list(times),
                "trained_on": {"pickscore": 100.0},
            }
            made[times] = tmp_path_factory.mktemp("run")
            with checkpoint.Checkpoints(made[times] / checkpoint.FOLDER, keep=1) as store:
                store.save(30, {"ema": params, "assistant": params}, metadata)
        return made[times]

    return make


@pytest.fixture(scope="module")
def exported(workdir_of, tmp_path_factory):
    """exported(times, dtype) -> an export; not to be changed."""
    made = {}

    def make(times, dtype="float32"):
        if (times, dtype) not in made:
            out = tmp_path_factory.mktemp("out") / "diffusers"
            _export(workdir_of(times), "ema", out, dtype=dtype)
            made[times, dtype] = out
        return made[times, dtype]

    return make


def noise_for(times) -> torch.Tensor:
    return torch.randn((len(times), 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ours(exported):
    """ours(folder, times) -> images in [0, 1] as `sample` draws a folder."""
    made = {}

    def draw(folder, times):
        key = (folder, times)
        if key not in made:
            loaded = drawing.load(str(folder), "ema")
            sampling = drawing.sampling_of(ASKED, loaded)
            assert sampling.timesteps.tolist() == list(times)
            z = noise_for(times).numpy().transpose(0, 1, 3, 4, 2)
            made[key] = drawing.draw_prompts(loaded, sampling)([PROMPT], z) / 2 + 0.5
        return made[key]

    return draw


@pytest.fixture
def theirs(monkeypatch):
    """theirs(pipe, times, **call) -> images in [0, 1] of a pipeline, on the same noise."""

    def draw(pipe, times, **call):
        noise = noise_for(times)
        rest = iter(noise[1:])  # the scheduler's own noise, between the steps
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *args, **kw: next(rest)
        )
        pipe.set_progress_bar_config(disable=True)
        images = pipe(PROMPT, latents=noise[0], guidance_scale=0, output_type="np", **call).images
        assert next(rest, None) is None and images.std() > 0.02, "not a flat image"
        return images

    return draw


def call_of(folder) -> str:
    """The code of an export's model card."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)


# The call that people type.


@pytest.mark.case("faults 5", "first hour 1", "first hour 2")
@pytest.mark.parametrize(
    "times, name",
    [
        *((ONE, name) for name in ("StableDiffusionXLPipeline", "DiffusionPipeline", "Auto")),
        pytest.param(TWO, "StableDiffusionXLPipeline", marks=pytest.mark.slow),
        pytest.param(TWO, "DiffusionPipeline", marks=pytest.mark.long),
        pytest.param(TWO, "Auto", marks=pytest.mark.long),
    ],
)
def test_the_plain_call_draws_what_we_draw(exported, ours, theirs, times, name):
    name = "AutoPipelineForText2Image" if name == "Auto" else name
    pipe = getattr(diffusers, name).from_pretrained(exported(times))
    assert {getattr(pipe, part).dtype for part in PARTS} == {torch.float32}
    images = theirs(pipe, times, num_inference_steps=len(times))
    np.testing.assert_allclose(images, ours(exported(times), times), atol=2e-5)


@pytest.mark.case("faults 5", "first hour 2")
@pytest.mark.parametrize(
    "times, arguments",
    [
        (ONE, "num_inference_steps=1, guidance_scale=0"),
        pytest.param(TWO, "num_inference_steps=2, guidance_scale=0", marks=pytest.mark.slow),
        pytest.param(ODD, "timesteps=[900, 500], guidance_scale=0", marks=pytest.mark.long),
    ],
)
def test_the_model_cards_code_runs_as_it_stands(
    exported, ours, monkeypatch, tmp_path, times, arguments
):
    folder = exported(times)
    code = call_of(folder)
    assert arguments in code and len(code.splitlines()) <= 5
    assert "# the steps and guidance that it was trained for" in code
    card = (folder / "README.md").read_text()
    assert "pickscore (scale 100)" in card and "ema, step 30" in card and "## Licence" in card
    noise = iter(noise_for(times))
    for module in (
        "pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "schedulers.scheduling_lcm",
    ):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *args, **kw: next(noise))
    os.symlink(folder, tmp_path / "diffusers")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    image = np.asarray(PIL.Image.open(tmp_path / "image.png"), int)
    assert np.abs(image - 255 * ours(folder, times)[0]).max() <= 1.0
    assert next(noise, None) is None


def test_the_model_card_has_the_hashes_the_licence_and_a_workflow_for_comfyui(
    reference, workdir_of, tmp_path
):
    base = shutil.copytree(reference, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    out = tmp_path / "mine" / "diffusers"
    _export(workdir_of(ONE), "ema", out, reference=str(base))
    card = (out / "README.md").read_text()
    assert "# mine\n" in card and "license: cc-by-nc-4.0\n---" in card
    assert "- base: `cc-by-nc-4.0`" in card and "**For non-commercial use only**" in card
    files = list(out.rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert f"| {file.relative_to(out)} | `{digest}` |" in card
    workflow = json.loads((out / "comfyui.json").read_text())
    assert workflow["1"]["inputs"]["ckpt_name"] == "mine.safetensors"
    assert workflow["4"]["inputs"]["width"] == 16 and workflow["9"]["_meta"]["title"].endswith(
        "399"
    )
    assert "--to=single --input=diffusers --output=mine.safetensors" in card
    again = tmp_path / "again"
    _export(workdir_of(ONE), "assistant", again, reference=str(out.parent.parent / "base"))
    assert (
        not (again / "comfyui.json").exists() and "ComfyUI" not in (again / "README.md").read_text()
    )


@pytest.mark.case("first hour 1")
@pytest.mark.slow
def test_the_fp16_variant_loads_in_half_and_draws_the_same_in_float32(exported, ours, theirs):
    folder = exported(ONE, "float16")
    assert 'torch_dtype=torch.float16, variant="fp16"' in call_of(folder)
    for name in ("StableDiffusionXLPipeline", "AutoPipelineForText2Image"):
        pipe = getattr(diffusers, name).from_pretrained(
            folder, torch_dtype=torch.float16, variant="fp16"
        )
        assert {getattr(pipe, part).dtype for part in PARTS} == {torch.float16}
    images = theirs(pipe.to(torch.float32), ONE, num_inference_steps=1)
    np.testing.assert_allclose(images, ours(folder, ONE), atol=2e-5)


@pytest.mark.case("first hour 1")
def test_bfloat16_is_offered(exported):
    folder = exported(ONE, "bfloat16")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {getattr(pipe, part).dtype for part in PARTS} == {torch.bfloat16}
    assert "bfloat16" in call_of(folder) and "variant" not in call_of(folder)
    assert drawing.load(str(folder), "ema").form == FewStep(ONE)


@pytest.mark.case("first hour 1", "faults 6")
@pytest.mark.parametrize("times", [ONE, pytest.param(TWO, marks=pytest.mark.long)])
def test_an_export_saved_again_by_diffusers_draws_the_same(exported, ours, theirs, tmp_path, times):
    diffusers.DiffusionPipeline.from_pretrained(exported(times)).save_pretrained(tmp_path / "again")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    images = theirs(pipe, times, num_inference_steps=len(times))
    np.testing.assert_allclose(images, ours(exported(times), times), atol=2e-5)
    assert drawing.load(str(tmp_path / "again"), "ema").form == FewStep(times)


@pytest.mark.case("first hour 1")
def test_shards_and_variant_get_the_names_that_diffusers_looks_for(
    workdir_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "MAX_SHARD", 20_000)
    _export(workdir_of(ONE), "ema", tmp_path / "out", dtype="float16")
    assert len(list((tmp_path / "out").glob("*/*.fp16-00001-of-*.safetensors"))) > 1
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=torch.float16, variant="fp16"
    )
    assert {getattr(pipe, part).dtype for part in PARTS} == {torch.float16}
    assert drawing.load(str(tmp_path / "out"), "ema").form == FewStep(ONE)


@pytest.mark.case("first hour 1")
def test_files_of_an_export_are_readable_as_any_new_file_is(exported, tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in exported(ONE).rglob("*") if path.is_file()} == {usual}


def test_every_number_of_dmd2s_steps_has_a_scheduler_that_draws_them(reference):
    for steps in range(1, 60):
        times = [999 - i * 1000 // steps for i in range(steps)]
        config = export.generator_scheduler(reference, FewStep(tuple(times)))
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        if export.calls_by_timesteps(config):
            assert steps == 38, "a rounding of diffusers' own"
            continue
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == times


# Our own commands on exports, runs and single UNets.


@pytest.mark.long
@pytest.mark.case("faults 6")
def test_evaluate_draws_an_export_at_its_times(exported, tmp_path):
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    fields = dict.fromkeys(Request.__dataclass_fields__)
    fields |= {
        "checkpoint": str(exported(TWO)),
        "which": "ema",
        "sampling": ASKED,
        "dtype": "float32",
        "seed": 0,
        "prompts": str(tmp_path / "prompts.txt"),
        "samples": 4,
        "metrics": ("saturation",),
        "weights": (),
        "features": "clipscore",
        "trained_on": (),
        "out": str(tmp_path / "out"),
        "batch_size": 8,
        "fsdp": 1,
        "max_prompts": 2,
    }
    settings = evaluate(Request(**fields)).settings
    assert (settings["sampler"], settings["timesteps"]) == ("few_step", list(TWO))


@pytest.mark.case("faults 6")
@pytest.mark.parametrize(
    "asked, words",
    [
        ({"steps": 2}, "--steps=2"),
        ({"guidance_scale": 5.0}, "--guidance_scale=5"),
        ({"sampler": "ddim", "timesteps": (399,)}, "--timestep=399 with --sampler=ddim"),
    ],
)
def test_flags_that_a_sampler_does_not_use_are_refused(exported, asked, words):
    loaded = drawing.load(str(exported(ONE)), "ema")
    assert words in _error(drawing.sampling_of, ASKED._replace(**asked), loaded)
    same = ASKED._replace(steps=1, guidance_scale=0.0)  # as diffusers is called
    assert drawing.sampling_of(same, loaded).timesteps.tolist() == [399]


@pytest.mark.case("faults 6")
def test_times_that_are_none_are_refused():
    for times in ("399", [1000], [399, 499], [True], [0.5]):
        error = _error(export.form_of, {export.TIMESTEPS: times}, FewStep((399,)))
        assert "scheduler_config.json" in error and repr(times) in error
    error = _error(export.form_of, {export.TIMESTEPS: [625], export.INPUT: "z"}, FewStep((399,)))
    assert "_generator_input is 'z', expected one of noise, scaled" in error


@pytest.mark.case("first hour 18")
def test_a_network_of_a_run_is_refused_where_there_is_no_run(exported):
    for which in ("initial", "generator", "assistant"):
        error = _error(drawing.load, str(exported(ONE)), which)
        assert f"--which={which}" in error and "is no run" in error


@pytest.mark.long
@pytest.mark.case("first hour 18")
def test_a_single_unet_is_drawn_and_converted_with_a_reference(reference, ours, theirs, tmp_path):
    unet = str(reference / "unet")
    assert "--reference_pipeline" in _error(drawing.load, unet, "ema")
    loaded = drawing.load(unet, "ema", reference=str(reference))
    assert loaded.form == FewStep(ONE)
    _export(Path(unet), "ema", tmp_path / "out", reference=str(reference))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    images = theirs(pipe, ONE, num_inference_steps=1)
    np.testing.assert_allclose(images, ours(tmp_path / "out", ONE), atol=2e-5)
    assert "--reference" in _error(_export, Path(unet), "ema", tmp_path / "x")
    assert "holds no denoiser of SDXL" in _error(
        drawing.load, str(reference / "vae"), "ema", reference=str(reference)
    )
    assert "whole pipeline" in _error(drawing.load, str(reference), "ema", reference=str(reference))


@pytest.mark.long
@pytest.mark.case("first hour 18")
def test_the_shipped_generator_is_drawn_by_the_command(tmp_path):
    shipped = Path(drawing.__file__).parent / "shapes" / "checkpoint"
    command = [sys.executable, "-m", "di_star_jax.sample", "--num=1", "--prompt=a red circle"]
    command += [f"--checkpoint={shipped / 'generator'}", f"--reference={shipped}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "by few_step in 1 step;" in done.stdout
    assert np.asarray(PIL.Image.open(tmp_path / "out" / "0000.png")).std() > 5


# Where a run's reference is.


@pytest.mark.case("faults 17", "first hour 12")
def test_a_run_stores_what_was_configured():
    class Settings:
        generator = FewStep(ONE)

    config = config_for(Path("a/pipeline"))
    config.weights.reference = "stabilityai/stable-diffusion-xl-base-1.0"
    model = pipeline.Model(None, None, {})
    loaded = pipeline.Pipeline(Path("/cache"), None, {"denoiser": model}, {}, None)
    parts = train.Parts(loaded, {})
    metadata = json.loads(json.dumps(train.metadata_of(config, parts, Settings)))
    assert metadata["reference"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert metadata["initial"] == "a/pipeline/generator"
    assert metadata["weights"]["pickscore"] == "a/pipeline/reward"
    assert metadata["directory"] == os.getcwd()
    assert checkpoint.located(metadata) == metadata, "what is a Hub's name stays it"


@pytest.mark.long
@pytest.mark.case("faults 17", "first hour 12")
def test_a_moved_run_finds_its_reference_by_its_relative_path_or_is_told(
    reference, tmp_path, monkeypatch
):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(reference, first / "base")
    config = folders.read_config(reference, "unet")
    params = weights.load(reference / "unet", pipeline.abstract_model(config).params)
    metadata = {
        "denoiser_config": config,
        "reference": "./base",
        "generator_timesteps": [399],
        "directory": str(first),
        "weights": {"pickscore": "base/vae", "hpsv2": "nobody/model"},
    }
    with checkpoint.Checkpoints(first / "run" / checkpoint.FOLDER, keep=1) as store:
        store.save(1, {"ema": params}, metadata)
    monkeypatch.chdir("/")
    assert drawing.load(str(first / "run"), "ema").folder == first / "base"
    assert checkpoint.located(metadata)["weights"] == {
        "pickscore": str(first / "base" / "vae"),
        "hpsv2": "nobody/model",
    }
    first.rename(moved)
    for read in (
        lambda: drawing.load(str(moved / "run"), "ema"),
        lambda: _export(moved / "run", "ema", tmp_path / "out"),
    ):
        error = _error(read)
        assert "--reference_pipeline" in error and "base" in error
    given = str(moved / "base")
    assert drawing.load(str(moved / "run"), "ema", reference=given).folder == moved / "base"
    _export(moved / "run", "ema", tmp_path / "out", reference=given)
    monkeypatch.chdir(moved)
    assert drawing.load("run", "ema").folder == Path("base")


# Nothing is deleted or leaked.


def tree(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.case("faults 1")
@pytest.mark.parametrize(
    "foreign",
    ["config.json", "model_index.json", "notes.md", "src/.hidden", "vae/lora.safetensors"],
)
def test_an_output_with_anything_foreign_is_refused(workdir_of, exported, tmp_path, foreign):
    for output in (tmp_path / "p", shutil.copytree(exported(ONE), tmp_path / "earlier")):
        (output / foreign).parent.mkdir(exist_ok=True, parents=True)
        (output / foreign).write_text("{}")
        before = tree(tmp_path)
        assert foreign in _error(_export, workdir_of(ONE), "ema", output)
        assert tree(tmp_path) == before


@pytest.mark.case("faults 1")
def test_an_earlier_export_is_replaced_unless_it_was_edited(workdir_of, exported, tmp_path):
    output = shutil.copytree(exported(ONE), tmp_path / "out")
    (output / "README.md").unlink()
    _export(workdir_of(TWO), "ema", output)
    assert drawing.load(str(output), "ema").form == FewStep(TWO)
    (output / "README.md").write_text("My notes.")
    assert "README.md" in _error(_export, workdir_of(ONE), "ema", output)
    os.symlink(output, tmp_path / "link")
    shutil.rmtree(output)
    shutil.copytree(exported(ONE), output)
    _export(workdir_of(TWO), "ema", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert drawing.load(str(output), "ema").form == FewStep(TWO)


@pytest.mark.case("faults 1")
def test_the_reference_the_current_folder_and_what_is_around_them_are_refused(
    workdir_of, exported, tmp_path, monkeypatch
):
    source = shutil.copytree(exported(ONE), tmp_path / "all" / "source")  # ours, and yet in use
    before = tree(tmp_path)
    for output in (source, source / "inner"):
        error = _error(_export, workdir_of(ONE), "ema", output, reference=str(source))
        assert "which is read" in error
    for around in (tmp_path / "all", tmp_path):
        assert "which is read" in _error(folders.check_output, around, [source])
        assert "overwritten" in _error(_export, workdir_of(ONE), "ema", around)
    monkeypatch.chdir(source)
    for output in (".", "..", "/"):
        assert "current folder" in _error(_export, workdir_of(ONE), "ema", Path(output))
    assert tree(tmp_path) == before


@pytest.mark.case("faults 11")
def test_a_tilde_is_the_home_folder(workdir_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    _export(workdir_of(ONE), "ema", Path("~/x"))
    assert os.listdir(tmp_path) == ["home"]
    assert drawing.load("~/x", "ema").form == FewStep(ONE)
    convert.to_orbax("~/x/unet", "~/orbax")
    assert checkpoint.existing("~/orbax").latest_step() == 0
    assert files.expand("~/x") == tmp_path / "home" / "x"
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.case("faults 2")
@pytest.mark.parametrize("name", ["x[1]", "lr[5e-7", "a*", "a?", "a\\b"])
def test_a_folder_whose_checkpoints_could_not_be_read_back_is_refused(reference, tmp_path, name):
    for write in (
        lambda: convert.to_orbax(reference / "unet", tmp_path / name),
        lambda: check_workdir(str(tmp_path / name)),
        lambda: checkpoint.Checkpoints(tmp_path / name / "checkpoints", keep=1),
    ):
        assert "cannot be read back" in _error(write)
    assert os.listdir(tmp_path) == []


@pytest.mark.case("faults 3")
@pytest.mark.parametrize(
    "link", ["tokenizer/tokenizer_config.json", "text_encoder", "vae/config.json"]
)
def test_a_link_that_leaves_the_reference_is_refused(reference, workdir_of, tmp_path, link):
    copy = shutil.copytree(reference, tmp_path / "copy")
    shutil.move(copy / link, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", copy / link)
    error = _error(_export, workdir_of(ONE), "ema", tmp_path / "out", reference=str(copy))
    assert str(copy / link) in error and "leads out" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.case("faults 3")
def test_only_known_files_are_copied_and_the_hubs_cache_may_link(
    reference, workdir_of, tmp_path, exported
):
    hub = tmp_path / "models--base"
    snapshot = shutil.copytree(reference, hub / "snapshots" / "abc")
    (hub / "blobs").mkdir()
    for i, file in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
        file.rename(hub / "blobs" / str(i))
        file.symlink_to(os.path.relpath(hub / "blobs" / str(i), file.parent))
    (tmp_path / "key").write_text("secret")
    (snapshot / "tokenizer" / "notes.txt").symlink_to(tmp_path / "key")
    (snapshot / "vae" / "other.json").write_text("{}")
    _export(workdir_of(ONE), "ema", tmp_path / "out", reference=str(snapshot))
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    }
    assert not names & {"tokenizer/notes.txt", "vae/other.json"}
    drawing.load(str(tmp_path / "out"), "ema")


# What the end needs is asked for at the start.


def index_with(folder, **entries) -> Path:
    index = folders.read_config(folder, name="model_index.json")
    folders.write_object(folder / "model_index.json", index | entries)
    return folder


@pytest.mark.case("faults 16")
def test_an_optional_component_that_is_absent_is_none_in_the_export(
    reference, workdir_of, tmp_path
):
    copy = shutil.copytree(reference, tmp_path / "copy")
    absent = ["transformers", "CLIPVisionModelWithProjection"]
    index_with(copy, image_encoder=absent, feature_extractor=["transformers", "X"])
    _export(workdir_of(ONE), "ema", tmp_path / "out", reference=str(copy))
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert pipe.image_encoder is None and pipe.feature_extractor is None


@pytest.mark.case("faults 16")
def test_a_needed_component_that_is_absent_stops_a_run_before_it_begins(reference, tmp_path):
    copy = shutil.copytree(reference, tmp_path / "copy")
    index_with(copy, text_encoder_3=["a", "B"])
    error = _error(train.run, config_for(copy), str(tmp_path / "run"))
    assert "text_encoder_3" in error and list((tmp_path / "run").rglob("*")) == []


@pytest.mark.case("faults 1", "faults 16")
def test_a_workdir_whose_export_would_be_refused_stops_a_run_before_it_begins(reference, tmp_path):
    (tmp_path / "run" / "diffusers").mkdir(parents=True)
    (tmp_path / "run" / "diffusers" / "notes.md").touch()
    error = _error(train.run, config_for(reference), str(tmp_path / "run"))
    assert "notes.md" in error and os.listdir(tmp_path / "run") == ["diffusers"]


def test_a_workdir_with_the_config_of_its_run_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert folders.is_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert not folders.is_model(tmp_path) and drawing.is_run(str(tmp_path))
