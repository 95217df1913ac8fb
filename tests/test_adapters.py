# SPDX-License-Identifier: Apache-2.0
"""Files of adapters, beside diffusers' and PEFT's readers of them, on small pipelines of diffusers.

What a run's own export is made of stands in test_lora.py.
"""

import hashlib
import json
import os
import re
import shutil
import types
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import original_layout
import pytest
import safetensors
import safetensors.torch
import t5_reference
import test_lora
import test_pixart_pipeline
import torch
from test_convert import _error, _pipeline, _run
from test_sd15 import ASKED, noise, to_nhwc, write_sd15
from test_train import config_for, write_pipeline

from di_star_jax import assembly, convert, drawing, sharding
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.models import lora, published
from di_star_jax.models.lora import Lora
from di_star_jax.pipelines import adapters, card, single, trained
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.pipelines.family import DENOISER
from di_star_jax.storage import checkpoint, folders, weights

RANK, ALPHA = 4, 6.0  # whose quotient is not 1
PROMPTS = ["a b c", "z"]
PARTS = {"sdxl": "unet", "sd15": "unet", "pixart": "transformer"}
TARGETS = {
    "sdxl": tuple(lora.TARGETS),
    "sd15": tuple(lora.TARGETS),
    "pixart": ("attention", "feed_forward", "projections"),
}
FORMS = {
    "sdxl": FewStep((399,)),
    "sd15": FewStep((625,), "scaled"),
    "pixart": FewStep((440,), "scaled"),
}


def _reference(kind: str, tmp: Path) -> Path:
    """A pipeline's folder, and beside it that of another denoiser, generator."""
    folder = tmp / "reference"
    if kind == "sdxl":
        _pipeline(tmp).save_pretrained(folder)
    elif kind == "sd15":
        write_sd15(folder)
    else:
        parts = test_pixart_pipeline.components(tmp)
        diffusers.PixArtAlphaPipeline(**parts).save_pretrained(folder)
        shutil.rmtree(folder / "tokenizer")
        t5_reference.write_folder(folder / "tokenizer")
    torch.manual_seed(1)
    _denoiser_class(kind).from_config(
        _denoiser_class(kind).load_config(folder / PARTS[kind])
    ).save_pretrained(tmp / "generator")
    return folder


def _denoiser_class(kind: str):
    if kind == "pixart":
        return diffusers.PixArtTransformer2DModel
    return diffusers.UNet2DConditionModel


def _write_run(kind: str, tmp: Path) -> Path:
    """A run whose adapters alone have learnt, on its generator."""
    reference = _reference(kind, tmp)
    config = folders.read_config(reference, PARTS[kind])
    params = pipeline.abstract_model(config).params
    low_rank = Lora(RANK, ALPHA, TARGETS[kind])
    shapes, treedef = jax.tree.flatten(lora.abstract(params, low_rank))
    rng = np.random.default_rng(0)
    state = {
        name: treedef.unflatten(
            [0.15 * rng.standard_normal(x.shape, dtype=np.float32) for x in shapes]
        )
        for name in ("generator", "ema")
    }
    metadata = {
        "denoiser_config": config,
        "reference": str(reference),
        "initial": str(tmp / "generator"),
        "generator_timesteps": list(FORMS[kind].timesteps),
        "generator_input": FORMS[kind].input,
        **trained.metadata_of(low_rank, tmp / "generator"),
    }
    with checkpoint.Checkpoints(tmp / "run" / checkpoint.FOLDER, keep=1) as store:
        store.save(7, state, metadata)
    return tmp / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """kind -> workdir, written when it is first asked for."""
    found = {}

    def run(kind: str) -> Path:
        if kind not in found:
            found[kind] = _write_run(kind, tmp_path_factory.mktemp(kind))
        return found[kind]

    return run


