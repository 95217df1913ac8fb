# SPDX-License-Identifier: Apache-2.0
"""The workflow for ComfyUI, run by what its nodes compute, beside our own sampler."""

import re

import numpy as np
import pytest

from di_star_jax import samplers
from di_star_jax.diffusion import FewStep, v_to_eps
from di_star_jax.pipelines import comfyui
from di_star_jax.pipelines.scheduler import SchedulerFile, schedule_from_json

EPS = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012}
EPS["beta_schedule"] = "scaled_linear"
V = EPS | {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True}
ONE = FewStep((399,))
FORMS = [ONE, FewStep((625,), "scaled"), FewStep((999,)), FewStep((999, 749, 499, 249))]
# ComfyUI's nodes: the inputs that they need, with their types, and the types of their outputs. Of
# nodes.py, comfy_extras/nodes_custom_sampler.py and comfy_extras/nodes_model_advanced.py.
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ["MODEL", "CLIP", "VAE"]),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ["LATENT"]),
    "RandomNoise": ({"noise_seed": int}, ["NOISE"]),
    "ManualSigmas": ({"sigmas": str}, ["SIGMAS"]),
    "AddNoise": (
        {"model": "MODEL", "noise": "NOISE", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT"],
    ),
    "KSamplerSelect": ({"sampler_name": str}, ["SAMPLER"]),
    "SamplerCustom": (
        {
            "model": "MODEL",
            "add_noise": bool,
            "noise_seed": int,
            "cfg": float,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ["LATENT", "LATENT"],
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ["MODEL"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, []),
}
LATENT_SCALE = 0.13025


def made(form=ONE, config=EPS):
    return comfyui.workflow("mine.safetensors", form, SchedulerFile(config), 1024)


# That it is one.


@pytest.mark.parametrize("config", [EPS, V, ZERO_SNR])
@pytest.mark.parametrize("form", FORMS)
def test_the_nodes_are_comfyuis_and_all_their_inputs_are_of_the_type_that_they_take(form, config):
    nodes = made(form, config)
    for node in nodes.values():
        assert set(node) == {"class_type", "inputs", "_meta"}, "else it is not opened"
        takes, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == takes.keys()
        for name, value in node["inputs"].items():
            if isinstance(takes[name], str):
                source, output = value
                assert NODES[nodes[source]["class_type"]][1][output] == takes[name]
            else:
                assert type(value) is takes[name]
    kinds = [node["class_type"] for node in nodes.values()]
    assert kinds.count("SaveImage") == 1
    needed, waiting = set(), [str(1 + kinds.index("SaveImage"))]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        links = [value[0] for value in nodes[name]["inputs"].values() if isinstance(value, list)]
        waiting += [link for link in links if link not in needed]
    assert needed == set(nodes), "no node hangs loose"


def test_it_names_the_file_the_sampler_the_size_and_no_guidance():
    by_kind = {node["class_type"]: node["inputs"] for node in made().values()}
    assert by_kind["CheckpointLoaderSimple"]["ckpt_name"] == "mine.safetensors"
    assert by_kind["KSamplerSelect"]["sampler_name"] == "lcm"
    assert by_kind["SamplerCustom"]["cfg"] == 1.0
    assert by_kind["EmptyLatentImage"] == {"width": 1024, "height": 1024, "batch_size": 1}


def test_another_noise_schedule_than_comfyuis_has_no_workflow():
    assert made(config=EPS | {"beta_end": 0.013}) is None
    assert made(config=EPS | {"beta_schedule": "linear"}) is None


# What it computes.


class Comfy:
    """What ComfyUI's nodes do with numbers. network: (x_t, t) -> its output."""

    def __init__(self, network, noises):
        self.network = network
        self.noises = noises  # by seed
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        bar = np.cumprod(1.0 - betas)
        self.sigmas = ((1 - bar) / bar) ** 0.5
        self.predicts_v = False
        self.asked = []  # times
        self.known = {}  # what nodes gave, each of which runs once

    def run(self, nodes):
        """The decoder's input."""
        self.nodes = nodes
        image = next(n for n in nodes.values() if n["class_type"] == "VAEDecode")
        return self.value(image["inputs"]["samples"])

    def value(self, link):
        number, _ = link
        if number not in self.known:
            node = self.nodes[number]
            inputs = {
                name: self.value(value) if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            self.known[number] = getattr(self, node["class_type"])(**inputs)
        return self.known[number]

    def CheckpointLoaderSimple(self, ckpt_name):
        return None

    def CLIPTextEncode(self, text, clip):
        return text

    def EmptyLatentImage(self, width, height, batch_size):
        return np.zeros((batch_size, 4, height // 8, width // 8))

    def RandomNoise(self, noise_seed):
        return self.noises(noise_seed)

    def ManualSigmas(self, sigmas):
        return np.array([float(x) for x in re.findall(r"[-+]?(?:\d*\.*\d+)", sigmas)], np.float32)

    def KSamplerSelect(self, sampler_name):
        return sampler_name

    def ModelSamplingDiscrete(self, model, sampling, zsnr):
        self.predicts_v = sampling == "v_prediction"
        if zsnr:
            root = np.sqrt(1 / (self.sigmas**2 + 1))
            moved = (root - root[-1]) * root[0] / (root[0] - root[-1])
            bar = moved**2
            bar[-1] = 4.8973451890853435e-08
            self.sigmas = ((1 - bar) / bar) ** 0.5

    def scaled(self, sigma, noise, latents, most=False):
        return noise * (np.sqrt(1 + sigma**2) if most else sigma) + latents

    def AddNoise(self, model, noise, sigmas, latent_image):
        assert not latent_image.any()
        scale = abs(sigmas[0] - sigmas[-1]) if len(sigmas) > 1 else sigmas[0]
        return self.scaled(scale, next(noise), latent_image) / LATENT_SCALE

    def SamplerCustom(
        self,
        model,
        add_noise,
        noise_seed,
        cfg,
        positive,
        negative,
        sampler,
        sigmas,
        latent_image,
    ):
        assert cfg == 1.0 and sampler == "lcm" and positive == comfyui.PROMPT
        noise = self.noises(noise_seed)
        first = next(noise) if add_noise else 0.0 * latent_image
        x = self.scaled(
            sigmas[0], first, latent_image * LATENT_SCALE, sigmas[0] > self.sigmas[-1] * 0.99999
        )
        for sigma, after in zip(sigmas, sigmas[1:]):
            x = self.denoised(x, sigma)
            if after > 0:
                x = self.scaled(after, next(noise), x)
        return x

    def denoised(self, x, sigma):
        t = np.abs(np.log(sigma) - np.log(self.sigmas)).argmin()
        self.asked.append(int(t))
        output = self.network(x / np.sqrt(sigma**2 + 1), t)
        if self.predicts_v:
            return x / (sigma**2 + 1) - output * sigma / np.sqrt(sigma**2 + 1)
        return x - output * sigma


def _network(x, t):
    """Of a value that depends on both, and not linearly."""
    return np.tanh(0.7 * x + 0.001 * t) + 0.1 * np.sin(3 * x)


def _drawn(form, config, change=lambda nodes: nodes):
    """(ComfyUI's latents, ours, the times at which ComfyUI asked the network)."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((len(form.timesteps), 1, 4, 128, 128)).astype(np.float32)
    streams = {0: iter(noise[:1]), 1: iter(noise[1:])}
    comfy = Comfy(_network, streams.__getitem__)
    theirs = comfy.run(change(made(form, config)))
    schedule = schedule_from_json(config)

    def eps_fn(x_t, t):
        output = _network(np.asarray(x_t), np.asarray(t).reshape(-1, 1, 1, 1))
        if config.get("prediction_type") == "v_prediction":
            return v_to_eps(x_t, output, *schedule.at(t))
        return output

    ours = samplers.few_step(eps_fn, noise, np.array(form.timesteps), schedule, input=form.input)
    return theirs, np.asarray(ours), comfy.asked


@pytest.mark.parametrize("config", [EPS, V, ZERO_SNR], ids=["eps", "v", "zero-snr"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_comfyui_draws_the_latents_that_we_draw(form, config):
    theirs, ours, asked = _drawn(form, config)
    assert asked == list(form.timesteps)
    # float32 keeps 0.004 of x_0 at the last time of zero terminal SNR, as `v_to_eps` says.
    bound = 0.02 if config is ZERO_SNR and 999 in form.timesteps else 5e-5
    assert np.abs(theirs - ours).max() < bound * ours.std()


def test_a_sampler_that_adds_the_noise_itself_gives_the_network_less():
    """Why the noise has a node of its own: ComfyUI's usual way multiplies it by sigma_t."""

    def usual(nodes):
        nodes["10"]["inputs"] |= {"add_noise": True, "noise_seed": 0, "latent_image": ["4", 0]}
        return nodes

    theirs, ours, _ = _drawn(ONE, EPS, usual)
    assert np.abs(theirs - ours).max() > 0.1
    theirs, ours, _ = _drawn(FewStep((625,), "scaled"), EPS, usual)
    assert np.abs(theirs - ours).max() < 1e-4, "which is what these generators want"


def test_all_that_asks_the_network_of_v_has_it_as_one():
    nodes = made(ONE, V)
    kinds = {name: node["class_type"] for name, node in nodes.items()}
    asking = [node["inputs"]["model"] for node in nodes.values() if "model" in node["inputs"]]
    of_v = [source for source in asking if kinds[source[0]] == "ModelSamplingDiscrete"]
    assert len(of_v) == len(asking) - 1 == 2  # all but that node itself
