# SPDX-License-Identifier: Apache-2.0
"""Weights in and out of folders that diffusers and transformers wrote, on small models."""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
import tracemalloc
import urllib.parse
import zipfile
from pathlib import Path

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from di_star_jax import models, sharding
from di_star_jax.errors import UserError
from di_star_jax.models import clip, unet, vae
from di_star_jax.storage import folders, weights

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.safetensors", "model.safetensors"
BLOCKS = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    norm_num_groups=8,
    cross_attention_dim=24,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    layers_per_block=1,
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
SDXL = dict(
    **BLOCKS,
    transformer_layers_per_block=(1, 3),
    attention_head_dim=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)
TEXT = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=12,
    projection_dim=16,
    bos_token_id=48,
    eos_token_id=49,
)


def _abstract(model, config_class, folder):
    config = config_class.from_json(folders.read_config(folder))
    return models.abstract(lambda rngs: model(config, rngs=rngs))[1]


def _unet(folder):
    return _abstract(unet.UNet2DConditionModel, unet.UNetConfig, folder)


@pytest.fixture(scope="module")
def torch_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SDXL)


@pytest.fixture(scope="module")
def unet_folder(torch_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "unet"
    torch_unet.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def abstract(unet_folder):
    return _unet(unet_folder)


@pytest.fixture
def copy(unet_folder, tmp_path):
    return Path(shutil.copytree(unet_folder, tmp_path / "unet"))


def _edit(folder, change, name=DIFFUSERS):
    """Applies `change` to the tensors of a folder's one file."""
    tensors = safetensors.numpy.load_file(folder / name)
    safetensors.numpy.save_file(
        change(tensors) or tensors, folder / name, metadata={"format": "pt"}
    )


def _error(call, *args, **kw) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def _assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# The rule.


def test_a_path_becomes_the_key_of_pytorch():
    leaf = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
    key = weights.torch_keys
    assert (
        key(("down_blocks", 0, "resnets", 1, "conv1", "kernel"), leaf)
        == "down_blocks.0.resnets.1.conv1.weight"
    )
    assert (
        key(("norm", "scale"), leaf) == "norm.weight" and key(("norm", "bias"), leaf) == "norm.bias"
    )
    assert key(("token_embedding", "embedding"), leaf) == "token_embedding.weight"
    assert key(("logit_scale",), leaf) == "logit_scale"
    assert key(("a", "transformer_blocks", "attn1", "to_out", 0, "kernel"), leaf) == [
        "a.transformer_blocks.0.attn1.to_out.0.weight",
        "a.transformer_blocks.1.attn1.to_out.0.weight",
    ]
    assert key(("encoder", "layers", 1, "fc1", "kernel"), leaf) == "encoder.layers.1.fc1.weight"


def test_rows_of_a_stacked_leaf_are_pytorchs_blocks_in_order(torch_unet, unet_folder, abstract):
    params = weights.load(unet_folder, abstract)
    ours = params["mid_block"]["attentions"][0]["transformer_blocks"]["ff"]["net"][2]["kernel"]
    theirs = torch_unet.mid_block.attentions[0].transformer_blocks
    assert ours.shape == (3, 128, 32)
    for i in range(3):
        np.testing.assert_array_equal(ours[i], theirs[i].ff.net[2].weight.detach().numpy().T)
    np.testing.assert_array_equal(
        params["conv_in"]["kernel"],
        torch_unet.conv_in.weight.detach().numpy().transpose(2, 3, 1, 0),
    )


# Round trips.


def _hub_names(model, folder):
    """Writes a transformers model under the names of the hub's files."""
    folder.mkdir()
    state = {
        k if k.startswith("text") else f"text_model.{k}": v.numpy()
        for k, v in model.state_dict().items()
    }
    safetensors.numpy.save_file(state, folder / TRANSFORMERS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["sdxl_unet", "sd15_unet", "vae", "text_encoder", "text_encoder_2"]
)
def test_a_round_trip_gives_the_same_bytes(name, unet_folder, tmp_path):
    torch.manual_seed(1)
    folder = tmp_path / "in"
    file_name = DIFFUSERS
    if name == "sdxl_unet":
        folder, abstract = unet_folder, _unet(unet_folder)
    elif name == "sd15_unet":
        diffusers.UNet2DConditionModel(**BLOCKS, attention_head_dim=2).save_pretrained(folder)
        abstract = _unet(folder)
    elif name == "vae":
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ).save_pretrained(folder)
        abstract = _abstract(vae.AutoencoderKL, vae.VAEConfig, folder)
    else:
        theirs, ours = {
            "text_encoder": (transformers.CLIPTextModel, clip.CLIPTextModel),
            "text_encoder_2": (
                transformers.CLIPTextModelWithProjection,
                clip.CLIPTextModelWithProjection,
            ),
        }[name]
        _hub_names(theirs(transformers.CLIPTextConfig(**TEXT)), folder)
        abstract, file_name = _abstract(ours, clip.CLIPTextConfig, folder), TRANSFORMERS
    config = folders.read_config(folder)
    weights.save(
        tmp_path / "out", weights.load(folder, abstract), config=config, file_name=file_name
    )
    assert (tmp_path / "out" / file_name).read_bytes() == (folder / file_name).read_bytes()
    assert folders.read_config(tmp_path / "out") == config


