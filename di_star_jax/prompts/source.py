# SPDX-License-Identifier: Apache-2.0
"""Prompts by index: a named set, file or URL to a tfds data source, and a step to its batch.

The data source is ArrayRecord, read without TensorFlow.
"""

import dataclasses
import functools
import hashlib
import http.client
import itertools
import json
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from di_star_jax import log
from di_star_jax.errors import UserError
from di_star_jax.prompts import records, sets
from di_star_jax.prompts.files import Prompt
from di_star_jax.prompts.sets import PROMPT_SETS, PromptSet
from di_star_jax.storage import buckets
from di_star_jax.storage.files import digest_of, read_json, whole, write_text

TIMEOUT = 60.0  # seconds without an answer
BLOCK = 64  # prompts in a record: tfds takes 30 us for each record, whatever is in it
SEAL = "whole.json"  # written last: {file of the data source: its sha256}
LARGE = 20_000_000  # bytes of a file that takes seconds


@dataclasses.dataclass(frozen=True, eq=False)
class Source(Sequence):
    """Prompts by index.

    Args:
      records: the tfds data source, whose records have BLOCK prompts each.
      name: of the set, or of the user's own file.
      digest: sha256 of what was read.
      verified: whether that is a published file, byte for byte; None where no checksum is known.
      notes: one line for each way in which it differs from what is published.
    """

    records: Sequence[dict[str, Any]]
    name: str
    digest: str
    verified: bool | None
    notes: tuple[str, ...]

    @functools.cached_property
    def _count(self) -> int:
        last = len(self.records) - 1
        return last * BLOCK + len(self._block(last))

    @functools.cached_property
    def _block(self) -> Callable[[int], list]:
        """Prompts of a record, the last ones kept, for those who take prompts in their order."""
        return functools.lru_cache(4)(lambda number: json.loads(self.records[number]["prompts"]))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):  # what ends an iteration; the data source raises ValueError
            raise IndexError(f"prompt {index} of {len(self)}")
        block, place = divmod(int(index), BLOCK)
        return Prompt(*self._block(block)[place])


def load(
    name_or_file: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    file: str | os.PathLike = "",
    column: str | None = None,
    option: str = "--prompts",
) -> Source:
    """Prompts as a data source, built once: a changed file or column is built anew.

    Args:
      name_or_file: one of PROMPT_SETS, or the path or URL of a prompt file.
      folder: where the ArrayRecord files, and in `downloads` the files of a URL, go.
      file: path or URL of a named set; of its folder, for a set that is one.
      column: of a file of the user's own, see `sets.own_file`.
      option: what the user gave `name_or_file` as, for the errors; `file` is OPTION_file.
    Raises: UserError for an unknown set or one without file, a failed download, and a file that is
      missing, not that set's, or without prompts.
    """
    try:
        return _load(str(name_or_file), Path(folder), str(file), column, option)
    except OSError as error:
        where = error.filename or name_or_file
        raise UserError(
            f"{option}: cannot read or write {where} ({error.strerror}); check the path and its "
            "permissions"
        ) from None


def _load(
    name_or_file: str,
    folder: Path,
    file: str,
    column: str | None,
    option: str,
) -> Source:
    name, where = sets.resolve(name_or_file, file, option)
    spec = PROMPT_SETS[name] if name else sets.own_file(column)
    path = _fetch(spec, where, folder / "downloads") if "://" in where else Path(where)
    digest = sets.digest_of(spec, path)
    known = spec.digests.get(path.suffix)
    source = Source(
        _build(spec, path, folder / _key(digest, name, path.suffix, spec.forms)),
        name=name or path.name,
        digest=digest,
        verified=digest == known[0] if known else None,
        notes=(),
    )
    notes = sets.differences(spec, path, digest, len(source))
    return dataclasses.replace(source, notes=tuple(notes))