def _written(run: Path, file: Path, **options: str) -> str:
    """What the command says."""
    given = {"to": "lora", "input": run, "output": file} | options
    done = _run(*(f"--{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stderr
    return done.stdout


def _merged(run: Path, which: str = "ema") -> dict[str, np.ndarray]:
    """The whole generator's tensors, as our own sampling has them."""
    return weights.tensors_from_params(drawing.load(str(run), which).models[DENOISER].params)


def _unet(pipe) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in pipe.unet.state_dict().items()}


def _assert_same(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert np.abs(tensor - theirs[name]).max() < tolerance, name


# Out, to diffusers.


@pytest.mark.parametrize(
    "kind",
    [pytest.param("sdxl", marks=pytest.mark.slow), pytest.param("sd15", marks=pytest.mark.long)],
)
def test_diffusers_draws_by_the_printed_code_what_we_draw(runs, tmp_path, kind):
    """Adapters of attention, feed-forward, projections and convolutions, beside the UNet and
    fused with it."""
    run, file = runs(kind), tmp_path / "a.safetensors"
    said = _written(run, file, dtype="float32")
    assert f"it goes on {run.parent / 'generator'}, the generator that the run began with" in said
    assert f"not on the reference {run.parent / 'reference'}" in said
    code = said.partition("in diffusers:\n")[2].replace('reference"', 'reference", **more')
    *lines, call, _ = code.strip().splitlines()
    names = {"more": {"safety_checker": None} if kind == "sd15" else {}}
    exec("\n".join(lines), names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    arguments = re.search(r"pipe\(\"a photo of a cat\", (.*)\)\.images", call).group(1)

    def theirs():
        given = eval(f"dict({arguments})") | {"height": 16, "width": 16}
        return pipe(PROMPTS, latents=noise(), output_type="np", **given).images

    beside = theirs()
    pipe.fuse_lora()
    fused = theirs()
    pipe.unload_lora_weights()
    loaded = drawing.load(str(run), "ema")
    sampling = drawing.sampling_of(ASKED, loaded)
    ours = drawing.draw_prompts(loaded, sampling)(PROMPTS, to_nhwc(noise())[None])
    ours = np.clip(ours / 2 + 0.5, 0, 1)
    base = drawing.load(str(run), "initial")
    without = drawing.draw_prompts(base, sampling)(PROMPTS, to_nhwc(noise())[None])
    assert np.abs(np.clip(without / 2 + 0.5, 0, 1) - ours).max() > 8 / 255, "adapters are seen"
    for images in (beside, fused):
        assert images.std() > 0.02, "not a flat image"
        np.testing.assert_allclose(ours, images, atol=2 / 255)


@pytest.mark.parametrize(
    "names, kind",
    [
        pytest.param("diffusers", "sdxl", marks=pytest.mark.long),
        pytest.param("kohya", "sd15", marks=pytest.mark.long),
        pytest.param("diffusers", "sd15", marks=pytest.mark.long),
        pytest.param("kohya", "sdxl", marks=pytest.mark.long),
    ],
)
def test_both_formats_fused_by_diffusers_are_our_merged_network(runs, tmp_path, kind, names):
    run, file = runs(kind), tmp_path / "a.safetensors"
    _convert(run, file, names, "float32")
    generator = _denoiser_class(kind).from_pretrained(run.parent / "generator")
    pipe = _pipe(kind, run, generator)
    pipe.load_lora_weights(str(file))
    count = len(adapters.read(file, folders.read_config(run.parent / "generator")))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = _merged(run)
    _assert_same(_unet(pipe), expected)
    before = _denoiser_class(kind).from_pretrained(run.parent / "generator").state_dict()
    changed = [k for k in before if np.abs(before[k].numpy() - expected[k]).max() > 1e-3]
    assert len(changed) == count > 40


def _convert(run: Path, file: Path, names: str, dtype: str, which: str = "ema") -> None:
    """As the command, in this process."""
    with checkpoint.existing(run) as store:
        metadata = store.metadata(7)
        learnt = trained.restored_adapters(store, 7, which, metadata)
    found = adapters.of_run(learnt, trained.lora_in(metadata))
    config = metadata["denoiser_config"]
    adapters.write(file, found, config, kind=names, dtype=dtype, about={})


def _pipe(kind: str, run: Path, unet):
    cls = {
        "sdxl": diffusers.StableDiffusionXLPipeline,
        "sd15": diffusers.StableDiffusionPipeline,
    }[kind]
    more = {"safety_checker": None} if kind == "sd15" else {}
    return cls.from_pretrained(run.parent / "reference", unet=unet, **more)


def test_peft_has_our_pixart_by_the_file(runs, tmp_path):
    """Diffusers' pipelines of PixArt load no adapters; PEFT does, into its transformer."""
    import peft

    run, file = runs("pixart"), tmp_path / "a.safetensors"
    said = _written(run, file, dtype="float32")
    assert "diffusers has no load_lora_weights for it" in said
    state = safetensors.torch.load_file(file)
    assert all(name.startswith("transformer.") for name in state)
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(run.parent / "generator")
    modules = sorted({name.partition(".lora_")[0] for name in state})
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules)
    peft.inject_adapter_in_model(config, transformer)
    left = peft.set_peft_model_state_dict(transformer, state)
    assert not left.unexpected_keys
    whole = diffusers.PixArtTransformer2DModel.from_pretrained(run.parent / "generator")
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    merged = {name: torch.tensor(array) for name, array in _merged(run).items()}
    assert not whole.load_state_dict(merged, strict=False).unexpected_keys
    assert not torch.equal(
        merged["caption_projection.linear_1.weight"], before["caption_projection.linear_1.weight"]
    )
    torch.manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([440]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    with torch.no_grad():
        ours, theirs = (model.eval()(**given).sample for model in (whole, transformer))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_file_is_of_half_precision_and_says_what_it_is(runs, tmp_path):
    run, file = runs("sdxl"), tmp_path / "in" / "a.safetensors"
    _written(run, file, format="kohya", which="generator")
    with safetensors.safe_open(file, framework="np") as found:
        header = found.metadata()
        names = found.keys()  # a handle is no dict
        tensors = {name: found.get_tensor(name) for name in names}
    about = json.loads(header["di_star_jax"])
    assert header["ss_base_model_version"].startswith("sdxl_")
    assert about["rank"] == RANK and about["alpha"] == ALPHA and about["timesteps"] == [399]
    assert about["base_digest"] == folders.digest(run.parent / "generator")
    assert about["network"] == "generator, step 7"
    page = file.with_suffix(".md").read_text()
    assert f"LoRA adapters (rank {RANK}, alpha {ALPHA:g})" in page and "generator, step 7" in page
    assert "they go on generator, the generator, not on reference" in page
    assert 'load_lora_weights("a.safetensors")' in page and str(run.parent) not in page
    assert hashlib.sha256(file.read_bytes()).hexdigest() in page
    start = "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q"
    down = tensors[f"{start}.lora_down.weight"]
    assert down.dtype == np.float16 and down.shape == (RANK, 32)
    assert tensors[f"{start}.lora_up.weight"].shape == (32, RANK)
    assert tensors[f"{start}.alpha"] == ALPHA and tensors[f"{start}.alpha"].dtype == np.float32
    convolution = "lora_unet_input_blocks_2_0_op"
    assert tensors[f"{convolution}.lora_down.weight"].shape == (RANK, 16, 3, 3)
    assert tensors[f"{convolution}.lora_up.weight"].shape == (16, RANK, 1, 1)
    with checkpoint.existing(run) as store:
        learnt = trained.restored_adapters(store, 7, "generator", store.metadata(7))
    a, _, _ = lora.modules(learnt, ALPHA)[
        "down_blocks", 1, "attentions", 0, "transformer_blocks", "attn1", "to_q"
    ]
    np.testing.assert_array_equal(down, np.asarray(a)[1].T.astype(np.float16))


@pytest.mark.long
def test_names_of_kohyas_are_those_of_the_published_files_modules():
    """At full size: SDXL's by the original layout, SD 1.5's by diffusers', as sd-scripts does."""
    names = adapters._names(published.UNET_SDXL)
    layout = original_layout.shapes(original_layout.SDXL)
    start, end = "model.diffusion_model.", ".weight"
    known = {
        f"lora_unet_{name[len(start) : -len(end)].replace('.', '_')}"
        for name in layout
        if name.startswith(start) and name.endswith(end)
    }
    assert {name["kohya"] for name in names.values()} <= known
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[module] == {
        "diffusers": f"unet.{module}",
        "kohya": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "others": f"lora_unet_{module.replace('.', '_')}",
    }
    of_sd15 = adapters._names(published.UNET_SD15)
    assert of_sd15[module]["kohya"] == f"lora_unet_{module.replace('.', '_')}"
    for table in (names, of_sd15):
        every = [name for of_module in table.values() for name in of_module.values()]
        assert len(set(every)) == len(every) == 3 * len(table)


# Of two networks.


def _two(tmp_path: Path, change: dict[str, np.ndarray]) -> tuple[Path, Path]:
    """Folders of a network before and after some of its tensors were changed."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(_small_unet(tmp_path / "before"))
    state = unet.state_dict()
    for name, array in change.items():
        state[name] += torch.tensor(array).reshape(state[name].shape)
    unet.load_state_dict(state)
    unet.save_pretrained(tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def _small_unet(folder: Path) -> Path:
    torch.manual_seed(3)
    diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        norm_num_groups=8,
        cross_attention_dim=16,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
    ).save_pretrained(folder)
    return folder


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROJECTION = "mid_block.attentions.0.proj_in"  # a convolution of one pixel
CONVOLUTION = "mid_block.resnets.0.conv1"


def test_the_part_of_rank_r_is_the_best_there_is_and_its_share_is_said(tmp_path):
    rng = np.random.default_rng(0)
    changes = {
        f"{module}.weight": rng.standard_normal((16, 16)).astype(np.float32)
        for module in (QUERY, PROJECTION)
    }
    left_out = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
    before, after = _two(tmp_path, changes | {f"{CONVOLUTION}.weight": left_out})
    found = adapters.extracted(after, before, 3)
    kept = total = 0.0
    for module in (QUERY, PROJECTION):
        change = changes[f"{module}.weight"].astype(np.float64)
        u, s, v = np.linalg.svd(change)
        best = (u[:, :3] * s[:3]) @ v[:3]
        adapter = found.adapters[module]
        np.testing.assert_allclose(adapter.product((16, 16)), best, atol=1e-5)
        assert adapter.rank == 3 and adapter.scale == 1.0
        kept += (s[:3] ** 2).sum()
        total += (s**2).sum()
    assert found.adapters[PROJECTION].down.shape == (3, 16, 1, 1)
    assert found.adapters[PROJECTION].up.shape == (16, 3, 1, 1)
    assert found.kept == pytest.approx(kept / total, rel=1e-5)
    of_all = total + (left_out.astype(np.float64) ** 2).sum()
    assert found.adapted == pytest.approx(total / of_all, rel=1e-5)
    assert CONVOLUTION not in found.adapters


@pytest.mark.parametrize("names", adapters.FORMATS)
def test_at_full_rank_a_file_makes_the_targeted_matrices_again(tmp_path, names):
    rng = np.random.default_rng(0)
    names_of = [f"{m}.weight" for m in (QUERY, PROJECTION, QUERY.replace("attn1", "attn2"))]
    changes = {n: rng.standard_normal((16, 16)).astype(np.float32) for n in names_of}
    before, after = _two(tmp_path, changes)
    file = tmp_path / "a.safetensors"
    options = {"extract_lora": 16, "reference": before, "format": names, "dtype": "float32"}
    said = _written(after, file, **options)
    assert "keeps 100.0% of the squared norm of the difference in these, which have 100.0%" in said
    config = folders.read_config(before)
    ours = dict(adapters.merged(before, config, adapters.read(file, config)))
    with weights.opened(after) as stored:
        _assert_same(ours, {name: tensor.read() for name, tensor in stored.items()})


# In, as a part of a generator.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "di_star_jax" / "lora"


def _config(reference: Path, file: Path, name: str = "generator"):
    given = {"reference": str(reference), "generator": "", "assistant": ""} | {name: str(file)}
    return ml_collections.ConfigDict({"weights": given})


@pytest.mark.parametrize(
    "kind, names",
    [
        ("pixart", "diffusers"),
        *(
            pytest.param(kind, names, marks=mark)
            for kind, names, mark in (
                ("sdxl", "kohya", pytest.mark.long),
                ("sdxl", "diffusers", pytest.mark.long),
                ("sd15", "kohya", pytest.mark.long),
                ("sd15", "diffusers", pytest.mark.long),
            )
        ),
    ],
)
def test_a_generators_file_becomes_the_references_denoiser_with_it(
    runs, cache, tmp_path, capsys, kind, names
):
    run, file = runs(kind), tmp_path / "a.safetensors"
    _convert(run, file, names, "float32")
    config = _config(run.parent / "generator", file)
    single.with_folders(config)
    folder = Path(config.weights.generator)
    facts = card.bases_of(str(folder))
    assert [base.name for base in facts] == ["generator", "a.safetensors"] and facts[1].sha256
    assert folder.parent == cache and folders.is_model(folder)
    assert f"a LoRA of rank {RANK} in " in capsys.readouterr().out
    with weights.opened(folder) as stored:
        found = {name: tensor.read() for name, tensor in stored.items()}
    _assert_same(found, _merged(run))
    assert folders.read_config(folder) == folders.read_config(run.parent / "generator")
    again = _config(run.parent / "generator", file)
    single.with_folders(again)
    assert again == config and "it was merged" in capsys.readouterr().out
    of_reference = _config(run.parent / "reference", file)
    single.with_folders(of_reference)
    assert of_reference.weights.generator != config.weights.generator
    assert len(os.listdir(cache)) == 2


def test_names_and_scales_of_other_programs_are_read_as_they_read_them(runs, tmp_path):
    """DMD2's names: diffusers' modules in SDXL's files of kohya's kind, alpha and rank by module;
    and what diffusers saves of PEFT's adapters, whose alpha is in the header."""
    import peft

    run = runs("sdxl")
    config = folders.read_config(run.parent / "generator")
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return torch.tensor(rng.standard_normal(shape, dtype=np.float32))

    module = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    other = "down_blocks.1.resnets.0.time_emb_proj"  # no target of ours
    flat = [f"lora_unet_{name.replace('.', '_')}" for name in (module, other)]
    tensors = {
        f"{flat[0]}.lora_down.weight": tensor(2, 32),
        f"{flat[0]}.lora_up.weight": tensor(32, 2),
        f"{flat[0]}.alpha": torch.tensor(8.0),
        f"{flat[1]}.lora_down.weight": tensor(3, 64),
        f"{flat[1]}.lora_up.weight": tensor(32, 3),
        f"{flat[1]}.alpha": torch.tensor(6.0),
    }
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, file)
    found = adapters.read(file, config)
    assert {name: (a.rank, a.alpha) for name, a in found.items()} == {module: (2, 8), other: (3, 6)}
    pipe = _pipe(
        "sdxl", run, diffusers.UNet2DConditionModel.from_pretrained(run.parent / "generator")
    )
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    _assert_same(_unet(pipe), dict(adapters.merged(run.parent / "generator", config, found)))

    pipe.unet.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=2, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 10}
        )
    )
    pipe.unet.save_lora_adapter(tmp_path / "saved", weight_name="a.safetensors")
    found = adapters.read(tmp_path / "saved" / "a.safetensors", config)
    assert {a.alpha for name, a in found.items() if name.endswith("to_q")} == {2.0}
    assert {a.alpha for name, a in found.items() if name.endswith("to_k")} == {10.0}


