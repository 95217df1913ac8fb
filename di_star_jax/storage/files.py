# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def expand(path: str | os.PathLike) -> Path:
    """A path as a user gives it: ~ is the home folder, also where no shell has read it."""
    return Path(path).expanduser()


def shown(path: str | os.PathLike) -> str:
    """A path as pages and tables name it, which others read: below the current folder, else its
    name alone. Names on the Hub and relative paths stay as they are.
    """
    path = Path(path)
    if not path.is_absolute():
        return str(path)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def _partial(path: Path) -> Path:
    """A hidden name beside `path`, of this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` at the end, or vanishes after an error."""
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole`, a new folder to write in; what had the name `path` is gone at the end."""
    partial = _partial(path)
    old = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_json(file: Path) -> dict:
    """{} where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_text(file: Path, text: str) -> None:
    """Writes a file that is never seen half written."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def digest_of(file: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
