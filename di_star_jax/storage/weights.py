# SPDX-License-Identifier: Apache-2.0
"""Between folders in the layout of diffusers and parameter trees, by one mechanical rule
(`torch_keys`).

Files are read one tensor at a time. A folder that is written appears whole under its name, or not
at all.
"""

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from jax.experimental import multihost_utils

from di_star_jax.errors import UserError

STACKED = (
    "transformer_blocks",
    "layers",
    "layer",
    "blocks",
)  # modules whose leaves have a leading axis, one row per PyTorch block
MAX_SHARD = 5 * 10**9  # bytes; the hub's own limit for one file of weights
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_TEXT = ["*.json", "*.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_AXES = {
    ("kernel", 2): (1, 0),
    ("kernel", 4): (3, 2, 0, 1),
}  # ours in PyTorch's order: [O, I], [O, I, kh, kw]
_OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # VAE files of SD 1.5


# The rule.


def torch_keys(path: tuple, leaf: Any) -> str | list[str]:
    """PyTorch's name of a parameter.

    Args:
      path: keys from the root of the parameter tree to the leaf; indices of module lists are ints.
      leaf: anything with a `shape`.
    Returns:
      the name, or for a leaf of a stacked module the names of its rows, in order.
    """
    *modules, name = path
    name = "weight" if name in ("kernel", "scale", "embedding") else name
    for i, module in enumerate(modules):
        if module in STACKED and not isinstance(path[i + 1], int):
            head, tail = modules[: i + 1], [*modules[i + 1 :], name]
            return [".".join(map(str, [*head, row, *tail])) for row in range(leaf.shape[0])]
    return ".".join(map(str, [*modules, name]))


class _Rows(NamedTuple):
    """One leaf as PyTorch stores it:

    `keys` name its rows, each of `shape`, whose axes are ours in order `axes`.
    """

    keys: list[str]
    stacked: bool
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _rows(path: tuple, leaf: Any) -> _Rows:
    keys = torch_keys(path, leaf)
    stacked = isinstance(keys, list)
    shape = leaf.shape[1:] if stacked else leaf.shape
    kind = (path[-1], len(shape))
    axes = _AXES[kind] if kind in _AXES else tuple(range(len(shape)))
    return _Rows(keys if stacked else [keys], stacked, tuple(shape[a] for a in axes), axes)


def _leaves(tree: Any) -> tuple[list[tuple[_Rows, Any]], Any]:
    """[(rows, leaf)] and the tree's definition."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return [(_rows(tuple(k.key for k in path), leaf), leaf) for path, leaf in leaves], treedef


def _check_finite(where: str, name: str, tensor: np.ndarray) -> None:
    count = tensor.size - np.count_nonzero(np.isfinite(tensor))
    if count:
        raise UserError(
            f"{where}: {count} of the {tensor.size} values of {name} are not finite in {tensor.dtype}, "
            "expected finite weights; use an undamaged file, or float32"
        )


# Tensors in.


def _current_name(name: str, wanted: set[str]) -> str:
    """The name that a file's tensor has in the model, where the file follows an older or newer
    convention.
    """
    if name in wanted:
        return name
    renamed = ".".join(_OLD_NAMES[part] if part in _OLD_NAMES else part for part in name.split("."))
    for candidate in (
        renamed,
        f"text_model.{name}",
    ):  # transformers >= 5 writes text encoders without the prefix
        if candidate in wanted:
            return candidate
    return name


def _check_fit(where: str, leaves: list, shapes: Mapping[str, tuple]) -> None:
    """Raises: UserError with the first ten tensors that are missing, extra or of another shape."""
    expected = {key: rows.shape for rows, _ in leaves for key in rows.keys}
    missing = [
        f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in shapes
    ]
    extra = [f"extra {key} {list(shape)}" for key, shape in shapes.items() if key not in expected]
    wrong = [
        f"{key} is {list(shapes[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    if missing or extra or wrong:
        first = (wrong + missing + extra)[:10]
        raise UserError(
            f"{where} does not fit the model: {len(missing)} tensors missing, {len(extra)} extra, "
            f"{len(wrong)} of the wrong shape; first {len(first)}: {'; '.join(first)}; "
            "give weights and config.json of the same model"
        )


def _read_leaf(
    where: str, rows: _Rows, shape: tuple, dtype: Any, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    leaf = np.empty(shape, dtype)
    for i, key in enumerate(rows.keys):
        tensor = read(key)
        _check_finite(where, key, tensor)
        leaf[i if rows.stacked else ...] = tensor.transpose(np.argsort(rows.axes))
    return leaf


def params_from_tensors(tensors: Mapping[str, np.ndarray], abstract_params: Any) -> Any:
    """A parameter tree of NumPy arrays from tensors in PyTorch's names and layout; `position_ids`
    are ignored.

    Args:
      tensors: in memory, of any float dtype.
      abstract_params: tree of `jax.ShapeDtypeStruct`; values are cast to its dtypes.
    Raises: UserError for tensors that are missing, extra, wrongly shaped or not finite.
    """
    leaves, treedef = _leaves(abstract_params)
    wanted = {key for rows, _ in leaves for key in rows.keys}
    found = {
        _current_name(name, wanted): name for name in tensors if not name.endswith("position_ids")
    }
    where = "the set of tensors"
    _check_fit(where, leaves, {key: tensors[name].shape for key, name in found.items()})
    return treedef.unflatten(
        [
            _read_leaf(where, rows, leaf.shape, leaf.dtype, lambda key: tensors[found[key]])
            for rows, leaf in leaves
        ]
    )


class Stored(NamedTuple):
    """A tensor in a file, not read yet. dtype: safetensors' name, such as F16."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


