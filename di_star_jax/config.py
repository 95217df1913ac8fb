# SPDX-License-Identifier: Apache-2.0
"""A config file and what the command line says of it."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from di_star_jax.errors import UserError, suggest

_RENAMED = {"eval.num_per_prompt": "eval.samples"}


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flags, with config errors turned into UserError.

    Those are a missing or broken file, an unknown field and a wrong type.
    """
    from absl import flags

    path = _config_path(argv)
    if path is None and _overrides(argv):
        raise UserError(
            f"--config.{_overrides(argv)[0]} without --config; give e.g. "
            "--config=configs/shapes.py first"
        )
    if path is not None and not os.path.isfile(path):
        raise UserError(f"no config file {path}; give e.g. --config=configs/shapes.py")
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"unknown flag --{error.flagname}{suggest(error.flagname, list(flags.FLAGS))}"
        ) from None
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv, error)) from None
    except (TypeError, ValueError, ImportError, SyntaxError) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}; mend the file, or see configs/sdxl.py"
        ) from None


def fields(config) -> dict[str, Any]:
    """{dotted name: value} of all fields of a ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= {f"{name}.{inner}": v for inner, v in fields(value).items()}
        else:
            flat[name] = value
    return flat


def load_config(path: str, *preset: str) -> Any:
    """The ConfigDict of a config file. Raises: UserError where there is no such file, or preset."""
    if not os.path.isfile(path):
        raise UserError(f"no config file {path}; give e.g. configs/shapes.py")
    spec = importlib.util.spec_from_file_location("loaded_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*preset)


def _overrides(argv: Sequence[str]) -> list[str]:
    """Dotted names of the fields that the command line sets."""
    return [
        arg.lstrip("-")[len("config.") :].split("=", 1)[0]
        for arg in argv
        if arg.lstrip("-").startswith("config.")
    ]


def _config_path(argv: Sequence[str]) -> str | None:
    """The file that --config gives, without the preset after the colon."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            return (value if equals else following).partition(":")[0] or None
    return None


def _unknown_field(argv: Sequence[str], error: Exception) -> str:
    """Names the field that the config file does not have, or passes on the file's own error."""
    path = _config_path(argv)
    try:
        known = list(fields(load_config(path)))
    except (AttributeError, KeyError):  # the file itself is at fault
        return f"{path}: {error}; a config file defines get_config(), see configs/sdxl.py"
    for name in _overrides(argv):
        if name not in known:
            near = suggest(name, known) or "; see configs/sdxl.py for all fields"
            near = f", now called {_RENAMED[name]}" if name in _RENAMED else near
            return f"unknown config field {name}{near}"
    return f"{path}: {error}"