@pytest.mark.long
def test_the_difference_is_also_that_of_a_file_and_a_folder(runs, cache, tmp_path):
    """As a checkpoint is downloaded that somebody has trained."""
    reference, trained_file = runs("sdxl").parent / "reference", tmp_path / "all.safetensors"
    single.from_folder(reference, trained_file, dtype="float32")
    tensors = safetensors.torch.load_file(trained_file)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    change = torch.ones_like(tensors[name])
    safetensors.torch.save_file(tensors | {name: tensors[name] + change}, trained_file)
    asked = {"input": trained_file, "reference_pipeline": str(reference), "extract_lora": 1}
    args = types.SimpleNamespace(**asked)
    file = tmp_path / "a.safetensors"
    said = convert._write_extracted(args, file, {"kind": "kohya", "dtype": "float32"})
    assert "keeps 100.0%" in said
    page = (tmp_path / "a.md").read_text()
    assert "what all.safetensors has learnt from the weights of reference" in page
    assert "(rank 1, alpha 1)" in page and str(tmp_path) not in page
    found = adapters.read(file, folders.read_config(reference, "unet"))
    product = found["mid_block.attentions.0.proj_in"].product(change.shape)
    np.testing.assert_allclose(product, change.numpy(), atol=1e-5)


# Bad input.


