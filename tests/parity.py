# SPDX-License-Identifier: Apache-2.0
"""Our ports against diffusers and transformers: `python tests/parity.py` prints the README's table.

Float32 on CPU, random weights; errors are max|ours - theirs| / max|theirs|.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from di_star_jax import models
from di_star_jax.models import published
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import weights

FORWARD, GRADIENT = 2e-5, 1e-4  # what is called equal


@dataclasses.dataclass
class Errors:
    """Relative errors of the output, of the gradient with respect to the input, and to each chosen
    weight.
    """

    forward: float
    input_gradient: float
    weight_gradients: dict[str, float]

    @property
    def gradient(self) -> float:
        return max(self.input_gradient, *self.weight_gradients.values())


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, norms and biases too, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.1 * noise)
    return module.eval()


def port(module: torch.nn.Module, config: dict, *, dtype=jnp.float32, remat: str = "none"):
    """(graphdef, params) of our port with a torch module's weights."""
    cls, settings = pipeline.model_class(config)
    graphdef, tree = models.abstract(
        lambda rngs: cls(settings, rngs=rngs, dtype=dtype, remat=remat)
    )
    tensors = {name: p.detach().numpy() for name, p in module.state_dict().items()}
    return graphdef, weights.params_from_tensors(tensors, tree)


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shapes {ours.shape} and {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def to_nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def leaves_with(params, names: list[str]) -> list[int]:
    """Places of the leaves that hold the weights of these torch names."""
    places = []
    for place, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        keys = weights.torch_keys(tuple(key.key for key in path), leaf)
        if set(names) & set([keys] if isinstance(keys, str) else keys):
            places.append(place)
    return places


def compare(
    module, theirs, config: dict, ours, x: np.ndarray, chosen: list[str], *, remat: str = "none"
) -> Errors:
    """Compares an image-to-image function of a module: forward, and gradients of a random
    projection of it.

    Args:
      module: torch. theirs: (x NCHW tensor) -> NCHW tensor, through `module`.
      config: config.json of the port. ours: (merged port, x NHWC) -> NHWC.
      x: input, NHWC. chosen: torch names of weights whose gradients are compared.
    """
    graphdef, params = port(module, config, remat=remat)
    x_torch = to_nchw(x).requires_grad_()
    out = theirs(x_torch)
    projection = np.random.default_rng(1).standard_normal(to_nhwc(out).shape).astype(np.float32)
    (out * to_nchw(projection)).sum().backward()

    def loss(params, x):
        y = ours(nnx.merge(graphdef, params), x)
        return jnp.sum(y * projection), y

    places = leaves_with(params, chosen)

    @jax.jit
    def run(params, x):
        """The gradients of the chosen leaves alone, so that the others are not compiled."""
        (_, y), (grads, x_grad) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
        leaves = jax.tree.leaves(grads)
        return y, x_grad, [leaves[place] for place in places]

    y, x_grad, chosen_grads = run(params, x)
    leaves, treedef = jax.tree.flatten(params)
    for place, gradient in zip(places, chosen_grads):
        leaves[place] = gradient
    gradients = weights.tensors_from_params(jax.tree.unflatten(treedef, leaves))
    named = dict(module.named_parameters())
    return Errors(
        relative(y, to_nhwc(out)),
        relative(x_grad, to_nhwc(x_torch.grad)),
        {name: relative(gradients[name], named[name].grad.numpy()) for name in chosen},
    )


# Small UNets with the block layouts of the real ones: heads of 64, the same depths.
UNETS = {
    "SDXL": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 32,
        "block_out_channels": [64, 128, 192],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [1, 2, 3],
        "cross_attention_dim": 96,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 40,
    },
    "SD 1.5": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 32,
        "block_out_channels": [32, 64, 96, 96],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 48,
    },
}
# One level of convolutions alone, one with transformers: a quarter of the time to compile.
UNETS["SDXL, small"] = {
    **UNETS["SDXL"],
    "block_out_channels": [64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNET_WEIGHTS = {
    "SDXL, small": [
        "conv_in.weight",
        "mid_block.attentions.0.transformer_blocks.1.attn1.to_q.weight",
        "up_blocks.1.resnets.1.conv1.weight",
    ],
    "SDXL": [
        "conv_in.weight",
        "mid_block.attentions.0.transformer_blocks.7.attn1.to_q.weight",
        "up_blocks.1.resnets.2.conv1.weight",
    ],
    "SD 1.5": [
        "conv_in.weight",
        "down_blocks.2.attentions.1.proj_in.weight",
        "up_blocks.0.resnets.1.norm2.weight",
    ],
}


def torch_unet(name: str):
    from diffusers import UNet2DConditionModel

    config = {k: v for k, v in UNETS[name].items() if k != "_class_name"}
    return randomise(UNet2DConditionModel(**config))


def unet_inputs(name: str, batch: int, height: int, width: int) -> dict[str, np.ndarray]:
    rng, config = np.random.default_rng(0), UNETS[name]
    values = {
        "x": rng.standard_normal((batch, height, width, 4)),
        "t": rng.integers(0, 1000, batch),
        "context": rng.standard_normal((batch, 7, config["cross_attention_dim"])),
    }
    if "addition_embed_type" in config:
        values |= {
            "pooled": rng.standard_normal((batch, 40)),
            "time_ids": rng.integers(0, 1024, (batch, 6)),
        }
    return {k: v.astype(np.int32 if k == "t" else np.float32) for k, v in values.items()}


def unet_errors(name: str, batch: int, height: int, width: int, *, remat: str = "none") -> Errors:
    from di_star_jax.models.unet import Condition

    v = unet_inputs(name, batch, height, width)
    module = torch_unet(name)
    added = (
        {"text_embeds": torch.tensor(v["pooled"]), "time_ids": torch.tensor(v["time_ids"])}
        if "pooled" in v
        else None
    )

    def theirs(x):
        return module(
            x, torch.tensor(v["t"]), torch.tensor(v["context"]), added_cond_kwargs=added
        ).sample

    condition = Condition(v["context"], v.get("pooled"), v.get("time_ids"))
    return compare(
        module,
        theirs,
        UNETS[name],
        lambda unet, x: unet(x, v["t"], condition),
        v["x"],
        UNET_WEIGHTS[name],
        remat=remat,
    )


def torch_vae():
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**{k: v for k, v in VAE.items() if k != "_class_name"}))


