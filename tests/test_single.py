# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in one file of the original layout, beside diffusers' `from_single_file`.

The files are written by names and shapes alone (original_layout.py), and the folders with their
settings hold no weights.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import ml_collections
import numpy as np
import original_layout
import pytest
import safetensors
import safetensors.torch
import torch
import transformers

from di_star_jax import convert, drawing, sample
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.models.unet import V_PREDICTION
from di_star_jax.pipelines import card, original, single
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.export import generator_scheduler
from di_star_jax.pipelines.scheduler import SchedulerFile
from di_star_jax.pipelines.sd15 import SD15
from di_star_jax.pipelines.sdxl import SDXL
from di_star_jax.storage import checkpoint, folders, weights
from di_star_jax.storage.weights import Stored

_VAE = original_layout.Vae(8, (1, 2, 2, 4))
_CLIP = original_layout.Text(16, 2, 32, vocab=54)
LAYOUTS = {
    "sdxl": original_layout.Checkpoint(
        original_layout.UNet(32, (1, 2, 4), (1, 2), (0, 2, 3), 48, adm_in_channels=80),
        _VAE,
        _CLIP,
        original_layout.Text(32, 12, 64, vocab=54),
    ),
    "sd15": original_layout.Checkpoint(
        original_layout.UNet(
            32, (1, 2, 4), (0, 1), (1, 1, 1), 16, num_res_blocks=1, use_linear=False
        ),
        _VAE,
        _CLIP,
    ),
}
_VAE_CONFIG = {"block_out_channels": [8, 16, 16, 32], "norm_num_groups": 4}
_TEXT_CONFIG = {
    "vocab_size": 54,
    "bos_token_id": 52,
    "eos_token_id": 53,
    "pad_token_id": 53,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
CONFIGS = {
    "sdxl": {
        "unet": published.UNET_SDXL
        | {
            "block_out_channels": [32, 64, 128],
            "norm_num_groups": 8,
            "transformer_layers_per_block": [1, 2, 3],
            "attention_head_dim": [2, 4, 8],
            "cross_attention_dim": 48,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        "vae": published.VAE_SDXL | _VAE_CONFIG,
        "text_encoder": published.CLIP_L_TEXT | _TEXT_CONFIG,
        "text_encoder_2": published.CLIP_BIGG_TEXT
        | _TEXT_CONFIG
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 12,
            "projection_dim": 32,
        },
    },
    "sd15": {
        "unet": published.UNET_SD15
        | {
            "block_out_channels": [32, 64, 128],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
        },
        "vae": published.VAE_SD15 | _VAE_CONFIG,
        "text_encoder": published.CLIP_L_TEXT | _TEXT_CONFIG,
    },
}
PIPELINES = {
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd15": diffusers.StableDiffusionPipeline,
}
# Of the published sd_xl_base_1.0.safetensors and v1-5-pruned-emaonly.safetensors: md5 of the sorted
# names and "name:shape", with a comma between each two, by which DiffSynth-Studio's
# configs/model_config.py knows the files.
PUBLISHED = {
    "sdxl": (original_layout.SDXL, 2515, "4cf64a799d04260df438c6f33c9a047e"),
    "sd15": (original_layout.SD15, 1131, "03343c606f16d834d6411d0902b53636"),
}


def _settings(folder: Path, kind: str) -> Path:
    """A pipeline's folder without weights."""
    folder.mkdir()
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    index = {
        "_class_name": PIPELINES[kind].__name__,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    names = {"tokenizer": "CLIPTokenizer"}
    if kind == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
        names["tokenizer_2"] = "CLIPTokenizer"
    else:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    for name in names:
        tokenizer.save_pretrained(folder / name)
        index[name] = ["transformers", names[name]]
    scheduler.save_pretrained(folder / "scheduler")
    for name, config in CONFIGS[kind].items():
        (folder / name).mkdir()
        folders.write_object(folder / name / "config.json", config)
        library = "diffusers" if "_class_name" in config else "transformers"
        index[name] = [library, config.get("_class_name") or config["architectures"][0]]
    folders.write_object(folder / "model_index.json", index)
    return folder


def _tensors(kind: str, dtype=torch.float16) -> dict[str, torch.Tensor]:
    """A whole file's, random."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in original_layout.shapes(LAYOUTS[kind]).items():
        if name.endswith("position_ids"):
            found[name] = torch.arange(77)[None]
        else:
            is_norm = len(shape) == 1 and name.endswith("weight")
            tensor = 0.05 * torch.randn(shape, generator=generator) + is_norm
            found[name] = tensor.to(dtype)
    return found


def _file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path)
    return path


def _plain_names(state: dict) -> dict:
    """Of a text encoder, whose prefix transformers has dropped."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _run(*options):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "di_star_jax.convert", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def _error(call, *args, **kw) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def settings(kind, tmp_path_factory):
    return _settings(tmp_path_factory.mktemp("settings") / kind, kind)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return _settings(tmp_path_factory.mktemp("settings") / "sdxl", "sdxl")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "di_star_jax" / "single"


# In.


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)],
)
def test_a_folder_of_a_single_file_has_diffusers_weights_byte_for_byte(
    kind, settings, tmp_path, dtype
):
    file = _file(tmp_path / "all.safetensors", _tensors(kind, dtype))
    theirs = PIPELINES[kind].from_single_file(
        str(file), config=str(settings), torch_dtype=dtype, local_files_only=True
    )
    single.to_folder(file, tmp_path / "out", reference=str(settings))
    for name in CONFIGS[kind]:
        expected = _plain_names(getattr(theirs, name).state_dict())
        with weights.opened(tmp_path / "out" / name) as stored:
            ours = _plain_names(stored)
            assert set(ours) == set(expected) - {"embeddings.position_ids"}
            for key, tensor in ours.items():
                assert tensor.dtype == weights._NAMES[str(dtype).removeprefix("torch.")]
                bits = expected[key].contiguous().view(torch.uint8).numpy().tobytes()
                assert tensor.read().tobytes() == bits, (name, key)


