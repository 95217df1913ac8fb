# SPDX-License-Identifier: Apache-2.0
"""Folders in the layout of diffusers: found here or on the Hub, read safely, written whole.

Nothing in them is run, and no name in them leads out of them.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import safetensors
from absl import logging

from di_star_jax import __version__
from di_star_jax.errors import UserError
from di_star_jax.storage import buckets
from di_star_jax.storage.files import MARKER, expand, listing, sampled_digest, whole_folder

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"  # stems of weight files' names
SCHEDULER = ("scheduler", "scheduler_config.json")  # folder and file, in a pipeline
LEFT_OUT = ("safety_checker",)  # of a pipeline: neither read nor exported
_STEMS = (DIFFUSERS, TRANSFORMERS, "pytorch_model")
_TEXT = ["*.json", "*.txt", "*spiece.model", "README.md"]  # the last for its licence
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = "*.safetensors"
SHIPPED = Path(__file__).parent.parent  # where the package's own weights lie
_LARGEST, _DEEPEST = 10**8, 64  # bytes of a JSON file, and its objects inside each other


def digest(folder: Path) -> str:
    """Of a folder's weights: what they are, wherever they lie."""
    return sampled_digest(folder, _WEIGHTS)


def identity(reference: Path) -> dict[str, str]:
    """What a checkpoint's metadata says of its reference's weights, for `other_world`."""
    return {"digest": digest(reference), "version": __version__}


def other_world(
    folder: Path,
    begun_with: str | None,
    version: str | None,
) -> str | None:
    """What is said of weights that are not those that a run began with; None where they are.

    Args: folder, of the weights; begun_with, their `digest` then, or None of a version that did not
      keep it, whose package had other weights than this; version, of di_star_jax then, if known.
    """
    shipped = folder.resolve().is_relative_to(SHIPPED)
    if begun_with == digest(folder) or (begun_with is None and not shipped):
        return None
    if not shipped:
        return f"{folder} has other weights than when the run began"
    return (
        f"the run began in the shapes world of di_star_jax {version or '0.1.0 or older'}, this is "
        f"{__version__}, whose {folder.name} has other weights"
    )


def read_config(
    folder: str | os.PathLike,
    subfolder: str = "",
    name: str = "config.json",
) -> dict:
    """The parsed JSON file of a model folder. Raises: UserError where it is missing or broken."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; give a folder in the layout of diffusers")
    return read_object(Path(folder) / subfolder / name)


def read_object(path: Path) -> dict:
    """A JSON file that holds an object. Raises: UserError where it is missing or broken."""
    if not path.is_file():  # a pipe would be waited for, a device read without end
        raise UserError(f"no file {path}; give a folder in the layout of diffusers")
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has over {_LARGEST // 10**6} MB, expected a file of settings")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); make it readable, or download it again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    except RecursionError:
        content = None
    if content is None or _is_deep(content):
        raise UserError(f"{path} has over {_DEEPEST} objects inside each other; download it again")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} holds {kind}, expected a JSON object; download it again")
    return content


def _is_deep(content: Any) -> bool:
    """Whether lists and objects stand inside each other beyond _DEEPEST."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
    return bool(level)


