# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` at the end, or vanishes after an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path) -> dict:
    """{} where there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_text(file: Path, text: str) -> None:
    """Writes a file that is never seen half written."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def digest_of(file: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
