# SPDX-License-Identifier: Apache-2.0
"""What an export says of itself: the call that draws with it, and its model card."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import yaml

from di_star_jax.storage import buckets, folders

FILE = "README.md"
PICTURE = "samples.png"
FACTS = "about.json"  # what the card says of the network, for cards that are made from it
_PROMPT = '"a photo of a cat"'
_GENERATOR = (
    "Number of steps and guidance are as it was trained: other steps, or guidance, may draw noise "
    "or burnt pictures."
)
# Of a generator's scheduler, what another of the pipeline has not. What begins with an underscore
# is ours.
_OF_GENERATOR = (
    "timestep_spacing",
    "steps_offset",
    "original_inference_steps",
    "clip_sample",
)
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*")  # needs no quotes in YAML
_NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial", re.IGNORECASE)


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


class Base(NamedTuple):
    """What an export was made from.

    name: on the Hub, or of a folder or file. on_hub: whether it is there. licence: as its model
    card names it, "" where it has none. more: the name of a licence that is "other", and link,
    where it stands; or "".
    """

    name: str
    on_hub: bool = False
    licence: str = ""
    more: str = ""
    link: str = ""

    @property
    def non_commercial(self) -> bool:
        """Whether its licence's name says so."""
        return bool(_NON_COMMERCIAL.search(f"{self.licence} {self.more}"))


class About(NamedTuple):
    """What a model card says.

    network: such as "ema, step 500". bases: the pipeline that it was trained from, and the
    generator that it began as. trained_on: scale of each reward, by name. objective: of the run, or
    "". scores: tables and sentences, as Markdown, or "". picture: a PNG file of samples, or None.
    """

    network: str
    bases: tuple[Base, ...]
    trained_on: Mapping[str, float] = {}
    objective: str = ""
    scores: str = ""
    picture: Path | None = None

    @classmethod
    def of_run(
        cls,
        metadata: dict,
        network: str,
        picture: Path | None = None,
        scores: str = "",
    ) -> "About":
        """From what a checkpoint says of its run. Args: metadata, as of `checkpoint.located`."""
        sources = [metadata["reference"], metadata.get("initial")]
        return cls(
            network,
            tuple(base_of(source) for source in dict.fromkeys(sources) if source),
            metadata.get("trained_on", {}),
            metadata.get("objective", ""),
            scores,
            picture,
        )

    @classmethod
    def of_export(cls, folder: Path) -> "About":
        """What the card of an export says; of another pipeline, that it is one."""
        kept = folders.read_object(folder / FACTS) if (folder / FACTS).is_file() else {}
        picture = folder / PICTURE if (folder / PICTURE).is_file() else None
        try:
            bases = tuple(Base(**base) for base in kept["bases"])
            return cls(**kept | {"bases": bases, "picture": picture})
        except (KeyError, TypeError):  # no export of ours, or of another version
            return cls("", (base_of(str(folder)),))

    def facts(self) -> dict[str, Any]:
        """As `of_export` reads it."""
        kept = self._asdict() | {"bases": [base._asdict() for base in self.bases]}
        del kept["picture"]
        return kept


# What it was made from.


def base_of(source: str) -> Base:
    """A folder, or a name on the Hub, and its licence, which nobody is asked for."""
    on_hub = "/" in source and not (buckets.is_remote(source) or _is_local(source))
    name = source if on_hub else Path(source).name
    card = _card_of(source, on_hub)
    if card is None:
        return Base(name, on_hub)
    found = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = huggingface_hub.metadata_load(card) or {}
    texts = [found.get(key) for key in ("license", "license_name", "license_link")]
    return Base(name, on_hub, *(" ".join(t.split()) if isinstance(t, str) else "" for t in texts))


def _is_local(source: str) -> bool:
    return Path(source).expanduser().exists()


def _card_of(source: str, on_hub: bool) -> Path | None:
    """The model card of a source, of a single network also that of the pipeline around it."""
    if on_hub:
        found = huggingface_hub.try_to_load_from_cache(source, FILE)
        return Path(found) if isinstance(found, str) else None
    if buckets.is_remote(source):
        return None
    folder = Path(source).expanduser()
    around = [folder.parent] if folders.is_pipeline(folder.parent) else []
    return next((f / FILE for f in [folder, *around] if (f / FILE).is_file()), None)


# The call.


def usage(folder: str, call: Call) -> str:
    """Lines of Python that draw with an export. Args: its path, or name on the Hub."""
    how = []
    if call.dtype != "float32":
        how.append(f", torch_dtype=torch.{call.dtype}")
    if call.dtype == "float16":
        how.append(', variant="fp16"')
    load = f'pipe = DiffusionPipeline.from_pretrained("{folder}"{"".join(how)})'
    return _lines("DiffusionPipeline", [load], call)


def usage_of_file(
    pipeline: str,
    file: str,
    folder: str,
    call: Call,
) -> str:
    """As `usage`, of one file. Args: class of the pipeline; folder, of settings and scheduler."""
    dtype = "" if call.dtype == "float32" else f", torch_dtype=torch.{call.dtype}"
    load = f'pipe = {pipeline}.from_single_file("{file}", config="{folder}"{dtype})'
    return _lines(pipeline, [load], call)


