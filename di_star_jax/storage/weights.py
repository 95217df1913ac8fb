# SPDX-License-Identifier: Apache-2.0
"""Between tensors in PyTorch's names and parameter trees, by one mechanical rule (`torch_keys`).

Files are read and written one tensor at a time.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from di_star_jax.errors import UserError
from di_star_jax.storage import folders
from di_star_jax.storage.files import whole

# Modules whose leaves have a leading axis, one row per PyTorch block.
STACKED = ("transformer_blocks", "layers", "layer", "block", "blocks")
# Modules that stand beside a stack here, and in its first block in PyTorch.
_IN_FIRST = {"relative_attention_bias": "block.0.layer.0.SelfAttention.relative_attention_bias"}
MAX_SHARD = 5 * 10**9  # bytes; the hub's own limit for one file of weights
# Ours in PyTorch's order: [O, I], [O, I, kh, kw].
_AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 0, 1)}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in safetensors
_INTEGERS = ("I64", "I32")  # of position_ids, which old files carry
# VAE files of SD 1.5.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# T5's table is one of several modules in PyTorch, and some files have it under another one's name.
_SHARED = {"encoder.embed_tokens.weight": "shared.weight"}


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
    modules = [_IN_FIRST.get(module, module) for module in modules]
    name = "weight" if name in ("kernel", "scale", "embedding") else name
    for i, module in enumerate(modules):
        if module in STACKED and not isinstance(path[i + 1], int):
            head, tail = modules[: i + 1], [*modules[i + 1 :], name]
            return [".".join(map(str, [*head, row, *tail])) for row in range(leaf.shape[0])]
    return ".".join(map(str, [*modules, name]))


class _Rows(NamedTuple):
    """One leaf as PyTorch stores it.

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


def _check_finite(
    where: str,
    name: str,
    tensor: np.ndarray,
) -> None:
    count = tensor.size - np.count_nonzero(np.isfinite(tensor))
    if count:
        raise UserError(
            f"{where}: {count} of the {tensor.size} values of {name} are not finite in "
            f"{tensor.dtype}, expected finite weights; use an undamaged file, or float32"
        )


# Tensors in.


def _current_name(name: str, wanted: set[str]) -> str:
    """The model's name of a tensor whose file follows an older or newer convention."""
    renamed = ".".join(_OLD_NAMES.get(part, part) for part in name.split("."))
    # transformers >= 5 writes text encoders without their prefix.
    for candidate in (name, renamed, f"text_model.{name}", _SHARED.get(name)):
        if candidate in wanted:
            return candidate
    return name