def _file(path: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    safetensors.torch.save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    return path


_KEY = "unet.mid_block.attentions.0.proj_in"
_BAD = {
    "adapters of another network": {
        "unet.down_blocks.7.attentions.0.proj_in.lora_A.weight": (4, 9)
    },
    "is a LoRA file of text encoders alone": {
        "lora_te1_text_model_encoder_x.lora_up.weight": (4, 4)
    },
    "LoHa": {f"{_KEY}.hada_w1_a": (4, 4), f"{_KEY}.lora_A.weight": (4, 32)},
    "DoRA": {f"{_KEY}.lora_A.weight": (4, 32), f"{_KEY}.dora_scale": (4,)},
    "three matrices": {f"{_KEY}.lora_mid.weight": (4, 4, 3, 3)},
    "is of another base": {f"{_KEY}.lora_A.weight": (4, 33), f"{_KEY}.lora_B.weight": (32, 4)},
    "are [4, 32] and [32, 5]": {
        f"{_KEY}.lora_A.weight": (4, 32),
        f"{_KEY}.lora_B.weight": (32, 5),
    },
    "but not what it is multiplied with": {f"{_KEY}.lora_A.weight": (4, 32)},
}


@pytest.mark.parametrize("said", _BAD)
def test_a_file_for_another_base_is_refused_and_nothing_is_left(runs, cache, tmp_path, said):
    file = _file(tmp_path / "a.safetensors", _BAD[said])
    reference = runs("sdxl").parent / "reference"
    assert said in _error(single.with_folders, _config(reference, file))
    assert not cache.exists() or not os.listdir(cache)


@pytest.mark.parametrize("names", adapters.FORMATS)
@pytest.mark.parametrize("base, other", [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_a_lora_of_the_other_family_is_named(runs, cache, tmp_path, base, other, names):
    config = folders.read_config(runs(other).parent / "generator")
    shapes = weights.shapes(pipeline.abstract_model(config).params)
    ends = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    found = {
        name: adapters.Adapter(np.ones((2, ends[name][1])), np.ones((ends[name][0], 2)), 2.0)
        for name in ends
        if re.search(r"attn\d\.to_[qkv]$", name)
    }
    about = {"kind": names, "dtype": "float16", "about": {}}
    adapters.write(tmp_path / "a.safetensors", found, config, **about)
    reference = runs(base).parent / "reference"
    message = _error(single.with_folders, _config(reference, tmp_path / "a.safetensors"))
    assert re.search("has adapters of another network|is of another base", message), message
    assert "weights.reference" in message and not cache.exists()


@pytest.mark.long
def test_adapters_of_text_encoders_are_left_out_and_said_to_be(runs, cache, tmp_path, capsys):
    """Published LoRAs of kohya's often have them; a run's text encoders are the reference's."""
    name, text = "unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.x"
    shapes = {"lora_A": (4, 32), "lora_B": (32, 4)}
    files = {}
    for which, modules in {"plain": [name], "both": [name, text]}.items():
        parts = {f"{m}.{p}.weight": shape for m in modules for p, shape in shapes.items()}
        files[which] = _file(tmp_path / f"{which}.safetensors", parts)
    config = folders.read_config(runs("sdxl").parent / "reference", "unet")
    plain, both = (adapters.read(file, config) for file in files.values())
    assert list(both) == list(plain) == [name.removeprefix("unet.")]
    reference = runs("sdxl").parent / "reference"
    for _ in range(2):  # merged, then found
        single.with_folders(_config(reference, files["both"]))
        said = capsys.readouterr().out
        assert "both.safetensors has adapters of text encoders too, 2 tensors" in said
    single.with_folders(_config(reference, files["plain"]))
    assert "text encoders" not in capsys.readouterr().out


def test_a_file_of_adapters_is_no_reference_and_no_assistant(runs, cache, tmp_path):
    file = _file(tmp_path / "a.safetensors", {f"{_KEY}.lora_A.weight": (4, 32)})
    reference = runs("sdxl").parent / "reference"
    assert "is a LoRA file" in _error(single.with_folders, _config(reference, file, "assistant"))
    assert "is a LoRA file" in _error(single.with_folders, _config(file, "", "generator"))


def test_a_truncated_file_is_named(runs, cache, tmp_path):
    file = _file(tmp_path / "a.safetensors", {f"{_KEY}.lora_A.weight": (4, 32)})
    file.write_bytes(file.read_bytes()[:-10])
    reference = runs("sdxl").parent / "reference"
    assert "download it again" in _error(single.with_folders, _config(reference, file))


def _refused(tmp_path: Path, *options: str) -> str:
    """The one line of the command, which leaves nothing."""
    before = sorted(os.listdir(tmp_path))
    done = _run("--to=lora", *options)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    assert sorted(os.listdir(tmp_path)) == before
    return done.stderr


@pytest.mark.long
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(runs, tmp_path):
    run, file = runs("sdxl"), tmp_path / "a.safetensors"
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    given = [f"--input={run}", f"--output={file}"]
    assert "is not overwritten" in _refused(tmp_path, given[0], f"--output={there}")
    assert there.read_text() == "mine"
    assert ".safetensors" in _refused(tmp_path, given[0], f"--output={tmp_path / 'a.bin'}")
    assert "expected generator or ema" in _refused(tmp_path, *given, "--which=assistant")
    assert "--extract_lora=0" in _refused(tmp_path, *given, "--extract_lora=0")
    assert "without --reference" in _refused(tmp_path, *given, "--extract_lora=4")


@pytest.mark.long
def test_a_run_of_whole_networks_and_pixart_in_kohyas_names_are_refused(runs, tmp_path):
    run = runs("pixart")
    given = [f"--input={run}", f"--output={tmp_path / 'a.safetensors'}", "--format=kohya"]
    assert "--format=kohya of PixArt-alpha" in _refused(tmp_path, *given)
    config = folders.read_config(run.parent / "reference", "transformer")
    metadata = {"denoiser_config": config, "reference": str(run.parent / "reference")}
    with checkpoint.Checkpoints(tmp_path / "run" / checkpoint.FOLDER, keep=1) as store:
        store.save(1, {"ema": {"w": np.ones(3, np.float32)}}, metadata)
    given[0] = f"--input={tmp_path / 'run'}"
    assert "has no adapters, for whole networks have learnt" in _refused(tmp_path, *given[:2])


def test_a_rank_above_a_matrix_and_networks_that_do_not_differ_are_refused(runs, tmp_path):
    before, after = _two(tmp_path, {f"{QUERY}.weight": np.ones((16, 16), np.float32)})
    message = _error(adapters.extracted, after, before, 17)
    assert "--extract_lora=17 is more than" in message and "use 16 or less" in message
    assert "nothing to extract" in _error(adapters.extracted, before, before, 4)
    other = runs("sdxl").parent / "generator"
    assert "does not fit the model" in _error(adapters.extracted, other, before, 4)
    with pytest.raises(UserError, match="holds no denoiser"):
        adapters.denoiser_folder(str(runs("sdxl").parent / "reference" / "vae"))


def test_flags_of_a_file_of_adapters_are_refused_elsewhere(tmp_path):
    done = _run("--to=single", "--input=a", "--output=b", "--format=kohya")
    assert done.returncode == 2 and "--format=kohya with --to=single" in done.stderr


# A generator that is the reference and a file of adapters: one base for both networks that learn.


@pytest.mark.parametrize("kind", ["pixart", pytest.param("sdxl", marks=pytest.mark.long)])
def test_frozen_adapters_beside_a_base_are_the_network_that_they_are_merged_into(kind):
    model = test_lora.denoiser(test_lora.FAMILIES[kind])
    low_rank = Lora(3, 6.0, test_lora.ALL)
    learnt = test_lora.random_adapters(model.params, low_rank)
    found = dict(adapters.of_run(learnt, low_rank))
    # One module has a smaller rank, and one block of a stack has none.
    name = next(n for n in found if "transformer_blocks.0" in n and n.endswith("to_k"))
    found[name] = adapters.Adapter(found[name].down[:2], found[name].up[:, :2], 2.0)
    del found[next(n for n in found if "transformer_blocks.0" in n and n.endswith("to_v"))]
    tree, rank = adapters.as_tree(found, model.params)
    assert rank == 3
    tensors = weights.tensors_from_params(model.params)
    for module, adapter in found.items():
        key = f"{module}.weight"
        tensors[key] = tensors[key] + adapter.product(tensors[key].shape)
    whole = weights.params_from_tensors(tensors, model.params)
    bound = model._replace(lora=low_rank._replace(frozen_rank=rank))
    given = test_lora.inputs(model.config)
    run = jax.jit(lambda params: bound.network(params)(*given))
    expected = run(whole)
    ours = run(model.params | tree)
    assert float(jnp.abs(ours - run(model.params)).max()) > 0.1
    np.testing.assert_allclose(ours, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.long
def test_a_run_on_a_file_of_adapters_holds_one_base_and_begins_as_their_merged_network(
    cache, tmp_path
):
    write_pipeline(tmp_path / "pipeline")
    low_rank = Lora(3, 6.0, test_lora.ALL)
    params = pipeline.load_model(tmp_path / "pipeline" / "unet").params
    found = adapters.of_run(test_lora.random_adapters(params, low_rank), low_rank)
    file = tmp_path / "generator.safetensors"
    how = {"kind": "kohya", "dtype": "float32", "about": {}}
    adapters.write(file, found, test_lora.UNET, **how)
    config = config_for(tmp_path / "pipeline", **test_lora.FIELDS)
    config.weights.generator = str(file)
    single.with_folders(config)
    parts = assembly.load_parts(config, sharding.make_mesh(8, 1))
    frozen = parts.frozen()
    assert parts.base is None and "generator" not in frozen
    model = parts.models[DENOISER]
    own, of_assistant = assembly.bases_of(model.lora, frozen)
    assert of_assistant is frozen["reference"]
    given = test_lora.inputs(model.config)
    whole = pipeline.load_model(Path(config.weights.generator)).params
    ours, expected = (jax.jit(lambda p: model.network(p)(*given))(p) for p in (own, whole))
    np.testing.assert_allclose(ours, expected, atol=5e-5 * float(jnp.abs(expected).max()))
    config.lora.rank = 0  # the whole network learns from what was merged
    assert assembly.shared_base(config) is None
