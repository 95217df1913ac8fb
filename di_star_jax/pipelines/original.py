# SPDX-License-Identifier: Apache-2.0
"""The original layout of SDXL's and SD 1.5's checkpoints: one file, in the names of the code that
trained them, as people download and draw with.

Source: `UNetModel` and `AutoencoderKL` of CompVis' latent-diffusion and Stability's
generative-models, `TextTransformer` of open_clip, in whose order of blocks names count.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from di_star_jax.errors import UserError
from di_star_jax.storage import open_clip
from di_star_jax.storage.weights import Stored

UNET, VAE, CLIP, OPEN_CLIP = "unet", "vae", "clip", "open_clip"  # networks that have a layout
# Empty tensors of files whose network predicts v, and of those that reach pure noise.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
_FLOATS, _COUNTS = ("F64", "F32", "F16", "BF16"), ("I64", "I32")  # how tensors may be stored


class Place(NamedTuple):
    """Where a tensor of diffusers' lies in the original layout.

    name: there, without what stands before the network's names.
    third: of queries, keys and values, which are one tensor there; None for a tensor by itself.
    lies: how, "same", "transposed", or as a "convolution" of one pixel.
    """

    name: str
    third: int | None = None
    lies: str = "same"


# Names.

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_BLOCK = {new: old for old, new in open_clip.BLOCK.items()}
_OPEN_CLIP_ENDS = {
    new: old for old, new in open_clip.TOWERS.items() if not new.startswith("vision_model")
}


class _Blocks(NamedTuple):
    """What names count by. layers: resnets of a block of the encoder. levels: of the decoder.
    attentive: indices of the decoder's blocks that attend.
    """

    layers: int
    levels: int
    attentive: frozenset[int]

    @classmethod
    def of(cls, keys: Iterable[str]) -> "_Blocks":
        found = [re.match(r"(?:\w+\.)?(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", k) for k in keys]
        parts = [(m[1], int(m[2]), m[3], int(m[4])) for m in found if m]
        return cls(
            layers=1 + max(i for way, _, kind, i in parts if (way, kind) == ("down", "resnets")),
            levels=1 + max(block for way, block, _, _ in parts if way == "up"),
            attentive=frozenset(
                b for way, b, kind, _ in parts if (way, kind) == ("up", "attentions")
            ),
        )


def _unet(key: str, blocks: _Blocks) -> Place:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return Place(f"{_UNET_ENDS[module]}.{leaf}")
    way, *rest = module.split(".")
    if way == "mid_block":
        kind, index, *inner = rest
        at, place = "middle_block", 1 if kind == "attentions" else 2 * int(index)
    else:
        block, kind, index, *inner = rest
        of_block = blocks.layers if way == "down_blocks" else blocks.layers + 1
        if way == "down_blocks":
            # The first of all is conv_in; each block's last makes the image smaller.
            number = 1 + int(block) * (of_block + 1) + int(index)
            number += of_block if kind == "downsamplers" else 0
            at = f"input_blocks.{number}"
        else:
            number = int(block) * of_block + int(index)
            number += of_block - 1 if kind == "upsamplers" else 0
            at = f"output_blocks.{number}"
        if kind == "upsamplers":
            place = 2 if int(block) in blocks.attentive else 1
        else:
            place = 1 if kind == "attentions" else 0
    inside = ".".join(inner)
    if kind == "resnets":
        inside = _UNET_RESNET[inside]
    elif kind == "downsamplers":
        inside = "op"
    return Place(f"{at}.{place}.{inside}.{leaf}")


def _vae(key: str, blocks: _Blocks) -> Place:
    module, _, leaf = key.rpartition(".")
    name = module.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    level = re.search(r"up_blocks\.(\d+)\.", name)
    if level:  # the decoder's blocks count the other way
        other = f"up.{blocks.levels - 1 - int(level[1])}."
        name = name.replace(level[0], other)
        name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", name)
    if not attention:
        return Place(f"{name}.{leaf}")
    inside = _VAE_ATTENTION[attention[2]]
    is_matrix = inside != "norm" and leaf == "weight"
    lies = "convolution" if is_matrix else "same"
    return Place(f"{attention[1]}.mid.attn_1.{inside}.{leaf}", lies=lies)


def _open_clip(key: str, blocks: None) -> Place:
    del blocks
    if key in _OPEN_CLIP_ENDS:
        lies = "transposed" if key == "text_projection.weight" else "same"
        return Place(_OPEN_CLIP_ENDS[key], lies=lies)
    module, _, leaf = key.rpartition(".")
    layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if not layer:
        return Place(f"{_OPEN_CLIP_ENDS[module]}.{leaf}")
    block = f"transformer.resblocks.{layer[1]}"
    stacked = re.fullmatch(r"self_attn\.([qkv])_proj", layer[2])
    if stacked:
        return Place(f"{block}.attn.in_proj_{leaf}", third="qkv".index(stacked[1]))
    return Place(f"{block}.{_OPEN_CLIP_BLOCK[layer[2]]}.{leaf}")


def places(network: str, keys: Iterable[str]) -> dict[str, Place]:
    """Where each tensor of a network lies. Args: of UNET to OPEN_CLIP; diffusers' names of all."""
    keys = list(keys)
    if network == CLIP:
        return {key: Place(key) for key in keys}
    if network == OPEN_CLIP:
        return {key: _open_clip(key, None) for key in keys}
    blocks = _Blocks.of(keys)
    rule = {UNET: _unet, VAE: _vae}[network]
    return {key: rule(key, blocks) for key in keys}


