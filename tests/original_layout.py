# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of single-file checkpoints as the code that they were trained with builds them.

Of `UNetModel`, `AutoencoderKL` and the embedders of CompVis' latent-diffusion and Stability's
generative-models, and of open_clip's `TextTransformer`, from the fields of their YAML files.
Nothing here knows diffusers' names.
"""

import dataclasses

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class UNet:
    """`network_config`, under its names there; heads is what a level has, which no shape shows."""

    model_channels: int
    channel_mult: tuple[int, ...]
    attention: tuple[int, ...]  # levels that have it
    depth: tuple[int, ...]
    context_dim: int
    num_res_blocks: int = 2
    adm_in_channels: int | None = None
    use_linear: bool = True
    in_channels: int = 4


@dataclasses.dataclass(frozen=True)
class Vae:
    """`ddconfig`."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int = 2
    z_channels: int = 4


@dataclasses.dataclass(frozen=True)
class Text:
    """One of the embedders."""

    width: int
    layers: int
    inner: int
    vocab: int = 49408
    length: int = 77


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """clip: of transformers. open_clip: SDXL's second; None for SD 1.5."""

    unet: UNet
    vae: Vae
    clip: Text
    open_clip: Text | None = None


_VAE = Vae(128, (1, 2, 4, 4))
_CLIP_L = Text(768, 12, 3072)
SDXL = Checkpoint(
    UNet(320, (1, 2, 4), (1, 2), (0, 2, 10), 2048, adm_in_channels=2816),
    _VAE,
    _CLIP_L,
    Text(1280, 32, 5120),
)
SD15 = Checkpoint(
    UNet(320, (1, 2, 4, 4), (0, 1, 2), (1, 1, 1, 1), 768, use_linear=False), _VAE, _CLIP_L
)


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """A linear layer or a convolution, [out, ...]; a norm, [out]."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _res_block(name: str, width: int, out: int, emb: int) -> Shapes:
    return {
        **_layer(f"{name}.in_layers.0", width),
        **_layer(f"{name}.in_layers.2", out, width, 3, 3),
        **_layer(f"{name}.emb_layers.1", out, emb),
        **_layer(f"{name}.out_layers.0", out),
        **_layer(f"{name}.out_layers.3", out, out, 3, 3),
        **(_layer(f"{name}.skip_connection", out, width, 1, 1) if width != out else {}),
    }


def _transformer(name: str, width: int, depth: int, of: UNet) -> Shapes:
    one = () if of.use_linear else (1, 1)
    found = _layer(f"{name}.norm", width) | _layer(f"{name}.proj_in", width, width, *one)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, context in (("attn1", width), ("attn2", of.context_dim)):
            found |= _layer(f"{block}.{attention}.to_q", width, width, bias=False)
            found |= _layer(f"{block}.{attention}.to_k", width, context, bias=False)
            found |= _layer(f"{block}.{attention}.to_v", width, context, bias=False)
            found |= _layer(f"{block}.{attention}.to_out.0", width, width)
        found |= _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        found |= _layer(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            found |= _layer(f"{block}.{norm}", width)
    return found | _layer(f"{name}.proj_out", width, width, *one)


def _unet(of: UNet) -> Shapes:
    ch, emb = of.model_channels, 4 * of.model_channels
    found = _layer("time_embed.0", emb, ch) | _layer("time_embed.2", emb, emb)
    if of.adm_in_channels:
        found |= _layer("label_emb.0.0", emb, of.adm_in_channels)
        found |= _layer("label_emb.0.2", emb, emb)
    found |= _layer("input_blocks.0.0", ch, of.in_channels, 3, 3)
    skips, width, at = [ch], ch, 1
    for level, mult in enumerate(of.channel_mult):
        for _ in range(of.num_res_blocks):
            found |= _res_block(f"input_blocks.{at}.0", width, mult * ch, emb)
            width = mult * ch
            if level in of.attention:
                found |= _transformer(f"input_blocks.{at}.1", width, of.depth[level], of)
            skips.append(width)
            at += 1
        if level < len(of.channel_mult) - 1:
            found |= _layer(f"input_blocks.{at}.0.op", width, width, 3, 3)
            skips.append(width)
            at += 1
    found |= _res_block("middle_block.0", width, width, emb)
    found |= _transformer("middle_block.1", width, of.depth[-1], of)
    found |= _res_block("middle_block.2", width, width, emb)
    at = 0
    for level, mult in reversed([*enumerate(of.channel_mult)]):
        for i in range(of.num_res_blocks + 1):
            found |= _res_block(f"output_blocks.{at}.0", width + skips.pop(), mult * ch, emb)
            width = mult * ch
            inner = 1
            if level in of.attention:
                found |= _transformer(f"output_blocks.{at}.1", width, of.depth[level], of)
                inner = 2
            if level and i == of.num_res_blocks:
                found |= _layer(f"output_blocks.{at}.{inner}.conv", width, width, 3, 3)
            at += 1
    return found | _layer("out.0", width) | _layer("out.2", 4, width, 3, 3)


def _vae_block(name: str, width: int, out: int) -> Shapes:
    return {
        **_layer(f"{name}.norm1", width),
        **_layer(f"{name}.conv1", out, width, 3, 3),
        **_layer(f"{name}.norm2", out),
        **_layer(f"{name}.conv2", out, out, 3, 3),
        **(_layer(f"{name}.nin_shortcut", out, width, 1, 1) if width != out else {}),
    }


def _vae_middle(name: str, width: int) -> Shapes:
    found = _vae_block(f"{name}.block_1", width, width) | _layer(f"{name}.attn_1.norm", width)
    for conv in ("q", "k", "v", "proj_out"):
        found |= _layer(f"{name}.attn_1.{conv}", width, width, 1, 1)
    return found | _vae_block(f"{name}.block_2", width, width)


def _vae(of: Vae) -> Shapes:
    last = len(of.ch_mult) - 1
    found = _layer("encoder.conv_in", of.ch, 3, 3, 3)
    width = of.ch
    for level, mult in enumerate(of.ch_mult):
        for i in range(of.num_res_blocks):
            found |= _vae_block(f"encoder.down.{level}.block.{i}", width, mult * of.ch)
            width = mult * of.ch
        if level < last:
            found |= _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    found |= _vae_middle("encoder.mid", width) | _layer("encoder.norm_out", width)
    found |= _layer("encoder.conv_out", 2 * of.z_channels, width, 3, 3)
    found |= _layer("decoder.conv_in", width, of.z_channels, 3, 3)
    found |= _vae_middle("decoder.mid", width)
    for level, mult in reversed([*enumerate(of.ch_mult)]):
        for i in range(of.num_res_blocks + 1):
            found |= _vae_block(f"decoder.up.{level}.block.{i}", width, mult * of.ch)
            width = mult * of.ch
        if level:
            found |= _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    found |= _layer("decoder.norm_out", width) | _layer("decoder.conv_out", 3, width, 3, 3)
    z = of.z_channels
    return found | _layer("quant_conv", 2 * z, 2 * z, 1, 1) | _layer("post_quant_conv", z, z, 1, 1)


def _clip(of: Text) -> Shapes:
    found = {
        "embeddings.token_embedding.weight": (of.vocab, of.width),
        "embeddings.position_embedding.weight": (of.length, of.width),
        "embeddings.position_ids": (1, of.length),
    }
    for i in range(of.layers):
        for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _layer(f"encoder.layers.{i}.self_attn.{linear}", of.width, of.width)
        found |= _layer(f"encoder.layers.{i}.mlp.fc1", of.inner, of.width)
        found |= _layer(f"encoder.layers.{i}.mlp.fc2", of.width, of.inner)
        found |= _layer(f"encoder.layers.{i}.layer_norm1", of.width)
        found |= _layer(f"encoder.layers.{i}.layer_norm2", of.width)
    return found | _layer("final_layer_norm", of.width)


def _open_clip(of: Text) -> Shapes:
    found = {
        "positional_embedding": (of.length, of.width),
        "text_projection": (of.width, of.width),
        "logit_scale": (),
        "token_embedding.weight": (of.vocab, of.width),
    }
    for i in range(of.layers):
        block = f"transformer.resblocks.{i}"
        found[f"{block}.attn.in_proj_weight"] = (3 * of.width, of.width)
        found[f"{block}.attn.in_proj_bias"] = (3 * of.width,)
        found |= _layer(f"{block}.attn.out_proj", of.width, of.width)
        found |= _layer(f"{block}.mlp.c_fc", of.inner, of.width)
        found |= _layer(f"{block}.mlp.c_proj", of.width, of.inner)
        found |= _layer(f"{block}.ln_1", of.width) | _layer(f"{block}.ln_2", of.width)
    return found | _layer("ln_final", of.width)


def shapes(of: Checkpoint) -> Shapes:
    """All tensors of a file."""
    parts = {"model.diffusion_model": _unet(of.unet), "first_stage_model": _vae(of.vae)}
    if of.open_clip is None:
        parts["cond_stage_model.transformer.text_model"] = _clip(of.clip)
    else:
        parts["conditioner.embedders.0.transformer.text_model"] = _clip(of.clip)
        parts["conditioner.embedders.1.model"] = _open_clip(of.open_clip)
    return {f"{part}.{key}": shape for part, keys in parts.items() for key, shape in keys.items()}
