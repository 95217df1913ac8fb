# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, in one line."""

import contextlib
import errno
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from di_star_jax.errors import UserError


@contextlib.contextmanager
def full_in_one_line(folder: Path) -> Iterator[None]:
    """Around a run, whose threads would end in silence. Raises: UserError for a full disk."""
    usual = threading.excepthook
    threading.excepthook = lambda args: _is_full_disk(args.exc_value) or usual(args)
    try:
        yield
    except Exception as error:
        threading.excepthook = usual
        if not _is_full_disk(error):
            raise
        # TensorBoard's writer tries again, in its thread and at the exit.
        threading.excepthook = lambda args: None
        sys.unraisablehook = _unless_full_disk
        raise UserError(
            f"disk full at {folder}: {shutil.disk_usage(folder).free / 1e6:.1f} MB are free; make "
            "room and run the same command again: it goes on from the newest checkpoint that is "
            "whole"
        ) from None
    else:
        threading.excepthook = usual


def _unless_full_disk(args) -> None:
    if not _is_full_disk(args.exc_value):
        sys.__unraisablehook__(args)


def _is_full_disk(error: BaseException | None) -> bool:
    """Orbax's threads and TensorStore say it in the text of other errors."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"No space left on device|Disk quota exceeded", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