def test_tensors_and_params_in_memory_are_inverse(unet_folder, abstract):
    tensors = safetensors.numpy.load_file(unet_folder / DIFFUSERS)
    again = weights.tensors_from_params(weights.params_from_tensors(tensors, abstract))
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert again[key].tobytes() == tensor.tobytes() and again[key].shape == tensor.shape, key


def test_shards_and_half_precision_files_of_diffusers_load(
    torch_unet, unet_folder, tmp_path, abstract
):
    exact = weights.load(unet_folder, abstract)
    torch_unet.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    _assert_equal(weights.load(tmp_path / "shards", abstract), exact)
    half = diffusers.UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    half.save_pretrained(tmp_path / "half_shards", variant="fp16", max_shard_size="200KB")
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), exact)
    _assert_equal(weights.load(tmp_path / "half", abstract), rounded)
    _assert_equal(weights.load(tmp_path / "half_shards", abstract), rounded)


def test_the_full_precision_file_is_preferred(copy, abstract):
    tensors = safetensors.numpy.load_file(copy / DIFFUSERS)
    safetensors.numpy.save_file(
        {k: v.astype(np.float16) for k, v in tensors.items()},
        copy / "diffusion_pytorch_model.fp16.safetensors",
    )
    params = weights.load(copy, abstract)
    np.testing.assert_array_equal(params["conv_in"]["bias"], tensors["conv_in.bias"])


def test_bfloat16_files_are_cast_exactly(copy, abstract):
    exact = weights.load(copy, abstract)
    _edit(copy, lambda tensors: {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), exact
    )
    _assert_equal(weights.load(copy, abstract), rounded)
    kept = weights.load(copy, sharding.abstract(abstract, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}


def test_our_shards_load_in_diffusers(unet_folder, torch_unet, tmp_path, monkeypatch, abstract):
    monkeypatch.setattr(weights, "MAX_SHARD", 200_000)
    params = weights.load(unet_folder, abstract)
    weights.save(
        tmp_path / "unet", params, config=folders.read_config(unet_folder), file_name=DIFFUSERS
    )
    files = list((tmp_path / "unet").glob("*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 220_000
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for (name, a), b in zip(torch_unet.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    _assert_equal(weights.load(tmp_path / "unet", abstract), params)


def test_shards_count_from_one_as_diffusers_counts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD", 40)
    params = {name: {"bias": np.zeros(10, np.float32)} for name in ("a", "b")}
    weights.save(tmp_path / "unet", params, config={}, file_name=DIFFUSERS)
    names = sorted(path.name for path in (tmp_path / "unet").glob("*.safetensors"))
    stem = "diffusion_pytorch_model"
    assert names == [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_older_and_newer_names_are_understood(tmp_path):
    torch.manual_seed(2)
    diffusers.AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    abstract = _abstract(vae.AutoencoderKL, vae.VAEConfig, tmp_path / "vae")
    expected = weights.load(tmp_path / "vae", abstract)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
        return tensors

    _edit(tmp_path / "vae", rename)
    assert any(
        ".proj_attn." in k for k in safetensors.numpy.load_file(tmp_path / "vae" / DIFFUSERS)
    )
    _assert_equal(weights.load(tmp_path / "vae", abstract), expected)

    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    _hub_names(model, tmp_path / "hub")
    _edit(
        tmp_path / "hub",
        lambda t: t.update({"text_model.embeddings.position_ids": np.arange(12)[None]}),
        TRANSFORMERS,
    )
    model.save_pretrained(tmp_path / "new")  # transformers 5 leaves `text_model.` out
    abstract = _abstract(clip.CLIPTextModel, clip.CLIPTextConfig, tmp_path / "new")
    _assert_equal(
        weights.load(tmp_path / "hub", abstract), weights.load(tmp_path / "new", abstract)
    )


def test_parameters_arrive_with_their_shardings(unet_folder, abstract):
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    plain = weights.load(unet_folder, abstract)

    def place(leaf):
        last = "fsdp" if leaf.shape[-1] % jax.device_count() == 0 else None
        return jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), last)
        )

    shardings = jax.tree.map(place, abstract)
    params = weights.load(unet_folder, sharding.abstract(abstract, shardings))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, shardings))
    _assert_equal(params, plain)


