# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from di_star_jax.errors import UserError

MARKER = "di_star_jax.json"  # lists what was written into a folder: that alone is replaced
_SAMPLE, _SAMPLES = 2**16, 32  # bytes of a file that are read at a time, and how often


def expand(path: str | os.PathLike) -> Path:
    """A path on this machine as a user gives it: ~ is the home folder, also where no shell has
    read it. Raises: UserError for an address.
    """
    if re.match(r"\w\w+:/", str(path)):
        scheme = str(path).partition(":")[0]
        if "://" in str(path):
            raise UserError(f"{path} is an address, expected a path on this machine; give one")
        raise UserError(f"{path} has one slash behind {scheme}:, expected {scheme}://BUCKET/PATH")
    return Path(path).expanduser()


def user_cache() -> Path:
    """The folder of this user for what can be had again."""
    of_user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(of_user) / "di_star_jax"


def staging(kind: str) -> Path:
    """A new folder of this process in the user's cache; those of processes that were killed go."""
    root = user_cache() / kind
    root.mkdir(parents=True, exist_ok=True)
    for path in root.iterdir():
        pid = path.name.partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))


def shown(path: str | os.PathLike) -> str:
    """A path as pages and tables name it, which others read: below the current folder, else its
    name alone. Names on the Hub, addresses and relative paths stay as they are.
    """
    if "://" in str(path):
        return str(path)
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


def writable_folder(path: str, option: str) -> Path:
    """A folder to write in, made where it is missing; ~ is the home folder.

    Tried, not predicted: a file system has many ways to refuse.

    Args: path; option, by which it was given.
    Raises: UserError where it cannot be made or written.
    """
    if "://" in path:
        raise UserError(f"{option}={path}, expected a folder on this machine; give one")
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder that is filled and then gets its name is how all is saved that must be whole.
        with tempfile.TemporaryDirectory(prefix=".try", dir=folder) as tried:
            (Path(tried) / "a").mkdir()
            (Path(tried) / "a" / "file").write_text("tried", encoding="utf-8")
            _try_rename(Path(tried) / "a")
        return folder
    except (OSError, ValueError) as error:  # a NUL byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        reason = "it is a file" if os.path.isfile(folder) else reason
        raise UserError(
            f"{option}={_short(path)} cannot be written ({reason}); give another folder"
        ) from None


def _try_rename(folder: Path) -> None:
    """Raises: OSError with a reason that a user can act on."""
    try:
        folder.rename(folder.with_name("b"))
    except OSError as error:
        reason = f"a folder cannot be renamed there: {error.strerror}"
        advice = "of a mounted bucket give the address, gs://BUCKET/PATH"
        raise OSError(error.errno, f"{reason}; {advice}") from None


def _short(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:60]}...{path[-30:]}"


def read_json(file: Path) -> dict:
    """{} where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_text(file: Path, text: str) -> None:
    """Writes a file that is never seen half written."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def digest_of(file: Path) -> str:
    """sha256 of a file, of any size."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def listing(folder: Path) -> dict[str, str | int]:
    """All files in a folder by name, but for the marker: digests, of weights only the size."""
    found = {}
    for where, inner, files in os.walk(folder):
        links = [name for name in inner if (Path(where) / name).is_symlink()]
        for path in (Path(where) / name for name in sorted(files + links)):
            found[path.relative_to(folder).as_posix()] = _content(path)
    found.pop(MARKER, None)
    return found


def _content(path: Path) -> str | int:
    if path.is_symlink() or not path.is_file():
        return "no file"  # nothing that was written here
    return path.stat().st_size if path.suffix == ".safetensors" else digest_of(path)


def sampled_digest(path: Path, names: str = "*") -> str:
    """sha256 of the names, sizes and some bytes of a folder's files, or of a file: in seconds.

    Of a safetensors file that is the list of its arrays, and a sample of them. Args: names, of the
    folder's files that count, as a pattern.
    """
    digest = hashlib.sha256()
    found = [path] if path.is_file() else sorted(path.rglob(names))
    for file in found:
        if not file.is_file() or any(p[0] == "." for p in file.relative_to(path).parts):
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as content:
            for i in range(_SAMPLES):
                content.seek(i * size // _SAMPLES)
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()
