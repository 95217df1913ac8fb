# SPDX-License-Identifier: Apache-2.0
"""The processes of one run among each other: what they agree on, and that they end together.

All of it goes through JAX's coordination service, which the first process runs: no further port.
Alone, a process does nothing here but end.
"""

import atexit
import collections
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from di_star_jax.errors import BUG, LOST, MISTAKE, LostError, UserError, line_of

PATIENCE = 1800.0  # seconds for the others to come; that one has died is seen long before
_POLL = 0.5  # seconds between two looks at what the others say
_LAST = 5.0  # seconds that the first process, on which all depend, waits for the others at its end
_HURRY = 1.5  # as that, before JAX aborts the process
_LONG = 10**10  # milliseconds
_KEYS = "di_star_jax"
_STATUS = "(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): "

_ending = threading.Lock()
_over = threading.Event()
_closing: list[Callable[[], None]] = []
_listeners: list[Callable[[str, int], None]] = []
_threads: list[threading.Thread] = []
_counters: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_silence = 0.0


def _client() -> Any:
    """Of the coordination service; None alone."""
    from jax._src import distributed

    return distributed.global_state.client


def alone() -> bool:
    """Whether this process is all of its run."""
    return jax.process_count() == 1


# What all do.


def gather(
    name: str,
    text: str = "",
    patience: float = PATIENCE,
) -> list[str]:
    """What each process says, by its number; all must call this, in the same order.

    Args: name, of what is gathered; patience, in seconds.
    Raises: LostError where some do not come.
    """
    if alone():
        return [text]
    client = _client()
    key = f"{_KEYS}/{name}/{next(_counters[name])}"
    try:
        client.key_value_set(f"{key}/{jax.process_index():08d}", json.dumps(text))
        client.wait_at_barrier(key, int(1000 * patience))
        said = sorted(client.key_value_dir_get(f"{key}/"))
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise LostError(_missing(name, str(error), patience)) from None
    return [json.loads(value) for _, value in said]


def _missing(
    name: str,
    said: str,
    patience: float,
) -> str:
    """Of the coordination service's words, which processes are not there."""
    timed_out = re.search(r"Some timed out task names:\s*((?:\d+\s*)+)", said)
    if timed_out:
        late = ", ".join(timed_out.group(1).split())
        return f"process {late} did not come to {name!r} within {patience:.0f} s; see what it does"
    return _lost(said)


def _lost(said: str) -> str:
    dead = re.search(r"Task (\d+) (?:heartbeat|disconnected)|, Task: (\d+)|\):\s+(\d+)", said)
    which = next((n for n in dead.groups() if n), "0") if dead else "0"
    return (
        f"process {which} of {jax.process_count()} has died or cannot be reached; the same command "
        "goes on from the newest checkpoint"
    )


def agree(
    what: str,
    mine: Mapping[str, Any],
    patience: float = PATIENCE,
) -> None:
    """Compares what each process has. Args: what, in words; mine, values by name.

    Raises: UserError in all of them where something differs, with the odd ones' numbers.
    """
    if alone():
        return
    text = json.dumps({name: str(value) for name, value in mine.items()}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(gather(f"{what}: digest", digest, patience))) == 1:
        return
    each = [json.loads(one) for one in gather(what, text, patience)]
    raise UserError(_differences(what, each, gather("hosts", socket.gethostname())))


def _differences(
    what: str,
    each: list[dict[str, str]],
    hosts: list[str],
) -> str:
    """Args: each, values by name; hosts, their names."""
    told = []
    for name in sorted(set().union(*each)):
        values = [one.get(name, "nothing") for one in each]
        usual = collections.Counter(values).most_common(1)[0][0]  # of equals the first one's
        odd = [i for i, value in enumerate(values) if value != usual]
        others = "process 0" if len(each) == 2 else "the others"
        told += [
            f"{name} is {values[i]} in process {i} (on {hosts[i]}), {usual} in {others}"
            for i in odd[:3]
        ]
    more = f"; and {len(told) - 4} more" if len(told) > 4 else ""
    return (
        f"the processes do not have the same {what}: {'; '.join(told[:4])}{more}; start all of "
        "them with the same command, code and files"
    )


# How they end.


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """Around what all processes do: where one of them fails in it, all end, and none waits.

    Raises: what is raised, where the process is alone.
    """
    try:
        yield
    except UserError as error:
        if alone():
            raise
        fail(MISTAKE, line_of(error))
    except LostError as error:
        leave(LOST, f"error: {error}", _note("lost", LOST, str(error)))
    except Exception as error:
        if alone():
            raise
        if _of_runtime(error):
            # The death of another one looks so too. Who watches the others knows it by then, and
            # ends this process.
            time.sleep(_silence + 5)
        traceback.print_exc()
        leave(BUG, "", _note("failed", BUG, f"{type(error).__name__}, see its log"))


