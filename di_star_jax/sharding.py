# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: a ('data', 'fsdp') mesh, parameters split over 'fsdp', the batch over both."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from di_star_jax.config import mesh_shape

SMALL = 2**16  # elements; below this, splitting a leaf costs more than it saves


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh over all devices.

    Args:
      data: copies of the parameters; -1 is what is left.
      fsdp: devices over which one copy is split; -1 is what is left.
    Raises: UserError unless data * fsdp is the number of devices.
    """
    # Auto: XLA propagates the shardings through the models, which do not mention them.
    return jax.make_mesh(mesh_shape(data, fsdp, jax.device_count()), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest axis that `fsdp` divides, the last of equals; small leaves stay whole."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not axes:
        return PartitionSpec()
    best = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(("fsdp" if axis == best else None) for axis in range(len(shape))))


def params_sharding(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A NamedSharding for each leaf; moments have their parameters' shapes and so their shardings.

    Args: mesh with an axis 'fsdp'; tree of arrays or `jax.ShapeDtypeStruct`. Returns: a tree like it.
    """
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(np.shape(leaf), fsdp)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
