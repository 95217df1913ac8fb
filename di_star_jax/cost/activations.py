# SPDX-License-Identifier: Apache-2.0
"""What a step holds on a device beside its state, by formula: nothing is traced or compiled.

Against what the TPU compiler makes of the whole step: docs/performance.md.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from di_star_jax.assembly import is_tiny, reference_dtype, reward_sources, seen_pixels
from di_star_jax.objectives import OBJECTIVES

# GB of a decoder at 1024 pixels in bfloat16, by what is kept.
VAE = {"none": 13.4, "dots": 4.3 + 4.3, "full": 4.3}
TINY = {"none": 2.22, "dots": 2.22, "full": 2.19}


class Activations(NamedTuple):
    """Bytes of an image, of a device's part of the batch.

    generator: of its pass, which waits while dL/dx0 is found. scores: of assistant and guided
    reference. decoder: of the VAE and the reward behind it. learning: of one network's pass.
    """

    generator: float
    scores: float
    decoder: float
    learning: float


def activations(
    config,
    width: float = 1.0,
    vae_width: float = 1.0,
    flash: bool = False,
) -> Activations:
    """Args: config; width, vae_width, as of `widths`; flash, whether the attention kernel keeps no
    maps.

    Counted on SDXL at 1024 pixels in bfloat16, per image (batch 1 of one network):
      UNet: keeps 0.46 GB and works in 0.80 GB (0.13 and one attention map in float32) with
        recomputation; keeps 13.0 GB (outputs 6.9, attention maps 6.1) without; with that of all
        but products, these too: in 10 blocks of 4096 tokens and 640 channels and 60 of 1024 and
        1280, 16 times the channels for each token, 3.36 GB, and resnets' convolutions, 0.26 GB;
      VAE decoder: keeps 1.9 GB and works in 2.4 GB with recomputation; with that of all but
        products these too, 4.3 GB; keeps 13.4 GB without;
      tiny decoder (`decode.view`), by the TPU compiler: 2.19 GB with recomputation, 2.22 without.
    Scaled by pixels (of what the decoder sees, `decode.view`), width and dtype; attention maps grow
    faster than that, and the reward's own network is small beside the VAE. The scores' gradient
    goes through three passes and their guided two at a time, but for losses that want none.
    Adapters change little here: what a block keeps is its input, with or without them.

    The decoder has a width of its own, for scaled by the denoiser's, PixArt's came out too small.
    """
    everything = 6.9 if flash else 13.0
    by_policy = {"none": (everything, 0.0), "dots": (0.46 + 3.62, 0.80), "full": (0.46, 0.80)}
    keep, work = by_policy[config.compute.remat_denoiser]
    vae = (TINY if is_tiny(config) else VAE)[config.compute.remat_vae]
    item = jnp.dtype(config.compute.dtype).itemsize / 2
    pixels = (config.data.resolution / 1024) ** 2
    seen = (seen_pixels(config) / 1024) ** 2
    kept = 3 if OBJECTIVES[config.objective.name].through else 0
    scores = pixels * width * reference_dtype(config).itemsize / 2 * (kept * keep + 2 * work)
    decoder = seen * item * vae_width * vae if reward_sources(config) else 0.0
    one = pixels * item * width
    gb = (one * keep, scores, decoder, one * (keep + work))
    return Activations(*(1e9 * size for size in gb))


class Phase(NamedTuple):
    """A part of the step. fixed: bytes on a device; image: more for each image at a time."""

    fixed: float
    image: float

    def bytes(self, images: float) -> float:
        """Of so many images at a time."""
        return self.fixed + images * self.image

    def images(self, room: float) -> int:
        """How many there is room for, below 0 where not even for what is fixed."""
        return math.floor((room - self.fixed) / max(self.image, 1.0))


def phases(
    config,
    denoiser: float,
    grads: float,
    of_image: Activations,
) -> dict[str, Phase]:
    """What a step holds beside its state, one after the other.

    Args: denoiser, grads, numbers on a device, of one network and of gradients held at once.

    Gradients of parameters are not there yet while dL/dx0 is found, nor is the decoder's part when
    they are. A loop over networks copies the one that it picks, in float32 where it learns; bases
    of adapters it leaves where they are.
    """
    picked, trained = reference_dtype(config).itemsize, 4
    loops = denoiser if config.compute.loop_networks and not config.lora.rank else 0
    waiting = of_image.generator
    size = config.decode.slice
    decoded = Phase(size * of_image.decoder, waiting)
    return {
        "scores of assistant and reference": Phase(loops * picked, waiting + of_image.scores),
        "decoder and reward": decoded if size else Phase(0.0, waiting + of_image.decoder),
        "gradients and learning": Phase(4 * grads + loops * trained, of_image.learning),
    }