Arrange = Callable[[dict[str, Stored]], dict[str, Stored]]


def load(
    folder: str | os.PathLike,
    abstract_params: Any,
    *,
    shardings: Any = None,
    dtype: Any = None,
    arrange: Arrange | None = None,
) -> Any:
    """The parameters in a model's folder; host memory holds about one leaf beside them.

    Args:
      folder: with one or several safetensors files; half-precision ones are taken where there are
        no others. Or one such file.
      abstract_params: tree of `jax.ShapeDtypeStruct`.
      shardings: tree of shardings like it, or None for the default device.
      dtype: of all leaves; None for those of `abstract_params`.
      arrange: from the stored tensors by name to those that the model has, where a file follows
        another convention.
    Returns: tree of `jax.Array`.
    Raises: UserError for a folder, file or tensor that cannot be used.
    """
    where = str(folder)
    leaves, treedef = _leaves(abstract_params)
    wanted = {key for rows, _ in leaves for key in rows.keys}
    places = treedef.flatten_up_to(shardings) if shardings is not None else [None] * len(leaves)
    params = []
    with contextlib.ExitStack() as stack:
        stored = {}
        for path in [Path(folder)] if Path(folder).is_file() else _weight_files(Path(folder))[0]:
            stored |= _stored(stack.enter_context(_open(path)))
        found = {
            _current_name(name, wanted): tensor
            for name, tensor in (arrange or dict)(stored).items()
        }
        _check_fit(where, leaves, {key: tensor.shape for key, tensor in found.items()})
        _check_floats(where, found)
        for (rows, leaf), place in zip(leaves, places):
            array = _read_leaf(
                where, rows, leaf.shape, dtype or leaf.dtype, lambda key: found[key].read()
            )
            # Waiting keeps one leaf on the host at a time.
            params.append(jax.block_until_ready(_place(array, place)))
    return treedef.unflatten(params)


def _stored(file: Any) -> dict[str, Stored]:
    """The tensors of an open safetensors file, without the `position_ids` that old files carry."""
    names = [name for name in file.keys() if not name.endswith("position_ids")]
    views = {name: file.get_slice(name) for name in names}
    return {
        name: Stored(
            tuple(view.get_shape()), view.get_dtype(), functools.partial(file.get_tensor, name)
        )
        for name, view in views.items()
    }


def _place(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_floats(where: str, found: dict[str, Stored]) -> None:
    for name, tensor in found.items():
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{where}: {name} is stored as {tensor.dtype}, expected F32, F16 or BF16; give a model that "
                "is not quantised"
            )


# Tensors out.