@pytest.mark.long
def test_the_folder_is_a_pipeline_that_diffusers_loads(kind, settings, tmp_path):
    file = _file(tmp_path / "all.safetensors", _tensors(kind))
    done = _run(
        "--to=diffusers",
        f"--input={file}",
        f"--output={tmp_path / 'out'}",
        f"--reference={settings}",
    )
    assert done.returncode == 0, done.stderr
    assert f"those of {settings}" in done.stdout
    pipe = PIPELINES[kind].from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    theirs = PIPELINES[kind].from_single_file(
        str(file), config=str(settings), torch_dtype=torch.float16, local_files_only=True
    )
    for name in CONFIGS[kind]:
        expected = getattr(theirs, name).state_dict()
        for key, tensor in getattr(pipe, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), (name, key)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert pipe.tokenizer("a b").input_ids == theirs.tokenizer("a b").input_ids
    pipeline.check_pipeline(tmp_path / "out")


def test_a_single_file_becomes_a_checkpoint_of_the_same_numbers(kind, settings, tmp_path):
    tensors = _tensors(kind)
    file = _file(tmp_path / "all.safetensors", tensors)
    convert.file_to_orbax(file, tmp_path / "orbax", str(settings))
    with checkpoint.existing(tmp_path / "orbax") as store:
        metadata = store.metadata(0)
        assert set(metadata["configs"]) == {"denoiser", *CONFIGS[kind]} - {"unet"}
        abstract = single.abstract_model(CONFIGS[kind]["unet"]).params
        unet = weights.tensors_from_params(store.restore_item(0, "denoiser", abstract))
    prefix = "model.diffusion_model."
    assert (unet["conv_in.weight"] == tensors[f"{prefix}input_blocks.0.0.weight"].numpy()).all()
    assert (unet["conv_out.bias"] == tensors[f"{prefix}out.2.bias"].numpy()).all()


def test_dtype_casts_and_names_the_variant(sdxl, tmp_path):
    file = _file(tmp_path / "all.safetensors", _tensors("sdxl", torch.float32))
    single.to_folder(file, tmp_path / "out", dtype="float16", reference=str(sdxl))
    names = {path.name for path in (tmp_path / "out").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=torch.float16, variant="fp16"
    )
    assert pipe.text_encoder.dtype == torch.float16


