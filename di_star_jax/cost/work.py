# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a sample before the start: one forward pass of each network, counted on its trace.

What passes back costs what `Pass` says of it, so that no step is traced, which would take SDXL a
minute; `benchmark` counts the whole trace, and comes to the same within 2 %.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from di_star_jax.assembly import lora_of, reward_sources, seen_pixels
from di_star_jax.cost import flops
from di_star_jax.cost.plan import Plan, encoders
from di_star_jax.models import lora
from di_star_jax.models.unet import Condition
from di_star_jax.objectives import OBJECTIVES
from di_star_jax.pipelines.family import DENOISER, TINY_VAE, conditions
from di_star_jax.pipelines.folder import Model, model_class, vae_scale
from di_star_jax.rewards import scales_of
from di_star_jax.rewards.reward import Reward

UTILISATION = 0.4  # of the bfloat16 peak, for which nothing is measured; see docs/performance.md


class Pass(NamedTuple):
    """FLOPs of one sample's forward pass: products with weights, between activations, of adapters.

    Both operands of a product between activations have a gradient; weights only where they learn.
    """

    weights: float
    activations: float
    adapters: float = 0.0

    @property
    def forward(self) -> float:
        """Once through."""
        return self.weights + self.activations + self.adapters

    @property
    def to_inputs(self) -> float:
        """Back to what the network was given, after the forward pass."""
        return self.forward + self.activations

    @property
    def to_learnt(self) -> float:
        """Back to what is learnt, and on the way nearly to the inputs."""
        return self.to_inputs + (self.adapters or self.weights)


class Work(NamedTuple):
    """FLOPs of one sample in a step. warmup: of a step of the assistant alone."""

    denoiser: float
    decoder: float
    text: float
    warmup: float

    @property
    def sample(self) -> float:
        """In all, of a step of both."""
        return self.denoiser + self.decoder + self.text


def of_plan(plan: Plan) -> Work | None:
    """The work of a planned run; None where some of its models are unknown or not there."""
    wanted = {DENOISER, "vae", *encoders(plan.known)}
    if plan.unknown or not wanted <= plan.models.keys():
        return None
    config = plan.config
    condition, text = _encoded(plan)
    plain, adapted = _passes(plan, condition)
    generator, assistant = (adapted.get(name, plain) for name in ("generator", "assistant"))
    # A few-step generator is run to the step that learns, which is drawn.
    drawn = (1 + (config.generator.steps - 1) / 2) * generator.forward
    learns = assistant.forward + assistant.to_learnt
    objective = OBJECTIVES[config.objective.name]
    denoiser = drawn + generator.to_learnt
    if objective.scores:
        denoiser += _scores(config, objective, assistant, plain)
    further = config.assistant.updates
    if not config.assistant.first:  # the first one is on the same samples
        further -= 1
        denoiser += learns
        if config.assistant.sharing == "x_t":
            denoiser -= assistant.forward
    return Work(
        denoiser=denoiser + further * (drawn + learns),
        decoder=_decoder(plan),
        text=text * (1 + further),
        warmup=config.assistant.updates * (drawn + learns + text),
    )


def _scores(
    config,
    objective,
    assistant: Pass,
    reference: Pass,
) -> float:
    """Of both score networks, and back through those that the loss's gradient flows through."""
    of_guided = 1 if config.objective.omega in (0.0, 1.0) else 2
    total = assistant.forward + of_guided * reference.forward
    if "psi" in objective.through:
        total += assistant.to_inputs
    if "guided" in objective.through:
        total += of_guided * reference.to_inputs
    parts = 2 if "cond" in objective.scores else of_guided
    return total + max(0, parts - of_guided) * reference.forward


def _passes(plan: Plan, condition: Any) -> tuple[Pass, dict[str, Pass]]:
    """Of the denoiser as it is, and with adapters, of those networks that have them."""
    config = plan.config
    model = plan.models[DENOISER]
    latents = _latents(plan, config.data.resolution)

    def count(model: Model, params: Any) -> tuple[int, int]:
        return _count(
            lambda p, *inputs: model.network(p)(*inputs), params, latents, _TIME, condition
        )

    plain = Pass(*count(model, model.params))
    low_rank = lora_of(config)
    if low_rank is None:
        return plain, {}
    params = model.params | lora.abstract(model.params, low_rank)
    with_adapters = sum(count(model._replace(lora=low_rank), params))
    adapted = plain._replace(adapters=with_adapters - plain.forward)
    names = ("generator", "assistant")
    return plain, {name: adapted for name in names if low_rank.adapts(name)}


_TIME = jax.ShapeDtypeStruct((1,), jnp.int32)


def _count(fn: Any, *args: Any) -> tuple[int, int]:
    return flops.products(jax.make_jaxpr(fn)(*args))


def _latents(plan: Plan, pixels: int) -> jax.ShapeDtypeStruct:
    """Of one image."""
    vae = plan.known.networks["vae"]
    side = pixels // vae_scale(vae)
    channels = model_class(vae)[1].latent_channels
    return jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)


def _encoded(plan: Plan) -> tuple[Condition, float]:
    """Shapes of one prompt's condition, and the FLOPs of encoding it, 0 with a cache."""
    family, config = plan.known.family, plan.config
    models = {name: plan.models[name] for name in encoders(plan.known)}
    graphdefs = {name: model.graphdef for name, model in models.items()}
    params = {name: model.params for name, model in models.items()}
    ids = {
        name: jax.ShapeDtypeStruct((1, model_class(models[encoder].config)[1].tokens), jnp.int32)
        for name, encoder in family.tokenizers.items()
    }

    def encode(params: dict, ids: dict) -> Condition:
        text = family.encode_text(graphdefs, params, ids)
        return conditions(family, text, text, config.data.resolution)[0]

    work = 0.0 if config.data.cache else float(sum(_count(encode, params, ids)))
    if not family.null_is_zero:  # and "", once for the images of a device
        work *= 1 + 1 / max(1.0, plan.at_a_time)
    return jax.eval_shape(encode, params, ids), work


def _decoder(plan: Plan) -> float:
    """Of VAE and rewards, forward and, where a reward has a scale, back to the latents."""
    config = plan.config
    used = reward_sources(config)
    if not used:
        return 0.0
    pixels = seen_pixels(config)
    vae = plan.models.get(TINY_VAE, plan.models["vae"])
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        return nnx.merge(vae.graphdef, params).decode(latents)

    passes = {"vae": Pass(*_count(decode, vae.params, _latents(plan, pixels)))}
    passes |= {name: _reward(plan.models[name], image) for name in used}
    scales = scales_of(config.reward)
    pulled = {name for name in used if scales.get(name)}
    pulled |= {"vae"} if pulled else set()
    forward = sum(found.forward for found in passes.values())
    return forward + sum(found.to_inputs for name, found in passes.items() if name in pulled)


def _reward(reward: Reward, image: jax.ShapeDtypeStruct) -> Pass:
    """All of it counts as if it read the image: what reads the prompt is small beside that."""
    return Pass(*_count(reward.reward, reward.params, image, reward.shapes))