# Tensors.


def _lies(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape in the original layout of a tensor of diffusers', its third alone."""
    if place.lies == "transposed":
        return shape[::-1]
    return (*shape, 1, 1) if place.lies == "convolution" else shape


def original_shapes(
    network: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network in the original layout. Args: diffusers'."""
    found = {}
    for key, place in places(network, shapes).items():
        first, *rest = _lies(shapes[key], place) or (None,)
        shape = () if first is None else (first, *rest)
        found[place.name] = shape if place.third is None else (3 * first, *rest)
    return found


def to_diffusers(
    network: str,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> dict[str, Stored]:
    """A network's tensors under diffusers' names and in its shapes; bytes are read when asked for.

    Args:
      network: of UNET to OPEN_CLIP.
      shapes: the network's in diffusers, by name.
      stored: its tensors in the original layout, which `original_shapes` lists.
    """
    return {
        key: _as_diffusers(stored[place.name], place, shapes[key])
        for key, place in places(network, shapes).items()
    }


def _as_diffusers(
    tensor: Stored,
    place: Place,
    shape: tuple[int, ...],
) -> Stored:
    def read() -> np.ndarray:
        array = tensor.read()
        if place.third is not None:
            rows = shape[0]
            array = array[place.third * rows : (place.third + 1) * rows]
        array = array.T if place.lies == "transposed" else array
        # In rows, for safetensors writes the memory as it lies.
        return np.ascontiguousarray(array).reshape(shape)

    return Stored(shape, tensor.dtype, read)


def from_diffusers(network: str, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """As `to_diffusers`, the other way. Args: stored, in diffusers' names."""
    stacks = {}
    for key, place in places(network, stored).items():
        stacks.setdefault(place.name, []).append((place, stored[key]))
    return {name: _as_original(parts) for name, parts in stacks.items()}


def _as_original(parts: list[tuple[Place, Stored]]) -> Stored:
    """Args: the one tensor of a name, or its thirds."""
    parts = sorted(parts, key=lambda part: part[0].third or 0)
    place, first = parts[0]
    shape = _lies(first.shape, place)
    if place.third is not None:
        shape = (3 * shape[0], *shape[1:])

    def read() -> np.ndarray:
        arrays = [tensor.read() for _, tensor in parts]
        array = arrays[0] if place.third is None else np.concatenate(arrays)
        array = array.T if place.lies == "transposed" else array
        return np.ascontiguousarray(array).reshape(shape)

    return Stored(shape, first.dtype, read)


# What a file is.

# A name in it, and what the file then is; the first that is found counts.
_KINDS = (
    (r"(^|\.|_)lora_|\.(hada|lokr)_", "a LoRA file"),
    (r"(^|\.)(double|single)_blocks\.\d+\.", "a FLUX checkpoint"),
    (r"(^|\.)joint_blocks\.\d+\.", "an SD3 checkpoint"),
    (r"(^|\.)(time_stack|time_mixer|motion_modules|temporal_transformer)\.", "a video model"),
    (r"^(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet"),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner checkpoint"),
    (r"^cond_stage_model\.model\.", "an SD 2 checkpoint"),
    (r"^(edm_mean|edm_std|edm_vpred\..*)$", "a checkpoint trained in EDM's form"),
    (r"^(down_blocks|mid_block|transformer_blocks|text_model)\.", "one network of a pipeline"),
    (r"^(encoder|decoder)\.(conv_in|mid)\.", "a VAE alone"),
)
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_CHANNELS = {8: "an InstructPix2Pix", 9: "an inpainting"}
# {what has the name: (name in words, article)}, of those that are read.
_FAMILIES = {
    "conditioner.embedders.1.model.": "SDXL",
    "cond_stage_model.transformer.": "SD 1.5",
}


def is_lora(names: Iterable[str]) -> bool:
    """Whether a file is of adapters. Args: its tensors' names."""
    pattern, _ = _KINDS[0]
    return any(re.search(pattern, name) for name in names)


def family_name(file: str, stored: Mapping[str, Stored]) -> str:
    """The family of a single file, "SDXL" or "SD 1.5", told by its names and shapes.

    Args: the file's path, for errors; its tensors.
    Raises: UserError that names what else the file is.
    """
    expected = "expected an SDXL or SD 1.5 checkpoint in one file, as it was published; give one"
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in stored):
            raise UserError(f"{file} is {kind}, {expected}")
    families = [
        name for start, name in _FAMILIES.items() if any(key.startswith(start) for key in stored)
    ]
    shape = stored[_CONV_IN].shape if _CONV_IN in stored else None
    if shape is not None and len(shape) == 4 and shape[1] in _CHANNELS:
        kind = f"{_CHANNELS[shape[1]]} checkpoint of {shape[1]} input channels"
        raise UserError(f"{file} is {kind}, {expected}")
    if shape is None or not families:
        what = "has no text encoders" if shape is not None else "has no UNet"
        names = ", ".join(sorted(stored)[:3]) or "nothing"
        raise UserError(f"{file} {what} (it holds {names}, ...), {expected}")
    _check_dtypes(file, families[0], stored)
    return families[0]


def _check_dtypes(file: str, family: str, stored: Mapping[str, Stored]) -> None:
    """Raises: UserError for weights that are quantised."""
    names = " ".join(name for name in stored if "bitsandbytes__" in name)
    for name, tensor in stored.items():
        if tensor.dtype in (*_FLOATS, *_COUNTS):
            continue
        if tensor.dtype.startswith("F8"):
            kind = "fp8"
        else:
            kind = next((k for k in ("nf4", "fp4") if f"__{k}" in names), tensor.dtype)
        raise UserError(
            f"{file} is an {family} checkpoint quantised to {kind} ({name} is stored as "
            f"{tensor.dtype}), expected F32, F16 or BF16; give the file that it was made from"
        )


def check_whole(
    file: str,
    family: str,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, Stored],
) -> None:
    """Looks whether a file has the tensors of all networks.

    Args: expected, by name; a convolution of one pixel may lie as a matrix.
    Raises: UserError for tensors that are missing, of another shape, or not known.
    """
    missing = [name for name in expected if name not in stored]
    wrong = [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and not _fits(stored[name].shape, shape)
    ]
    starts = {".".join(name.split(".")[:2]) + "." for name in expected}
    extra = [
        name
        for name in stored
        if name.startswith(tuple(starts)) and name not in expected and not _is_left_out(name)
    ]
    if missing or wrong or extra:
        first = [*wrong, *(f"missing {n}" for n in missing), *(f"extra {n}" for n in extra)][:5]
        raise UserError(
            f"{file} is an {family} checkpoint that does not fit the settings: {len(missing)} "
            f"tensors missing, {len(extra)} extra, {len(wrong)} of another shape; first "
            f"{len(first)}: {'; '.join(first)}; give --reference=FOLDER of a pipeline of its kind"
        )


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return found == shape or (len(shape) == 4 and shape[2:] == (1, 1) and found == shape[:2])


def _is_left_out(name: str) -> bool:
    """What no picture depends on: counters, CLIP's heads, the loss that a VAE was trained with."""
    ends = ("position_ids", "logit_scale", "transformer.text_projection.weight")
    return name.endswith(ends) or name.startswith(("first_stage_model.loss.", "model_ema."))
