# SPDX-License-Identifier: Apache-2.0
"""How the processes that read and decode pairs begin and end."""

import os
import signal
import threading
import time

_LOOK = 1.0  # seconds between two looks whether the run still lives


def begin(*numbers: int) -> None:
    """To be called first in a worker: it leaves Ctrl-C to the run, and ends when the run does.

    A run may end at once, without telling its workers. Args: what grain tells a worker of itself.
    """
    del numbers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(_LOOK)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