def _matched(
    where: str,
    leaves: list,
    tensors: Mapping[str, Any],
) -> dict[str, Any]:
    """The tensors by the model's names; `position_ids`, which old files carry, are left out.

    Raises: UserError with the first ten tensors that are missing, extra or of another shape, or for
      one that is there twice and not the same.
    """
    expected = {key: rows.shape for rows, _ in leaves for key in rows.keys}
    names, found = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        key = _current_name(name, set(expected))
        if key in found:
            _check_same(where, (names[key], name), (found[key], tensor))
        names[key], found[key] = name, tensor
    missing = [
        f"missing {key} {list(shape)}" for key, shape in expected.items() if key not in found
    ]
    extra = [f"extra {key} {list(x.shape)}" for key, x in found.items() if key not in expected]
    wrong = [
        f"{key} is {list(found[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    if missing or extra or wrong:
        first = (wrong + missing + extra)[:10]
        own = _own_names([key for key in found if key not in expected], expected)
        raise UserError(
            f"{where} does not fit the model: {len(missing)} tensors missing, {len(extra)} extra, "
            f"{len(wrong)} of the wrong shape; first {len(first)}: {'; '.join(first)}; "
            f"{own}give weights and config.json of the same model"
        )
    return found


def _check_same(
    where: str,
    names: tuple[str, str],
    tensors: tuple[Any, Any],
) -> None:
    """Raises: UserError where two tensors of one parameter differ."""
    first, second = (tensor.read() if isinstance(tensor, Stored) else tensor for tensor in tensors)
    if not np.array_equal(first, second):
        raise UserError(
            f"{where} has {names[0]} and {names[1]}, which are one parameter of the model, with "
            "other values; give weights that were saved whole"
        )


def _own_names(strange: list[str], expected: Mapping[str, Any]) -> str:
    """What an error says of the names in a file that the model does not have, if any."""
    if not strange:
        return ""
    # What stands before a name of the model's, for the first that ends in one.
    prefix = next(
        (
            ".".join(parts[:i]) + "."
            for parts in (name.split(".") for name in strange)
            for i in range(1, len(parts))
            if ".".join(parts[i:]) in expected
        ),
        "",
    )
    if prefix and all(name.startswith(prefix) for name in strange):
        return f"the file's names begin with {prefix!r}: save its tensors without that, or "
    return f"the file has {', '.join(sorted(strange)[:3])}; "


def _read_leaf(
    where: str,
    rows: _Rows,
    leaf: jax.ShapeDtypeStruct,
    read: Callable[[str], np.ndarray],
) -> np.ndarray:
    array = np.empty(leaf.shape, leaf.dtype)
    for i, key in enumerate(rows.keys):
        tensor = read(key)
        _check_finite(where, key, tensor)
        array[i if rows.stacked else ...] = tensor.transpose(np.argsort(rows.axes))
    return array


def params_from_tensors(tensors: Mapping[str, np.ndarray], abstract_params: Any) -> Any:
    """A parameter tree of NumPy arrays from tensors in PyTorch's names and layout.

    Args:
      tensors: in memory, of any float dtype; `position_ids` are ignored.
      abstract_params: tree of `jax.ShapeDtypeStruct`; values are cast to its dtypes.
    Raises: UserError for tensors that are missing, extra, wrongly shaped or not finite.
    """
    where = "the set of tensors"
    leaves, treedef = _leaves(abstract_params)
    found = _matched(where, leaves, tensors)
    return treedef.unflatten(
        [_read_leaf(where, rows, leaf, found.__getitem__) for rows, leaf in leaves]
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
    arrange: Arrange = dict,
) -> Any:
    """The parameters in a model's folder; host memory holds about one leaf beside them.

    Args:
      folder: with one or several safetensors files; half-precision ones are taken where there are
        no others. Or one such file.
      abstract_params: tree of `jax.ShapeDtypeStruct`, whose dtypes and shardings the parameters
        get; a leaf without sharding goes to the default device.
      arrange: from the stored tensors by name to those that the model has, where a file follows
        another convention.
    Returns: tree of `jax.Array`.
    Raises: UserError for a folder, file or tensor that cannot be used.
    """
    with opened(folder) as stored:
        return from_stored(str(folder), abstract_params, arrange(stored))


def from_stored(
    where: str,
    abstract_params: Any,
    stored: Mapping[str, Stored],
) -> Any:
    """As `load`, of tensors in files that are open. Args: where they are from, for errors."""
    leaves, treedef = _leaves(abstract_params)
    found = matched(where, abstract_params, stored)
    params = []
    for rows, leaf in leaves:
        array = _read_leaf(where, rows, leaf, lambda key: found[key].read())
        # Waiting keeps one leaf on the host at a time.
        params.append(jax.block_until_ready(_place(array, leaf.sharding)))
    return treedef.unflatten(params)


@contextlib.contextmanager
def opened(folder: str | os.PathLike) -> Iterator[dict[str, Stored]]:
    """The tensors of a model's folder, or of one file, by the names there; closed at the end.

    Raises: UserError for a folder or file that cannot be used.
    """
    path = Path(folder)
    with contextlib.ExitStack() as stack:
        stored = {}
        files, index = ([path], None) if path.is_file() else folders.weight_files(path)
        file_of = {} if index is None else folders.weight_map(index)
        for file in files:
            tensors = _stored(stack.enter_context(folders.open_weights(file)))
            # A tensor may lie in two shards: the index says in which it counts.
            stored |= {
                key: tensor
                for key, tensor in tensors.items()
                if file_of.get(key, file.name) == file.name
            }
        yield stored


def shapes(abstract_params: Any) -> dict[str, tuple[int, ...]]:
    """A model's tensors in PyTorch's names and layout. Args: tree of `jax.ShapeDtypeStruct`."""
    return {key: rows.shape for rows, _ in _leaves(abstract_params)[0] for key in rows.keys}


def matched(
    where: str,
    abstract_params: Any,
    stored: Mapping[str, Stored],
) -> dict[str, Stored]:
    """A model's stored tensors by its own names. Args: where they are from, for errors.

    Raises: UserError for tensors that are missing, extra, of the wrong shape or quantised.
    """
    found = _matched(where, _leaves(abstract_params)[0], stored)
    _check_floats(where, found)
    return found


def stored_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """A model folder's tensors by the names in its files, one at a time.

    Raises: UserError for files that cannot be used.
    """
    for file in folders.weight_files(folder)[0]:
        with folders.open_weights(file) as handle:
            found = _stored(handle)
            floats = {name: t for name, t in found.items() if t.dtype not in _INTEGERS}
            _check_floats(str(folder), floats)
            for name, tensor in found.items():
                yield name, tensor.read()


def _stored(file: Any) -> dict[str, Stored]:
    """The tensors of an open safetensors file."""
    names = file.keys()  # a handle is no dict
    views = {name: file.get_slice(name) for name in names}
    return {
        name: Stored(
            tuple(view.get_shape()), view.get_dtype(), functools.partial(file.get_tensor, name)
        )
        for name, view in views.items()
    }


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_floats(where: str, found: dict[str, Stored]) -> None:
    for name, tensor in found.items():
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"{where}: {name} is stored as {tensor.dtype}, expected F32, F16 or BF16; "
                "give a model that is not quantised"
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
    folder: str | os.PathLike,
    params: Any,
    *,
    config: dict,
    file_name: str,
    dtype: Any = None,
) -> None:
    """Writes a model's folder: config.json and safetensors.

    Args:
      folder: replaced as a whole if it is an earlier model.
      params: tree of arrays. If they are spread over several hosts, all must call this; the first
        one writes.
      config: content of config.json.
      file_name: e.g. diffusion_pytorch_model.safetensors.
      dtype: to cast to, or None.
    Raises: UserError for values that are not finite in `dtype`, or a folder that cannot be written.
    """
    params = whole_on_each_host(params)
    if jax.process_index() == 0:
        with folders.new_folder(folder) as partial:
            write_model(partial, params, config=config, file_name=file_name, dtype=dtype)


