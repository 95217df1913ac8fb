# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the frozen matrices of a denoiser.

y = x W + (alpha / r) (x A) B, with A [in, r] and B [r, out]; a convolution's A has its window, [kh,
kw, in, r], and its B none. In stacked blocks both have the stack's leading axis. A network's
parameters are then `base | learnt`: the tree that it has without adapters, and beside it, under
ADAPTERS, a tree of {"a", "b"} by the same path. What learns is the second alone: W is closed over,
never differentiated, and so no gradient of its is computed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from di_star_jax.errors import UserError
from di_star_jax.models import int8
from di_star_jax.models.layers import Adapter

ADAPTERS = "lora"  # of a tree of parameters, beside its modules
FROZEN = "frozen_lora"  # likewise, of adapters that are part of the base; their scale is in B
Path = tuple[str | int, ...]  # of a module


class Lora(NamedTuple):
    """What learns in place of whole networks.

    targets: keys of TARGETS. generator, assistant: whether of these only adapters learn.
    int8: whether the matrices beside them are held in 8 bits. frozen_rank: of adapters that the
    generator's base is made of beside the reference; 0 for none.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    generator: bool = True
    assistant: bool = True
    int8: bool = False
    frozen_rank: int = 0

    @property
    def scale(self) -> float:
        """Of the adapters' product."""
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether of a network only adapters learn. Args: a field of the training state."""
        return self.assistant if name == "assistant" else self.generator


def _projects(path: Path) -> bool:
    into = "attentions" in path and path[-1] in ("proj_in", "proj_out")
    return into or "caption_projection" in path


def _convolves(path: Path) -> bool:
    of_resnet = "resnets" in path and str(path[-1]).startswith("conv")
    return of_resnet or "downsamplers" in path or "upsamplers" in path


# Modules by their path: those of the transformers' attention (of pixels and of text) and
# feed-forward, the maps into and out of a transformer (PixArt's: of the captions), and the
# convolutions of resnets and between levels.
TARGETS: dict[str, Callable[[Path], bool]] = {
    "attention": lambda path: "attn1" in path or "attn2" in path,
    "feed_forward": lambda path: "ff" in path,
    "projections": _projects,
    "convolutions": _convolves,
}


def targeted(params: dict, targets: tuple[str, ...]) -> Iterator[tuple[Path, Any]]:
    """(path of a module, its kernel) of those that get adapters."""
    for (*module, name), leaf in traverse_util.flatten_dict(params).items():
        path = tuple(module)
        if name == "kernel" and any(TARGETS[target](path) for target in targets):
            yield path, leaf


def _fan_in(kernel_or_a: Any) -> int:
    """Numbers that one output is made of. Four axes are a convolution's, three a stack's."""
    shape = kernel_or_a.shape
    window = shape[0] * shape[1] if len(shape) == 4 else 1
    return window * shape[-2]


def abstract(params: dict, lora: Lora) -> dict:
    """The adapters' shapes, {ADAPTERS: tree}, float32.

    Args: params, of a denoiser without adapters; may be abstract.
    Raises: UserError for a rank above the smallest matrix, and targets that are not there.
    """
    found = {}
    for path, kernel in targeted(params, lora.targets):
        *lead, c_in, c_out = kernel.shape
        most = min(_fan_in(kernel), c_out)
        if lora.rank > most:
            raise UserError(
                f"lora.rank={lora.rank} is more than {'.'.join(map(str, path))}, a matrix of "
                f"{_fan_in(kernel)} x {c_out}, can have; use {most} or less, or other lora.targets"
            )
        of_stack = lead if len(lead) == 1 else []
        found[(*path, "a")] = (*lead, c_in, lora.rank)
        found[(*path, "b")] = (*of_stack, lora.rank, c_out)
    if not found:
        raise UserError(
            f"lora.targets={lora.targets} name nothing that this denoiser has; use attention, "
            "feed_forward and projections"
        )
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in found.items()}
    return {ADAPTERS: traverse_util.unflatten_dict(shapes)}


def init(key: jax.Array, shapes: dict) -> dict:
    """First values: A uniform in +-1 / sqrt(fan in), as PEFT's; B zero, so that nothing changes.

    Args: shapes, of `abstract`.
    """
    flat = traverse_util.flatten_dict(shapes)
    values = {}
    for i, (path, leaf) in enumerate(flat.items()):
        values[path] = jnp.zeros(leaf.shape)
        if path[-1] == "a":
            bound = _fan_in(leaf) ** -0.5
            one = jax.random.fold_in(key, i)
            values[path] = jax.random.uniform(one, leaf.shape, minval=-bound, maxval=bound)
    return traverse_util.unflatten_dict(values)


def bind(
    graphdef: nnx.GraphDef,
    lora: Lora | None,
    params: dict,
) -> nnx.Module:
    """The network of these parameters, with adapters and scales of int8.py where they have any."""
    beside = (ADAPTERS, FROZEN, int8.SCALES)
    base = {name: part for name, part in params.items() if name not in beside}
    network = nnx.merge(graphdef, base)
    if lora and ADAPTERS in params:
        _attach(network, params[ADAPTERS], "adapter", lora.rank, lora.scale)
    if lora and FROZEN in params:
        _attach(network, params[FROZEN], "frozen_adapter", lora.frozen_rank, 1.0)
    int8.attach(network, params.get(int8.SCALES, {}))
    return network


def _attach(
    module: nnx.Module,
    adapters: dict,
    name: str,
    *of_all: Any,
) -> None:
    """Hands each layer below a module the adapter of its path.

    Args: name, of the layer's attribute; of_all, rank and scale.
    """
    if adapters.keys() == {"a", "b"}:
        setattr(module, name, Adapter(adapters["a"], adapters["b"], *of_all))
        return
    for part, inside in adapters.items():
        inner = module[part] if isinstance(part, int) else getattr(module, part)
        _attach(inner, inside, name, *of_all)


def silenced(base: dict, learnt: dict) -> dict:
    """Parameters with adapters like those that are learnt, all zero: they add nothing.

    With them a network that has none can be traced as one that has. They are in the precision of
    the base, in which it computes.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(base)}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    dtype = min(floats, key=lambda dtype: dtype.itemsize)
    return base | jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), learnt)


def modules(learnt: dict, alpha: float) -> dict[Path, tuple[Any, Any, float]]:
    """{path of a module: (A, B, alpha)}, as files of adapters have them.

    Args: learnt, {ADAPTERS: tree}.
    """
    flat = traverse_util.flatten_dict(learnt[ADAPTERS])
    paths = [path[:-1] for path in flat if path[-1] == "a"]
    return {path: (flat[(*path, "a")], flat[(*path, "b")], alpha) for path in paths}


def merged(
    base: dict,
    learnt: dict,
    lora: Lora,
) -> dict:
    """The whole network without adapters: W + (alpha / r) A B, in W's dtype.

    Args: trees of NumPy arrays, or both of JAX's.
    """
    flat = traverse_util.flatten_dict(base)
    del base  # where nobody else holds it, each matrix is freed once it is merged
    for path, (a, b, _) in modules(learnt, lora.alpha).items():
        kernel = flat[(*path, "kernel")]
        with jax.default_matmul_precision("highest"):
            whole = kernel.astype(a.dtype) + lora.scale * (a @ b)
        flat[(*path, "kernel")] = whole.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)
