# SPDX-License-Identifier: Apache-2.0
"""A trained denoiser as a folder that diffusers loads and draws with, and its model card."""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from di_star_jax.diffusion import INPUTS, FewStep
from di_star_jax.errors import UserError
from di_star_jax.pipelines import card, comfyui
from di_star_jax.pipelines.families import family_at
from di_star_jax.pipelines.family import DENOISER, Family
from di_star_jax.pipelines.scheduler import NUM_TRAIN_TIMESTEPS, SchedulerFile, betas_of
from di_star_jax.prompts import spiece, t5
from di_star_jax.storage import buckets, files, folders
from di_star_jax.storage.weights import (
    stored_tensors,
    whole_on_each_host,
    write_model,
    write_tensors,
)

FOLDER = "diffusers"  # of a run, in its workdir
DTYPES = ("float32", "float16", "bfloat16")
# Where a generator's times stand in its scheduler's config. diffusers passes over what begins with
# an underscore, and keeps it.
TIMESTEPS = "_generator_timesteps"
INPUT = "_generator_input"
# diffusers does without them.
_OPTIONAL = (*folders.LEFT_OUT, "feature_extractor", "image_encoder")
# Beside weights, what a component is read from; nothing else is copied.
_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    spiece.FILE,
)


class Denoiser(NamedTuple):
    """What is exported.

    params: tree of arrays. config: content of its config.json.
    form: of a few-step generator; None for a network that is none.
    """

    params: Any
    config: dict
    form: FewStep | None


# The scheduler.


def generator_scheduler(
    reference_folder: str | os.PathLike,
    form: FewStep,
    *,
    keeps_offset: bool = True,
) -> dict:
    """Content of scheduler_config.json with which diffusers draws as the generator does.

    With K steps that is `pipe(prompt, num_inference_steps=K, guidance_scale=0)`, or the same with
    the times in place of their number (`calls_by_timesteps`). One step is EulerDiscreteScheduler's,
    whose spacing says whether it scales its noise. Several are LCMScheduler's, which noises again
    between them, and so is one where the pipeline would put another offset in the place of ours.
    LCMScheduler's grid holds DMD2's times.

    Args:
      reference_folder: a local pipeline folder, whose noise schedule is kept.
      form: of the generator.
      keeps_offset: as of `Family`.
    """
    timesteps = form.timesteps
    reference = folders.read_config(reference_folder, *folders.SCHEDULER)
    common = {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "prediction_type": reference.get("prediction_type", "epsilon"),
        "timestep_spacing": "trailing" if form.input == "scaled" else "leading",
        TIMESTEPS: list(timesteps),
        INPUT: form.input,
        **betas_of(reference, str(Path(reference_folder).joinpath(*folders.SCHEDULER))),
    }
    if not keeps_offset:
        common["steps_offset"] = 1  # else the pipeline puts it there, with a warning
    euler = {"_class_name": "EulerDiscreteScheduler", **common}
    if form.input == "scaled":
        return euler
    if len(timesteps) == 1 and keeps_offset:
        return euler | {"steps_offset": timesteps[0]}
    grids = range(NUM_TRAIN_TIMESTEPS, len(timesteps) - 1, -1)
    fitting = (n for n in grids if _lcm_timesteps(n, len(timesteps)) == [*timesteps])
    return {
        "_class_name": "LCMScheduler",
        "original_inference_steps": next(fitting, 50),
        "clip_sample": False,
        **common,
    }