def _tensors(params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(PyTorch's name, contiguous array in PyTorch's layout), one leaf on the host at a time."""
    for rows, leaf in _leaves(params)[0]:
        leaf = np.asarray(leaf)
        for key, row in zip(rows.keys, leaf if rows.stacked else leaf[None]):
            yield key, np.ascontiguousarray(row.transpose(rows.axes)).reshape(rows.shape)


def tensors_from_params(params: Any) -> dict[str, np.ndarray]:
    """Tensors in PyTorch's names and layout: the inverse of `params_from_tensors`."""
    return dict(_tensors(params))


def save(
    folder: str | os.PathLike, params: Any, *, config: dict, file_name: str, dtype: Any = None
) -> None:
    """Writes a model's folder: config.json and safetensors, in shards of at most MAX_SHARD bytes
    with an index.

    Args:
      folder: replaced as a whole if it is an earlier model.
      params: tree of arrays. If they are spread over several hosts, all must call this; the first
        one writes.
      config: content of config.json.
      file_name: e.g. diffusion_pytorch_model.safetensors.
      dtype: to cast to, or None.
    Raises: UserError for values that are not finite in `dtype`, or a folder that cannot be written.
    """
    params = _on_hosts(params)
    if jax.process_index() == 0:
        with _whole_folder(Path(folder)) as partial:
            _write_model(partial, params, config, file_name, dtype)


def _on_hosts(params: Any) -> Any:
    """Makes leaves that are spread over hosts whole on each of them."""

    def whole(leaf):
        return (
            leaf
            if getattr(leaf, "is_fully_addressable", True)
            else multihost_utils.process_allgather(leaf, True)
        )

    return jax.tree.map(whole, params)


def _write_model(folder: Path, params: Any, config: dict, file_name: str, dtype: Any) -> None:
    _write_json(folder / "config.json", config)
    shards, total = [], 0
    for shard in _packed(_tensors(params), dtype):
        safetensors.numpy.save_file(shard, folder / str(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "0").rename(folder / file_name)
        return
    names = [
        f"{Path(file_name).stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        for i in range(len(shards))
    ]
    for i, name in enumerate(names):
        (folder / str(i)).rename(folder / name)
    weight_map = {key: name for name, keys in zip(names, shards) for key in keys}
    _write_json(
        folder / f"{file_name}.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _packed(
    tensors: Iterator[tuple[str, np.ndarray]], dtype: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Groups of tensors, cast to `dtype`, of at most MAX_SHARD bytes; each is emptied when the next
    is asked for.
    """
    held, size = {}, 0
    for key, tensor in tensors:
        with np.errstate(over="ignore"):  # reported by the next line
            tensor = tensor.astype(dtype or tensor.dtype, copy=False)
        _check_finite("cannot write the weights", key, tensor)
        if held and size + tensor.nbytes > MAX_SHARD:
            yield held
            held.clear()
            size = 0
        held[key] = tensor
        size += tensor.nbytes
    yield held


def check_output(folder: str | os.PathLike) -> None:
    """Raises: UserError if `save` or `export_pipeline` would refuse to replace this folder."""
    folder = Path(folder)
    if folder.exists() and not any(
        (folder / name).is_file() for name in ("config.json", "model_index.json")
    ):
        raise UserError(
            f"{folder} exists and is no model folder, so it is not overwritten; give another output"
        )


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the name `folder` at the end, or vanishes after an
    error.
    """
    check_output(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror}); give an output on a disk with room"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# Files.


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            start = file.read(
                9
            )  # a safetensors file may begin with 0x80 too, but its ninth byte is "{"
            if start[:1] == b"\x80" and start[8:] != b"{" or start[:2] == b"PK":
                raise _pickle_error(path) from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a readable safetensors file ({reason}); download it again"
        ) from None


def _pickle_error(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which can run code when it is read; expected safetensors: convert it first "
        "with safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
    )


def _weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """A model folder's safetensors files, and the index if they are shards of one model."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give a folder with safetensors weights")
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            single, index = (
                folder / f"{stem}{variant}.safetensors",
                folder / f"{stem}.safetensors.index{variant}.json",
            )
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
        f"no weights in {folder}, expected e.g. {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors; "
        "give the folder of one model, such as PIPELINE/unet"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in _read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError):
        raise UserError(f"{index} has no table 'weight_map'; download the folder again") from None
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):  # nothing that leaves the folder
            raise UserError(
                f"{index} names a file {name!r}, expected plain names of safetensors files beside it; "
                "get the weights from a source you trust"
            )
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not there; download the folder again")
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no file {path}; give a folder in the layout of diffusers") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__}, expected a JSON object; download it again"
        )
    return content


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: str | os.PathLike, subfolder: str = "", name: str = "config.json") -> dict:
    """The parsed JSON file of a model folder. Raises: UserError where it is missing or broken."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; give a folder in the layout of diffusers")
    return _read_json(Path(folder) / subfolder / name)


