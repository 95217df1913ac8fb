# SPDX-License-Identifier: Apache-2.0
"""Each field of a file is followed as diffusers follows it, harmless, or refused."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import transformers
from flax import nnx

from di_star_jax import drawing, samplers
from di_star_jax.errors import UserError
from di_star_jax.models import blip, clip, config, pixart, published, tiny_vae, unet, vae
from di_star_jax.pipelines import export, scheduler
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.rewards import imagereward
from di_star_jax.shapes import networks

CHECKPOINT = Path(__file__).parents[1] / "di_star_jax" / "shapes" / "checkpoint"

# As published on the Hub, field by field.
OF_SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
OF_TURBO = {
    **OF_SDXL,
    "_class_name": "EulerAncestralDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "timestep_spacing": "trailing",
}
OF_SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
UNET_SDXL = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
UNET_SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE_SDXL = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_SDXL = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "vocab_size": 49408,
}
INDEX_SDXL = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def names(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def refused(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


# What diffusers and transformers have, we know.

SCHEDULERS = [getattr(diffusers, name) for name in scheduler._CLASSES]
KNOWN = {
    diffusers.UNet2DConditionModel: (unet.UNetConfig, unet.FIELDS),
    diffusers.AutoencoderKL: (vae.VAEConfig, vae.FIELDS),
    diffusers.AutoencoderTiny: (tiny_vae.TinyVAEConfig, tiny_vae.FIELDS),
    transformers.CLIPTextConfig: (clip.CLIPTextConfig, clip.FIELDS),
    transformers.CLIPVisionConfig: (clip.CLIPVisionConfig, clip.VISION_FIELDS),
    transformers.CLIPConfig: (clip.CLIPConfig, clip.JOINT_FIELDS),
    transformers.BertConfig: (blip.BLIPConfig, blip.FIELDS),
    **dict.fromkeys(SCHEDULERS, (scheduler._Betas, scheduler.FIELDS)),
}


def fields_of(cls) -> dict:
    """Of a class's files, with its defaults."""
    if issubclass(cls, transformers.PretrainedConfig):
        return cls().to_dict()
    parameters = inspect.signature(cls.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


@pytest.mark.case("faults 7")
@pytest.mark.parametrize("cls", KNOWN, ids=lambda cls: cls.__name__)
def test_every_field_of_a_class_stands_in_a_table_and_its_default_is_supported(cls):
    followed, fields = KNOWN[cls]
    found = {name: value for name, value in fields_of(cls).items() if not name.startswith("_")}
    tables = [names(followed), set(fields.fixed), set(fields.harmless)]
    for name, default in found.items():
        places = sum(name in table for table in tables)
        assert places == 1, f"{name}={default!r} stands in {places} tables"
        if name in fields.fixed and cls is not transformers.BertConfig:
            assert config._is_one_of(default, fields.fixed[name]), (name, default)


@pytest.mark.case("faults 7")
def test_what_a_scheduler_leaves_out_is_what_its_class_assumes():
    for cls in SCHEDULERS:
        schedule = scheduler.schedule_from_json({"_class_name": cls.__name__})
        theirs = cls().alphas_cumprod.double().sqrt()
        np.testing.assert_allclose(schedule.alpha, theirs, rtol=1e-4, err_msg=cls.__name__)
    for sampler, cls in (
        ("euler", diffusers.EulerDiscreteScheduler),
        ("ddim", diffusers.DDIMScheduler),
        ("dpm_solver_pp", diffusers.DPMSolverMultistepScheduler),
        ("few_step", diffusers.LCMScheduler),
    ):
        followed, fields = scheduler._FIELDS[sampler]
        theirs = fields_of(cls)
        for name, value in dataclasses.asdict(followed()).items():
            assert theirs[name] == value, (sampler, name)
        for name, only in fields.fixed.items():
            assert name not in theirs or config._is_one_of(theirs[name], only), (sampler, name)


def test_the_published_files_are_read(tmp_path):
    for known in (UNET_SDXL, UNET_SD15, VAE_SDXL, TEXT_SDXL):
        pipeline.model_class(known)
    assert unet.UNetConfig.from_json(UNET_SDXL) == unet.UNetConfig.from_json(published.UNET_SDXL)
    assert unet.UNetConfig.from_json(UNET_SD15) == unet.UNetConfig.from_json(published.UNET_SD15)
    assert vae.VAEConfig.from_json(VAE_SDXL) == vae.VAEConfig.from_json(published.VAE_SDXL)
    config.check_others(
        SDXL.index,
        INDEX_SDXL,
        "model_index.json",
        names(drawing.Drawer)
        | {*SDXL.tokenizers, *(part.folder for part in SDXL.parts.values()), "scheduler"},
    )
    # What transformers wrote until version 5, with all that concerns the writing of text.
    for name, value in {"top_k": 50, "length_penalty": 1.0, "id2label": {"0": "a"}}.items():
        clip.CLIPTextConfig.from_json({**TEXT_SDXL, name: value})


@pytest.mark.parametrize("cls", [diffusers.UNet2DConditionModel, diffusers.AutoencoderKL])
def test_what_diffusers_leaves_at_its_defaults_is_built_alike(cls):
    ours, _ = KNOWN[cls]
    theirs = fields_of(cls)
    for name, value in dataclasses.asdict(ours()).items():
        if name == "v_prediction":  # the scheduler's to say in diffusers
            continue
        expected = theirs[name]
        count = len(theirs["block_out_channels"])
        assert value == expected or value == (expected,) * count, name


# A field of a newer library.


@pytest.mark.case("faults 7")
def test_a_field_that_nobody_knows_is_refused_unless_it_is_off():
    new = {**UNET_SDXL, "_note": {"a": 1}, "qk_norm": None, "use_rope": False}
    unet.UNetConfig.from_json(new)
    message = refused(unet.UNetConfig.from_json, {**new, "use_rope": True}, "m/unet/config.json")
    assert "m/unet/config.json has use_rope=True" in message
    message = refused(scheduler.schedule_from_json, {**OF_SDXL, "warp": "x" * 999}, "s.json")
    assert "s.json has warp='xxx" in message and len(message) < 200


# Samplers.

Z = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)