def _of_runtime(error: BaseException | None) -> bool:
    while error is not None:
        # Raised while a program is started, it is a ValueError with the same words.
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match(_STATUS, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def fail(code: int, line: str) -> NoReturn:
    """Ends this process with an error, and so the others. Args: code, MISTAKE or BUG; line."""
    leave(code, f"error: {line}", _note("failed", code, line))


def leave(
    code: int,
    line: str = "",
    note: str = "",
) -> NoReturn:
    """Ends this process at once, also from another thread than the main one.

    Args: line, for stderr; note, for the other processes, of `_note`.
    """
    _ending.acquire()  # for good: who comes second waits for the end
    with contextlib.suppress(OSError, ValueError):
        if line:
            print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    patience = _HURRY if code == LOST else _LAST
    for close in _closing:
        _within(patience, close)
    if _client() is not None and note:
        _within(patience, lambda: _say_goodbye(note))
    os._exit(code)


@contextlib.contextmanager
def closing(close: Callable[[], None]) -> Iterator[None]:
    """Calls `close` at the end, also where `leave` ends the process before."""
    _closing.append(close)
    try:
        yield
    finally:
        _closing.remove(close)
        close()


def _say_goodbye(note: str) -> None:
    client, me = _client(), jax.process_index()
    _tell(note)
    client.key_value_set(f"{_KEYS}/left/{me}", "", allow_overwrite=True)
    # What the others have not read by then is lost with the first process.
    while me == 0 and len(client.key_value_dir_get(f"{_KEYS}/left/")) < jax.process_count():
        time.sleep(_POLL / 5)


def _within(seconds: float, function: Callable[[], object]) -> None:
    """Calls a function that may fail, or never return."""

    def call() -> None:
        with contextlib.suppress(Exception):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


# What they tell each other.


def stop(kind: str, number: int) -> None:
    """Tells the other processes of a signal. Args: kind, "asked" or "now"; the signal's number."""
    if _client() is not None:
        _within(_LAST, lambda: _tell(_note(kind, number)))


def leave_stopped(
    code: int,
    number: int,
    line: str = "",
) -> NoReturn:
    """As `leave`, and the other processes leave at once too. Args: number, of the signal."""
    leave(code, line, _note("now", number))


@contextlib.contextmanager
def listening(listener: Callable[[str, int], None]) -> Iterator[None]:
    """Calls `listener` with what another process tells by `stop`."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _note(
    kind: str,
    code: int,
    line: str = "",
) -> str:
    return json.dumps({"kind": kind, "code": code, "line": line})


def _tell(note: str) -> None:
    key = f"{_KEYS}/notes/{jax.process_index():08d}/{next(_counters['notes'])}"
    _client().key_value_set(key, note)


def _read(client: Any, seen: set[str]) -> None:
    """Does what new notes of other processes say."""
    for key, value in client.key_value_dir_get(f"{_KEYS}/notes/"):
        sender = int(key.split("/")[-2])
        if key in seen or sender == jax.process_index():
            continue
        seen.add(key)
        note = json.loads(value)
        kind, code, line = note["kind"], note["code"], note["line"]
        if kind == "failed" and code == MISTAKE:
            leave(MISTAKE, f"error: process {sender}: {line}", value)
        elif kind == "failed":
            leave(LOST, f"error: process {sender} has ended: {line}", value)
        elif kind == "lost":
            leave(LOST, f"error: {line}", value)
        for listener in list(_listeners):
            listener(kind, code)


# Who watches.


def watch(silence: float) -> None:
    """Watches the other processes from now on; once, after `jax.distributed.initialize`.

    Args: silence, seconds without a sign of life after which JAX calls a process dead.
    """
    global _silence
    _silence = silence
    client = _client()
    if alone() or client is None or _threads:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would swallow it until it is asked
    if sys.platform == "linux":
        # JAX aborts the process where another one has died. That waits six seconds (the signal's
        # number), in which the threads below end it with the code and the line that are due.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    seen: set[str] = set()
    if jax.process_index():
        threading.Thread(target=_watch_first, daemon=True).start()
    for target in (_watch_lives, _watch_notes):
        thread = threading.Thread(target=target, args=(client, seen), daemon=True)
        thread.start()
        _threads.append(thread)
    atexit.register(_end)


def _watch_lives(client: Any, seen: set[str]) -> None:
    # A barrier to which nobody else comes fails as soon as a process is known to be dead.
    try:
        client.wait_at_barrier(f"{_KEYS}/lives/{jax.process_index()}", _LONG)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        if _over.is_set():
            return
        _within(1.0, lambda: _read(client, seen))  # it may have told why
        line = _lost(str(error))
        has_service = not line.startswith("process 0 ")
        leave(LOST, f"error: {line}", _note("lost", LOST, line) if has_service else "")


def _watch_first() -> None:
    # The service that would tell is the first process's own. What its death is noticed by is an
    # idle connection to the same port, which the system closes.
    from jax._src import distributed

    host, _, port = distributed.global_state.coordinator_address.rpartition(":")
    while not _over.is_set():
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=10) as line:
                line.settimeout(None)
                line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                while line.recv(1024):
                    pass
        except ConnectionRefusedError:
            if not _over.is_set():
                leave(LOST, f"error: {_lost('')}")
        except OSError:  # of the network, or at its end: JAX's heartbeat will tell
            _over.wait(1.0)


def _watch_notes(client: Any, seen: set[str]) -> None:
    while not _over.wait(_POLL):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # that is for `_watch_lives`
            _read(client, seen)


def _end() -> None:
    """At the interpreter's end, before threads that wait for the service would crash in it."""
    _over.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
    for thread in _threads:
        thread.join(_LAST)