def test_loading_holds_about_one_leaf_beside_the_parameters(tmp_path):
    leaves, size = 16, 512 * 512
    rng = np.random.default_rng(0)
    safetensors.numpy.save_file(
        {f"m.{i}.weight": rng.random((512, 512), np.float32) for i in range(leaves)},
        tmp_path / TRANSFORMERS,
    )
    abstract = {
        "m": {i: {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)} for i in range(leaves)}
    }
    tracemalloc.start()
    params = weights.load(tmp_path, abstract)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - after < 3 * 4 * size, "the leaf, the tensor it is made from, and small change"
    assert params["m"][3]["kernel"].shape == (512, 512)


# Errors.


def test_tensors_that_do_not_fit_are_named_and_counted_in_one_error(copy, abstract):
    def damage(tensors):
        for key in [k for k in tensors if "attn2" in k]:
            del tensors[key]
        tensors["conv_in.weight"] = np.zeros((16, 9, 3, 3), np.float32)
        tensors["stray.weight"] = np.zeros(3, np.float32)

    _edit(copy, damage)
    message = _error(weights.load, copy, abstract)
    assert f"{12 * 5} tensors missing, 1 extra, 1 of the wrong shape" in message
    assert (
        "conv_in.weight is [16, 9, 3, 3], expected [16, 4, 3, 3]" in message
        and str(copy) in message
    )
    assert message.count("missing down_blocks.1") + message.count("missing mid_block") == 9, (
        "the first ten only"
    )
    zeros = weights.tensors_from_params(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    )
    _edit(copy, lambda tensors: {**zeros, "stray.weight": tensors["stray.weight"]})
    assert "extra stray.weight [3]" in _error(weights.load, copy, abstract)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(copy, value, dtype, abstract):
    def damage(tensors):
        tensors["mid_block.resnets.1.conv2.weight"] = tensors[
            "mid_block.resnets.1.conv2.weight"
        ].astype(dtype)
        tensors["mid_block.resnets.1.conv2.weight"][3, 2, 1, 0] = value

    _edit(copy, damage)
    message = _error(weights.load, copy, abstract)
    assert "mid_block.resnets.1.conv2.weight" in message and "1 of the 9216 values" in message


def test_quantised_weights_are_refused(copy, abstract):
    _edit(copy, lambda t: t.update({"conv_in.bias": t["conv_in.bias"].astype(np.int8)}))
    assert "conv_in.bias is stored as I8" in _error(weights.load, copy, abstract)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "unet.pt", "model.ckpt"])
def test_a_folder_of_pickles_is_refused_unopened(copy, name, abstract):
    (copy / DIFFUSERS).rename(copy / name)
    message = _error(weights.load, copy, abstract)
    assert name in message and "safetensors.torch.save_file" in message


