# SPDX-License-Identifier: Apache-2.0
"""A reward that is a function in a user's own file, given as FILE:FUNCTION.

    def brightness(images):              # [B, H, W, 3] in [-1, 1] -> [B]
        return images.mean((1, 2, 3))

Text cannot enter a compiled step. A function of the prompt too, `FUNCTION(images, prompts)`, gets
what `tokenize(prompts)` of the same file makes of them: a list of B texts -> arrays of B rows.
"""

import importlib.util
import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from di_star_jax.errors import UserError, suggest
from di_star_jax.rewards.reward import Entry, Reward, Tokenize, no_prompts
from di_star_jax.storage import buckets

_PIXELS = 512  # of the images of the trial


def is_custom(text: str) -> bool:
    """Whether a reward's name is FILE:FUNCTION."""
    return bool(re.fullmatch(r".+:\w+", text))


def name_of(spec: str) -> str:
    """The function's name, which is the reward's. Args: spec, FILE:FUNCTION."""
    return spec.rpartition(":")[2]


def entry(spec: str, pixels: int = _PIXELS) -> Entry:
    """The entry of a function, loaded from its file and tried without computing anything.

    Args: spec, FILE:FUNCTION; pixels, a side of the images it will see.
    Raises: UserError for a file or function that is not there, and for a function that does not
      turn images into one number each, or has no gradient.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise UserError(f"reward {spec!r}, expected FILE:FUNCTION such as my.py:brightness")
    path = buckets.local(file)
    if not path.is_file():
        raise UserError(f"reward {spec}: no file {path}; give FILE:FUNCTION with a file's path")
    module = _module(spec, path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(
            f"reward {spec}: {path} has no function {name}; it has {', '.join(known) or 'none'}"
            f"{suggest(name, known)}"
        )
    tokenize = getattr(module, "tokenize", None)
    score = _score(spec, function, tokenize)
    _try(spec, score, tokenize or no_prompts, pixels)
    reward = _reward(score, tokenize or no_prompts)
    return Entry(
        name,
        load=lambda folder, options: reward,
        abstract=lambda config, options: reward,
        tokenizer=lambda folder, tokenizer: reward.tokenize,
        file=str(path.absolute()),
    )


def _module(spec: str, path: Path) -> types.ModuleType:
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None:
        raise UserError(f"reward {spec}: {path} is no Python file; its name ends in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does
        raise _broken(spec, "the file fails", error) from None
    return module


def _broken(
    spec: str,
    what: str,
    error: Exception,
) -> UserError:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"reward {spec}: {what} with {type(error).__name__}: {text}; mend it")


def _score(
    spec: str,
    function: Callable,
    tokenize: Tokenize | None,
) -> Callable:
    """(images, prompts) -> [B] float32."""
    parameters = inspect.signature(function).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty]
    if len(needed) == 1:
        return lambda images, prompts: function(images)
    if len(needed) != 2:
        raise UserError(
            f"reward {spec}: the function has {len(needed)} parameters, expected (images) or "
            "(images, prompts)"
        )
    if tokenize is None:
        raise UserError(
            f"reward {spec}: the function takes prompts, but its file has no tokenize(prompts); "
            "define one that turns a list of texts into arrays, for text cannot enter a compiled "
            "step"
        )
    return function


def _try(
    spec: str,
    score: Callable,
    tokenize: Tokenize,
    pixels: int,
) -> None:
    """Traces the function and its gradient on two images. Raises: UserError."""
    images = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
    try:
        prompts = tokenize(["a cat", "two red circles"])
        rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(prompts)}
    except Exception as error:  # whatever a user's function does
        raise _broken(spec, "tokenize of two texts ends", error) from None
    if rows != {(2,)}:
        raise UserError(f"reward {spec}: tokenize of two texts must make arrays of two rows")
    try:
        found = jax.eval_shape(score, images, prompts)
    except Exception as error:
        raise _broken(spec, f"a trial on images {list(images.shape)} ends", error) from None
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
    if shape != (2,) or not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(
            f"reward {spec}: of images {list(images.shape)} it makes {_said(found)}, expected a "
            "number for each image: float of shape [2]"
        )
    try:
        jax.eval_shape(jax.grad(lambda images: score(images, prompts).sum()), images)
    except Exception as error:
        raise _broken(spec, "the gradient to the images ends", error) from None


def _said(found: object) -> str:
    if hasattr(found, "shape"):
        return f"{found.dtype} of shape {list(found.shape)}"
    return type(found).__name__


def _reward(score: Callable, tokenize: Tokenize) -> Reward:
    def reward(params, images, prompts):
        del params
        return score(images.astype(jnp.float32), prompts).astype(jnp.float32)

    def evaluate(params, images, prompts):
        rounded = jnp.floor(jnp.clip((images + 1) / 2, 0, 1) * 255 + 0.5) / 255  # as a file has it
        return reward(params, 2 * rounded - 1, prompts)

    rows = jax.tree.map(np.asarray, tokenize([""]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), rows)
    return Reward({}, reward, evaluate, tokenize, shapes)
