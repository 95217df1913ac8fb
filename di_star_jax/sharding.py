# SPDX-License-Identifier: Apache-2.0
"""Where arrays live, and what crosses chips: a ('data', 'fsdp', 'context') mesh.

The batch is split over data and fsdp, parameters and moments over fsdp and context, the rows of
latents and images over context. What costs memory runs per device (`on_each`, a shard_map): each
chip sees its part of the batch, and the layers call the functions below, which are the only
collectives there are. XLA's own partitioner, left to itself, follows the weights' split instead of
the batch's, and then a v5e:4x4 slice holds sixteen images' activations on every chip. Outside of
`on_each`, on one device or under plain jit, all of these functions do nothing.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from di_star_jax.errors import UserError

AXES = ("data", "fsdp", "context")
BATCH = ("data", "fsdp")  # split the first axis of prompts, noise, latents and images
PARAMS = ("fsdp", "context")  # split parameters, their gradients and moments
SMALL = 2**16  # elements; below this, splitting a leaf costs more than it saves
LARGE = 2**18  # elements, 1 MB in float32; above this, a leaf that cannot be split is refused


def make_mesh(
    data: int,
    fsdp: int,
    context: int = 1,
    *,
    devices=None,
) -> Mesh:
    """A mesh over all devices. Where they make up several TPU slices, data goes over these.

    Args:
      data: copies of the parameters; -1 is what is left.
      fsdp: devices over which one copy and its part of the batch are split; -1 is what is left.
      context: devices that share one image, by rows.
      devices: those to use; all there are if None.
    Raises: UserError unless data * fsdp * context is the number of devices, and for slices that
      fsdp * context does not fit in or that differ in size.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(data, fsdp, context, len(devices))
    sizes = slice_sizes(devices)
    if len(sizes) == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    check_slices(shape, sizes)
    placed = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // len(sizes), *shape[1:]),
        (len(sizes), 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def slice_sizes(devices: Sequence[jax.Device]) -> list[int]:
    """Devices in each TPU slice; between slices is a network that is slower by a hundred times.

    Other devices count as one slice: a GPU's partition says nothing of its network.
    """
    if devices[0].platform != "tpu":
        return [len(devices)]
    return list(Counter(getattr(device, "slice_index", 0) for device in devices).values())


def check_slices(shape: tuple[int, int, int], sizes: list[int]) -> None:
    """Refuses a mesh that would gather parameters between slices.

    Args: shape, of the mesh; sizes, devices of each slice. Raises: UserError.
    """
    if len(set(sizes)) > 1:
        raise UserError(
            f"the slices have {', '.join(map(str, sizes))} devices, expected slices of one size; "
            "start the run on equal ones"
        )
    data, fsdp, context = shape
    if data % len(sizes):
        raise UserError(
            f"mesh fsdp={fsdp} x context={context} does not fit in a slice of {sizes[0]} devices, "
            f"of which there are {len(sizes)}: only mesh.data={data} goes over the network between "
            f"them; set mesh.data=-1 and mesh.fsdp to a divisor of {sizes[0] // context or 1}"
        )


def mesh_shape(
    data: int,
    fsdp: int,
    context: int,
    device_count: int,
) -> tuple[int, int, int]:
    """(data, fsdp, context) of the mesh, with -1 filled in.

    Raises: UserError where they do not make up `device_count`.
    """
    if data == -1 and fsdp == -1:
        raise UserError(
            "mesh.data=-1 and mesh.fsdp=-1: expected one of them at most; set mesh.fsdp to a number"
        )
    for name, devices in (("data", data), ("fsdp", fsdp), ("context", context)):
        if devices < 1 and (devices != -1 or name == "context"):
            raise UserError(
                f"mesh.{name}={devices}, expected 1 or more, or -1 (not context) for what is left; "
                "use 1"
            )
    given = f"mesh data={data} x fsdp={fsdp}" + (f" x context={context}" if context > 1 else "")
    if data == -1:
        data = device_count // (fsdp * context)
    if fsdp == -1:
        fsdp = device_count // (data * context)
    if data * fsdp * context != device_count:
        divisors = " or ".join(
            str(n) for n in range(1, device_count + 1) if device_count % (n * context) == 0
        )
        raise UserError(
            f"{given} does not make up the {device_count} devices; set mesh.data=-1 and mesh.fsdp "
            f"to {divisors or 'less, or mesh.context=1'}"
        )
    return data, fsdp, context


def _spec(
    path: tuple,
    shape: tuple[int, ...],
    parts: int,
) -> PartitionSpec:
    """Splits the largest axis that `parts` divides, the last of equals; small leaves stay whole."""
    if parts == 1 or math.prod(shape) < SMALL:
        return PartitionSpec()
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not axes and math.prod(shape) > LARGE:
        raise UserError(
            f"mesh.fsdp x mesh.context = {parts} divides no axis of "
            f"{jax.tree_util.keystr(path, simple=True, separator='.')} with shape {shape}; use a "
            "power of two, and mesh.data for the other devices"
        )
    if not axes:
        return PartitionSpec()
    # The first of three or more may be the depth of scanned blocks: split there, a block would live
    # on one device.
    best = max(axes, key=lambda axis: (axis > 0 or len(shape) < 3, shape[axis], axis))
    return PartitionSpec(*(PARAMS if axis == best else None for axis in range(len(shape))))


def params_sharding(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A NamedSharding for each leaf; moments have their parameters' shapes and so their shardings.

    Args: mesh as of `make_mesh`; tree of arrays or `jax.ShapeDtypeStruct`. Returns: a tree like it.
    Raises: UserError where a leaf over 1 MB cannot be split.
    """
    parts = math.prod(mesh.shape[axis] for axis in PARAMS)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, np.shape(leaf), parts)), tree
    )


def params_spec(mesh: Mesh, tree: Any) -> Any:
    """`params_sharding` as PartitionSpecs, for `on_each`."""
    return jax.tree.map(lambda sharding: sharding.spec, params_sharding(mesh, tree))


def batch_spec(axis: int = 0) -> PartitionSpec:
    """Splits one axis, the batch, over all devices that do not share images."""
    return PartitionSpec(*[None] * axis, BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices that do not share images."""
    return NamedSharding(mesh, batch_spec())


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def abstract(
    tree: Any,
    shardings: Any = None,
    dtype: Any = None,
) -> Any:
    """A tree of arrays, or of their shapes, as `jax.ShapeDtypeStruct`s.

    Args:
      shardings: one for each leaf, or for each subtree; None says nothing of where they are.
      dtype: of all leaves; None keeps theirs.
    """

    def leaf(x: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    each = jax.tree.broadcast(shardings, tree, is_leaf=lambda x: x is None)
    return jax.tree.map(leaf, tree, each)


def local_rows(
    mesh: Mesh,
    batch_size: int,
    devices: list | None = None,
) -> list[int]:
    """The rows of a batch that some devices hold, ascending, each once.

    The devices of a context hold the same rows, and may belong to several processes.

    Args: devices, those of this process if None.
    """
    held = batch_sharding(mesh).devices_indices_map((batch_size,))
    ours = [held[device][0] for device in devices or jax.local_devices() if device in held]
    return sorted({row for rows in ours for row in range(*rows.indices(batch_size))})


def place_batch(
    tree: Any,
    mesh: Mesh,
    batch_size: int,
) -> Any:
    """Arrays of a whole batch, split as `batch_sharding` says, from what each process has of it.

    Args: tree of arrays [rows, ...], the process's `local_rows` or all rows; batch_size, of all
      processes together.
    Returns: a tree of global arrays [batch_size, ...].
    """

    def place(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, shape)

    return jax.tree.map(place, tree)


def on_each(
    mesh: Mesh,
    fn: Callable,
    in_specs: Any,
    out_specs: Any,
) -> Callable:
    """`fn` run by each device on its parts of the arguments; its results are parts too."""
    # check_vma=False: gradients are summed by `sum_gradients`, once, and not wherever a small leaf
    # is used.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# ---- inside `on_each` ----


def size(*axes: str) -> int:
    """Devices along axes of the mesh that this code runs on; 1 outside of `on_each`."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.manual_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
    part: jax.Array,
    axis: int,
    dtype: Any,
    stored: Any,
) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), PARAMS, axis=axis, tiled=True)


def _gather_fwd(
    part: jax.Array,
    axis: int,
    dtype: Any,
    stored: Any,
) -> tuple[jax.Array, None]:
    return _gather(part, axis, dtype, stored), None


def _gather_bwd(
    axis: int,
    dtype: Any,
    stored: Any,
    _: None,
    grad: jax.Array,
) -> tuple[jax.Array]:
    # Each device's share is rounded to the compute dtype, and crosses as it is; their sum, which
    # need not be, is made where it is kept. A sum on the way would have to cross in float32, and on
    # less than a whole torus of TPUs twice: XLA makes an all-reduce of a reduce-scatter there.
    parts = grad.shape[axis] // size(*PARAMS)
    shares = jnp.reshape(grad, (*grad.shape[:axis], -1, parts, *grad.shape[axis + 1 :]))
    shares = jax.lax.all_to_all(shares, PARAMS, split_axis=axis, concat_axis=axis)
    return (shares.sum(axis, dtype=jnp.float32).astype(stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather_param(
    part: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """A parameter of a known full shape, in the compute dtype, from the devices that share it.

    Its gradient is that of the device's own part, summed over those devices.
    """
    split = [axis for axis, full in enumerate(shape) if part.shape[axis] != full]
    return _gather(part, split[0], dtype, part.dtype) if split else part.astype(dtype)


def sum_gradients(grads: Any, specs: Any) -> Any:
    """Sums the devices' gradients. `gather_param` has summed those of split leaves already.

    Args: grads, specs: trees of the devices' parts and their PartitionSpecs.
    """
    if size(*AXES) == 1:
        return grads
    return jax.tree.map(
        lambda grad, spec: jax.lax.psum(grad, "data" if any(spec) else AXES), grads, specs
    )


def _own(x: jax.Array) -> jax.Array:
    """This device's rows of a [B, H, W, C] that is the same on all devices of a context."""
    rows = x.shape[1] // size("context")
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("context") * rows, rows, axis=1)


def _all(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "context", axis=1, tiled=True)


_split, _join = jax.custom_vjp(_own), jax.custom_vjp(_all)
_split.defvjp(lambda x: (_own(x), None), lambda _, grad: (_all(grad),))
_join.defvjp(lambda x: (_all(x), None), lambda _, grad: (_own(grad),))


def split_rows(x: jax.Array) -> jax.Array:
    """The device's own rows, [B, H / context, W, C], of [B, H, W, C] that all of a context have."""
    return _split(x) if size("context") > 1 else x


def join_rows(x: jax.Array) -> jax.Array:
    """The reverse of `split_rows`; what follows, every device of the context computes alike."""
    return _join(x) if size("context") > 1 else x


def all_rows(x: jax.Array) -> jax.Array:
    """[B, N, ...] own tokens -> [B, N * context, ...] all of them.

    Unlike after `join_rows`, what follows differs from device to device.
    """
    return _all(x) if size("context") > 1 else x


def mean_over_rows(x: jax.Array) -> jax.Array:
    """The mean over a context's devices of their figures."""
    return jax.lax.pmean(x, "context") if size("context") > 1 else x


def with_halo(
    x: jax.Array,
    above: int,
    below: int,
) -> jax.Array:
    """[B, H, W, C] -> [B, above + H + below, W, C], with rows of the neighbouring devices.

    At the picture's borders they are zeros.
    """
    n = size("context")
    if n == 1:
        return jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
    parts = [x]
    if above:
        downwards = [(i, i + 1) for i in range(n - 1)]
        parts.insert(0, jax.lax.ppermute(x[:, -above:], "context", downwards))
    if below:
        upwards = [(i + 1, i) for i in range(n - 1)]
        parts.append(jax.lax.ppermute(x[:, :below], "context", upwards))
    return jnp.concatenate(parts, axis=1)
