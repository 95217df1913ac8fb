# SPDX-License-Identifier: Apache-2.0
"""A whole pipeline in one file of the original layout: read into a folder, and written from one.

Such a file holds the networks alone. Their settings, the tokenizers and the scheduler are a
reference's, as in diffusers' `from_single_file`: the published pipeline of the family, unless the
user names a folder.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from di_star_jax import log
from di_star_jax.diffusion import FewStep
from di_star_jax.errors import UserError
from di_star_jax.models import published
from di_star_jax.pipelines import adapters, card, comfyui, original
from di_star_jax.pipelines.export import (
    calls_by_timesteps,
    copy_component,
    form_of,
    in_workdir,
    weights_name,
    workflow_of,
)
from di_star_jax.pipelines.families import FAMILIES
from di_star_jax.pipelines.family import DENOISER, Family
from di_star_jax.pipelines.folder import (
    abstract_model,
    check_pipeline,
    read_config,
    with_prediction,
)
from di_star_jax.pipelines.scheduler import SchedulerFile, predicts_v
from di_star_jax.storage import buckets, folders, weights
from di_star_jax.storage.files import digest_of, expand, user_cache, whole, write_text
from di_star_jax.storage.weights import Stored

# open_clip's temperature, at which its training holds it: exp of it is 100. No picture depends on
# it, but files have it.
_LOGIT_SCALE = np.log(100.0)

PREDICTION_TYPES = ("epsilon", "v_prediction")
# diffusers' schedulers that read rescale_betas_zero_snr.
_KNOW_ZERO_SNR = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


def is_file(path: str | os.PathLike) -> bool:
    """Whether a user's input is one file on this machine, or by its name one in a bucket."""
    if buckets.is_remote(path):
        return str(path).endswith(".safetensors")
    return expand(path).is_file()


# In.


class Source(NamedTuple):
    """A single file that was looked at.

    tensors: by component and diffusers' name. stored: all, by the names in the file.
    """

    family: Family
    tensors: dict[str, dict[str, Stored]]
    stored: Mapping[str, Stored]

    def dtype(self, component: str) -> str:
        """The widest of a component's numbers, as a name of NumPy's."""
        found = {tensor.dtype for tensor in self.tensors[component].values()}
        names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        return next(name for kind, name in names.items() if kind in found)


def hub_name(family: Family) -> str:
    """The published pipeline of a family."""
    return next(name for name, (cls, _) in published.PIPELINES.items() if FAMILIES[cls] is family)


@contextlib.contextmanager
def _opened(file: str | os.PathLike) -> Iterator[tuple[Path, Mapping[str, Stored]]]:
    """A file's path on this machine, and its tensors."""
    here = buckets.local(file)
    with buckets.named(here, str(file)), weights.opened(here) as stored:
        yield here, stored


def _name(file: str | os.PathLike) -> str:
    """As cards name it, which others read."""
    return str(file).rpartition("/")[2]


def _family(file: str, stored: Mapping[str, Stored]) -> Family:
    name = original.family_name(file, stored)
    return next(family for family in FAMILIES.values() if family.name == name)


def _looked_at(
    file: str,
    family: Family,
    configs: Mapping[str, dict],
    stored: Mapping[str, Stored],
) -> Source:
    """All networks of a file, none of whose weights are read yet.

    Args: configs, config.json by component. Raises: UserError for what does not fit them.
    """
    stored = _current_names(family, stored)
    shapes = {name: weights.shapes(abstract_model(configs[name]).params) for name in family.parts}
    expected, tensors = {}, {}
    for name, (start, network) in family.original.items():
        for key, shape in original.original_shapes(network, shapes[name]).items():
            expected[start + key] = shape
    original.check_whole(file, family.name, expected, stored)
    for name, (start, network) in family.original.items():
        of_network = {k.removeprefix(start): t for k, t in stored.items() if k.startswith(start)}
        tensors[name] = original.to_diffusers(network, shapes[name], of_network)
    return Source(family, tensors, stored)