def _lcm_timesteps(grid: int, num_steps: int) -> list[int]:
    """Those of diffusers' LCMScheduler with `original_inference_steps=grid`."""
    times = np.arange(grid, 0, -1) * (NUM_TRAIN_TIMESTEPS // grid) - 1
    indices = np.floor(np.linspace(0, grid, num_steps, endpoint=False)).astype(int)
    return times[indices].tolist()


def calls_by_timesteps(scheduler: dict) -> bool:
    """Whether the call must name the times. Args: of `generator_scheduler`, or a teacher's."""
    times = scheduler.get(TIMESTEPS, [])
    if not times:
        return False
    if scheduler["_class_name"] == "LCMScheduler":
        return times != _lcm_timesteps(scheduler["original_inference_steps"], len(times))
    return scheduler["timestep_spacing"] == "trailing"


def form_of(scheduler: dict, one_step: FewStep) -> FewStep | None:
    """Of a generator, as its export has it; None for a teacher.

    Args: scheduler_config.json; the form where an LCMScheduler's does not say.
    Raises: UserError for times, or an input, that are none.
    """
    if TIMESTEPS not in scheduler:
        return one_step if scheduler.get("_class_name") == "LCMScheduler" else None
    file = "/".join(folders.SCHEDULER)
    times = scheduler[TIMESTEPS]
    given = scheduler.get(INPUT, "noise")  # earlier exports had no other
    if (
        not isinstance(times, list)
        or not all(type(t) is int and 0 <= t < NUM_TRAIN_TIMESTEPS for t in times)
        or any(a <= b for a, b in zip(times, times[1:]))
    ):
        raise UserError(
            f"{file}: {TIMESTEPS} is {times!r}, expected falling whole numbers of 0 to "
            f"{NUM_TRAIN_TIMESTEPS - 1}; export again"
        )
    if given not in INPUTS:
        raise UserError(
            f"{file}: {INPUT} is {given!r}, expected one of {', '.join(INPUTS)}; export again"
        )
    return FewStep(tuple(times), given) if times else None


def form_of_run(metadata: dict) -> FewStep:
    """Of a run's generator. Args: of a checkpoint."""
    given = metadata.get("generator_input", "noise")  # earlier runs had no other
    return FewStep(tuple(metadata["generator_timesteps"]), given)


# The folder.


def in_workdir(folder: Path) -> Path:
    """The export of a run's workdir; any other folder is itself."""
    export = folder / FOLDER
    return export if folders.is_pipeline(export) else folder


def denoiser_in(folder: Path, family: Family) -> Path:
    """The denoiser's folder of a workdir's export, or of a pipeline; any other folder is itself."""
    folder = in_workdir(folder)
    return folder / family.parts[DENOISER].folder if folders.is_pipeline(folder) else folder


def check_export(reference_folder: Path, output: str | os.PathLike) -> None:
    """Raises: UserError for what would stop `export_pipeline`; to be asked before long work."""
    folders.check_output(output, [reference_folder])
    folders.check_inside(reference_folder, reference_folder / "model_index.json")
    folders.check_inside(reference_folder, reference_folder.joinpath(*folders.SCHEDULER))
    folders.read_config(reference_folder, *folders.SCHEDULER)
    for name in _copied(reference_folder):
        source = reference_folder / name
        folders.check_inside(reference_folder, source)
        for file in _small_files(source):
            folders.check_inside(reference_folder, file)
        if (source / "config.json").is_file():
            files, index = folders.weight_files(source)
            for file in files if index is None else [*files, index]:
                folders.check_inside(reference_folder, file)


def _copied(reference_folder: Path) -> list[str]:
    """The components that an export has of its reference; optional ones may be absent.

    Raises: UserError for others that are absent.
    """
    folder_of_denoiser = family_at(reference_folder).parts[DENOISER].folder
    names = []
    for name in folders.components(reference_folder):
        if name in (folder_of_denoiser, folders.SCHEDULER[0], *folders.LEFT_OUT):
            continue
        if (reference_folder / name).is_dir():
            names.append(name)
        elif name not in _OPTIONAL:
            raise UserError(
                f"the reference has no folder {reference_folder / name}, but its model_index.json "
                "names it; download it again"
            )
    return names


def export_pipeline(
    denoiser: Denoiser,
    about: card.About,
    *,
    reference_folder: str | os.PathLike,
    output: str | os.PathLike,
    dtype: str = "float32",
    repository: str = "",
) -> str:
    """Writes a pipeline folder: a trained denoiser, with all else from the reference, in one dtype.

    A generator gets the scheduler of its steps, another network keeps the reference's.

    Args:
      denoiser: if its params are spread over several hosts, all must call this.
      about: what the model card says of it.
      reference_folder: a local pipeline folder.
      output: replaced as a whole if it is an earlier export.
      dtype: of DTYPES; float16 gets the file names of diffusers' variant "fp16".
      repository: on the Hub, where it is to go; "" for nowhere.
    Returns: how diffusers draws with it, as lines of Python.
    Raises: UserError for a reference that lacks a component, or an output that cannot be written.
    """
    reference_folder = Path(reference_folder)
    check_export(reference_folder, output)
    index = folders.read_config(reference_folder, name="model_index.json")
    family = family_at(reference_folder)
    part = family.parts[DENOISER]
    form = denoiser.form
    if form is None:
        scheduler = folders.read_config(reference_folder, *folders.SCHEDULER)
    else:
        scheduler = generator_scheduler(reference_folder, form, keeps_offset=family.keeps_offset)
    times = () if form is None else form.timesteps
    named = times if calls_by_timesteps(scheduler) else ()
    call = card.Call(dtype, len(times), named, family.call)
    params = whole_on_each_host(denoiser.params)
    if jax.process_index() != 0:
        return _usage(str(output), call)
    names = _copied(reference_folder)
    with folders.new_folder(output, [reference_folder]) as partial:
        for name in names:
            copy_component(reference_folder / name, partial / name, dtype)
        (partial / part.folder).mkdir()
        write_model(
            partial / part.folder,
            params,
            config=denoiser.config,
            file_name=weights_name(folders.DIFFUSERS, dtype),
            dtype=jnp.dtype(dtype),
        )
        (partial / "scheduler").mkdir()
        folders.write_object(partial.joinpath(*folders.SCHEDULER), scheduler)
        absent = {*folders.components(reference_folder)} - {*names}
        index |= dict.fromkeys(absent, [None, None])
        if "requires_safety_checker" in index:
            index["requires_safety_checker"] = False  # else diffusers warns of its absence
        index[part.folder] = ["diffusers", part.classes[0]]
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        folders.write_object(partial / "model_index.json", index)
        title = repository or title_of(output)
        workflow = workflow_of(f"{Path(title).name}.safetensors", partial, family)
        if workflow is not None:
            folders.write_object(partial / comfyui.FILE, workflow)
        _write_card(partial, about, title, call, repository or Path(output).resolve().name)
    return _usage(str(output), call)


def title_of(output: str | os.PathLike) -> str:
    """What an export is called: as its folder, or as the run whose it is."""
    path = Path(output).resolve()
    return path.parent.name if path.name == FOLDER and path.parent.name else path.name


def workflow_of(
    checkpoint: str,
    folder: Path,
    family: Family,
) -> dict | None:
    """For ComfyUI, of a pipeline's folder; None where it cannot draw with it as we do.

    Args: checkpoint, name of the pipeline as a single file.
    """
    scheduler = SchedulerFile(
        folders.read_config(folder, *folders.SCHEDULER), str(folder.joinpath(*folders.SCHEDULER))
    )
    form = form_of(scheduler.config, family.one_step)
    if form is None or not family.original:
        return None
    size = folders.read_config(folder, family.parts[DENOISER].folder).get("sample_size")
    scale = 2 ** (len(folders.read_config(folder, "vae").get("block_out_channels", ())) - 1)
    return comfyui.workflow(checkpoint, form, scheduler, size * scale) if size else None


def _write_card(
    folder: Path,
    about: card.About,
    title: str,
    call: card.Call,
    name: str,
) -> None:
    """Writes the model card of a folder that is whole otherwise. Args: name, in its code."""
    if about.picture is not None:
        shutil.copyfile(about.picture, folder / card.PICTURE)
    folders.write_object(folder / card.FACTS, about.facts())
    found = sorted(folder.rglob("*.safetensors"))
    hashes = {path.relative_to(folder).as_posix(): files.digest_of(path) for path in found}
    said = ""
    if (folder / comfyui.FILE).is_file():
        file = f"{Path(title).name}.safetensors"
        said = (
            f"`di-star convert --to=single --input={name} --output={file}` makes one file of this "
            f"folder, for `models/checkpoints`. [{comfyui.FILE}]({comfyui.FILE}), dragged into the "
            "window, draws with it."
        )
    text = card.text(about, title, call, card.usage(name, call), hashes, comfyui=said)
    (folder / card.FILE).write_text(text, encoding="utf-8")


def _usage(output: str, call: card.Call) -> str:
    """As `card.usage`; diffusers reads from no bucket, so of one with the copy before it."""
    if not buckets.is_remote(output):
        return card.usage(output, call)
    name = Path(output).name
    copy = f"gcloud storage cp -r {output} ."
    if output.startswith("s3://"):
        copy = f"aws s3 cp --recursive {output} {name}"
    return f"# first: {copy}\n{card.usage(name, call)}"


def weights_name(stem: str, dtype: str) -> str:
    """The file name that diffusers and transformers look for. Args: dtype, of DTYPES."""
    return f"{stem}.fp16.safetensors" if dtype == "float16" else f"{stem}.safetensors"


def _small_files(source: Path) -> list[Path]:
    return [source / name for name in _FILES if (source / name).is_file()]


def copy_component(
    source: Path,
    target: Path,
    dtype: str,
) -> None:
    """Copies data files (never code) of a pipeline's component, its weights in `dtype`."""
    target.mkdir()
    for file in _small_files(source):
        shutil.copyfile(file, target / file.name)
    if (source / spiece.FILE).is_file() and not (source / t5.JSON).is_file():
        t5.write_json(source, target)
    if not (source / "config.json").is_file():  # a tokenizer has no weights
        return
    config = folders.read_config(source)
    # transformers takes the dtype that the config names before that of the weights.
    config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
    folders.write_object(target / "config.json", config)
    stem = folders.DIFFUSERS if "_class_name" in config else folders.TRANSFORMERS
    tensors = stored_tensors(source)
    write_tensors(target, tensors, weights_name(stem, dtype), jnp.dtype(dtype))
