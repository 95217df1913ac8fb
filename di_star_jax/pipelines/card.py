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
    variant: whether files in float16 have diffusers' variant in their names.
    """

    dtype: str
    steps: int
    timesteps: tuple[int, ...]
    more: str = ""
    variant: bool = True


class Base(NamedTuple):
    """What an export was made from.

    name: on the Hub, or of a folder or file. on_hub: whether it is there. licence: as its model
    card names it, "" where it has none. more: the name of a licence that is "other", and link,
    where it stands; or "". sha256: of a file.
    """

    name: str
    on_hub: bool = False
    licence: str = ""
    more: str = ""
    link: str = ""
    sha256: str = ""

    @property
    def non_commercial(self) -> bool:
        """Whether its licence's name says so."""
        return bool(_NON_COMMERCIAL.search(f"{self.licence} {self.more}"))


class About(NamedTuple):
    """What a model card says.

    network: such as "ema, step 500"; "" of weights that were converted alone. bases: the pipeline
    that it was trained from, and the generator that it began as. trained_on: scale of each reward,
    by name. objective: of the run, or "". scores: tables and sentences, as Markdown, or "".
    picture: a PNG file of samples, or None. lora: where adapters alone have learnt, as "rank 64,
    alpha 64"; else "".
    """

    network: str
    bases: tuple[Base, ...]
    trained_on: Mapping[str, float] = {}
    objective: str = ""
    scores: str = ""
    picture: Path | None = None
    lora: str = ""

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
        bases = [base for source in sources if source for base in bases_of(source)]
        return cls(
            network,
            tuple(dict.fromkeys(bases)),
            metadata.get("trained_on", {}),
            metadata.get("objective", ""),
            scores,
            picture,
            _adapted(metadata, network),
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

    @property
    def is_converted(self) -> bool:
        """Whether nothing has trained it."""
        return not (self.network or self.objective or self.trained_on)

    def facts(self) -> dict[str, Any]:
        """As `of_export` reads it."""
        kept = self._asdict() | {"bases": [base._asdict() for base in self.bases]}
        del kept["picture"]
        return kept


def _adapted(metadata: dict, network: str) -> str:
    """As of `About.lora`. Args: of a run; network, which begins with its name."""
    low_rank = metadata.get("lora")
    which = "assistant" if network.startswith("assistant") else "generator"
    if not low_rank or not low_rank.get(which, True):
        return ""
    return f"rank {low_rank['rank']}, alpha {low_rank['alpha']:g}"


# What it was made from.


def bases_of(source: str) -> tuple[Base, ...]:
    """What a folder was converted from, as its own facts have it; of any other, `base_of`."""
    path = Path(source).expanduser() / FACTS
    if not buckets.is_remote(source) and path.is_file():
        about = About.of_export(path.parent)
        if about.is_converted:
            return about.bases
    return (base_of(source),)


def base_of_file(
    file: Path,
    name: str,
    sha256: str,
) -> Base:
    """A single file. Its licence is that of the card beside it, NAME.md, or of its own header.

    Args: file, here; name, as it is to be called.
    """
    base = Base(name, sha256=sha256)
    if file.with_suffix(".md").is_file():
        return base._replace(**_licence_in(file.with_suffix(".md")))
    # As Stability's ModelSpec has it, which may be any text.
    text = (folders.open_weights(file).metadata() or {}).get("modelspec.license", "")
    short = re.sub(r"[^a-z0-9.+]+", "-", text[:80].lower()).strip("-")
    return base._replace(licence="other", more=short) if short else base


def base_of(source: str) -> Base:
    """A folder, or a name on the Hub, and its licence, which nobody is asked for."""
    on_hub = "/" in source and not (buckets.is_remote(source) or _is_local(source))
    name = source if on_hub else Path(source).name
    card = _card_of(source, on_hub)
    if card is None:
        return Base(name, on_hub)
    return Base(name, on_hub, **_licence_in(card))


def _licence_in(card: Path) -> dict[str, str]:
    """Fields of `Base`, by a model card."""
    found = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = huggingface_hub.metadata_load(card) or {}
    keys = {"licence": "license", "more": "license_name", "link": "license_link"}
    texts = {field: found.get(key) for field, key in keys.items()}
    return {k: " ".join(t.split()) if isinstance(t, str) else "" for k, t in texts.items()}


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
    if call.dtype == "float16" and call.variant:
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
    numbers: str = "",
) -> str:
    """The model card of a whole network.

    Args: code, that draws; hashes, SHA-256 of the files of weights by name; picture, where that of
      `about` lies; comfyui, what is said of it, or ""; numbers, what the weights are stored as
      where it is not all the call's dtype.
    """
    steps = {0: "A diffusion model", 1: "A one-step generator"}
    kind = steps.get(call.steps, f"A generator of {call.steps} steps")
    return _page(
        about,
        title,
        f"{_written(kind, about)} {_origin(about)}{_merged(about)}",
        {
            "Use": ["```python", code, "```", *(["", _GENERATOR] if call.steps else [])],
            "In ComfyUI": [comfyui] if comfyui else [],
            "Scores": _scores(about),
            "Files": _files(numbers or f"All weights are {call.dtype}.", hashes),
        },
        picture,
    )


