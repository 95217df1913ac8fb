# SPDX-License-Identifier: Apache-2.0
"""A config.json as a frozen dataclass, and what is said of values that the ports do not have."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from di_star_jax.errors import UserError

Config = TypeVar("Config")


def from_json(
    cls: type[Config],
    config: Mapping[str, Any],
    fixed: Mapping[str, Any],
    *,
    file: str,
    advice: str = "",
) -> Config:
    """`cls` of the fields that it shares with a parsed config.json, its defaults for the others.

    Args:
      cls: a dataclass; lists become tuples.
      config: the parsed file.
      fixed: fields with the one value that the port implements, which a file may also leave out.
      file: what to call the file in an error; advice, what to add to it.
    Raises: UserError for another value of a fixed field.
    """
    for field, only in fixed.items():
        if config.get(field, only) != only:
            raise UserError(
                f"{file} has {field}={config[field]!r}, the port implements {only!r} only{advice}"
            )
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.items()
            if name in known
        }
    )


def check_class(
    config: Mapping[str, Any],
    expected: str,
    advice: str,
) -> None:
    """Raises: UserError where a config.json of diffusers is of another class."""
    name = config.get("_class_name", expected)
    if name != expected:
        raise UserError(
            f"wrong architecture: config.json is of a {name}, expected {expected}; {advice}"
        )


def check_divides(
    built: Any,
    field: str,
    by: str,
    file: str,
) -> None:
    """Raises: UserError where the field `by` of a config does not divide its field `field`."""
    size, parts = getattr(built, field), getattr(built, by)
    if size % parts:
        raise UserError(
            f"{file} has {field}={size}, which is not divisible by {by}={parts}; change one of them"
        )