@pytest.mark.parametrize("protocol", [2, 4, "zip"])
def test_a_pickle_under_the_name_of_safetensors_is_refused(copy, protocol, abstract):
    if protocol == "zip":
        with zipfile.ZipFile(copy / DIFFUSERS, "w") as file:
            file.writestr("data.pkl", "x")
    else:
        (copy / DIFFUSERS).write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    assert "is a pickle" in _error(weights.load, copy, abstract)


def test_safetensors_that_begin_like_a_pickle_are_not_taken_for_one(tmp_path):
    for pad in range(300):  # until the length of the header is 0x..80, the first byte of a pickle
        safetensors.numpy.save_file(
            {"b": np.zeros(3, np.float32)}, tmp_path / TRANSFORMERS, metadata={"x": "x" * pad}
        )
        if (tmp_path / TRANSFORMERS).read_bytes()[0] == 0x80:
            break
    assert (tmp_path / TRANSFORMERS).read_bytes()[0] == 0x80
    abstract = {"b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert weights.load(tmp_path, abstract)["b"].shape == (3,)
    (tmp_path / TRANSFORMERS).write_bytes((tmp_path / TRANSFORMERS).read_bytes()[:-1])
    assert "is not a readable safetensors file" in _error(weights.load, tmp_path, abstract)


@pytest.mark.parametrize(
    "content", [b"", b"\x10", b"\xff" * 40, b"\x02\x00\x00\x00\x00\x00\x00\x00{x"]
)
def test_a_broken_file_is_named(copy, content, abstract):
    (copy / DIFFUSERS).write_bytes(content)
    assert "is not a readable safetensors file" in _error(weights.load, copy, abstract)


def test_a_truncated_file_is_named(copy, abstract):
    (copy / DIFFUSERS).write_bytes((copy / DIFFUSERS).read_bytes()[:-1000])
    assert f"{copy / DIFFUSERS} is not a readable safetensors file" in _error(
        weights.load, copy, abstract
    )


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "x.bin", 3, None],
)
def test_an_index_cannot_name_files_outside_its_folder(copy, name, abstract):
    (copy / DIFFUSERS).rename(copy.parent / "secret.safetensors")
    (copy / f"{DIFFUSERS}.index.json").write_text(
        json.dumps({"weight_map": {"conv_in.weight": name}})
    )
    assert repr(str(name)) in _error(weights.load, copy, abstract)


def test_missing_shards_and_broken_json_are_named(copy, abstract):
    (copy / DIFFUSERS).unlink()
    assert f"no weights in {copy}" in _error(weights.load, copy, abstract)
    index = copy / f"{DIFFUSERS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "shard.safetensors"}}))
    assert "shard.safetensors, which is not there" in _error(weights.load, copy, abstract)
    index.write_text("{}")
    assert "no table 'weight_map'" in _error(weights.load, copy, abstract)
    index.write_text("{")
    assert f"{index} is not JSON" in _error(weights.load, copy, abstract)
    (copy / "config.json").write_text("[]")
    assert "expected a JSON object" in _error(folders.read_config, copy)
    assert "no file" in _error(folders.read_config, copy, "vae")
    assert "no folder" in _error(folders.read_config, copy / "nowhere")
    assert "no folder" in _error(weights.load, copy / "nowhere", {})


@pytest.mark.case("faults 12")
def test_a_tensor_in_two_shards_is_that_of_the_file_that_the_index_names(copy, abstract):
    tensors = safetensors.numpy.load_file(copy / DIFFUSERS)
    (copy / DIFFUSERS).unlink()
    name = "conv_in.weight"
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    for first, second in (("a", "b"), ("b", "a")):
        right = {**others, name: tensors[name]}
        safetensors.numpy.save_file(right, copy / f"{first}.safetensors")
        stale = {name: np.zeros_like(tensors[name]), "conv_in.bias": tensors["conv_in.bias"]}
        safetensors.numpy.save_file(stale, copy / f"{second}.safetensors")
        places = {key: f"{first}.safetensors" for key in tensors}
        places["conv_in.bias"] = f"{second}.safetensors"
        (copy / f"{DIFFUSERS}.index.json").write_text(json.dumps({"weight_map": places}))
        kernel = weights.load(copy, abstract)["conv_in"]["kernel"]
        np.testing.assert_array_equal(kernel, tensors[name].transpose(2, 3, 1, 0))