def text_of_adapters(
    about: About,
    file: str,
    goes_on: str,
    use: str,
    stored: str,
    sha256: str,
) -> str:
    """The model card of a file of adapters.

    Args: file, its name; goes_on, for which network it is; use, how to draw with it, as Markdown;
      stored, what its numbers and names are.
    """
    kind = f"LoRA adapters ({about.lora})"
    origin = f"They were{_origin(about).removeprefix('It was')}"
    if about.is_converted:
        before, after = (about.bases[i].name for i in (0, -1))
        origin = (
            f"They are the low-rank part of what {after} has learnt from the weights of {before}; "
            "nothing was trained here."
        )
    said = (
        f"{_written(kind, about)} {origin} **These are adapters alone, no whole network**: "
        f"they go on {goes_on}."
    )
    sections = {
        "Use": [use],
        "Scores": _scores(about),
        "Files": _files(stored, {file: sha256}),
    }
    return _page(about._replace(picture=None), Path(file).stem, said, sections)


def _scores(about: About) -> list[str]:
    return [about.scores] if about.scores else []


def _files(numbers: str, hashes: Mapping[str, str]) -> list[str]:
    rows = (f"| {name} | `{digest}` |" for name, digest in hashes.items())
    return [numbers, "", "| file | SHA-256 |", "|---|---|", *rows]


def _written(kind: str, about: About) -> str:
    """The first sentence: what it is, and by whom it was written."""
    if about.is_converted:
        return f"{kind}, converted by di_star_jax."
    return f"{kind}, written by di_star_jax{f': {about.network}' if about.network else ''}."


def _page(
    about: About,
    title: str,
    said: str,
    sections: Mapping[str, list[str]],
    picture: str = PICTURE,
) -> str:
    """A card of what is said first and of sections, with what all cards have."""
    sections = {**sections, "Licence": _licences(about.bases)}
    return "\n".join(
        [
            *_header(about.bases),
            f"# {title}",
            "",
            said,
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
    known = {(base.licence, base.more, base.link) for base in bases}
    if len(known) == 1 and bases[0].licence:
        return bases[0]
    return Base("", licence="other") if all(base.licence for base in bases) and bases else None


def _yaml(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _origin(about: About) -> str:
    """Base, method, rewards."""
    names = [base.name for base in about.bases]
    if about.is_converted:
        return f"These are the weights of {' and '.join(names)}, of which nothing was trained here."
    began = f", beginning with the generator {' and '.join(names[1:])}" if len(names) > 1 else ""
    if not about.objective:
        rewards = _rewards(about)
        return f"It was made from {names[0]}{began}{f', {rewards}' if rewards else ''}."
    method = (
        f"the objective `{about.objective}` of the Diff-Instruct* family "
        "([arXiv 2410.20898](https://arxiv.org/abs/2410.20898))"
    )
    rewards = _rewards(about) or "without a reward"
    return f"It was made from {names[0]}{began}, by {method}, {rewards}."


def _merged(about: About) -> str:
    """Of a whole network in which adapters have learnt."""
    return (
        f" It is a whole network: the adapters that have learnt ({about.lora}) are merged into it."
        if about.lora
        else ""
    )


def _rewards(about: About) -> str:
    said = ", ".join(f"{name} (scale {scale:g})" for name, scale in about.trained_on.items())
    return f"with the rewards {said}" if said else ""


def _licences(bases: tuple[Base, ...]) -> list[str]:
    """That of each base, which holds for what is made from it."""
    lines = ["Made from the weights of the following, whose licences hold for these files too:", ""]
    for base in bases:
        where = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else base.name
        where += f" (SHA-256 `{base.sha256}`)" if base.sha256 else ""
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
