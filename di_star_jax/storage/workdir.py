# SPDX-License-Identifier: Apache-2.0
"""The place of a run: a folder, or one at gs:// with a folder here that is copied there.

Checkpoints and what is compiled go to gs:// by themselves, the export when it is whole. The small
files (config.json, metrics.jsonl, events, pictures, scores) are written in the folder, fetched when
a run goes on and put back as they change: a bucket knows no appending.
"""

import contextlib
import os
import shutil
import time

import jax

from di_star_jax.errors import UserError
from di_star_jax.storage import buckets
from di_star_jax.storage.checkpoint import check_path
from di_star_jax.storage.files import staging, writable_folder

_PAUSE = 10.0  # seconds between two copies of what changes


class Workdir(contextlib.AbstractContextManager):
    """To be used with `with`: what is left to copy is copied at the end.

    Args: name, a folder or a gs:// address, made where it is missing and tried.
    Raises: UserError where nothing can be written there.

    Attributes:
      folder: here, with the small files.
      url: of the bucket; None where `folder` is all there is.
    """

    def __init__(self, name: str | os.PathLike):
        check_path(name)
        self.url = str(name).rstrip("/") if buckets.is_remote(name) else None
        self._sent: dict[str, tuple[int, int]] = {}  # {file: its time and size when it was copied}
        self._next = 0.0  # when the next copy is due
        if self.url is None:
            self.folder = writable_folder(str(name), "workdir")
            return
        buckets.check_workdir(self.url)
        self.folder = staging("workdirs")
        for file in buckets.files_in(self.url):
            if file[0] != ".":  # such as what another process tries just now
                buckets.get(self.at(file), self.folder / file)
        self._sent = self._files()

    def __exit__(self, *error: object) -> None:
        if self.url is None:
            return
        try:
            self.push()
        except UserError as failed:
            if error[0] is None:
                raise
            print(f"warning: {failed}", flush=True)  # what ends the run is said after it
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def at(self, name: str) -> str:
        """Where something of this name is, or will be, for others."""
        return f"{self}/{name}"

    def named(self, text: str) -> str:
        """A text that names files of the folder, as others will find them."""
        return text.replace(str(self.folder), str(self))

    def push_sometimes(self) -> None:
        """As `push`, but rarely: every ten seconds at most, and for a twentieth of the time.

        A server that fails is said, and tried again the next time.
        """
        began = time.monotonic()
        if self.url is None or began < self._next:
            return
        try:
            self.push()
        except UserError as error:
            print(f"warning: {error}", flush=True)
        ended = time.monotonic()
        self._next = ended + max(_PAUSE, 20 * (ended - began))

    def push(self) -> None:
        """Copies the small files that have changed. Raises: UserError where that fails."""
        if self.url is None or jax.process_index() != 0:
            return
        now = self._files()
        for file in now:
            if self._sent.get(file) != now[file]:
                buckets.put(self.folder / file, self.at(file))
        buckets.remove(*[self.at(file) for file in self._sent if file not in now])
        self._sent = now

    def check_folder(self, name: str) -> None:
        """Raises: UserError where something else has the place of a folder to be uploaded."""
        if self.url is not None:
            buckets.check_output(self.at(name))

    def upload(self, name: str) -> None:
        """Copies a folder of results that is whole."""
        if self.url is not None:
            buckets.upload(self.folder / name, self.at(name))

    def holds(self, name: str, file: str) -> bool:
        """Whether a folder of results is there, whole. Args: file, that it has."""
        if self.url is not None:
            return buckets.committed(self.at(name))
        return (self.folder / name / file).is_file()

    def _files(self) -> dict[str, tuple[int, int]]:
        paths = [path for path in self.folder.iterdir() if path.name[0] != "." and path.is_file()]
        return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in paths}