@pytest.mark.case("faults 24")
def test_an_error_shows_the_names_in_the_file_and_a_prefix_of_them_all(copy, abstract):
    whole = safetensors.numpy.load_file(copy / DIFFUSERS)
    for prefix in ("module.", "model.diffusion."):
        _edit(copy, lambda _: {prefix + key: tensor for key, tensor in whole.items()})
        message = _error(weights.load, copy, abstract)
        assert f"the file's names begin with {prefix!r}: save its tensors without" in message
    _edit(copy, lambda _: {f"x{i}.w": tensor for i, tensor in enumerate(whole.values())})
    message = _error(weights.load, copy, abstract)
    assert "the file has x0.w, x1.w, x10.w" in message and "begin with" not in message


@pytest.mark.case("faults 18")
@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"a":' * 10**5, b'{"a":' * 80 + b"1" + b"}" * 80]
)
def test_json_nested_without_end_is_named(copy, content):
    (copy / "config.json").write_bytes(content)
    message = _error(folders.read_config, copy)
    assert f"{copy / 'config.json'} has over 64 objects inside each other" in message


def test_a_pipe_in_place_of_a_file_is_not_waited_for(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    assert f"no file {copy / 'config.json'}" in _error(folders.read_config, copy)


# Writing.


def test_nothing_half_written_is_left_behind(unet_folder, tmp_path, abstract):
    params = weights.load(unet_folder, abstract)
    params["up_blocks"][1]["resnets"][0]["conv1"]["bias"] *= np.nan
    save = dict(config={}, file_name=DIFFUSERS)
    assert "up_blocks.1.resnets.0.conv1.bias" in _error(
        weights.save, tmp_path / "unet", params, **save
    )
    assert os.listdir(tmp_path) == []
    params["up_blocks"][1]["resnets"][0]["conv1"]["bias"] = np.full(16, 7e4, np.float32)
    assert "float16" in _error(weights.save, tmp_path / "unet", params, dtype=jnp.float16, **save)
    weights.save(tmp_path / "unet", params, **save)
    weights.save(tmp_path / "unet", {"b": jnp.zeros(3)}, config={"new": 1}, file_name=TRANSFORMERS)
    assert os.listdir(tmp_path) == ["unet"], "no temporary folder"
    assert sorted(os.listdir(tmp_path / "unet")) == ["config.json", folders.MARKER, TRANSFORMERS], (
        "nothing of the earlier model"
    )


def test_folders_that_are_no_models_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    model = dict(params={"b": jnp.zeros(3)}, config={}, file_name=TRANSFORMERS)
    assert "is no model folder" in _error(weights.save, tmp_path, **model)
    assert "cannot write" in _error(weights.save, tmp_path / "thesis.tex" / "unet", **model)
    assert os.listdir(tmp_path) == ["thesis.tex"]


# Names on the Hub.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with one repository in `tmp_path / "repository"`; records what was asked for."""
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        if not (tmp_path / "repository").is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                "cannot reach the Hub\nand more lines"
            )
        return str(tmp_path / "repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_path_is_looked_for_locally_only(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stabilityai" / "sdxl").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert folders.resolve("stabilityai/sdxl") == Path("stabilityai/sdxl")
    for name in ("./x", "/x", "x", "a/b/c", "../a", "~/a", "a/.."):
        assert f"no folder {name}" in _error(folders.resolve, name)
    assert "is a file" in _error(folders.resolve, "file")
    assert hub == []