def resolve(name: str) -> Path:
    """A local folder for a folder's or a Hub repository's name; of the Hub's, safetensors, json and
    txt files only.

    Raises: UserError for a path that is no folder (without asking the network), or when the Hub
      does not deliver.
    """
    if _is_folder(name):
        return Path(name)
    folder = _fetch(name, _TEXT)
    # Beside the components of a pipeline, repositories keep the same weights again in single files.
    is_pipeline = (folder / "model_index.json").is_file()
    parts = (
        [f"{part}/*.safetensors" for part in components(folder)]
        if is_pipeline
        else ["*.safetensors"]
    )
    _fetch(name, parts, ignore="*.fp16*")
    if not any(folder.rglob("*.safetensors")):
        _fetch(name, parts)
    return folder


def resolve_tokenizer(name: str) -> Path:
    """As `resolve`, but fetches no weights."""
    return Path(name) if _is_folder(name) else _fetch(name, _TEXT)


def _is_folder(name: str) -> bool:
    """Whether `name` is local.

    Raises: UserError if it is neither a folder nor what a repository could be called.
    """
    if Path(name).is_dir():
        return True
    if Path(name).exists():
        raise UserError(
            f"{name} is a file, expected a folder in the layout of diffusers; give the folder around it"
        )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(
            f"no folder {name}; give an existing folder, or a name on the Hub such as "
            "stabilityai/stable-diffusion-xl-base-1.0"
        )
    return False


def _fetch(name: str, patterns: list[str], ignore: str | None = None) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignore)
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name} is no local folder and could not be had from the Hub ({reason}); check the name and "
            f"the network, or run `hf download {name}` where there is one and give the folder"
        ) from None


# Pipelines.


def one_step_scheduler(reference_folder: str | os.PathLike) -> dict:
    """Content of scheduler_config.json for a one-step generator:

    LCMScheduler with the reference's noise schedule.
    """
    reference = read_config(reference_folder, "scheduler", "scheduler_config.json")
    schedule = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "timestep_spacing": "leading",
        "clip_sample": False,
        "steps_offset": 1,
        **{k: reference[k] for k in schedule if k in reference},
    }


def export_pipeline(
    unet_params: Any,
    *,
    unet_config: dict,
    reference_folder: str | os.PathLike,
    output: str | os.PathLike,
    scheduler: dict,
    dtype: Any = None,
) -> None:
    """Writes a pipeline folder that diffusers loads: a trained UNet, with all else copied from the
    reference.

    Args:
      unet_params: tree of arrays; if they are spread over several hosts, all must call this.
      unet_config: content of the UNet's config.json.
      reference_folder: a local pipeline folder; components with .fp16 files only get plain names.
      output: replaced as a whole if it is an earlier export.
      scheduler: content of scheduler_config.json.
      dtype: of the UNet's weights, or None to keep them.
    Raises: UserError for a reference that lacks a component, or an output that cannot be written.
    """
    reference_folder, output = Path(reference_folder), Path(output)
    index = read_config(reference_folder, name="model_index.json")
    unet_params = _on_hosts(unet_params)
    if jax.process_index() != 0:
        return
    with _whole_folder(output) as partial:
        for name in components(reference_folder):
            (partial / name).mkdir()
            if name not in ("unet", "scheduler"):
                _copy_component(reference_folder / name, partial / name)
        _write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        _write_model(partial / "unet", unet_params, unet_config, f"{_STEMS[0]}.safetensors", dtype)
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        _write_json(partial / "model_index.json", index)


def components(pipeline: str | os.PathLike) -> list[str]:
    """Names of the subfolders of a pipeline.

    Raises: UserError where its model_index.json is missing or suspicious.
    """
    model_index = Path(pipeline) / "model_index.json"
    content = _read_json(model_index)
    names = [
        name
        for name, kind in content.items()
        if isinstance(kind, list) and kind[:1] not in ([], [None])
    ]
    for name in names:
        if not re.fullmatch(r"\w+", name):
            raise UserError(
                f"{model_index} names a component {name!r}, expected a plain name; get it from a source "
                "you trust"
            )
    return names


def _copy_component(source: Path, target: Path) -> None:
    """Copies data files (never code) of a pipeline's component."""
    if not source.is_dir():
        raise UserError(
            f"the reference has no folder {source}, but its model_index.json names it; download it again"
        )
    for file in source.iterdir():
        if file.suffix in (".json", ".txt") and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)
    if not (source / "config.json").is_file():  # a tokenizer
        return
    files, index = _weight_files(source)
    for file in files:
        shutil.copyfile(file, target / file.name.replace(".fp16", ""))
    if index is not None:
        content = _read_json(index)
        content["weight_map"] = {
            k: v.replace(".fp16", "") for k, v in content["weight_map"].items()
        }
        _write_json(target / index.name.replace(".fp16", ""), content)
