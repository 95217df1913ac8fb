# SPDX-License-Identifier: Apache-2.0
"""What an export says of itself: the call that draws with it, and its model card."""

from pathlib import Path
from typing import NamedTuple

PICTURE = "samples.png"
_PROMPT = '"a photo of a cat"'
_GENERATOR = (
    "Number of steps and guidance are as it was trained: other steps, or guidance, may draw noise "
    "or burnt pictures."
)


class Call(NamedTuple):
    """How diffusers is to call an export.

    dtype: of its weights. steps: of a generator, 0 for another network.
    timesteps: of the steps where the call must name them, else ().
    more: another argument, or "".
    """

    dtype: str
    steps: int
    timesteps: tuple[int, ...]
    more: str = ""


class About(NamedTuple):
    """What a model card says.

    network: such as "ema, step 500". reference: Hub name or folder of the pipeline that it was
    trained from. trained_on: scale of each reward, by name. objective: of the run, or "".
    picture: a PNG file of samples, or None.
    """

    network: str
    reference: str
    trained_on: dict[str, float] = {}
    objective: str = ""
    picture: Path | None = None

    @classmethod
    def of_run(
        cls,
        metadata: dict,
        network: str,
        picture: Path | None = None,
    ) -> "About":
        """From what a checkpoint says of its run."""
        trained_on = metadata.get("trained_on", {})
        objective = metadata.get("objective", "")
        return cls(network, metadata["reference"], trained_on, objective, picture)


def usage(folder: str, call: Call) -> str:
    """Lines of Python that draw with an export. Args: its path."""
    how = []
    if call.dtype != "float32":
        how.append(f", torch_dtype=torch.{call.dtype}")
    if call.dtype == "float16":
        how.append(', variant="fp16"')
    return "\n".join(
        [
            *(["import torch"] if how else []),
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}"{"".join(how)})',
            *(["# the steps and guidance that it was trained for"] if call.steps else []),
            f"image = pipe({', '.join([_PROMPT, *_arguments(call)])}).images[0]",
            'image.save("image.png")',
        ]
    )


def usage_of_file(
    pipeline: str,
    file: str,
    folder: str,
    call: Call,
) -> str:
    """As `usage`, of one file. Args: class of the pipeline; folder, of settings and scheduler."""
    dtype = "" if call.dtype == "float32" else f", torch_dtype=torch.{call.dtype}"
    return "\n".join(
        [
            *(["import torch"] if dtype else []),
            f"from diffusers import {pipeline}",
            f'pipe = {pipeline}.from_single_file("{file}", config="{folder}"{dtype})',
            *(["# the steps and guidance that it was trained for"] if call.steps else []),
            f"image = pipe({', '.join([_PROMPT, *_arguments(call)])}).images[0]",
            'image.save("image.png")',
        ]
    )


def usage_of_adapters(
    folder: str,
    base: str | None,
    file: str,
    scheduler: dict,
    call: Call,
) -> str:
    """As `usage`, of a file of adapters.

    Args: folder, of the pipeline; base, of the UNet that the adapters are for, where the pipeline
    has another; scheduler, scheduler_config.json of the generator.
    """
    dtype = "" if call.dtype == "float32" else f", torch_dtype=torch.{call.dtype}"
    name = scheduler["_class_name"]
    fields = ("timestep_spacing", "steps_offset", "original_inference_steps", "clip_sample")
    changes = ", ".join(f"{key}={scheduler[key]!r}" for key in fields if key in scheduler)
    network = ["UNet2DConditionModel"] if base else []
    return "\n".join(
        [
            *(["import torch"] if dtype else []),
            f"from diffusers import {', '.join(['DiffusionPipeline', name, *network])}",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}"{dtype})',
            *([f'pipe.unet = UNet2DConditionModel.from_pretrained("{base}"{dtype})'] * bool(base)),
            f'pipe.load_lora_weights("{file}")',
            f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, {changes})",
            "# the steps and guidance that it was trained for",
            f"image = pipe({', '.join([_PROMPT, *_arguments(call)])}).images[0]",
            'image.save("image.png")',
        ]
    )


def _arguments(call: Call) -> list[str]:
    """Of the call, beside the prompt."""
    more = [call.more] if call.more else []
    if call.timesteps:
        return [f"timesteps={list(call.timesteps)}", "guidance_scale=0", *more]
    if call.steps:
        return [f"num_inference_steps={call.steps}", "guidance_scale=0", *more]
    return more


def text(
    about: About,
    folder: str,
    call: Call,
) -> str:
    """The model card. Args: folder, the export's name."""
    is_hub_name = "/" in about.reference and not Path(about.reference).expanduser().exists()
    reference = about.reference if is_hub_name else Path(about.reference).name
    steps = {0: "A diffusion model", 1: "A one-step generator"}
    kind = steps.get(call.steps, f"A generator of {call.steps} steps")
    rewards = ", ".join(f"{name} (scale {scale:g})" for name, scale in about.trained_on.items())
    trained = f" by the objective {about.objective}" if about.objective else ""
    trained += f", with the rewards {rewards}" if rewards else ""
    header = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    header += [f"base_model: {reference}"] if is_hub_name else []
    return "\n".join(
        [
            *header,
            "---",
            f"# {folder}",
            "",
            f"{kind} for diffusers, written by di_star_jax: {about.network}. It was made from "
            f"{reference}{trained}.",
            *(["", f"![samples]({PICTURE})"] if about.picture else []),
            "",
            "## Use",
            "",
            "```python",
            usage(folder, call),
            "```",
            "",
            *([_GENERATOR, ""] if call.steps else []),
            f"All weights are {call.dtype}.",
            "",
            "## Licence",
            "",
            f"The denoiser was trained from that of {reference}, and all else copied from there: "
            "its licence holds for this folder too.",
            "",
        ]
    )