def test_of_a_repository_only_data_files_of_its_components_are_fetched(hub, tmp_path):
    assert "`hf download stabilityai/sdxl`" in _error(folders.resolve, "stabilityai/sdxl")
    folder = tmp_path / "repository"
    folder.mkdir()
    index = {"unet": ["diffusers", "U"], "vae": [None, None], "flag": True}
    index["safety_checker"] = ["stable_diffusion", "S"]  # which nobody reads
    (folder / "model_index.json").write_text(json.dumps(index))
    hub.clear()
    assert folders.resolve("stabilityai/sdxl") == folder
    assert {name for name, _, _ in hub} == {"stabilityai/sdxl"}
    assert [asked[1:] for asked in hub] == [
        (["*.json", "*.txt", "*spiece.model", "README.md"], None),
        (["unet/*.safetensors"], "*.fp16*"),
        (["unet/*.safetensors"], None),
    ], "half precision where there is nothing else"
    (folder / "model.safetensors").touch()
    (folder / "model_index.json").write_text(json.dumps({"../../home": ["diffusers", "U"]}))
    assert "'../../home'" in _error(folders.resolve, "stabilityai/sdxl")
    (folder / "model_index.json").unlink()
    hub.clear()
    folders.resolve("yuvalkirstain/PickScore_v1")
    assert [patterns for _, patterns, _ in hub] == [
        ["*.json", "*.txt", "*spiece.model", "README.md"],
        ["*.safetensors"],
    ]
    hub.clear()
    assert folders.resolve_tokenizer("laion/CLIP-ViT-H-14-laion2B-s32B-b79K") == folder
    assert [patterns for _, patterns, _ in hub] == [
        ["*.json", "*.txt", "*spiece.model", "README.md"]
    ]
    assert "no folder ./nowhere" in _error(folders.resolve_tokenizer, "./nowhere")


# Over HTTP, by the Hub's own client.


class Hub(http.server.BaseHTTPRequestHandler):
    """Speaks as much of the Hub's API as one repository needs. files: {path: content}."""

    files: dict[str, bytes] = {}
    gated = False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        commit = "0" * 40
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if self.gated:
            self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED})
        elif "/tree/" in path:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
                for name, content in self.files.items()
            ]
            self._answer(200, json.dumps(listing).encode(), {})
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "some/one", "sha": commit, "siblings": siblings}
            self._answer(200, json.dumps(info).encode(), {})
        else:
            content = self.files[path.partition(f"/resolve/{commit}/")[2]]
            marks = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit}
            self._answer(200, content, marks)

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


GATED = "Access to model some/one is restricted. You must have access to it and be authenticated."


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A handler class of its own, served on this machine as the Hub."""
    handler = type("OneHub", (Hub,), {"files": {}})
    constants = huggingface_hub.constants
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield handler
        serving.shutdown()


@pytest.mark.case("faults 22")
def test_half_precision_is_fetched_for_the_components_that_have_no_other(server):
    parts = ("unet", "vae", "text_encoder", "scheduler", "tokenizer", "safety_checker")
    index = {part: ["library", "Class"] for part in parts}
    server.files |= {
        "model_index.json": json.dumps(index).encode(),
        "sd_xl_base_1.0.safetensors": b"all of it again",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": b"full",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
        "text_encoder/config.json": b"{}",
        "text_encoder/model.fp16.safetensors": b"half",
        "text_encoder/pytorch_model.bin": b"pickle",
        "scheduler/scheduler_config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        "tokenizer/spiece.model": b"pieces",
        "safety_checker/config.json": b"{}",
        "safety_checker/model.safetensors": b"nobody reads this",
    }
    folder = folders.resolve("some/one")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()}
    left_out = {
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
    }
    assert found == set(server.files) - left_out
    for part in ("unet", "vae", "text_encoder"):
        assert folders.weight_files(folder / part)[0]


@pytest.mark.case("faults 22")
def test_of_a_gated_repository_the_hubs_own_sentence_is_told(server):
    server.gated = True
    message = _error(folders.resolve, "some/one")
    assert "restricted" in message and "authenticated" in message and "401" in message


@pytest.mark.case("faults 22")
@pytest.mark.parametrize("address", ["hf-mirror.com", "", "ftp://x"])
def test_an_address_of_the_hub_without_its_scheme_is_named(monkeypatch, address):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    assert f"HF_ENDPOINT={address}, expected" in _error(folders.resolve, "some/one")
