# SPDX-License-Identifier: Apache-2.0
"""What lies in a bucket, gs:// or s3://: read by a copy made here, written by a copy of what is.

Orbax, TensorStore and JAX's compile cache reach gs:// by themselves, once `check_url` has been
called; all else passes through here.
"""

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from di_star_jax.errors import UserError
from di_star_jax.storage import files
from di_star_jax.storage.files import MARKER, user_cache, whole

_EXTRAS = {"gs": "gcsfs", "s3": "s3fs"}  # by scheme: what reaches it
SCHEMES = tuple(_EXTRAS)
_PATTERN = "[]*?#\\"  # what Orbax, TensorStore or fsspec take for a pattern or a version
_WAIT = 14.0  # seconds until a server counts as dead
_METADATA = 5.0  # seconds that a new machine's own server of credentials may need to be there
_UNFINISHED = "replaces"  # of a folder's marker while it is being written: what was there before


class Text(NamedTuple):
    """An object's content, and the generation that `write_text` compares."""

    text: str
    generation: str


def is_remote(name: str | os.PathLike) -> bool:
    """Whether a path is an address, such as gs://bucket/run; `check_url` says if it is usable."""
    return "://" in str(name)


def check_url(url: str) -> None:
    """Raises: UserError for an address that cannot be used from here; asks no network."""
    scheme, _, rest = str(url).partition("://")
    bucket = rest.partition("/")[0]
    if scheme not in _EXTRAS:
        raise UserError(f"{url} begins with {scheme}://, expected gs://, s3:// or a local path")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket):
        raise UserError(f"{url} names no bucket, expected {scheme}://BUCKET/PATH")
    found = sorted(set(_PATTERN) & set(rest))
    if found or not rest.isprintable():
        raise UserError(
            f"{url} has {' '.join(found) or 'control characters'} in it, which cannot be read "
            "back; give a path without [ ] * ? # or a backslash"
        )
    if {"", ".", ".."} & set(rest.rstrip("/").split("/")):
        raise UserError(f"{url} has an empty part, or a part . or ..; write the path plainly")
    _prepare(scheme, os.environ.get("STORAGE_EMULATOR_HOST"))


def child(url: str, name: str) -> str:
    """The address of what lies under another one."""
    return f"{url.rstrip('/')}/{name}"


# Reading.


def fetch(
    url: str,
    patterns: Sequence[str] = ("*",),
    ignore: str | None = None,
) -> Path:
    """A file or folder of a bucket as a local one, copied into the user's cache once a version.

    Args: patterns, ignore: which of a folder's files, as of a Hub's snapshot; more of them can be
      fetched later, to the same place.
    Raises: UserError where nothing is there or it cannot be had.
    """
    url = url.rstrip("/")
    found = listing(url)
    if not found:
        raise UserError(f"nothing at {url}; check the name, or what the credentials may read")
    version = _short_hash(json.dumps([url, found]))
    root = user_cache() / "buckets" / version / _name(url)
    wanted = {
        name: root / name
        for name in found
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        and not (ignore and fnmatch.fnmatch(name, ignore))
    }
    if "" in found:  # the address is a file's
        wanted = {"": root}
    with _alone(root):
        for name, path in wanted.items():
            if not path.exists():
                _download(child(url, name) if name else url, path, found[name][1])
    return root


def local(path: str | os.PathLike) -> Path:
    """A file or folder to read, as a user gives it: a bucket's is fetched, once a process.

    Raises: UserError as of `fetch`.
    """
    return _fetched(str(path)) if is_remote(path) else files.expand(path)


_fetched = functools.cache(fetch)


def exists(url: str) -> bool:
    """Whether there is an object, or one below. Raises: UserError where that cannot be asked."""
    with _told(url, "read"):
        fs = _connect(url)
        try:
            fs.info(url.rstrip("/"), timeout=_WAIT)
        except FileNotFoundError:
            _check_bucket(fs, url)
            return False
    return True


def read_text(url: str) -> Text | None:
    """A small object; None where there is none."""
    with _told(url, "read"):
        fs = _connect(url)
        try:
            generation = _version(fs.info(url, timeout=_WAIT))
            return Text(fs.cat_file(url, timeout=_WAIT).decode(), generation)
        except FileNotFoundError:
            _check_bucket(fs, url)
    return None