def _current_names(family: Family, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Old files of SD 1.5 lack a part of their text encoder's names."""
    start, _ = family.original["text_encoder"]
    parts = ("embeddings.", "encoder.", "final_layer_norm.")
    old = tuple(start + part for part in parts)
    return {
        name.replace(start, f"{start}text_model.") if name.startswith(old) else name: tensor
        for name, tensor in stored.items()
    }


def to_folder(
    file: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    reference: str | None = None,
    prediction_type: str | None = None,
    repository: str = "",
) -> str:
    """Writes a single file as a pipeline's folder, with its model card.

    Args:
      file: SDXL or SD 1.5 in the original layout, here or in a bucket.
      output: replaced as a whole if it is an earlier export.
      dtype: of all weights, one of export.DTYPES; None leaves each tensor as it is stored.
      reference: folder or Hub name of the pipeline whose tokenizers, scheduler and settings count;
        its weights are not looked at. None for the published one.
      prediction_type: what the denoiser predicts, one of PREDICTION_TYPES; None for what the file
        says, by an empty tensor, else the reference.
      repository: on the Hub, where it is to go; "" for nowhere.
    Returns: what the reference was.
    Raises: UserError for a file that is something else, or does not fit, before anything is
      written.
    """
    folders.check_output(output)
    named = _name(file)
    with _opened(file) as (file, stored):
        family = _family(str(file), stored)
        name = reference or hub_name(family)
        folder = _settings(file, name, given=reference is not None)
        scheduler = _scheduler(_checked(file, family, name, folder), stored, prediction_type)
        configs = _configs(folder, family)
        source = _looked_at(str(file), family, configs, stored)
        with folders.new_folder(output, [folder, file]) as partial:
            for part in family.parts:
                _write_part(partial / family.parts[part].folder, part, source, configs[part], dtype)
            for tokenizer in family.tokenizers:
                folders.check_inside(folder, folder / tokenizer)
                copy_component(folder / tokenizer, partial / tokenizer, "float32")
            (partial / folders.SCHEDULER[0]).mkdir()
            folders.write_object(partial.joinpath(*folders.SCHEDULER), scheduler)
            index = _index(folder, family) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
            folders.write_object(partial / "model_index.json", index)
            base = card.base_of_file(file, named, digest_of(file))
            title = repository or Path(output).resolve().name
            _write_folders_card(partial, base, title, source, scheduler, dtype)
    return name


def _write_folders_card(
    folder: Path,
    base: card.Base,
    title: str,
    source: Source,
    scheduler: dict,
    dtype: str | None,
) -> None:
    """The model card of a folder that is whole otherwise. Args: as of `to_folder`."""
    about = card.About("", (base,))
    stored = {part: dtype or source.dtype(name) for name, part in _folders(source.family).items()}
    call = _call(scheduler, source.family, stored[source.family.parts[DENOISER].folder])
    numbers = ", ".join(f"{part} {kind}" for part, kind in stored.items())
    hashes = {
        path.relative_to(folder).as_posix(): digest_of(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    code = card.usage(title, call._replace(variant=dtype is not None))
    text = card.text(
        about, Path(title).name, call, code, hashes, numbers=f"Weights are stored as: {numbers}."
    )
    folders.write_object(folder / card.FACTS, about.facts())
    write_text(folder / card.FILE, text)


def _folders(family: Family) -> dict[str, str]:
    return {name: part.folder for name, part in family.parts.items()}


def _call(
    scheduler: dict,
    family: Family,
    dtype: str,
) -> card.Call:
    """How diffusers draws with a pipeline. Args: scheduler, content of scheduler_config.json."""
    form = form_of(scheduler, family.one_step)
    named = form.timesteps if form and calls_by_timesteps(scheduler) else ()
    return card.Call(dtype, 0 if form is None else len(form.timesteps), named, family.call)


def as_folder(source: str, reference: str | None = None) -> str:
    """The folder of a single file, for all that takes folders; another source is itself.

    A file is converted once into the user's cache, where its content is what it is known by.

    Args: source, here or in a bucket; reference, as of `to_folder`. Raises: as there.
    """
    if not is_file(source):
        return source
    with buckets.local(source).open("rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update((reference or "").encode())
    folder = user_cache() / "single" / digest.hexdigest()
    if not folders.is_pipeline(folder):
        log.say(f"{source}: converting it once, into {folder}")
        to_folder(source, folder, reference=reference)
    else:
        log.say(f"{source}: it was converted into {folder}")
    return str(folder)


def with_folders(config) -> None:
    """Puts folders in the place of the single files that a config's weights are.

    The reference's settings count for generator and assistant; a generator's file of adapters is
    merged with its denoiser. What is missing or no text is left for the config's own check.
    """
    reference = None
    for name in ("reference", "generator", "assistant"):
        given = config.get("weights", {}).get(name)
        if not isinstance(given, str):
            continue
        if name == "generator" and reference and adapters.is_file(given):
            config.weights[name] = adapters.as_folder(given, reference)
        else:
            config.weights[name] = as_folder(given, reference)
        if name == "reference":
            reference = config.get("weights", {}).get(name)


def _scheduler(
    reference: SchedulerFile,
    stored: Mapping[str, Stored],
    prediction_type: str | None,
) -> dict:
    """Content of scheduler_config.json: the reference's, with what a file says of its denoiser."""
    said = {}
    if original.V_PREDICTION in stored:
        said["prediction_type"] = "v_prediction"
    if prediction_type is not None:
        said["prediction_type"] = prediction_type
    predicted = (reference.config | said).get("prediction_type")
    if predicted == "v_prediction" and original.ZERO_SNR in stored:
        said["rescale_betas_zero_snr"] = True
    elif predicted != "v_prediction" and reference.config.get("rescale_betas_zero_snr"):
        said["rescale_betas_zero_snr"] = False
    name = reference.config.get("_class_name")
    if said.get("rescale_betas_zero_snr") and name not in _KNOW_ZERO_SNR:
        said["_class_name"] = "EulerDiscreteScheduler"
    return reference.config | said


def _settings(file: Path, name: str, *, given: bool) -> Path:
    """The folder of what a single file does not hold."""
    try:
        return folders.resolve_tokenizer(name)
    except UserError as error:
        if given:
            raise
        raise UserError(
            f"{file} holds no tokenizers and no scheduler, and {error}; or give "
            "--reference=FOLDER of any pipeline of its kind"
        ) from None


def _checked(
    file: Path,
    family: Family,
    name: str,
    folder: Path,
) -> SchedulerFile:
    """The scheduler of a reference of the file's family. Raises: UserError for another."""
    found, scheduler = check_pipeline(folder)
    if found is not family:
        raise UserError(
            f"{file} is an {family.name} checkpoint, but {name} is of {found.name}; give the "
            f"folder of an {family.name} pipeline as --reference"
        )
    return scheduler


def _configs(folder: Path, family: Family) -> dict[str, dict]:
    """config.json by component."""
    return {name: read_config(folder, part.folder) for name, part in family.parts.items()}


def _index(folder: Path, family: Family) -> dict:
    """model_index.json without the components that a single file does not have."""
    parts = {part.folder for part in family.parts.values()}
    kept = {*parts, *family.tokenizers, folders.SCHEDULER[0]}
    index = folders.read_config(folder, name="model_index.json")
    index |= dict.fromkeys({*folders.components(folder)} - kept, [None, None])
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False  # else diffusers warns of its absence
    return index


def _write_part(
    folder: Path,
    component: str,
    source: Source,
    config: dict,
    dtype: str | None,
) -> None:
    folder.mkdir()
    stored_as = dtype or source.dtype(component)
    # transformers takes the dtype that the config names before that of the weights.
    config = config | {name: stored_as for name in ("dtype", "torch_dtype") if name in config}
    folders.write_object(folder / "config.json", config)
    stem = folders.DIFFUSERS if "_class_name" in config else folders.TRANSFORMERS
    tensors = ((key, tensor.read()) for key, tensor in source.tensors[component].items())
    file_name = weights_name(stem, dtype or "")
    weights.write_tensors(folder, tensors, file_name, dtype and jnp.dtype(dtype))


def to_params(
    file: str | os.PathLike,
    reference: str | None = None,
    prediction_type: str | None = None,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """config.json and the float32 parameters of each component of a single file.

    The denoiser's config says whether it predicts v, as of `folder.with_prediction`.

    Args, Raises: as of `to_folder`.
    """
    with _opened(file) as (file, stored):
        family = _family(str(file), stored)
        configs = published.PIPELINES[hub_name(family)][1]
        said = prediction_type or ("v_prediction" if original.V_PREDICTION in stored else "epsilon")
        if reference is not None or said == "v_prediction":  # which is by a scheduler's betas
            name = reference or hub_name(family)
            folder = _settings(file, name, given=reference is not None)
            scheduler = _scheduler(_checked(file, family, name, folder), stored, prediction_type)
            configs = _configs(folder, family)
            configs[DENOISER] = with_prediction(configs[DENOISER], SchedulerFile(scheduler))
        source = _looked_at(str(file), family, configs, stored)
        params = {
            name: weights.from_stored(
                f"{file}, {name}", abstract_model(configs[name]).params, tensors
            )
            for name, tensors in source.tensors.items()
        }
    return {name: configs[name] for name in params}, params


# Out.


class Written(NamedTuple):
    """A single file that was written. usage: lines of Python that draw with it in diffusers.

    form: of a few-step generator, whose times no file holds; None for another network.
    files: all that belong to it, by the names that they have on the Hub.
    """

    usage: str
    form: FewStep | None
    files: dict[str, Path]


def from_folder(
    folder: str | os.PathLike,
    file: str | os.PathLike,
    *,
    dtype: str = "float16",
    scores: str = "",
    repository: str = "",
) -> Written:
    """Writes a pipeline as one file of the original layout, its model card as NAME.md beside it.

    Beside them, of a run that has one, the picture of its samples, NAME.png, which other programs
    show for the file; and of a generator a workflow for ComfyUI, NAME.comfyui.json.

    Args:
      folder: of a pipeline of SDXL or SD 1.5, or a run's workdir, whose export is taken; a Hub name
        or an address, too.
      file: of which there is none yet.
      dtype: of all weights, one of export.DTYPES.
      scores: as of `card.About`, in place of the folder's; "" for these.
      repository: on the Hub, where it is to go; "" for nowhere.
    Raises: UserError for a folder of another kind, or a file that cannot be written.
    """
    file = expand(file)
    _check_new(file)
    source = in_workdir(folders.resolve(str(folder)))
    family, scheduler = check_pipeline(source)
    if not family.original:
        raise UserError(
            f"{folder} is of {family.name}, which has no layout in one file that others read; "
            "expected SDXL or SD 1.5"
        )
    about = card.About.of_export(source)
    about = about._replace(scores=scores or about.scores)
    form = form_of(scheduler.config, family.one_step)
    call = _call(scheduler.config, family, dtype)
    kind = family.index.fixed["_class_name"][0]
    with contextlib.ExitStack() as stack:
        tensors = {}
        for name, (start, network) in family.original.items():
            part = source / family.parts[name].folder
            stored = stack.enter_context(weights.opened(part))
            abstract = abstract_model(read_config(part)).params
            found = original.from_diffusers(network, weights.matched(str(part), abstract, stored))
            tensors |= {start + key: tensor for key, tensor in found.items()}
        tensors |= _fixed(family, tensors) | _markers(scheduler)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                weights.write_file(partial, tensors, jnp.dtype(dtype))
                address = f"https://huggingface.co/{repository}/blob/main/{file.name}"
                code = card.usage_of_file_alone(
                    kind, address if repository else file.name, scheduler.config, call
                )
                workflow = workflow_of(file.name, source, family)
                beside = _write_beside(file, about, workflow)
                _write_card(file, digest_of(partial), about, call, code)
        except OSError as error:
            raise UserError(
                f"cannot write {file} ({error.strerror}); give an output on a disk with room"
            ) from None
    usage = card.usage_of_file(kind, str(file), str(source), call)
    return Written(usage, form, {file.name: file, card.FILE: _beside(file)[0]} | beside)


def _beside(file: Path) -> tuple[Path, Path, Path]:
    """Of a single file: its model card, the picture in it, and its workflow for ComfyUI."""
    return tuple(file.with_suffix(suffix) for suffix in (".md", ".png", f".{comfyui.FILE}"))


def _write_beside(
    file: Path,
    about: card.About,
    workflow: dict | None,
) -> dict[str, Path]:
    """What the model card shows and names, {name: file}."""
    _, picture, graph = _beside(file)
    written = {}
    if about.picture is not None:
        shutil.copyfile(about.picture, picture)
        written[picture.name] = picture
    if workflow is not None:
        folders.write_object(graph, workflow)
        written[graph.name] = graph
    return written


def _write_card(
    file: Path,
    digest: str,
    about: card.About,
    call: card.Call,
    code: str,
) -> None:
    page, picture, graph = _beside(file)
    said = (
        f"Put `{file.name}` into `models/checkpoints`. [{graph.name}]({graph.name}), dragged into "
        "the window, draws with it."
    )
    text = card.text(
        about,
        file.stem,
        call,
        code,
        {file.name: digest},
        picture=picture.name,
        comfyui=said if graph.exists() else "",
    )
    write_text(page, text)


def _check_new(file: Path) -> None:
    """Raises: UserError for a name that is taken, or none of a safetensors file."""
    weights.check_new_file(file)
    for path in _beside(file):
        if path.exists():
            raise UserError(f"{path} is there, so it is not overwritten; give another output")


def _markers(scheduler: SchedulerFile) -> dict[str, Stored]:
    """What a file says of its denoiser, as ComfyUI writes and reads it: empty tensors."""
    if not predicts_v(scheduler):
        return {}
    zero_snr = scheduler.config.get("rescale_betas_zero_snr")
    names = [original.V_PREDICTION, *([original.ZERO_SNR] if zero_snr else [])]
    return {name: Stored((0,), "F32", lambda: np.zeros(0, np.float32)) for name in names}


def _fixed(family: Family, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """What published files hold besides, which is the same in all."""
    found = {}
    for start, network in family.original.values():
        if network == original.CLIP:
            table = tensors[f"{start}text_model.embeddings.position_embedding.weight"]
            ids = np.arange(table.shape[0])[None]
            name = f"{start}text_model.embeddings.position_ids"
            found[name] = Stored(ids.shape, "I64", lambda ids=ids: ids)
        elif network == original.OPEN_CLIP:
            found[f"{start}logit_scale"] = Stored((), "F32", lambda: np.float32(_LOGIT_SCALE))
    return found