def eps_fn(x, t):
    """Some smooth function of x and t, the same in jax and torch."""
    wave = (x * 0.7).tanh() if isinstance(x, torch.Tensor) else jnp.tanh(x * 0.7)
    return wave + 0.3 * x * t.reshape(-1, 1, 1, 1) / 1000.0


def drawn_by_diffusers(built, steps: int) -> np.ndarray:
    built.set_timesteps(steps)
    x = torch.tensor(Z) * built.init_noise_sigma
    for t in built.timesteps:
        eps = eps_fn(built.scale_model_input(x, t), t.reshape(1).float())
        x = built.step(eps, t, x, return_dict=False)[0]
    return x.numpy()


def drawn_by_us(file: dict, sampler: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(x_0, times)"""
    times, settings = scheduler.spacing(scheduler.SchedulerFile(file), sampler, steps)
    schedule = scheduler.schedule_from_json(file)
    x0 = samplers.SAMPLERS[sampler](eps_fn, jnp.array(Z), times, schedule, **settings)
    return np.asarray(x0), times


VARIANTS = {
    "SDXL": OF_SDXL,
    "Turbo": OF_TURBO,
    "SD 1.5": OF_SD15,
    "nothing said": {"_class_name": "EulerDiscreteScheduler"},
    "linspace": {**OF_SDXL, "timestep_spacing": "linspace"},
    "offset": {**OF_SDXL, "steps_offset": 17},
    "all alpha": {**OF_SDXL, "set_alpha_to_one": True},
    "trailing, all alpha": {**OF_TURBO, "set_alpha_to_one": True},
    "clipped": {**OF_SDXL, "clip_sample": True, "clip_sample_range": 0.7},
    "linear betas": {**OF_SDXL, "beta_schedule": "linear", "beta_end": 0.02},
}
SAMPLERS = {
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm_solver_pp": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.case("faults 7")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sampler_follows_the_file_as_its_class_in_diffusers_does(variant, sampler):
    file = VARIANTS[variant]
    for steps in (1, 2, 7, 30):
        built = SAMPLERS[sampler].from_config(file)
        theirs = drawn_by_diffusers(built, steps)
        ours, times = drawn_by_us(file, sampler, steps)
        np.testing.assert_allclose(times, built.timesteps.numpy(), rtol=1e-6)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=3e-4, err_msg=f"{steps}")


@pytest.mark.case("faults 7")
def test_eulers_last_noise_level_is_followed():
    file = {**OF_SDXL, "final_sigmas_type": "sigma_min"}
    theirs = drawn_by_diffusers(diffusers.EulerDiscreteScheduler.from_config(file), 7)
    np.testing.assert_allclose(drawn_by_us(file, "euler", 7)[0], theirs, atol=1e-3)


@pytest.mark.case("faults 7")
@pytest.mark.parametrize(
    "change, samplers_that_refuse",
    [
        ({"use_karras_sigmas": True}, ("euler", "dpm_solver_pp")),
        ({"use_beta_sigmas": True}, ("euler", "dpm_solver_pp")),
        ({"use_exponential_sigmas": True}, ("euler", "dpm_solver_pp")),
        ({"use_lu_lambdas": True}, ("dpm_solver_pp",)),
        ({"interpolation_type": "log_linear"}, ("euler",)),
        ({"thresholding": True}, ("ddim", "dpm_solver_pp", "few_step")),
        ({"clip_sample": True}, ("few_step",)),
        ({"timestep_scaling": 5.0}, ("few_step",)),
        ({"solver_order": 3}, ("dpm_solver_pp",)),
        ({"algorithm_type": "sde-dpmsolver++"}, ("dpm_solver_pp",)),
        ({"final_sigmas_type": "sigma_min"}, ("dpm_solver_pp",)),
        ({"timestep_spacing": "sideways"}, ("euler", "ddim", "dpm_solver_pp")),
        ({"steps_offset": -1}, ("euler", "ddim", "dpm_solver_pp")),
        ({"steps_offset": 399}, ("euler", "ddim", "dpm_solver_pp")),
    ],
)
def test_what_a_sampler_does_not_follow_is_refused_by_those_that_diffusers_has_it_for(
    change, samplers_that_refuse
):
    file = scheduler.SchedulerFile({**OF_SDXL, **change}, "m/scheduler/scheduler_config.json")
    scheduler.schedule_from_json(*file)
    [(field, _)] = change.items()
    for sampler in samplers.SAMPLERS:
        call = scheduler.check if sampler == "few_step" else scheduler.spacing
        args = (file, sampler) if sampler == "few_step" else (file, sampler, 20)
        if sampler in samplers_that_refuse:
            message = refused(call, *args)
            assert file.file in message and field in message
        else:
            call(*args)


@pytest.mark.case("faults 7", "faults 18")
@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
        {"use_flow_sigmas": True},
        {"num_train_timesteps": 10**10},
        {"beta_start": "0.1"},
        {"beta_end": 12},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": ["EulerDiscreteScheduler"]},
    ],
)
def test_another_noise_schedule_is_refused_with_file_and_field(change):
    [(field, value)] = change.items()
    message = refused(scheduler.schedule_from_json, {**OF_SDXL, **change}, "m/s.json")
    assert f"m/s.json has {field}={value!r}" in message


# Networks.


@pytest.mark.slow
@pytest.mark.case("faults 7")
def test_a_unets_rarer_values_are_followed_as_in_diffusers():
    known = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [16, 24],
        "norm_num_groups": 4,
        "norm_eps": 1e-2,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "layers_per_block": [1, 1],
        "attention_head_dim": [2, 3],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": [12, 12],
        "only_cross_attention": [False, False],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "in_channels": 3,
        "out_channels": 5,
        "sample_size": [8, 8],
    }
    arguments = {name: value for name, value in known.items() if name != "_class_name"}
    theirs = parity.randomise(diffusers.UNet2DConditionModel(**arguments))
    graphdef, params = parity.port(theirs, known)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    context = rng.standard_normal((2, 5, 12)).astype(np.float32)
    t = np.array([3, 777])
    with torch.no_grad():
        expected = theirs(parity.to_nchw(x), torch.tensor(t), torch.tensor(context)).sample
    condition = unet.Condition(context, None, None)
    ours = jax.jit(lambda params: nnx.merge(graphdef, params)(x, t, condition))(params)
    assert parity.relative(ours, parity.to_nhwc(expected)) < parity.FORWARD


CLIP_B32 = published.CLIP_B32
BASES = {
    "unet": (unet.UNetConfig.from_json, published.UNET_SDXL),
    "vae": (vae.VAEConfig.from_json, published.VAE_SDXL),
    "text": (clip.CLIPTextConfig.from_json, published.CLIP_BIGG_TEXT),
    "clip": (clip.CLIPConfig.from_json, CLIP_B32),
    "blip": (blip.BLIPConfig.from_json, imagereward.PUBLISHED),
}


@pytest.mark.case("faults 18")
@pytest.mark.parametrize(
    "base, change",
    [
        ("unet", {"norm_num_groups": 0}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"in_channels": -4}),
        ("unet", {"in_channels": "4"}),
        ("unet", {"block_out_channels": [320, "640", 1280]}),
        ("unet", {"block_out_channels": 320}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"attention_head_dim": [5, 10]}),
        ("unet", {"attention_head_dim": [5, 10, 21]}),
        ("unet", {"layers_per_block": [2, 2, 3]}),
        ("unet", {"layers_per_block": 10**4}),
        ("unet", {"transformer_layers_per_block": 10**6}),
        ("unet", {"transformer_layers_per_block": [[1], [2], [10]]}),
        ("unet", {"block_out_channels": [32] * 40}),
        ("unet", {"freq_shift": 160}),
        ("unet", {"cross_attention_dim": None}),
        ("unet", {"addition_time_embed_dim": None}),
        ("unet", {"projection_class_embeddings_input_dim": 5}),
        ("unet", {"use_linear_projection": "yes"}),
        ("unet", {"down_block_types": ["CrossAttnUpBlock2D"] * 3}),
        ("unet", {"conv_in_kernel": 1}),
        ("unet", {"only_cross_attention": [False, True, False]}),
        ("unet", {"attention_type": "gated"}),
        ("unet", {"quantization_config": {"load_in_8bit": True}}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": None}),
        ("vae", {"norm_num_groups": 3}),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        ("vae", {"up_block_types": ["UpDecoderBlock2D"]}),
        ("vae", {"latents_mean": [0.1, 0, 0, 0]}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"mid_block_add_attention": False}),
        ("text", {"num_hidden_layers": 10**6}),
        ("text", {"hidden_act": ["gelu"]}),
        ("text", {"vocab_size": 10**12}),
        ("text", {"layer_norm_eps": True}),
        ("text", {"num_attention_heads": 7}),
        ("clip", {"text_config": 3}),
        ("clip", {"vision_config": {"patch_size": 500}}),
        ("clip", {"vision_config": {"rope_theta": 1e4}}),
        ("blip", {"vision_config": []}),
        ("blip", {"position_embedding_type": "relative_key"}),
    ],
)
def test_an_absurd_value_is_refused_with_the_files_path_and_the_field(base, change):
    read, known = BASES[base]
    [(field, value)] = change.items()
    message = refused(read, {**known, **change}, "m/part/config.json")
    assert "m/part/config.json has" in message or "config of m/part/config.json has" in message
    inner = field if not isinstance(value, dict) or not value else next(iter(value))
    assert inner in message or field in message


@pytest.mark.case("faults 18")
def test_a_list_of_equal_numbers_is_the_number():
    same = {**published.UNET_SDXL, "layers_per_block": [2, 2, 2], "cross_attention_dim": [2048] * 3}
    assert unet.UNetConfig.from_json(same) == unet.UNetConfig.from_json(published.UNET_SDXL)


@pytest.mark.case("faults 18")
@pytest.mark.parametrize("content", [{}, {"_class_name": {}}, {"architectures": "CLIPModel"}])
def test_a_file_that_describes_nothing_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = refused(pipeline.load_model, tmp_path)
    assert f"{tmp_path / 'config.json'} describes" in message


# Pipelines.


@pytest.fixture
def copy(tmp_path):
    """The shapes world's pipeline."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "m"))


def edit(file: Path, *gone: str, **changed) -> None:
    content = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in gone}))