def vae_decoder_errors(batch: int, height: int, width: int) -> Errors:
    module = torch_vae()
    z = np.random.default_rng(0).standard_normal((batch, height, width, 4)).astype(np.float32)
    return compare(
        module,
        lambda z: module.decode(z / 0.13025).sample,
        VAE,
        lambda vae, z: vae.decode(z),
        z,
        [
            "decoder.conv_in.weight",
            "decoder.mid_block.attentions.0.to_v.weight",
            "decoder.up_blocks.2.resnets.0.conv1.weight",
        ],
    )


TINY_VAE = {
    **published.TINY_VAE,
    "encoder_block_out_channels": [24] * 4,
    "decoder_block_out_channels": [24] * 3,
    "num_decoder_blocks": [2, 1, 1],
}


def torch_tiny_vae(config: dict = TINY_VAE):
    from diffusers import AutoencoderTiny

    return randomise(AutoencoderTiny(**{k: v for k, v in config.items() if k != "_class_name"}))


def tiny_vae_errors(batch: int, height: int, width: int, *, remat: str = "none") -> Errors:
    """Of latents as large as those that the tanh at the decoder's beginning bends."""
    module = torch_tiny_vae()
    del module.encoder  # which the port leaves out
    z = 3 * np.random.default_rng(0).standard_normal((batch, height, width, 4)).astype(np.float32)
    return compare(
        module,
        lambda z: module.decode(z / module.config.scaling_factor).sample,
        TINY_VAE,
        lambda vae, z: vae.decode(z),
        z,
        [
            "decoder.layers.0.weight",
            "decoder.layers.3.conv.2.bias",
            "decoder.layers.5.weight",
        ],
        remat=remat,
    )


def vae_encoder_errors(batch: int, height: int, width: int) -> Errors:
    """Of mean and standard deviation of the scaled latents, side by side."""
    module = torch_vae()
    image = np.random.default_rng(0).standard_normal((batch, height, width, 3)).astype(np.float32)

    def theirs(image):
        posterior = module.encode(image).latent_dist
        return 0.13025 * torch.cat([posterior.mean, posterior.std], dim=1)

    return compare(
        module,
        theirs,
        VAE,
        lambda vae, x: jnp.concatenate(vae.encode(x), axis=-1),
        image,
        [
            "encoder.conv_in.weight",
            "encoder.down_blocks.1.downsamplers.0.conv.weight",
            "quant_conv.weight",
        ],
    )