def usage_of_file_alone(
    pipeline: str,
    file: str,
    scheduler: Mapping[str, Any],
    call: Call,
) -> str:
    """As `usage_of_file`, without the folder: a generator's times stand in the lines.

    Args: scheduler, content of the pipeline's scheduler_config.json.
    """
    dtype = "" if call.dtype == "float32" else f", torch_dtype=torch.{call.dtype}"
    load = [f'pipe = {pipeline}.from_single_file("{file}"{dtype})']
    if not call.steps:
        return _lines(pipeline, load, call)
    name = scheduler["_class_name"]
    said = [f"{k}={_python(scheduler[k])}" for k in _OF_GENERATOR if k in scheduler]
    settings = "".join(f", {each}" for each in said)
    load += [f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{settings})"]
    return _lines(f"{name}, {pipeline}", load, call)


def _lines(
    imported: str,
    load: list[str],
    call: Call,
) -> str:
    return "\n".join(
        [
            *(["import torch"] if call.dtype != "float32" else []),
            f"from diffusers import {imported}",
            *load,
            *(["# the steps and guidance that it was trained for"] if call.steps else []),
            f"image = pipe({', '.join([_PROMPT, *_arguments(call)])}).images[0]",
            'image.save("image.png")',
        ]
    )


def _python(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


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


# The card.


def text(
    about: About,
    title: str,
    call: Call,
    code: str,
    hashes: Mapping[str, str],
    *,
    picture: str = PICTURE,
    comfyui: str = "",
) -> str:
    """The model card.

    Args: code, that draws; hashes, SHA-256 of the files of weights by name; picture, where that of
      `about` lies; comfyui, what is said of it, or "".
    """
    steps = {0: "A diffusion model", 1: "A one-step generator"}
    kind = steps.get(call.steps, f"A generator of {call.steps} steps")
    network = f": {about.network}" if about.network else ""
    sections = {
        "Use": ["```python", code, "```", *(["", _GENERATOR] if call.steps else [])],
        "In ComfyUI": [comfyui] if comfyui else [],
        "Scores": [about.scores] if about.scores else [],
        "Files": [
            f"All weights are {call.dtype}.",
            "",
            "| file | SHA-256 |",
            "|---|---|",
            *(f"| {name} | `{digest}` |" for name, digest in hashes.items()),
        ],
        "Licence": _licences(about.bases),
    }
    return "\n".join(
        [
            *_header(about.bases),
            f"# {title}",
            "",
            f"{kind}, written by di_star_jax{network}. {_origin(about)}",
            *([""] if about.picture else []),
            *([f"![samples]({picture})"] if about.picture else []),
            *(["", _PICTURED] if about.picture else []),
            "",
            *(
                line
                for heading, lines in sections.items()
                if lines
                for line in (f"## {heading}", "", *lines, "")
            ),
        ]
    )


_PICTURED = (
    "Before and after the training: the generator that it began as and this one, on the same "
    "prompts and the same noise."
)


def _header(bases: tuple[Base, ...]) -> list[str]:
    """What the Hub reads of a card."""
    names = [_yaml(base.name) for base in bases if base.on_hub]
    licence = _common(bases)
    more = [("license_name", licence.more), ("license_link", licence.link)] if licence else []
    return [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *([f"base_model: {names[0]}"] if len(names) == 1 else []),
        *(["base_model:", *(f"- {name}" for name in names)] if len(names) > 1 else []),
        *([f"license: {_yaml(licence.licence)}"] if licence else []),
        *(f"{key}: {_yaml(value)}" for key, value in more if value),
        "---",
    ]


def _common(bases: tuple[Base, ...]) -> Base | None:
    """The base whose licence the whole has: one that forbids commerce; else all must agree."""
    strict = [base for base in bases if base.non_commercial]
    if strict:
        return strict[0]
    known = {base[2:] for base in bases}
    if len(known) == 1 and bases[0].licence:
        return bases[0]
    return Base("", licence="other") if all(base.licence for base in bases) and bases else None


def _yaml(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _origin(about: About) -> str:
    """Base, method, rewards."""
    names = [base.name for base in about.bases]
    began = f", beginning with the generator {names[1]}" if len(names) > 1 else ""
    if not about.objective:
        rewards = _rewards(about)
        return f"It was made from {names[0]}{began}{f', {rewards}' if rewards else ''}."
    method = (
        f"the objective `{about.objective}` of the Diff-Instruct* family "
        "([arXiv 2410.20898](https://arxiv.org/abs/2410.20898))"
    )
    rewards = _rewards(about) or "without a reward"
    return f"It was made from {names[0]}{began}, by {method}, {rewards}."


def _rewards(about: About) -> str:
    said = ", ".join(f"{name} (scale {scale:g})" for name, scale in about.trained_on.items())
    return f"with the rewards {said}" if said else ""


def _licences(bases: tuple[Base, ...]) -> list[str]:
    """That of each base, which holds for what is made from it."""
    lines = ["Made from the weights of the following, whose licences hold for these files too:", ""]
    for base in bases:
        where = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else base.name
        if base.licence:
            known = [f"`{base.licence}`", base.more, base.link]
            lines.append(f"- {where}: {', '.join(part for part in known if part)}")
        else:
            lines.append(
                f"- {where}: no licence was found beside its weights; look it up before these files"
                " are shared or used"
            )
    if any(base.non_commercial for base in bases):
        lines += ["", "**For non-commercial use only**, by these licences."]
    return lines