@pytest.mark.case("faults 18")
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer"])
def test_a_pipeline_without_a_part_is_refused_before_anything_is_read(copy, name):
    file = copy / "model_index.json"
    for value in ([None, None], 3, {}, "x", [], ["diffusers"], None):
        edit(file, **{name: value})
        assert f"{file} has {name}=" in refused(pipeline.load_pipeline, copy)
    edit(file, name)
    assert f"{file} has {name}=None" in refused(pipeline.load_pipeline, copy)


@pytest.mark.case("faults 7")
@pytest.mark.parametrize(
    "change",
    [
        {"force_zeros_for_empty_prompt": False},
        {"requires_aesthetics_score": True},
        {"_class_name": "StableDiffusion3Pipeline"},
        {"controlnet": ["diffusers", "ControlNetModel"]},
    ],
)
def test_another_kind_of_pipeline_is_refused(copy, change):
    edit(copy / "model_index.json", **change)
    [(field, value)] = change.items()
    assert f"{copy / 'model_index.json'} has {field}={value!r}" in refused(
        pipeline.load_pipeline, copy
    )


def test_an_sdxl_that_calls_itself_sd15_is_refused(copy):
    file = copy / "model_index.json"
    edit(file, _class_name="StableDiffusionPipeline")
    assert f"{file} has force_zeros_for_empty_prompt=True" in refused(pipeline.load_pipeline, copy)
    edit(file, "force_zeros_for_empty_prompt", "text_encoder_2", "tokenizer_2")
    message = refused(pipeline.load_pipeline, copy)
    assert f"{copy}/unet/config.json has addition_embed_type='text_time'" in message
    assert "give the parts of one SD 1.5 pipeline" in message


