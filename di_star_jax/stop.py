# SPDX-License-Identifier: Apache-2.0
"""A run that is asked to end: by Ctrl-C, or by SIGTERM as Slurm and Kubernetes send it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from di_star_jax import log

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(contextlib.AbstractContextManager):
    """Listens for the signals while its `with` lasts; the second one ends the process at once.

    A thread of its own listens, for Python's handlers wait until the compiler returns. Where there
    is nothing to lose (`free`) the first signal ends the process as well. Exit code: 128 and the
    signal's number, as of a shell.

    Attributes: doing, what a signal has to wait for; goes_on, what a stop now would mean for the
      same command run again.
    """

    def __init__(self):
        self.doing = "what is being written"
        self.goes_on = "stopped before the first step; the same command starts again"
        self._asked = None  # the first signal
        self._free = False
        self._lock = threading.Lock()
        self._votes = None
        self._handlers = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main one may listen
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)  # which ends the thread

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Around what loses nothing when the process ends in the middle of it.

        Raises: SystemExit before it begins where a signal has come already.
        """
        self.leave_if_asked()
        with self._lock:
            self._free = True
        try:
            yield
        finally:
            with self._lock:
                self._free = False
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """Raises: SystemExit where a signal has come."""
        if self._asked is not None:
            log.say(self.goes_on)
            raise SystemExit(self.code)

    @property
    def code(self) -> int:
        """The process's exit code."""
        return 128 + (self._asked or 0)

    def reached(self, mesh: Mesh) -> bool:
        """Whether to stop after this step: the same answer in all processes of a run.

        To be called once a step. Several processes vote, and count the votes of the step before, so
        that no device waits for the host. Args: mesh, of all their devices.
        """
        asked = self._asked is not None
        if jax.process_count() == 1:
            return asked
        before, self._votes = self._votes, _vote(asked, mesh)
        if before is None or not bool(before):
            return False
        self._asked = self._asked or signal.SIGTERM  # another process's
        return True

    def _listen(self) -> None:
        while came := os.read(self._reading, 1):
            number = came[0]
            if number not in SIGNALS:
                continue
            with self._lock:
                name = signal.Signals(number).name
                if self._free:
                    log.say(f"{name}: {self.goes_on}")
                    os._exit(128 + number)
                if self._asked is not None:
                    os._exit(128 + number)
                self._asked = number
            log.say(f"{name}: ends after {self.doing}; a second one ends at once")
        os.close(self._reading)


def _vote(asked: bool, mesh: Mesh) -> jax.Array:
    """Whether any process asks to stop, on all devices."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = np.full(jax.local_device_count(), asked)
    votes = jax.make_array_from_process_local_data(split, mine)
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))(votes)