def _key(
    digest: str,
    name: str,
    suffix: str,
    forms: dict,
) -> str:
    """A folder's name, after all that the prompts depend on."""
    key = f"{digest}\0{name}\0{suffix}\0{forms.get(suffix)}\0blocks of {BLOCK}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _records(spec: PromptSet, path: Path) -> Iterator[records.Record]:
    """Records of the data source. Raises: UserError where there is none."""
    prompts = sets.read(spec, path)
    block = list(itertools.islice(prompts, BLOCK))
    if not block:
        raise UserError(f"{path} holds no prompts, expected at least one; give another file")
    while block:
        yield {"prompts": json.dumps(block)}
        block = list(itertools.islice(prompts, BLOCK))


def _build(
    spec: PromptSet,
    path: Path,
    folder: Path,
) -> Sequence[dict[str, Any]]:
    """The records in a folder of their own, written by the first call, found by later ones.

    What a stop has left half written, and what has changed since, is written anew.
    """
    names = ["prompts"]
    if not _is_sealed(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if path.is_file() and path.stat().st_size > LARGE:
            log.say(f"reading the prompts of {path}, {path.stat().st_size / 1e6:.0f} MB")
        records.write(folder, names, _records(spec, path))
        write_text(folder / SEAL, json.dumps(_digests(folder), indent=1) + "\n")
    return records.read(folder, names)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of the files below a folder, but for its seal."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    return {str(file.relative_to(folder)): digest_of(file) for file in files}


def _is_sealed(folder: Path) -> bool:
    """Whether a data source is there, as it was when it was finished."""
    try:
        return (folder / SEAL).is_file() and read_json(folder / SEAL) == _digests(folder)
    except ValueError:
        return False


class PromptStream:
    """An endless, reshuffled stream: what step k sees is a pure function of (source, seed, k).

    Args:
      source: prompts by index.
      seed: of the shuffles, one for each pass over the source.
      batch_size: prompts per step, over all hosts.
    """

    def __init__(
        self,
        source: Sequence[Prompt],
        *,
        seed: int,
        batch_size: int,
    ):
        import grain

        self._stream = grain.MapDataset.source(source).shuffle(seed).repeat()
        self._batch_size = batch_size

    def at(self, step: int, rows: Sequence[int] | None = None) -> list[Prompt]:
        """A step's prompts, or those of some rows of its batch."""
        first = step * self._batch_size
        rows = range(self._batch_size) if rows is None else rows
        return [self._stream[first + row] for row in rows]


def _fetch(
    spec: PromptSet,
    url: str,
    folder: Path,
) -> Path:
    """Downloads a file, or each file of a set that is a folder of known names, once."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in buckets.SCHEMES:
        return buckets.fetch(url, spec.folder or ("*",))
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"{url} starts with {parts.scheme}://, expected http:// or https://, gs:// or s3://; "
            "or give a path"
        )
    folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    if not spec.forms:
        for name in spec.folder:
            _download(f"{url.rstrip('/')}/{name}", folder / name)
        return folder
    name = Path(parts.path).name
    if not Path(name).suffix and len(spec.forms) == 1:  # such as the export of a sheet
        name += next(iter(spec.forms))
    sets.check_suffix(spec, Path(name))
    _download(url, folder / name)
    return folder / name


# By urllib, since tfds's dl_manager waits without a timeout and takes web pages and bodies that
# were cut short for the file.
def _download(url: str, path: Path) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            log.waiting(f"downloading {url}"),
            urllib.request.urlopen(url, timeout=TIMEOUT) as response,
            whole(path) as partial,
        ):
            _save(response, url, partial)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}); check the URL, or download the file and give its "
            "path"
        ) from None


def _save(
    response: http.client.HTTPResponse,
    url: str,
    path: Path,
) -> None:
    if response.headers.get_content_type() == "text/html":
        raise UserError(
            f"{url} is a web page, expected a prompt file; give the URL of the raw file"
        )
    with path.open("wb") as file:
        shutil.copyfileobj(response, file)
        size = file.tell()
    length = response.headers.get("Content-Length")
    if length is not None and size != int(length):
        raise OSError(f"{size} of {length} bytes came")
