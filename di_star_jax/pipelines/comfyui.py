# SPDX-License-Identifier: Apache-2.0
"""A workflow for ComfyUI, in which a few-step generator draws as it does here.

ComfyUI's latents are x = x_t / alpha_t: with s = sigma_t / alpha_t its network is given
x / sqrt(1 + s^2), which is x_t, at the time whose s is the nearest, and its denoised latents x -
s eps are our x_0. What differs is how it begins: its samplers add s z to an empty image, which is
sigma_t z to the network, but DMD2's one-step generators are given z itself. So a node before the
sampler adds the noise, scaled by what the generator wants, and the sampler adds none. From there
the LCM sampler goes on as `samplers.few_step` does: x_0 + s' z' is alpha' x_0 + sigma' z' to the
network.

Source: what ComfyUI's nodes.py, comfy/samplers.py, comfy/model_sampling.py and comfy_extras/
nodes_custom_sampler.py compute.
"""

import dataclasses
from typing import Any

import numpy as np

from di_star_jax.diffusion import Betas, FewStep
from di_star_jax.pipelines.scheduler import (
    SchedulerFile,
    betas_of,
    predicts_v,
    schedule_from_json,
)

FILE = "comfyui.json"
PROMPT = "a photo of a cat"


def workflow(
    checkpoint: str,
    form: FewStep,
    scheduler: SchedulerFile,
    pixels: int,
) -> dict[str, dict] | None:
    """Nodes by number, in the form that ComfyUI's server takes and its window opens.

    Args:
      checkpoint: name of the single file in ComfyUI's models/checkpoints.
      form: of the generator.
      scheduler: of its pipeline.
      pixels: height and width of the image.
    Returns: None where the noise schedule is not the one that ComfyUI has for SDXL and SD 1.5.
    """
    betas = Betas(**betas_of(*scheduler))
    if dataclasses.replace(betas, rescale_betas_zero_snr=False) != Betas():
        return None
    times = np.array(form.timesteps)
    alpha, sigma = (np.asarray(x, np.float64)[times] for x in schedule_from_json(*scheduler))
    ratios = sigma / alpha
    noise = ratios[0] if form.input == "scaled" else 1.0 / alpha[0]
    nodes = {
        "1": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "2": _node("CLIPTextEncode", "Prompt", text=PROMPT, clip=["1", 1]),
        "3": _node("CLIPTextEncode", "No effect: guidance is 1", text="", clip=["1", 1]),
        "4": _node("EmptyLatentImage", width=pixels, height=pixels, batch_size=1),
        "5": _node("RandomNoise", "Seed of the picture", noise_seed=0),
        "6": _node("ManualSigmas", "Scale of the first noise", sigmas=_numbers([noise])),
        "7": _node(
            "AddNoise", model=["1", 0], noise=["5", 0], sigmas=["6", 0], latent_image=["4", 0]
        ),
        "8": _node("KSamplerSelect", sampler_name="lcm"),
        "9": _node(
            "ManualSigmas",
            f"Timesteps {', '.join(map(str, form.timesteps))}",
            sigmas=_numbers([*ratios, 0.0]),
        ),
        "10": _node(
            "SamplerCustom",
            model=["1", 0],
            add_noise=False,
            noise_seed=1,  # of the noise between steps, which must be another than the first
            cfg=1.0,
            positive=["2", 0],
            negative=["3", 0],
            sampler=["8", 0],
            sigmas=["9", 0],
            latent_image=["7", 0],
        ),
        "11": _node("VAEDecode", samples=["10", 0], vae=["1", 2]),
        "12": _node("SaveImage", images=["11", 0], filename_prefix="di_star"),
    }
    if predicts_v(scheduler):  # files of SDXL say so by themselves, those of SD 1.5 do not
        zero_snr = betas.rescale_betas_zero_snr
        nodes["13"] = _node(
            "ModelSamplingDiscrete", model=["1", 0], sampling="v_prediction", zsnr=zero_snr
        )
        for name in ("7", "10"):
            nodes[name]["inputs"]["model"] = ["13", 0]
    return nodes


def _node(kind: str, title: str = "", **inputs: Any) -> dict:
    """Args: inputs, values, or [number of a node, which of its outputs]."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}


def _numbers(values: list[float]) -> str:
    """As ManualSigmas reads them: no exponents."""
    return ", ".join(f"{value:.9f}" for value in values)