def listing(url: str) -> dict[str, tuple[str, int]]:
    """{name below the address: (version, bytes)} of all objects; "" is the address's own."""
    with _told(url, "read"):
        fs = _connect(url)
        prefix = url.partition("://")[2].rstrip("/")
        found = fs.find(url.rstrip("/"), detail=True, timeout=_WAIT)
        if not found:
            _check_bucket(fs, url)
    names = {
        path.removeprefix(prefix).lstrip("/"): (_version(info), info["size"])
        for path, info in sorted(found.items())
        if not path.endswith("/")  # some tools leave such objects for folders
    }
    for name in names:
        if ".." in name.split("/") or "\\" in name or name.startswith("/"):
            raise UserError(f"{url} has an object {name!r}, whose name leads out; remove it")
    return names


def reach(url: str) -> None:
    """Raises: UserError where the bucket is not there, does not answer or may not be read."""
    with _told(url, "read"):
        _check_bucket(_connect(url), url)


def check_workdir(url: str) -> None:
    """Tries what a run and Orbax do in a bucket. Raises: UserError where that is refused."""
    tried = child(url, f".tried-{uuid.uuid4().hex}")
    write_text(tried, "tried", "0")
    remove(tried)
    bucket = url.partition("://")[2].partition("/")[0]
    try:
        _connect(url).call("GET", "b/{}", bucket, timeout=_WAIT)
    except Exception as error:
        raise UserError(
            f"{url} can be written, but what gs://{bucket} is may not be asked, as Orbax does "
            f"({type(error).__name__}); give the account storage.buckets.get, which the role "
            "Storage Bucket Viewer has"
        ) from None


def files_in(url: str) -> list[str]:
    """Names of the objects just below an address, not of those deeper down."""
    with _told(url, "read"):
        fs = _connect(url)
        try:
            found = fs.ls(url.rstrip("/"), detail=True, timeout=_WAIT)
        except FileNotFoundError:
            _check_bucket(fs, url)
            return []
    names = [one["name"].rpartition("/")[2] for one in found if one["type"] == "file"]
    return [name for name in names if name]


def committed(url: str) -> bool:
    """Whether `upload` has written a whole folder there."""
    marker = read_text(child(url, MARKER))
    return marker is not None and _UNFINISHED not in _parsed(marker.text)


# Writing.


def write_text(
    url: str,
    text: str,
    generation: str | None = None,
) -> str | None:
    """Writes a small object of gs://; where a generation is given, only in that one's place.

    Args: generation, of `read_text`; "0" where nothing may be there yet.
    Returns: the new generation, or None where another one is there.
    """
    with _told(url, "written"):
        fs = _connect(url)
        if not url.startswith("gs://"):
            fs.pipe_file(url, text.encode(), timeout=_WAIT)
            return _version(fs.info(url, timeout=_WAIT))
        bucket, key, _ = fs.split_path(url)
        condition = {} if generation is None else {"ifGenerationMatch": generation}
        try:
            _, answer = fs.call(
                "POST",
                f"{fs._location}/upload/storage/v1/b/{bucket}/o",
                uploadType="media",
                name=key,
                data=text.encode(),
                headers={"Content-Type": "text/plain; charset=utf-8"},
                timeout=_WAIT,
                **condition,
            )
            return str(json.loads(answer)["generation"])
        except FileExistsError:  # 412; also where an answer was lost and asked for again
            now = read_text(url)
            return now.generation if now and now.text == text else None


def upload(source: Path, url: str) -> None:
    """Puts a local file or folder to a bucket, in place of what was put there before.

    A folder's marker is written last, so `committed` says whether all of it is there.

    Raises: UserError where something else is there, or it cannot be written.
    """
    if not source.is_dir():
        put(source, url)
        return
    check_output(url)
    marker = child(url, MARKER)
    kept = read_text(marker)
    before = _parsed(kept.text).get("files", {}) if kept else {}
    names = files.listing(source)
    content = {"files": names}
    write_text(marker, json.dumps(content | {_UNFINISHED: before}))
    for name in names:
        put(source / name, child(url, name))
    old = sorted(set(before) - set(names))
    remove(*[child(url, name) for name in old])
    write_text(marker, json.dumps(content, indent=2, sort_keys=True) + "\n")


