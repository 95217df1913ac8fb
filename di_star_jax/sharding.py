# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: a ('data', 'fsdp') mesh, parameters split over 'fsdp', the batch over both."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from di_star_jax.config import UserError, mesh_shape

SMALL = 2**16  # elements; below this, splitting a leaf costs more than it saves
LARGE = 2**18  # elements, 1 MB in float32; above this, a leaf that cannot be split is refused


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over all devices.

    Args:
      data: copies of the parameters; -1 is what is left.
      fsdp: devices over which one copy is split; -1 is what is left.
    Raises: UserError unless data * fsdp is the number of devices.
    """
    # Auto: XLA propagates the shardings through the models, which do not mention them.
    return jax.make_mesh(mesh_shape(data, fsdp, jax.device_count()), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _spec(path: tuple, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest axis that `fsdp` divides, the last of equals; small leaves stay whole."""
    if fsdp == 1 or math.prod(shape) < SMALL:
        return PartitionSpec()
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not axes and math.prod(shape) > LARGE:
        raise UserError(f"mesh.fsdp={fsdp} divides no axis of {jax.tree_util.keystr(path, simple=True, separator='.')} "
                        f"with shape {shape}; use a power of two, and mesh.data for the other devices")
    if not axes:
        return PartitionSpec()
    # The first of three or more may be the depth of scanned blocks: split there, a block would live on one device.
    best = max(axes, key=lambda axis: (axis > 0 or len(shape) < 3, shape[axis], axis))
    return PartitionSpec(*(("fsdp" if axis == best else None) for axis in range(len(shape))))


def params_sharding(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A NamedSharding for each leaf; moments have their parameters' shapes and so their shardings.

    Args: mesh with an axis 'fsdp'; tree of arrays or `jax.ShapeDtypeStruct`. Returns: a tree like it.
    Raises: UserError where a leaf over 1 MB cannot be split.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, np.shape(leaf), fsdp)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
