# SPDX-License-Identifier: Apache-2.0
"""open_clip's names and layout of a CLIP's tensors as transformers' `CLIPModel` has them."""

import re

import numpy as np

from di_star_jax.storage.weights import Stored

# What open_clip calls a module, and what transformers does.
TOWERS = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _rename(name: str) -> str:
    for old, new in TOWERS.items():
        if name == old or name.startswith(old + "."):
            name = new + name[len(old) :]
            break
    layer = re.fullmatch(r"(\w+\.encoder\.layers\.\d+\.)(.*)\.(weight|bias)", name)
    return f"{layer[1]}{BLOCK[layer[2]]}.{layer[3]}" if layer and layer[2] in BLOCK else name


def _part(tensor: Stored, index: int) -> Stored:
    """One third of queries, keys and values, which open_clip stacks."""
    rows = tensor.shape[0] // 3
    return Stored(
        (rows, *tensor.shape[1:]),
        tensor.dtype,
        lambda: tensor.read()[index * rows : (index + 1) * rows],
    )


def to_transformers(stored: dict[str, Stored]) -> dict[str, Stored]:
    """A file's tensors under transformers' names; one that has these already is left alone.

    For `weights.load`.
    """
    if "visual.conv1.weight" not in stored:
        return stored
    arranged = {}
    for name, tensor in stored.items():
        stacked = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", _rename(name))
        if stacked:
            for i, part in enumerate("qkv"):
                arranged[f"{stacked[1]}.self_attn.{part}_proj.{stacked[2]}"] = _part(tensor, i)
        elif name in ("visual.proj", "text_projection"):  # open_clip multiplies from the other side
            transposed = Stored(
                tensor.shape[::-1], tensor.dtype, lambda read=tensor.read: np.transpose(read())
            )
            arranged[_rename(name)] = transposed
        else:
            arranged[_rename(name)] = tensor
    return arranged