def test_the_card_of_a_converted_file_names_it_and_so_does_that_of_the_file_made_of_it(
    sdxl, tmp_path
):
    file = _file(tmp_path / "theirs.safetensors", _tensors("sdxl"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for out, dtype, loaded in (
        ("as_it_is", None, 'from_pretrained("as_it_is", torch_dtype=torch.float16)'),
        ("half", "float16", 'from_pretrained("half", torch_dtype=torch.float16, variant="fp16")'),
    ):
        single.to_folder(file, tmp_path / out, dtype=dtype, reference=str(sdxl))
        page = (tmp_path / out / "README.md").read_text()
        assert loaded in page and f"theirs.safetensors (SHA-256 `{digest}`)" in page
        assert "A diffusion model, converted by di_star_jax" in page and str(tmp_path) not in page
        assert "Weights are stored as: unet float16, vae float16, text_encoder float16" in page
        own = tmp_path / out / "unet" / f"diffusion_pytorch_model{'.fp16' * (dtype is not None)}"
        hashed = hashlib.sha256(Path(f"{own}.safetensors").read_bytes()).hexdigest()
        assert f"| unet/{own.name}.safetensors | `{hashed}` |" in page
    single.from_folder(tmp_path / "as_it_is", tmp_path / "again.safetensors")
    page = (tmp_path / "again.md").read_text()
    assert f"theirs.safetensors (SHA-256 `{digest}`)" in page and "nothing was trained" in page


def test_what_old_and_full_files_hold_besides_is_left_out(sdxl, tmp_path):
    tensors = _tensors("sdxl")
    more = {
        "conditioner.embedders.0.transformer.text_projection.weight": torch.ones(16, 16),
        "conditioner.embedders.0.logit_scale": torch.ones(()),
        "denoiser.sigmas": torch.ones(1000),
        "model_ema.num_updates": torch.ones((), dtype=torch.int32),
        "first_stage_model.loss.logvar": torch.ones(()),
    }
    attention = "first_stage_model.decoder.mid.attn_1.q.weight"
    more[attention] = tensors[attention][:, :, 0, 0].contiguous()  # a matrix, as some tools write
    single.to_folder(
        _file(tmp_path / "all.safetensors", tensors | more), tmp_path / "out", reference=str(sdxl)
    )
    with weights.opened(tmp_path / "out" / "vae") as stored:
        found = stored["decoder.mid_block.attentions.0.to_q.weight"].read()
    assert (found == more[attention].numpy()).all()


def test_an_old_text_encoders_shorter_names_are_known(tmp_path):
    settings = _settings(tmp_path / "settings", "sd15")
    old = {name.replace(".text_model.", "."): t for name, t in _tensors("sd15").items()}
    single.to_folder(
        _file(tmp_path / "all.safetensors", old), tmp_path / "out", reference=str(settings)
    )
    with weights.opened(tmp_path / "out" / "text_encoder") as stored:
        found = stored["text_model.final_layer_norm.bias"].read()
    assert (found == old["cond_stage_model.transformer.final_layer_norm.bias"].numpy()).all()


# Other files.

_UNET = "model.diffusion_model."
_CONV_IN = _UNET + "input_blocks.0.0.weight"


def _like(change: dict) -> dict:
    return _tensors("sdxl") | change


def _bytes(*names: str) -> dict:
    return {name: torch.ones(8, dtype=torch.uint8) for name in names}


# Names of a file's tensors, and what it is said to be.
_BY_NAME = {
    "conditioner.embedders.0.model.ln_final.bias": "is an SDXL refiner checkpoint",
    "cond_stage_model.model.ln_final.bias": "is an SD 2 checkpoint",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": "is an SD3 checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "is a FLUX checkpoint",
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": "is a LoRA file",
    "unet.down_blocks.1.attentions.0.to_q.lora_A.weight": "is a LoRA file",
    "control_model.input_hint_block.0.bias": "is a ControlNet",
    "down_blocks.0.resnets.0.conv1.bias": "is one network of a pipeline",
    "first_stage_model.encoder.conv_in.bias": "has no UNet",
    _CONV_IN: "has no text encoders",
    "thing": "it holds thing",
}
_CHANGED = {
    "an inpainting checkpoint of 9 input channels": lambda: {_CONV_IN: torch.ones(32, 9, 3, 3)},
    "an InstructPix2Pix checkpoint": lambda: {_CONV_IN: torch.ones(32, 8, 3, 3)},
    "an SDXL checkpoint quantised to fp8": lambda: {
        _CONV_IN: torch.ones(32, 4, 3, 3).to(torch.float8_e4m3fn)
    },
    "an SDXL checkpoint quantised to nf4": lambda: _bytes(
        _UNET + "out.2.weight", _UNET + "out.2.weight.quant_state.bitsandbytes__nf4"
    ),
    "out.2.bias is [5], expected [4]": lambda: {_UNET + "out.2.bias": torch.ones(5)},
    "extra model.diffusion_model.strange": lambda: {_UNET + "strange": torch.ones(5)},
}


@pytest.mark.parametrize("name, said", _BY_NAME.items())
def test_another_file_is_named(sdxl, tmp_path, name, said):
    file = _file(tmp_path / "it.safetensors", {name: torch.ones(32, 4, 3, 3)})
    assert said in _error(single.to_folder, file, tmp_path / "out", reference=str(sdxl))
    assert os.listdir(tmp_path) == ["it.safetensors"]


@pytest.mark.parametrize("said", _CHANGED)
def test_a_changed_file_is_named_and_nothing_is_written(sdxl, tmp_path, said):
    file = _file(tmp_path / "it.safetensors", _like(_CHANGED[said]()))
    assert said in _error(single.to_folder, file, tmp_path / "out", reference=str(sdxl))
    assert os.listdir(tmp_path) == ["it.safetensors"]


def _as_generator(file, settings):
    given = {"reference": str(settings), "generator": str(file), "assistant": ""}
    single.with_folders(ml_collections.ConfigDict({"weights": given}))


_ENTRANCES = {
    "sample": lambda file, settings: drawing.load(str(file), "ema", reference=str(settings)),
    "generator": _as_generator,
    "orbax": lambda file, settings: convert.file_to_orbax(file, f"{file}.out", str(settings)),
}
_LONG = [(said, entrance) for said in _CHANGED for entrance in _ENTRANCES]
_LONG.remove(("an SDXL checkpoint quantised to fp8", "generator"))


# Files of whole networks take a second or two each: one through one entrance stands for the others,
# which are named above.
@pytest.mark.parametrize(
    "said, entrance",
    [
        pytest.param(
            said,
            entrance,
            marks=[pytest.mark.long] if (said, entrance) in _LONG else [],
        )
        for said in [*_BY_NAME.values(), *_CHANGED, "download it again", "a GGUF"]
        for entrance in _ENTRANCES
    ],
)
def test_whoever_takes_a_file_names_another_and_leaves_nothing(
    sdxl, cache, tmp_path, entrance, said
):
    file = tmp_path / "it.safetensors"
    if said in _CHANGED:
        _file(file, _like(_CHANGED[said]()))
    elif said == "a GGUF":
        file.write_bytes(b"GGUF\x03" + bytes(100))
    else:
        names = [name for name, words in _BY_NAME.items() if words == said]
        _file(file, {name: torch.ones(32, 4, 3, 3) for name in names or ["thing"]})
        if not names:
            file.write_bytes(file.read_bytes()[:-10])
    message = _error(_ENTRANCES[entrance], file, sdxl)
    is_generators = entrance == "generator" and said == "is a LoRA file"
    assert ("adapters of another network" if is_generators else said) in message
    assert str(file) in message
    assert os.listdir(tmp_path) == ["it.safetensors"] or not os.listdir(cache)


def test_a_refused_file_leaves_no_folder_for_pictures(tmp_path):
    def refuse(name, picture=False):
        with pytest.raises(UserError), sample._folder(str(tmp_path / name)) as out:
            if picture:
                (out / "0000.png").touch()
            raise UserError("it is a FLUX checkpoint")

    refuse("new")
    (tmp_path / "there").mkdir()
    refuse("there")
    refuse("drawn", picture=True)
    assert sorted(os.listdir(tmp_path)) == ["drawn", "there"]


def test_a_file_without_vae_is_said_to_lack_it(sdxl, tmp_path):
    tensors = {k: t for k, t in _tensors("sdxl").items() if "first_stage" not in k}
    file = _file(tmp_path / "it.safetensors", tensors)
    message = _error(single.to_folder, file, tmp_path / "out", reference=str(sdxl))
    assert "missing first_stage_model." in message


def test_a_truncated_file_is_named_by_the_command(sdxl, tmp_path):
    file = _file(tmp_path / "it.safetensors", _tensors("sdxl"))
    file.write_bytes(file.read_bytes()[:-1000])
    done = _run(
        "--to=diffusers", f"--input={file}", f"--output={tmp_path / 'out'}", f"--reference={sdxl}"
    )
    assert done.returncode == 2 and "download it again" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and str(file) in done.stderr
    assert os.listdir(tmp_path) == ["it.safetensors"]


def test_a_weight_that_is_not_finite_leaves_nothing_behind(sdxl, tmp_path):
    tensors = _like({_UNET + "out.2.bias": torch.full((4,), float("nan"))})
    file = _file(tmp_path / "it.safetensors", tensors)
    message = _error(single.to_folder, file, tmp_path / "out", reference=str(sdxl))
    assert "not finite" in message and os.listdir(tmp_path) == ["it.safetensors"]


def test_the_reference_is_of_the_files_family(sdxl, tmp_path):
    file = _file(tmp_path / "it.safetensors", _tensors("sd15"))
    message = _error(single.to_folder, file, tmp_path / "out", reference=str(sdxl))
    assert f"{file} is an SD 1.5 checkpoint, but {sdxl} is of SDXL" in message


def test_without_network_and_reference_the_missing_parts_are_named(tmp_path, monkeypatch):
    file = _file(tmp_path / "it.safetensors", _tensors("sdxl"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = _error(single.to_folder, file, tmp_path / "out")
    assert "holds no tokenizers" in message and "stable-diffusion-xl-base-1.0" in message
    assert "--reference=FOLDER" in message


# Names and shapes at full size.


@pytest.mark.parametrize("layout, count, digest", PUBLISHED.values(), ids=PUBLISHED)
def test_names_and_shapes_are_the_published_files(layout, count, digest):
    """Guards original_layout.py, by which all here is written, with digests of the real files."""
    found = original_layout.shapes(layout)
    lines = [*found, *(f"{name}:{'_'.join(map(str, shape))}" for name, shape in found.items())]
    assert len(found) == count
    assert hashlib.md5(",".join(sorted(lines)).encode()).hexdigest() == digest


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_diffusers_networks_at_full_size_have_the_published_names_and_shapes(kind):
    layout = {"sdxl": original_layout.SDXL, "sd15": original_layout.SD15}[kind]
    family = {"sdxl": SDXL, "sd15": SD15}[kind]
    configs = published.PIPELINES[single.hub_name(family)][1]
    found = {}
    for name, (start, network) in family.original.items():
        config = configs[name]
        with torch.device("meta"):
            if "_class_name" in config:
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            else:
                cls = getattr(transformers, config["architectures"][0])
                model = cls(transformers.CLIPTextConfig(**config))
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if "_class_name" not in config:  # transformers has dropped a part of the names
            shapes = {
                key if key.startswith("text_") else f"text_model.{key}": shape
                for key, shape in shapes.items()
                if not key.endswith("position_ids")
            }
        for key, shape in original.original_shapes(network, shapes).items():
            found[start + key] = shape
    tables = {name: Stored(shape, "F32", None) for name, shape in found.items()}
    found |= {name: tensor.shape for name, tensor in single._fixed(family, tables).items()}
    assert found == original_layout.shapes(layout)


# Out.


def test_a_folder_becomes_a_file_that_diffusers_loads_and_back_byte_for_byte(
    kind, settings, tmp_path
):
    tensors = _tensors(kind)
    for name in tensors:
        if name.endswith("logit_scale"):
            tensors[name] = torch.tensor(np.log(100.0), dtype=torch.float16)
    file = _file(tmp_path / "all.safetensors", tensors)
    single.to_folder(file, tmp_path / "folder", reference=str(settings))
    again = tmp_path / "again" / "all.safetensors"
    written = single.from_folder(tmp_path / "folder", again)
    with safetensors.safe_open(again, framework="pt") as found:
        assert set(found.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(found.get_tensor(name), tensor), name
            assert found.get_tensor(name).dtype == tensor.dtype
    pipe = PIPELINES[kind].from_single_file(
        str(again),
        config=str(tmp_path / "folder"),
        torch_dtype=torch.float16,
        local_files_only=True,
    )
    first = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.state_dict()["conv_in.weight"], first)
    assert written.form is None and PIPELINES[kind].__name__ in written.usage
    single.to_folder(again, tmp_path / "back", reference=str(settings))
    names = [str(p.relative_to(tmp_path / "folder")) for p in (tmp_path / "folder").rglob("*.*")]
    names = [name for name in names if name not in (card.FILE, card.FACTS, folders.MARKER)]
    assert len(names) >= 10  # weights, settings and tokenizers of SD 1.5
    _, changed, missing = filecmp.cmpfiles(
        tmp_path / "folder", tmp_path / "back", names, shallow=False
    )
    assert not changed and not missing


def test_a_file_has_the_dtype_that_is_asked_for_and_the_call_of_a_generator(sdxl, tmp_path):
    file = _file(tmp_path / "all.safetensors", _tensors("sdxl", torch.float32))
    single.to_folder(file, tmp_path / "folder", reference=str(sdxl))
    scheduler = generator_scheduler(sdxl, FewStep((399,)))
    folders.write_object(tmp_path / "folder" / "scheduler" / "scheduler_config.json", scheduler)
    file = str(tmp_path / "b.safetensors")
    said, _ = convert._to_single(str(tmp_path / "folder"), file, "bfloat16")
    with weights.opened(tmp_path / "b.safetensors") as stored:
        assert {t.dtype for t in stored.values()} == {"BF16", "I64"}
    assert "LCM sampler, times 399" in said and "num_inference_steps=1, guidance_scale=0" in said
    pipe = PIPELINES["sdxl"].from_single_file(
        str(tmp_path / "b.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    pipe.scheduler.set_timesteps(1)
    assert pipe.scheduler.timesteps.tolist() == [399]


def test_a_files_card_draws_without_a_folder_and_lies_beside_it_with_picture_and_workflow(
    sdxl, tmp_path, monkeypatch
):
    file = _file(tmp_path / "all.safetensors", _tensors("sdxl", torch.float32))
    folder = tmp_path / "run" / "diffusers"  # of a workdir
    single.to_folder(file, folder, reference=str(sdxl))
    scheduler = generator_scheduler(sdxl, FewStep((399,)))
    folders.write_object(folder / "scheduler" / "scheduler_config.json", scheduler)
    about = card.About("ema, step 5", (card.Base("base", False, "mit"),), {"pickscore": 7.0})
    folders.write_object(folder / card.FACTS, about.facts())
    (folder / card.PICTURE).write_bytes(b"picture")
    out = tmp_path / "out"
    written = single.from_folder(tmp_path / "run", out / "mine.safetensors", repository="me/a")
    names = {"mine.safetensors", "mine.md", "mine.png", "mine.comfyui.json"}
    assert set(os.listdir(out)) == names and set(written.files) == names - {"mine.md"} | {
        "README.md"
    }
    assert (out / "mine.png").read_bytes() == b"picture"
    workflow = json.loads((out / "mine.comfyui.json").read_text())
    assert workflow["1"]["inputs"]["ckpt_name"] == "mine.safetensors"
    page = (out / "mine.md").read_text()
    digest = hashlib.sha256((out / "mine.safetensors").read_bytes()).hexdigest()
    for said in (
        f"| mine.safetensors | `{digest}` |",
        "![samples](mine.png)",
        "pickscore (scale 7)",
    ):
        assert said in page
    assert "license: mit" in page and "(mine.comfyui.json)" in page and str(tmp_path) not in page
    code = re.search(r"```python\n(.*?)```", page, re.S).group(1)
    assert "https://huggingface.co/me/a/blob/main/mine.safetensors" in code
    cls = PIPELINES["sdxl"]
    load, drawn = cls.from_single_file, []

    def here(address, **kw):
        name = address.rpartition("/")[2]
        return load(str(out / name), config=str(sdxl), local_files_only=True, **kw)

    def call(pipe, *args, **kw):
        pipe.scheduler.set_timesteps(kw["num_inference_steps"])
        drawn.append((pipe.scheduler.timesteps.tolist(), float(pipe.scheduler.init_noise_sigma)))
        raise StopIteration

    monkeypatch.setattr(cls, "from_single_file", here)
    monkeypatch.setattr(cls, "__call__", call)
    with pytest.raises(StopIteration):
        exec(code, {})
    folders_own = diffusers.EulerDiscreteScheduler.from_config(scheduler)
    folders_own.set_timesteps(1)
    assert drawn == [([399], float(folders_own.init_noise_sigma))]
    for there in ("mine.md", "mine.png"):
        (out / "mine.safetensors").unlink(missing_ok=True)
        message = _error(single.from_folder, tmp_path / "run", out / "mine.safetensors")
        assert f"{out / there} is there" in message
        (out / there).unlink()


def test_what_cannot_be_a_file_is_refused_before_it_is_read(sdxl, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    assert "is not overwritten" in _error(single.from_folder, sdxl, there)
    assert there.read_text() == "mine"
    assert ".safetensors" in _error(single.from_folder, sdxl, tmp_path / "folder")
    folder = tmp_path / "pixart"
    shutil.copytree(sdxl, folder)
    assert "no weights" in _error(single.from_folder, folder, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_number_too_large_for_float16_leaves_no_file(sdxl, tmp_path):
    tensors = _tensors("sdxl", torch.float32)
    tensors[_UNET + "out.2.bias"][0] = 1e6
    file = _file(tmp_path / "it.safetensors", tensors)
    single.to_folder(file, tmp_path / "folder", reference=str(sdxl))
    message = _error(single.from_folder, tmp_path / "folder", tmp_path / "out.safetensors")
    assert "out.2.bias" in message and "not finite in float16" in message
    assert sorted(os.listdir(tmp_path)) == ["folder", "it.safetensors"]


# Networks that predict v.


def test_the_empty_tensors_of_a_v_prediction_file_reach_the_scheduler_and_back(sdxl, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = _file(tmp_path / "v.safetensors", _tensors("sdxl") | marks)
    single.to_folder(file, tmp_path / "folder", reference=str(sdxl))
    scheduler = folders.read_config(tmp_path / "folder", *folders.SCHEDULER)
    before = folders.read_config(sdxl, *folders.SCHEDULER)
    said = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert scheduler == before | said
    single.from_folder(tmp_path / "folder", tmp_path / "back.safetensors")
    with weights.opened(tmp_path / "back.safetensors") as stored:
        assert {name: stored[name].shape for name in marks} == {"v_pred": (0,), "ztsnr": (0,)}


@pytest.mark.parametrize(
    "asked, marks",
    [
        pytest.param("v_prediction", (), marks=pytest.mark.long),
        pytest.param(None, ("v_pred", "ztsnr"), marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_of_a_v_prediction_file_says_so_to_its_export(sdxl, tmp_path, asked, marks):
    """A reference of another prediction would make noise of it without a word."""
    tensors = _tensors("sdxl") | {name: torch.zeros(0) for name in marks}
    file = _file(tmp_path / "v.safetensors", tensors)
    convert.file_to_orbax(file, tmp_path / "orbax", str(sdxl), asked)
    with checkpoint.existing(tmp_path / "orbax") as store:
        config = store.metadata(0)["denoiser_config"]
    assert bool(config[V_PREDICTION]["rescale_betas_zero_snr"]) is ("ztsnr" in marks)
    single.to_folder(file, tmp_path / "v", reference=str(sdxl), prediction_type=asked)
    single.to_folder(file, tmp_path / "eps", reference=str(sdxl), prediction_type="epsilon")

    def export(reference):
        output, how = tmp_path / "out", {"step": None, "dtype": "float16"}
        orbax = tmp_path / "orbax"
        convert.to_diffusers(orbax, "denoiser", output, reference=str(tmp_path / reference), **how)
        return output

    message = _error(export, "eps")
    assert "network predicts v" in message and "eps/scheduler/scheduler_config.json" in message
    assert not (tmp_path / "out").exists()
    made = folders.read_config(export("v"), *folders.SCHEDULER)
    assert made == folders.read_config(tmp_path / "v", *folders.SCHEDULER)
    convert.to_orbax(tmp_path / "v", tmp_path / "again")
    with checkpoint.existing(tmp_path / "again") as store:
        assert store.metadata(0)["denoiser_config"][V_PREDICTION] == config[V_PREDICTION]


def test_what_a_file_predicts_is_no_flag_for_a_folder(sdxl, tmp_path):
    done = _run(
        "--to=orbax",
        f"--input={sdxl}",
        f"--output={tmp_path / 'out'}",
        "--prediction_type=v_prediction",
    )
    assert done.returncode == 2 and "--prediction_type=v_prediction with --to=orbax" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "marks, asked, predicted, zero_snr",
    [
        ((), None, "epsilon", False),
        ((), "v_prediction", "v_prediction", False),
        (("v_pred",), None, "v_prediction", False),
        (("v_pred", "ztsnr"), None, "v_prediction", True),
        (("v_pred", "ztsnr"), "epsilon", "epsilon", False),
        (("ztsnr",), None, "epsilon", False),
        (("ztsnr",), "v_prediction", "v_prediction", True),
    ],
)
def test_what_a_denoiser_predicts_is_the_files_word_unless_the_user_says(
    marks, asked, predicted, zero_snr
):
    reference = SchedulerFile({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"})
    found = single._scheduler(reference, dict.fromkeys(marks), asked)
    assert found["prediction_type"] == predicted
    assert bool(found.get("rescale_betas_zero_snr")) is zero_snr
    name = "EulerDiscreteScheduler" if zero_snr else "PNDMScheduler"
    assert found["_class_name"] == name, "PNDM knows no zero-terminal SNR"


@pytest.mark.long
def test_a_v_prediction_file_is_drawn_as_diffusers_draws_it(tmp_path):
    """Zero terminal SNR, from pure noise on, with guidance."""
    settings = _settings(tmp_path / "settings", "sd15")
    scheduler = folders.read_config(settings, *folders.SCHEDULER)
    scheduler |= {"timestep_spacing": "trailing", "_class_name": "EulerDiscreteScheduler"}
    folders.write_object(settings.joinpath(*folders.SCHEDULER), scheduler)
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = _file(tmp_path / "v.safetensors", _tensors("sd15", torch.float32) | marks)
    single.to_folder(file, tmp_path / "out", reference=str(settings))
    loaded = drawing.load(str(tmp_path / "out"), "ema")
    sampling = drawing.sampling_of(drawing.Asked(None, 4, 3.0, (), 64), loaded)
    assert sampling.sampler == "euler" and sampling.timesteps[0] == 999
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    ours = drawing.draw_prompts(loaded, sampling)(["a b"], noise.numpy().transpose(0, 2, 3, 1))
    pipe = PIPELINES["sd15"].from_pretrained(tmp_path / "out", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        "a b",
        latents=noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="np",
    ).images
    assert theirs.std() > 0.02, "not a flat image"
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=1e-3)


# In the place of folders.


def test_a_file_is_converted_once_and_known_by_its_content(sdxl, cache, tmp_path, capsys):
    tensors = _tensors("sdxl")
    file = _file(tmp_path / "a.safetensors", tensors)
    folder = single.as_folder(str(file), str(sdxl))
    assert pipeline.check_pipeline(Path(folder))[0] is SDXL and Path(folder).parent == cache
    assert f"{file}: converting it once, into {folder}" in capsys.readouterr().out
    file.rename(tmp_path / "b.safetensors")
    assert single.as_folder(str(tmp_path / "b.safetensors"), str(sdxl)) == folder
    assert "it was converted" in capsys.readouterr().out
    tensors[_UNET + "out.2.bias"][0] += 1  # of the same size
    assert single.as_folder(str(_file(file, tensors)), str(sdxl)) != folder
    assert len(os.listdir(cache)) == 2
    assert single.as_folder("owner/name") == "owner/name"
    assert single.as_folder("") == ""


def test_a_configs_files_become_folders_with_the_references_settings(sdxl, cache, tmp_path):
    file = _file(tmp_path / "a.safetensors", _tensors("sdxl"))
    given = {"reference": str(sdxl), "generator": str(file), "assistant": "", "pickscore": "x"}
    config = ml_collections.ConfigDict({"weights": given})
    single.with_folders(config)
    assert config.weights.reference == str(sdxl) and config.weights.assistant == ""
    assert Path(config.weights.generator).parent == cache
    assert config.weights.pickscore == "x"


def test_a_file_that_is_none_leaves_no_folder_in_the_cache(sdxl, cache, tmp_path):
    file = _file(tmp_path / "a.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(1)})
    assert "is a LoRA file" in _error(single.as_folder, str(file), str(sdxl))
    assert not cache.exists() or not os.listdir(cache)