def write_object(path: Path, content: dict) -> None:
    """Writes a JSON file as diffusers does, its keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# From a bucket or the Hub.


def resolve(name: str) -> Path:
    """A local folder for a folder's, a bucket's or a Hub repository's name.

    Of the latter two, safetensors, json and txt files and spiece.model only.

    Raises: UserError for a path that is no folder (without asking the network), or when bucket or
      Hub do not deliver.
    """
    if _is_folder(name):
        return expand(name)
    folder = _fetch(name, _TEXT)
    patterns = ["*.safetensors"]
    # Beside the components of a pipeline, repositories keep the same weights again in single files.
    if (folder / "model_index.json").is_file():
        parts = [part for part in components(folder) if part not in LEFT_OUT]
        patterns = [f"{part}/*.safetensors" for part in parts]
    _fetch(name, patterns, ignore="*.fp16*")
    # Half precision of what there is in no other: of all, or of single components.
    lacking = [pattern for pattern in patterns if _lacks_weights(folder, pattern)]
    if lacking:
        _fetch(name, lacking)
    return folder


def _lacks_weights(folder: Path, pattern: str) -> bool:
    """Whether a model has no file of a pattern; a folder without config.json is none."""
    part = (folder / pattern).parent
    is_model = not part.is_dir() or part == folder or (part / "config.json").is_file()
    return is_model and not any(folder.glob(pattern))


def resolve_tokenizer(name: str) -> Path:
    """As `resolve`, but fetches no weights."""
    return expand(name) if _is_folder(name) else _fetch(name, _TEXT)


def _is_folder(name: str) -> bool:
    """Whether `name` is local. Raises: UserError if it is nothing to be fetched either."""
    if buckets.is_remote(name):
        return False
    if expand(name).is_dir():
        return True
    if expand(name).exists():
        raise UserError(
            f"{name} is a file, expected a folder in the layout of diffusers; "
            "give the folder around it, or make one of it with `di-star convert --to=diffusers`"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"no folder {name}; give an existing folder, or a name on the Hub such as "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    return False


def check_endpoint() -> None:
    """Raises: UserError where the Hub's address, as the environment has it, is none."""
    endpoint = huggingface_hub.constants.ENDPOINT
    if not endpoint.startswith(("https://", "http://")):
        raise UserError(
            f"the environment has HF_ENDPOINT={endpoint}, expected an address that begins with "
            f"https://; set HF_ENDPOINT=https://{endpoint.rpartition('//')[2]}, or unset it"
        )


def _fetch(
    name: str,
    patterns: list[str],
    ignore: str | None = None,
) -> Path:
    if buckets.is_remote(name):
        folder = buckets.fetch(name, patterns, ignore)
        if folder.is_file():
            raise UserError(f"{name} is a file, expected a folder in the layout of diffusers")
        return folder
    check_endpoint()
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignore)
        )
    except (OSError, ValueError) as error:
        # The Hub's own sentence, on access to a gated repository, stands below the first line.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} is no local folder and could not be had from the Hub ({reason}); "
            f"check the name and the network, or run `hf download {name}` where there is one "
            "and give the folder"
        ) from None


# What is in them.


def components(pipeline: str | os.PathLike) -> list[str]:
    """Names of the subfolders of a pipeline.

    Raises: UserError where its model_index.json is missing or suspicious.
    """
    model_index = Path(pipeline) / "model_index.json"
    content = read_object(model_index)
    names = [
        name
        for name, kind in content.items()
        if isinstance(kind, list) and kind[:1] not in ([], [None])
    ]
    for name in names:
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"{model_index} names a component {name!r}, expected a plain name; "
                "get it from a source you trust"
            )
    return names


def is_pipeline(folder: str | os.PathLike) -> bool:
    """Whether a folder is a pipeline's."""
    return _holds(folder, "model_index.json")


def is_model(folder: str | os.PathLike) -> bool:
    """Whether a folder is a single model's; a run's workdir has a config.json of another kind."""
    is_run = _holds(folder, "checkpoints")
    return _holds(folder, "config.json") and not is_run and not is_pipeline(folder)


def _holds(folder: str | os.PathLike, name: str) -> bool:
    """Whether something of this name is in a folder, here or in a bucket."""
    if buckets.is_remote(folder):
        return buckets.exists(buckets.child(str(folder), name))
    path = Path(folder) / name
    return path.is_file() or path.is_dir()


