# SPDX-License-Identifier: Apache-2.0
"""A config file and what the command line says of it."""

import importlib.util
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from di_star_jax.errors import UserError, suggest

_RENAMED = {
    "compute.remat_unet": "compute.remat_denoiser",
    "eval.num_per_prompt": "eval.samples",
}
_PACKAGE = Path(__file__).parent
# An installed package has its configs inside, a checkout beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_EXPECTED = {
    bool: "True or False",
    int: "an integer, in digits alone",
    float: "a number",
    tuple: "values in brackets, such as (999,499)",
}


def names() -> list[str]:
    """Configs that `find` knows by name."""
    return sorted({path.stem for folder in _FOLDERS for path in _files(folder)})


def _files(folder: Path) -> list[Path]:
    is_ours = (folder / "sdxl.py").is_file()
    return list(folder.glob("*.py")) if is_ours else []


def find(name: str) -> Path:
    """The file of a config: a path, or the name of one that comes with the package.

    Raises: UserError where there is neither, which says where it looked.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in _FOLDERS:
        file = folder / f"{name}.py"
        if re.fullmatch(r"[\w-]+", name) and file in _files(folder):
            return file
    known = names()
    near = suggest(Path(name).stem, known)
    raise UserError(
        f"no config file {name} in {Path.cwd()}, and none of that name with the package: give a "
        f"path, or one of {', '.join(known)} (--config={known[0]} works from anywhere){near}"
    )


def load_module(path: str | Path) -> types.ModuleType:
    """Runs a config file. Raises: UserError where it cannot, or does not define get_config."""
    spec = importlib.util.spec_from_file_location("loaded_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does
        text = " ".join(f"{error or type(error).__name__}".split())
        raise UserError(f"{path}: {text}; mend the file, or see configs/sdxl.py") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: a config file defines get_config(), see configs/sdxl.py")
    return module


def load_config(name: str | Path, *preset: str) -> Any:
    """The ConfigDict of a config file, by path or name.

    Raises: UserError where there is no such file or preset, or where the file is broken.
    """
    path = find(str(name))
    module = load_module(path)
    try:
        return module.get_config(*preset)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file does
        text = " ".join(f"{error or type(error).__name__}".split())
        raise UserError(f"{path}: {text}; mend the file, or see configs/sdxl.py") from None


def fields(config) -> dict[str, Any]:
    """{dotted name: value} of all fields of a ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= {f"{name}.{inner}": v for inner, v in fields(value).items()}
        else:
            flat[name] = value
    return flat


def comments(source: str) -> dict[str, str]:
    """By field, the comment above it. Args: text of a config file."""
    found = {}
    above = []
    for line in source.splitlines():
        comment = re.fullmatch(r" +# (.*)", line)
        field = re.match(r" +config\.([\w.]+) = ", line)
        if comment:
            above.append(comment.group(1))
        elif field:
            found[field.group(1)] = " ".join(above)
        if not comment:
            above = []
    return found


def describe(name: str, *preset: str) -> str:
    """Presets and fields of a config, with defaults and comments, as --help prints them."""
    path = find(name)
    said = comments(path.read_text(encoding="utf-8"))
    base = path.with_name("sdxl.py")  # which the others change
    if base.is_file():
        said = comments(base.read_text(encoding="utf-8")) | said
    lines = []
    presets = getattr(load_module(path), "PRESETS", {})
    if presets:
        lines += [f"presets of {path}, as --config={name}:NAME"]
    for row, changes in presets.items():
        changed = ", ".join(f"{field}={value!r}" for field, value in changes.items())
        lines.append(f"  {row:<22} {changed or 'as the fields below have it'}")
    lines += ["", "fields, with their values in this config", ""]
    for field, value in fields(load_config(path, *preset)).items():
        lines.append(f"  --config.{field}={value!r}")
        lines += [f"      {said[field]}"] if said.get(field) else []
    return "\n".join(lines)


def overrides(argv: Sequence[str]) -> list[str]:
    """Dotted names of the fields that the command line sets."""
    found = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv)
    return [match.group(1) for match in found if match]


def given(argv: Sequence[str]) -> str | None:
    """What --config gives: FILE or FILE:PRESET."""
    for arg, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and name == "config":
            return (value if equals else following) or None
    return None


def with_file(argv: Sequence[str]) -> list[str]:
    """The command line with the path of the config's file first, where ml_collections wants it.

    Raises: UserError for a missing or broken file, and for a field that it does not have.
    """
    spec = given(argv)
    if spec is None:
        if overrides(argv):
            raise UserError(
                f"--config.{overrides(argv)[0]} without --config; give e.g. --config=shapes too"
            )
        return list(argv)
    name, *preset = spec.split(":", 1)
    path = find(name)
    known = fields(load_config(path, *preset))
    for field in overrides(argv):
        _check_field(field, known)
    rest = []
    skip = False
    for arg in argv[1:]:
        if not skip and arg.lstrip("-").partition("=")[0] != "config":
            rest.append(arg)
        skip = not skip and arg in ("-config", "--config")
    return [argv[0], f"--config={':'.join([str(path), *preset])}", *rest]


def _check_field(field: str, known: dict[str, Any]) -> None:
    if field in known:
        return
    inside = [name for name in known if name.startswith(f"{field}.")]
    if inside:
        raise UserError(
            f"--config.{field} is a section, not a field; set one of {', '.join(inside)}"
        )
    near = suggest(field, list(known)) or "; see --config=sdxl --help for all fields"
    if field in _RENAMED:
        near = f", now called {_RENAMED[field]}"
    elif field.startswith("reward."):
        near += "; a reward of your own is --config.reward.custom=FILE:FUNCTION"
    raise UserError(f"unknown config field {field}{near}")


def expected(spec: str, field: str) -> str:
    """What a field takes, in words. Args: spec, of --config."""
    name, *preset = spec.split(":", 1)
    return _EXPECTED.get(type(fields(load_config(name, *preset)).get(field)), "another value")