@pytest.mark.case("faults 18")
@pytest.mark.parametrize(
    "part, change, said",
    [
        ("unet", {"in_channels": 9}, "in_channels=9, expected 4"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim=64, expected 160"),
        ("text_encoder_2", {"projection_dim": 32}, "projection_class_embeddings_input_dim=112"),
        ("text_encoder_2", {"architectures": ["CLIPTextModel"]}, "is of a CLIPTextModel"),
        ("vae", {"latent_channels": 16}, "in_channels=4, expected 16"),
        ("text_encoder", {"vocab_size": 600}, "has vocab_size=600"),
        ("text_encoder", {"max_position_embeddings": 10}, "max_position_embeddings=10"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(copy, part, change, said):
    edit(copy / part / "config.json", **change)
    if "token" in said or "vocab" in said or "position" in said:
        message = refused(pipeline.load_tokenizers, copy, SDXL)
    else:
        message = refused(pipeline.check_pipeline, copy)
    assert said in message


@pytest.mark.long
@pytest.mark.case("faults 7")
def test_a_trailing_file_is_drawn_from_its_last_time_as_diffusers_draws_it(copy):
    """The fault as it was seen: t = 1, which is pure noise."""
    edit(copy / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    loaded = pipeline.load_pipeline(copy)
    asked = drawing.Asked("euler", 1, 0.0, (), None)
    sampling = drawing.sampling_of(asked, loaded)
    assert sampling.timesteps.tolist() == [999]
    z = np.random.default_rng(1).standard_normal((1, 16, 16, 4)).astype(np.float32)
    prompt = (CHECKPOINT / "prompts_held_out.txt").read_text().splitlines()[0]
    ours = drawing.draw_prompts(loaded, sampling)([prompt], z)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        copy, variant="fp16", torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt,
        num_inference_steps=1,
        guidance_scale=0.0,
        latents=parity.to_nchw(z),
        output_type="np",
    ).images
    np.testing.assert_allclose(ours / 2 + 0.5, theirs, atol=1e-4)


NOTHING = drawing.Asked(None, None, None, (), None)


@pytest.fixture(scope="module")
def shapes():
    return pipeline.load_pipeline(CHECKPOINT)


def with_scheduler(loaded: pipeline.Pipeline, file: dict) -> pipeline.Pipeline:
    form = export.form_of(file, SDXL.one_step)
    return loaded._replace(scheduler=scheduler.SchedulerFile(file), form=form)


@pytest.mark.parametrize(
    "file, sampler, theirs",
    [
        (OF_SDXL, "euler", diffusers.EulerDiscreteScheduler),
        ({**OF_SDXL, "_class_name": "DDIMScheduler"}, "ddim", diffusers.DDIMScheduler),
        (
            {**OF_SDXL, "_class_name": "DPMSolverMultistepScheduler"},
            "dpm_solver_pp",
            diffusers.DPMSolverMultistepScheduler,
        ),
        (OF_SD15, "euler", diffusers.EulerDiscreteScheduler),  # PNDM's is not ported
    ],
)
def test_a_teacher_is_drawn_by_default_by_its_folders_scheduler_with_the_papers_settings(
    shapes, file, sampler, theirs
):
    sampling = drawing.sampling_of(NOTHING, with_scheduler(shapes, file))
    built = theirs.from_config(file)
    built.set_timesteps(50)
    assert sampling.sampler == sampler and sampling.timesteps.tolist() == built.timesteps.tolist()
    assert sampling.guidance_scale == 7.5


def test_a_generator_has_no_guidance_by_default_and_the_shapes_world_its_own(shapes):
    assert shapes.scheduler.config == networks.SCHEDULER
    found = drawing.sampling_of(NOTHING, shapes)
    assert (found.sampler, len(found.timesteps), found.guidance_scale) == ("euler", 50, 3.0)
    asked = drawing.sampling_of(NOTHING._replace(steps=7, guidance_scale=2.0), shapes)
    assert (len(asked.timesteps), asked.guidance_scale) == (7, 2.0)
    lcm = with_scheduler(shapes, {**OF_SDXL, "_class_name": "LCMScheduler"})
    generator = drawing.sampling_of(NOTHING, lcm)
    assert (generator.sampler, generator.timesteps.tolist()) == ("few_step", [399])
    assert not generator.guided


@pytest.mark.parametrize("value", ["7.5", -1, True, None, [5.0], float("inf"), float("nan")])
def test_a_folders_guidance_that_is_none_is_refused(shapes, value):
    loaded = with_scheduler(shapes, {**OF_SDXL, scheduler.GUIDANCE_SCALE: value})
    message = refused(drawing.sampling_of, NOTHING, loaded)
    assert message.startswith("scheduler_config.json has _guidance_scale=")
    given = drawing.sampling_of(NOTHING._replace(guidance_scale=2.0), loaded)
    assert given.guidance_scale == 2.0


@pytest.mark.case("faults 7")
def test_weights_of_another_setting_are_not_run_as_the_references(copy):
    unet_config = json.loads((copy / "unet" / "config.json").read_text())
    pipeline.check_like(copy / "generator", unet_config)
    pipeline.check_like(copy / "tokenizer", unet_config)  # has none
    edit(copy / "generator" / "config.json", sample_size=99)
    pipeline.check_like(copy / "generator", unet_config)
    edit(copy / "generator" / "config.json", norm_eps=1e-6)
    message = refused(pipeline.check_like, copy / "generator", unet_config)
    assert f"{copy / 'generator' / 'config.json'} has norm_eps=1e-06" in message
    assert "is of AutoencoderKL" in refused(pipeline.check_like, copy / "vae", unet_config)


# Tokenizers.


@pytest.mark.case("faults 20")
@pytest.mark.parametrize("content", [b"", b"\xff\x00\x01", b"[]", b"[" * 10**5, b'{"a":' * 10**5])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizers_file_is_named(copy, name, content):
    (copy / "tokenizer" / name).write_bytes(content)
    assert f"{copy / 'tokenizer' / name} " in refused(Tokenizer, copy / "tokenizer")


@pytest.mark.case("faults 20")
@pytest.mark.parametrize("value", [-1, 0, 2, "77", [], {}, True])
def test_an_absurd_length_of_prompts_is_refused(copy, value):
    file = copy / "tokenizer" / "tokenizer_config.json"
    edit(file, model_max_length=value)
    message = refused(Tokenizer, copy / "tokenizer")
    assert f"{file} has model_max_length={value!r}" in message


@pytest.mark.case("faults 20")
def test_what_transformers_cannot_read_is_one_line_with_its_reason(copy):
    folder = copy / "tokenizer"
    whole = json.loads((folder / "tokenizer.json").read_text())
    for merges in (["a"], [["q", "zz"]], 5, [[1, 2]]):
        broken = {**whole, "model": {**whole["model"], "merges": merges}}
        (folder / "tokenizer.json").write_text(json.dumps(broken))
        assert f"cannot read the tokenizer in {folder}" in refused(Tokenizer, folder)
    for field in whole:
        for value in (None, -1, "x", [], {}, [[[]]]):
            (folder / "tokenizer.json").write_text(json.dumps({**whole, field: value}))
            try:
                assert Tokenizer(folder)(["a cat"]).shape == (1, 20)
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert "padding token" in refused(Tokenizer, folder)
    edit(folder / "tokenizer_config.json", "pad_token")
    assert Tokenizer(folder)(["a"])[0, -1] == 603, "transformers' own: the end of text"
    edit(folder / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    assert "tokenizer_class='T5Tokenizer'" in refused(Tokenizer, folder)


@pytest.mark.case("faults 20")
def test_a_vocabulary_that_is_no_text_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    message = refused(imagereward.BertTokenizer, tmp_path, 30524)
    assert f"cannot read {tmp_path / 'vocab.txt'}" in message


# All fields of all files.

NESTED = [[[[["x"]]]]]
VALUES = [None, True, -1, 0, 1, 10**20, 10**400, 1e30, -1e400, "x", "", [], {}, NESTED, [1, 2, 3]]
FILES = {
    "unet": {
        **networks.UNET,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 2],
        "transformer_layers_per_block": [1, 1],
        **{name: only[0] for name, only in unet.FIELDS.fixed.items()},
    },
    "vae": {
        **networks.VAE,
        "block_out_channels": [16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        **{name: only[0] for name, only in vae.FIELDS.fixed.items()},
    },
    "tiny_vae": {
        **published.TINY_VAE,
        "decoder_block_out_channels": [16, 16],
        "num_decoder_blocks": [1, 1],
        **{name: only[0] for name, only in tiny_vae.FIELDS.fixed.items()},
    },
    "transformer": {
        **parity.PIXARTS["PixArt-1024"],
        "interpolation_scale": 2,
        "use_additional_conditions": True,
        **{name: only[0] for name, only in pixart.FIELDS.fixed.items()},
    },
    "text_encoder": TEXT_SDXL,
    "reward": CLIP_B32,
    "scheduler": OF_SDXL,
}


def use(name: str, known: dict) -> None:
    """What is done with a file before weights are read."""
    if name != "scheduler":
        pipeline.abstract_model(known)
        return
    scheduler.schedule_from_json(known)
    file = scheduler.SchedulerFile(known)
    scheduler.check(file, "few_step")
    for sampler in SAMPLERS:
        scheduler.spacing(file, sampler, 4)


@pytest.mark.case("faults 18")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in ("unet", "vae") else name
        for name in FILES
    ],
)
def test_any_value_of_any_field_works_or_is_one_line(name, monkeypatch):
    # A model of each set of settings is built once.
    built = {}

    def once(port, known, options):
        settings = port.settings.from_json(known)
        if settings not in built:
            built[settings] = abstract(port, known, options)
        return built[settings]

    abstract = pipeline.abstract_port
    monkeypatch.setattr(pipeline, "abstract_port", once)
    known = FILES[name]
    use(name, known)
    for field in [*known, "a_new_field"]:
        for value in VALUES:
            changed = [{**known, field: value}]
            if isinstance(known.get(field), list):
                changed += [{**known, field: [value, *known[field][1:]]}]
            if isinstance(known.get(field), dict):
                changed += [{**known, field: {**known[field], k: value}} for k in known[field]]
            for each in changed:
                try:
                    use(name, each)
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 500, (field, value)


@pytest.mark.case("faults 18")
def test_any_value_in_an_index_works_or_is_one_line(copy):
    file = copy / "model_index.json"
    known = json.loads(file.read_text())
    for field in known:
        for value in VALUES:
            file.write_text(json.dumps({**known, field: value}))
            try:
                pipeline.check_pipeline(copy)
            except UserError as error:
                assert "\n" not in str(error) and str(file) in str(error), (field, value)