def check_output(url: str) -> None:
    """Raises: UserError if `upload` would refuse to write a folder there."""
    there = listing(url)
    if not there:
        return
    kept = read_text(child(url, MARKER))
    marker = _parsed(kept.text) if kept else {}
    for name, (_, size) in there.items():
        ours = [marker.get(key, {}).get(name) for key in ("files", _UNFINISHED)]
        if name != MARKER and _content(url, name, size, ours) not in ours:
            raise UserError(
                f"{url} is no folder that was written here: it holds {name or 'a file'}, which is "
                f"not as {MARKER} lists it, so nothing is overwritten; give another output"
            )


@contextlib.contextmanager
def new_folder(url: str) -> Iterator[Path]:
    """A folder here to write in, which is uploaded in the end, and not after an error.

    Raises: UserError where `upload` would refuse it.
    """
    check_output(url)
    place = files.staging("outputs")
    folder = place / _name(url)
    folder.mkdir()
    try:
        with named(folder, url):
            yield folder
        upload(folder, url)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def continued_folder(path: str) -> Iterator[Path]:
    """A folder to go on writing in: `path`, or a copy of a bucket's, which is uploaded in the end.

    The copy stays: after an error, work goes on from it on this machine.

    Raises: UserError where `upload` would refuse it.
    """
    if not is_remote(path):
        yield files.expand(path)
        return
    check_output(path)
    folder = user_cache() / "continued" / _short_hash(path.rstrip("/")) / _name(path)
    there = read_text(child(path, MARKER))
    seen = folder / MARKER  # of the bucket, when both were last the same
    is_same = seen.exists() and there and seen.read_text(encoding="utf-8") == there.text
    if there and _UNFINISHED not in _parsed(there.text) and not is_same:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fetch(path), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with named(folder, path):
        yield folder
    upload(folder, path)
    get(child(path, MARKER), seen)


@contextlib.contextmanager
def named(here: Path, url: str) -> Iterator[None]:
    """What a user can mend in what stands here for a bucket's, by the name of the bucket's."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(here), url)) from None


def put(file: Path, url: str) -> None:
    """Copies one file to a bucket; it is there whole, or not at all."""
    with _told(url, "written"):
        _connect(url).put_file(str(file), url)


def get(url: str, file: Path) -> None:
    """Copies one object here."""
    with _told(url, "read"), whole(file) as partial:
        _connect(url).get_file(url, str(partial))


def move(url: str, new: str) -> None:
    """Gives all objects below an address another one."""
    names = list(listing(url))
    for name in names:  # all are there twice before the first is gone
        with _told(url, "renamed"):
            _connect(url).cp_file(child(url, name), child(new, name))
    remove(*[child(url, name) for name in names])


def remove(*urls: str) -> None:
    """Deletes objects; what is not there is none."""
    for url in urls:
        with _told(url, "deleted"), contextlib.suppress(FileNotFoundError):
            _connect(url).rm_file(url, timeout=_WAIT)


# The server.


@functools.cache
def _prepare(scheme: str, emulator: str | None) -> None:
    """Settings of all that reaches a bucket, also of Orbax; to be made before the first use."""
    # A listing that is kept hides what other processes write.
    settings: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "gs" and emulator:
        address = emulator if "://" in emulator else f"http://{emulator}"
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
        # Else TensorStore asks a machine of Google's for credentials.
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # Else gcsfs asks for the bucket's kind in a protocol that emulators do not have.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        settings["token"] = "anon"
    import fsspec

    fsspec.config.conf.setdefault(scheme, {}).update(settings)
    # What matters is raised; this is tracebacks, and a warning for each bucket.
    logging.getLogger(_EXTRAS[scheme]).setLevel(logging.CRITICAL)
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        extra = {"gs": "gcs"}.get(scheme, scheme)
        raise UserError(
            f"{scheme}:// needs {_EXTRAS[scheme]}: pip install 'di_star_jax[{extra}]'"
        ) from None


def _connect(url: str) -> Any:
    check_url(url)
    import fsspec

    scheme = url.partition("://")[0]
    if scheme == "gs" and _without_credentials():
        fsspec.config.conf["gs"]["token"] = "anon"  # what is public can still be read
    return fsspec.filesystem(scheme)


def _without_credentials() -> bool:
    return not os.environ.get("STORAGE_EMULATOR_HOST") and not _has_credentials()


@functools.cache
def _has_credentials() -> bool:
    """Whether Google's libraries find any. gcsfs itself would go on asking for a quarter minute."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    for pause in (_METADATA, 0.0):
        try:
            google.auth.default()
            return True
        except DefaultCredentialsError:
            time.sleep(pause)
    return False