def whole_on_each_host(params: Any) -> Any:
    """The tree with its leaves whole that are spread over hosts; all must call this."""
    return jax.tree.map(_whole_leaf, params)


def _whole_leaf(leaf: Any) -> Any:
    if getattr(leaf, "is_fully_addressable", True):
        return leaf
    return multihost_utils.process_allgather(leaf, True)


def write_model(
    folder: Path,
    params: Any,
    *,
    config: dict,
    file_name: str,
    dtype: Any = None,
) -> None:
    """As `save`, of params on this host, into a folder that is there and empty."""
    folders.write_object(folder / "config.json", config)
    write_tensors(folder, _tensors(params), file_name, dtype)


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    file_name: str,
    dtype: Any = None,
) -> None:
    """Writes safetensors, in shards with an index where they are large.

    Args:
      folder: has its config.json already.
      tensors: by name, in PyTorch's names and layout; one is asked for at a time.
      file_name: e.g. model.safetensors, or model.fp16.safetensors for the variant.
      dtype: to cast floats to, or None.
    Raises: UserError for values that are not finite in `dtype`.
    """
    shards, total = [], 0
    for shard in _packed(tensors, dtype):
        file = folder / str(len(shards))
        safetensors.numpy.save_file(shard, file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors keeps others from reading it
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "0").rename(folder / file_name)
        return
    weight_map = {}
    for i, keys in enumerate(shards):
        name = f"{Path(file_name).stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / str(i)).rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    stem, *variant = Path(file_name).stem.split(".")
    index = ".".join([stem, "safetensors", "index", *variant, "json"])
    folders.write_object(
        folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_file(
    path: Path,
    tensors: Mapping[str, Stored],
    dtype: Any,
    *,
    exact: Collection[str] = (),
    metadata: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Writes one safetensors file of any size; host memory holds one tensor.

    Args:
      path: of a file that is not there yet.
      tensors: by name.
      dtype: of all floats; whole numbers stay as they are.
      exact: names of floats that stay float32.
      metadata: of the file's header.
    Raises: UserError for values that are not finite in `dtype`.
    """
    dtype = np.dtype(dtype)
    as_stored = {name: t.dtype in _INTEGERS or name in exact for name, t in tensors.items()}
    sizes = {"I64": 8, "I32": 4, "F32": 4}
    # Larger numbers first, so that each lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: (not as_stored[name], name))
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name in names:
        tensor = tensors[name]
        kind = tensor.dtype if as_stored[name] else _NAMES[dtype.name]
        size = sizes[kind] if as_stored[name] else dtype.itemsize
        begin, end = end, end + size * math.prod(tensor.shape)
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = tensors[name].read()
            if not as_stored[name]:
                with np.errstate(over="ignore"):  # reported by the next line
                    array = array.astype(dtype, copy=False)
                _check_finite("cannot write the weights", name, array)
            file.write(np.ascontiguousarray(array).tobytes())


def check_new_file(file: Path) -> None:
    """Raises: UserError for a name that is taken, or none of a safetensors file."""
    if file.suffix != ".safetensors":
        raise UserError(f"--output={file}, expected a name that ends in .safetensors; give one")
    if file.exists():
        raise UserError(f"{file} is there, so it is not overwritten; give another output")


def write_new_file(
    file: Path,
    tensors: Mapping[str, Stored],
    dtype: Any,
    **more: Any,
) -> None:
    """As `write_file`, a file that is whole or not there, in a folder that is made if needed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as partial:
            write_file(partial, tensors, dtype, **more)
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({error.strerror}); give an output on a disk with room"
        ) from None


def _packed(
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: Any,
) -> Iterator[dict[str, np.ndarray]]:
    """Groups of tensors, floats cast to `dtype`, of at most MAX_SHARD bytes.

    Each group is emptied when the next is asked for.
    """
    held, size = {}, 0
    for key, tensor in tensors:
        if jnp.issubdtype(tensor.dtype, jnp.floating):
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
