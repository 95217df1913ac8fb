# SPDX-License-Identifier: Apache-2.0
"""One job at a time in a workdir: a small file there says which, renewed while it lives.

Who finds one on the same machine looks whether its process lives. One of another machine lives
where its file is renewed; so a job that begins on another machine than the one that was killed
waits `LIMIT` at most. A job that ends, by a signal or an error too, leaves no file.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from di_star_jax import log, processes
from di_star_jax.errors import MISTAKE, UserError
from di_star_jax.storage import buckets, files
from di_star_jax.storage.checkpoint import check_path

FILE = "lock.json"  # in the workdir
RENEWAL = 10.0  # seconds
LIMIT = 60.0  # seconds without renewal after which the holder counts as dead
_LONG_AGO = 600.0  # as that, by the clocks of two machines
_SETTLED = 2.0  # seconds: of two who take a dead holder's file, the later one has it
_SIGHT = 20.0  # seconds until a network drive shows what another machine has written


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds a workdir for this job. All its processes must call it; the first one holds.

    Raises: UserError where another job holds it, or where a process does not see what the first one
      writes there.
    """
    place = _place(workdir)
    if jax.process_index() != 0:
        _check_shared(place, processes.gather("the workdir's lock")[0])
        yield
        return
    mine = _myself()
    stopped = threading.Event()
    version = _acquire(place, mine)
    with processes.closing(lambda: _release(place, mine, stopped)):
        threading.Thread(target=_renew, args=(place, mine, version, stopped), daemon=True).start()
        processes.gather("the workdir's lock", mine["token"])
        _check_shared(place, mine["token"])
        yield


def _place(workdir: str | os.PathLike) -> str | Path:
    """Raises: UserError where nothing can be written there."""
    if not buckets.is_remote(workdir):
        return files.writable_folder(str(workdir), "workdir") / FILE
    check_path(workdir)
    buckets.check_workdir(str(workdir).rstrip("/"))
    return buckets.child(str(workdir), FILE)


def _check_shared(place: str | Path, token: str) -> None:
    """Raises: UserError where a process sees another workdir than the first one."""
    until = time.monotonic() + _SIGHT
    found = _holder(_read(place))
    while found.get("token") != token and time.monotonic() < until:
        time.sleep(0.2)
        found = _holder(_read(place))
    see = "yes" if found.get("token") == token else "no"
    answers = processes.gather("who sees the workdir", see)
    blind = [str(i) for i, answer in enumerate(answers) if answer == "no"]
    if blind:
        raise UserError(
            f"process {', '.join(blind)} of {len(answers)} does not see what process 0 writes in "
            f"the workdir, {os.path.dirname(place)}; give a folder that all processes share, or "
            "gs://BUCKET/PATH"
        )


def _acquire(place: str | Path, mine: dict[str, Any]) -> str:
    """Returns: the version of what is written. Raises: UserError where another job holds it."""
    began = time.monotonic()
    first = None
    while True:
        there = _read(place)
        if there is None:
            version = _write(place, _text(mine), "0")
        elif _is_dead(_holder(there)) or time.monotonic() - began > LIMIT:
            log.say(f"takes over from a job that has died: {_told(_holder(there))}")
            version = _write(place, _text(mine), there.generation)
        elif _is_here(_holder(there)) or (first is not None and there.text != first.text):
            raise UserError(
                f"{os.path.dirname(place)} is in use by another job: {_told(_holder(there))}; give "
                "another --workdir, or end that job first"
            )
        else:
            version = None
            if first is None:
                log.say(
                    f"waiting up to {LIMIT:.0f} s to see whether another job still uses this "
                    f"workdir: {_told(_holder(there))}"
                )
            first = there
            time.sleep(1.0)
        if version is not None:
            return version


def _renew(
    place: str | Path,
    mine: dict[str, Any],
    version: str,
    stopped: threading.Event,
) -> None:
    while not stopped.wait(RENEWAL):
        try:
            now = _read(place)
            if now is None:
                version = _write(place, _text(mine), "0") or version
            elif _holder(now).get("token") == mine["token"]:
                version = _write(place, _text(mine), now.generation, settle=False) or version
            elif not stopped.is_set():
                line = f"another job has taken {os.path.dirname(place)}: {_told(_holder(now))}"
                processes.fail(MISTAKE, line)
        except (OSError, UserError):
            continue  # a drive that is full or away for a while; nobody may take it before LIMIT


def _release(
    place: str | Path,
    mine: dict[str, Any],
    stopped: threading.Event,
) -> None:
    stopped.set()
    with contextlib.suppress(OSError, UserError):
        if _holder(_read(place)).get("token") != mine["token"]:
            return
        if isinstance(place, Path):
            place.unlink(missing_ok=True)
        else:
            buckets.remove(place)


# The file.


def _read(place: str | Path) -> buckets.Text | None:
    """Its content and version; of a local file the content is the version."""
    if not isinstance(place, Path):
        return buckets.read_text(place)
    try:
        text = place.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    return buckets.Text(text, text)


def _write(
    place: str | Path,
    text: str,
    version: str,
    settle: bool = True,
) -> str | None:
    """Writes it in the place of one version, "0" for none.

    Returns: the new version, or None where another one was there.
    """
    if not isinstance(place, Path):
        return buckets.write_text(place, text, version)
    if version == "0":
        try:
            with place.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return None
        return text
    now = _read(place)
    if now is None or now.generation != version:
        return None
    files.write_text(place, text)
    if settle:
        time.sleep(_SETTLED)
        now = _read(place)
    return text if now is not None and (not settle or now.text == text) else None


# Its holder.


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "machine": _machine(),
        "started": _started(pid),
        "token": uuid.uuid4().hex,
    }


def _text(mine: dict[str, Any]) -> str:
    return json.dumps(mine | {"renewed": time.time()}) + "\n"


def _holder(there: buckets.Text | None) -> dict[str, Any]:
    """{} of a file that is not whole."""
    try:
        content = json.loads(there.text) if there is not None else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _told(holder: dict[str, Any]) -> str:
    names = ("host", "pid", "since")
    return ", ".join(f"{name} {holder.get(name, 'unknown')}" for name in names)


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether its process is to be seen from this one."""
    ours = _machine()
    return bool(ours) and holder.get("machine") == ours


def _is_dead(holder: dict[str, Any]) -> bool:
    if _is_here(holder):
        return _started(holder.get("pid")) != holder.get("started")
    renewed = holder.get("renewed")
    return isinstance(renewed, (int, float)) and time.time() - renewed > _LONG_AGO


def _machine() -> str:
    """Of all processes that see each other: a start of a kernel, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # not Linux


def _started(pid: Any) -> str | None:
    """When a process began, in the kernel's ticks, for its number may be another one's by now."""
    try:
        said = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError, ValueError):
        return None
    fields = said.rpartition(")")[2].split()  # a name may have blanks and brackets
    return None if fields[0] == "Z" else fields[19]