def check_inside(folder: Path, path: Path) -> None:
    """Raises: UserError where `path`, in `folder`, is a link to something outside.

    The Hub's cache may: its snapshots link to the blobs beside them.
    """
    root, real = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    if not any(real.is_relative_to(each) for each in allowed):
        raise UserError(
            f"{path} is a link that leads out of {folder}, to {real}, expected files of the "
            "folder's own, for they are copied; put a copy in place of the link"
        )


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """A model folder's safetensors files, and the index if they are shards of one model.

    Half-precision files are taken where there are no others. Raises: UserError where none are.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give a folder with safetensors weights")
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if variant and (single.is_file() or index.is_file()):
                logging.info("%s has half-precision weights only: taking its .fp16 files", folder)
            if single.is_file():
                return [single], None
            if index.is_file():
                return _shards(index), index
    pickles = sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise _pickle_error(pickles[0])
    raise UserError(
        f"no weights in {folder}, expected e.g. {DIFFUSERS}.safetensors or "
        f"{TRANSFORMERS}.safetensors; give the folder of one model, such as PIPELINE/vae"
    )


def weight_map(index: Path) -> dict[str, str]:
    """An index's {tensor: file beside it}. Raises: UserError where there is none."""
    try:
        return {key: str(name) for key, name in read_object(index)["weight_map"].items()}
    except (KeyError, AttributeError):
        raise UserError(f"{index} has no table 'weight_map'; download the folder again") from None


def _shards(index: Path) -> list[Path]:
    names = sorted(set(weight_map(index).values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):  # nothing that leaves the folder
            raise UserError(
                f"{index} names a file {name!r}, expected plain names of safetensors files "
                "beside it; get the weights from a source you trust"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not there; download the folder again")
    return [index.parent / name for name in names]


def open_weights(path: Path) -> Any:
    """An open safetensors file, its tensors not read. Raises: UserError for anything else."""
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        if _begins_as_pickle(path):
            raise _pickle_error(path) from None
        if _first(path, 4) == b"GGUF":
            raise UserError(
                f"{path} is a GGUF file, whose weights are quantised, expected safetensors in F32, "
                "F16 or BF16; give the file that it was made from"
            ) from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a readable safetensors file ({reason}); download it again"
        ) from None


def _first(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _begins_as_pickle(path: Path) -> bool:
    start = _first(path, 9)
    # A safetensors file may begin with 0x80 too, but its ninth byte is "{".
    return start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:] != b"{")


def _pickle_error(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run code when it is read; expected safetensors: "
        "convert it first with safetensors.torch.save_file"
        "(torch.load(file, weights_only=True), 'model.safetensors')"
    )


# Written whole.


def check_output(folder: str | os.PathLike, sources: Sequence[Path] = ()) -> None:
    """Raises: UserError if `new_folder` would refuse to write this folder.

    Args: sources, what is read meanwhile: the folder may be none of them, in none, around none.
    """
    if buckets.is_remote(folder):
        buckets.check_output(str(folder))
        return
    real = expand(folder).resolve()
    if Path.cwd().is_relative_to(real):
        raise UserError(
            f"{folder} is the current folder or one around it, so it is not overwritten; give "
            "another output"
        )
    for source in sources:
        read = source.resolve()
        if real.is_relative_to(read) or read.is_relative_to(real):
            raise UserError(
                f"{folder} is {source}, in it or around it, which is read; give another output"
            )
    if real.exists() and not real.is_dir():
        raise UserError(f"{folder} is a file, expected a folder to write; give another output")
    foreign = _foreign(real) if real.exists() else None
    if foreign is not None:
        raise UserError(
            f"{folder} is no model folder that was written here: it holds {foreign}, which is not "
            f"as {MARKER} lists it, so nothing is overwritten; give another output"
        )


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A model's or a pipeline's folder to write in, which appears whole, or not at all.

    Args: as of `check_output`.
    Raises: UserError where `folder` is something else, or cannot be written.
    """
    check_output(folder, sources)
    try:
        if buckets.is_remote(folder):
            with buckets.new_folder(str(folder)) as partial:
                yield partial
            return
        with whole_folder(expand(folder).resolve()) as partial:
            yield partial
            write_object(partial / MARKER, {"files": listing(partial)})
            check_output(folder, sources)  # again, for writing may have taken minutes
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write {folder} ({reason}); give an output on a disk with room"
        ) from None


def _foreign(folder: Path) -> str | None:
    """A file in a folder that is not as `new_folder` left it."""
    files = {}
    if (folder / MARKER).is_file():
        files = read_object(folder / MARKER).get("files")
    ours = files if isinstance(files, dict) else {}
    found = listing(folder)
    return next((name for name, content in found.items() if ours.get(name) != content), None)
