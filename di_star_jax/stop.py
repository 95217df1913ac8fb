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

from di_star_jax import log, processes
from di_star_jax.errors import INTERRUPTED, STOPPED

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: STOPPED}  # exit codes


class Stop(contextlib.AbstractContextManager):
    """Listens for the signals while its `with` lasts; a second Ctrl-C ends the process at once.

    A thread of its own listens, for Python's handlers wait until the compiler returns. Where there
    is nothing to lose (`free`) the first signal ends the process as well.

    Several processes of a run end together, whichever gets the signal. They vote in `reached`,
    `leave_if_asked` and at both ends of `free`: so all of them are in the same part of the run, and
    where one of them has nothing to lose, none has.

    Attributes: doing, what a signal has to wait for; goes_on, what a stop now would mean for the
      same command run again.
    """

    def __init__(self):
        self.doing = "what is being written"
        self.goes_on = "stopped before the first step; the same command starts again"
        self._asked = 0  # the first signal's number
        self._free = False
        self._lock = threading.Lock()
        self._votes = None
        self._handlers = {}
        self._told = contextlib.ExitStack()

    def __enter__(self) -> "Stop":
        self._told.enter_context(processes.listening(self._hear))
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main one may listen
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in CODES:
            self._handlers[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._told.close()
        if not self._handlers:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writing)  # which ends the thread

    def promise(self) -> str:
        """What a signal will do, in a line."""
        if not self._handlers:
            return (
                "warning: this run was not started by the main thread, so SIGTERM and Ctrl-C end "
                "it without saving; checkpoints are those of train.save_every"
            )
        where = "" if processes.alone() else f", in any of the {jax.process_count()} processes,"
        return (
            f"SIGTERM{where} saves the step at hand and ends with exit code {STOPPED}, Ctrl-C with "
            f"{INTERRUPTED}; the same command goes on there"
        )

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Around what loses nothing when the process ends in the middle of it.

        All processes of a run must come here. Raises: SystemExit before it begins or at its end
        where a signal has come.
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
        """Raises: SystemExit where a signal has come, in all processes, which must all call it."""
        numbers = processes.gather("whether to stop", str(self._asked))
        number = max(map(int, numbers))
        if number:  # one that has come since then waits for the next time
            self._asked = number
            log.say(self.goes_on)
            raise SystemExit(self.code)

    @property
    def code(self) -> int:
        """The process's exit code."""
        return CODES[signal.Signals(self._asked)]

    def reached(self, mesh: Mesh) -> bool:
        """Whether to stop after this step: the same answer in all processes of a run.

        To be called once a step. Several processes vote, and count the votes of the step before, so
        that no device waits for the host. Args: mesh, of all their devices.
        """
        if processes.alone():
            return bool(self._asked)
        before, self._votes = self._votes, _vote(self._asked, mesh)
        number = 0 if before is None else int(before)
        self._asked = self._asked or number
        return bool(number)

    def _listen(self) -> None:
        while came := os.read(self._reading, 1):
            number = came[0]
            if number not in CODES:
                continue
            with self._lock:
                self._leave_where_free(number)
                if self._asked:
                    # SIGTERM may come twice, from a launcher and from its own launcher.
                    if number == signal.SIGINT:
                        processes.leave_stopped(INTERRUPTED, number)
                    continue
                self._asked = number
            processes.stop("asked", number)
            name = signal.Signals(number).name
            log.say(f"{name}: ends after {self.doing}; Ctrl-C now ends at once")
        os.close(self._reading)

    def _hear(self, kind: str, number: int) -> None:
        """Of a signal that another process got. Args: kind, "asked" or "now"."""
        if kind == "now":  # it was free, and so nobody has anything to lose; or Ctrl-C came twice
            processes.leave_stopped(CODES[signal.Signals(number)], number)
        with self._lock:
            self._leave_where_free(number)
            self._asked = self._asked or number

    def _leave_where_free(self, number: int) -> None:
        if self._free:
            log.say(f"{signal.Signals(number).name}: {self.goes_on}")
            processes.leave_stopped(CODES[signal.Signals(number)], number)


def _vote(asked: int, mesh: Mesh) -> jax.Array:
    """The signal that any process asks to stop by, or 0, on all devices."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = np.full(jax.local_device_count(), asked, np.int32)
    votes = jax.make_array_from_process_local_data(split, mine)
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(votes)