# Small transformers of PixArt-alpha's layout, as its config.json has it: the second is told sizes.
PIXARTS = {
    "PixArt-512": {
        **published.PIXART_512,
        "num_attention_heads": 3,
        "attention_head_dim": 24,
        "cross_attention_dim": 72,
        "num_layers": 3,
        "caption_channels": 40,
    },
}
PIXARTS["PixArt-1024"] = {**PIXARTS["PixArt-512"], "sample_size": 128}
PIXART_WEIGHTS = {
    "PixArt-512": [
        "pos_embed.proj.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.1.ff.net.0.proj.weight",
    ],
    "PixArt-1024": [
        "adaln_single.emb.resolution_embedder.linear_1.weight",
        "transformer_blocks.2.scale_shift_table",
        "transformer_blocks.0.attn2.to_k.weight",
    ],
}


def torch_pixart(name: str, seed: int = 0):
    from diffusers import PixArtTransformer2DModel

    known = inspect.signature(PixArtTransformer2DModel).parameters
    config = {k: v for k, v in PIXARTS[name].items() if k in known}
    return randomise(PixArtTransformer2DModel(**config), seed)


def pixart_inputs(
    config: dict, batch: int, height: int, width: int, tokens: int = 7
) -> dict[str, np.ndarray]:
    """Of texts of different lengths, the first of one token as that of no prompt."""
    rng = np.random.default_rng(0)
    lengths = 1 + np.arange(batch) * (tokens - 1) // max(batch - 1, 1)
    lengths = lengths if batch > 1 else np.array([tokens // 2])
    size = rng.integers(256, 2048, (batch, 2)).astype(np.float32)
    return {
        "x": rng.standard_normal((batch, height, width, 4)).astype(np.float32),
        "t": rng.integers(0, 1000, batch).astype(np.int32),
        "context": rng.standard_normal((batch, tokens, config["caption_channels"])).astype(
            np.float32
        ),
        "mask": np.arange(tokens) < lengths[:, None],
        "time_ids": np.concatenate([size, size[:, :1] / size[:, 1:]], axis=1),
    }


def pixart_condition(v: dict[str, np.ndarray]):
    from di_star_jax.models.unet import Condition

    return Condition(v["context"], None, v["time_ids"], v["mask"])


def torch_pixart_eps(module, v: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """The first half of the channels, which the pipeline keeps."""
    size = torch.tensor(v["time_ids"])
    out = module(
        x,
        encoder_hidden_states=torch.tensor(v["context"]),
        timestep=torch.tensor(v["t"]),
        added_cond_kwargs={"resolution": size[:, :2], "aspect_ratio": size[:, 2:]},
        encoder_attention_mask=torch.tensor(v["mask"]),
    ).sample
    return out.chunk(2, dim=1)[0]


def pixart_errors(name: str, batch: int, height: int, width: int, *, remat: str = "none") -> Errors:
    v = pixart_inputs(PIXARTS[name], batch, height, width)
    module = torch_pixart(name)
    return compare(
        module,
        lambda x: torch_pixart_eps(module, v, x),
        PIXARTS[name],
        lambda pixart, x: pixart(x, v["t"], pixart_condition(v)),
        v["x"],
        PIXART_WEIGHTS[name],
        remat=remat,
    )


def main() -> None:
    rows = {
        "UNet2DConditionModel, SDXL layout (depths 1/2/10), 24x40, batch 3": unet_errors(
            "SDXL", 3, 24, 40
        ),
        "UNet2DConditionModel, SD 1.5 layout, 24x40, batch 1": unet_errors("SD 1.5", 1, 24, 40),
        "PixArtTransformer2DModel, 512 layout, 10x14, batch 3": pixart_errors(
            "PixArt-512", 3, 10, 14
        ),
        "PixArtTransformer2DModel, 1024 layout (told sizes), 26x18, batch 1": pixart_errors(
            "PixArt-1024", 1, 26, 18
        ),
        "AutoencoderKL, encoder, 48x80, batch 1": vae_encoder_errors(1, 48, 80),
        "AutoencoderKL, decoder, 6x10, batch 3": vae_decoder_errors(3, 6, 10),
        "AutoencoderTiny, decoder, 6x10, batch 3": tiny_vae_errors(3, 6, 10),
    }
    print("| module | forward | gradient (input and three weights) |\n|---|---|---|")
    for name, errors in rows.items():
        print(f"| {name} | {errors.forward:.1e} | {errors.gradient:.1e} |")


if __name__ == "__main__":
    main()