@functools.cache
def sign_in(bucket: str) -> None:
    """Lets TensorStore find its credentials, which it does once a process, and say nothing.

    Else a line on stderr, where a machine's account is used, says that gcloud's file is missing.
    """
    from tensorstore import KvStore

    spec = {"driver": "gcs", "bucket": bucket, "gcs_request_retries": {"max_retries": 2}}
    with _without_stderr(), contextlib.suppress(Exception):  # said by what is done there next
        KvStore.open(spec).result().read(".none").result()


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what any library writes there, those of C++ too."""
    sys.stderr.flush()
    usual = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)


def _check_bucket(fs: Any, url: str) -> None:
    """Raises: UserError where there is no such bucket."""
    bucket = url.partition("://")[2].partition("/")[0]
    try:
        if url.startswith("gs://"):
            fs.call("GET", "b/{}/o", bucket, maxResults=1, timeout=_WAIT)
        else:
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1, timeout=_WAIT)
    except FileNotFoundError:
        scheme = url.partition("://")[0]
        raise UserError(f"{url}: there is no bucket {scheme}://{bucket}; make it first") from None


@contextlib.contextmanager
def _told(url: str, done: str) -> Iterator[None]:
    """What can go wrong with a bucket, in one line. Args: done, such as "read"."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        _check_bucket(_connect(url), url)
        raise UserError(f"{url} cannot be {done}: it is not there") from None
    except Exception as error:  # of a dozen libraries, with no class in common
        reason = " ".join(str(error).split()) or type(error).__name__
        if type(error).__name__ == "FSTimeoutError":
            reason = f"no answer in {_WAIT:.0f} s"
        raise UserError(f"{url} cannot be {done} ({reason[:200]}); {_advice(url, error)}") from None


def _advice(url: str, error: Exception) -> str:
    said = f"{type(error).__name__} {error}"
    is_anonymous = url.startswith("gs://") and _without_credentials()
    denied = r"\b40[13]\b|Forbidden|Anonymous|redential|PermissionError|AccessDenied|Access Denied"
    if not is_anonymous and not re.search(denied, said):
        return "check the network and the service, and run the same command again"
    if url.startswith("gs://"):
        found = "no credentials were found: " if is_anonymous else ""
        return found + (
            "log in with `gcloud auth application-default login`, or let the machine's service "
            "account use the bucket (Storage Object Admin)"
        )
    return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of who may use it"


# Small parts.


def _name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(info: dict) -> str:
    return str(info.get("generation") or info.get("ETag") or info.get("etag"))


def _parsed(text: str) -> dict:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _content(
    url: str,
    name: str,
    size: int,
    ours: list,
) -> str | int | None:
    """An object's content as `files.listing` has it; None where it cannot be one of ours."""
    if any(isinstance(each, str) for each in ours):
        with _told(url, "read"):
            content = _connect(url).cat_file(child(url, name), timeout=_WAIT)
        return hashlib.sha256(content).hexdigest()
    return size if any(isinstance(each, int) for each in ours) else "not ours"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time, so that several do not fetch the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _told(url, "read"), whole(path) as partial:
        _connect(url).get_file(url, str(partial))
        if partial.stat().st_size != size:
            raise OSError(f"got {partial.stat().st_size} bytes of {size}")
