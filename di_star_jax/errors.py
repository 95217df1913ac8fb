# SPDX-License-Identifier: Apache-2.0
"""What a user can mend, said in one line, and the exit codes by which launchers decide."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Exit codes. A launcher starts the same command again after STOPPED, LOST and death by a signal,
# and not after the others: docs/clusters.md.
DONE = 0
BUG = 1  # with a traceback
MISTAKE = 2  # the user's: it would be made again
STOPPED = 75  # by SIGTERM, with the state saved (EX_TEMPFAIL of sysexits.h)
LOST = 76  # another process of the run died, or cannot be reached
INTERRUPTED = 130  # by Ctrl-C, with the state saved; what shells say of it


class UserError(Exception):
    """A mistake the user can mend: one line that says what was given, what is expected and how to
    fix it.
    """


class LostError(Exception):
    """The processes of a run have lost each other: one line that says which."""


def line_of(error: UserError) -> str:
    """What it says, without what a config file's own error has before it."""
    return re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])


def exit_on_user_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, ending with one line on stderr and exit code 2 where the user erred.

    With LOST where processes have lost each other.
    """

    def wrapped(*args):
        try:
            return function(*args)
        except UserError as error:
            print(f"error: {line_of(error)}", file=sys.stderr)
            sys.exit(MISTAKE)
        except LostError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(LOST)
        except BrokenPipeError:  # of `di-star ... | head`, which has seen enough
            os._exit(DONE)

    return wrapped


def nearest(
    name: str,
    known: Sequence[str],
    most: int = 3,
) -> list[str]:
    """The known names that resemble one, the nearest first."""
    return difflib.get_close_matches(name, known, most, 0.6)


def check_all(*checks: Callable[[], object]) -> None:
    """Runs checks that do not need each other, so that all that is wrong is said at once.

    Raises: UserError with what each of them said.
    """
    said = []
    for check in checks:
        try:
            check()
        except UserError as error:
            said.append(str(error))
    if said:
        raise UserError("; also ".join(said))


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?" where a known dotted name is near, else ""."""
    section, _, last = name.rpartition(".")
    leaves = {k: k.rsplit(".", 1)[-1] for k in known}
    same = [k for k in known if leaves[k] == last]
    # Names of the same section are near by what follows it: no reward is near for its "reward.".
    comparable = [
        k
        for k in known
        if k.rpartition(".")[0] != section
        or difflib.SequenceMatcher(None, last, leaves[k]).ratio() >= 0.5
    ]
    near = nearest(name, comparable, 1) or [
        k
        for leaf in difflib.get_close_matches(last, leaves.values(), 1, 0.7)
        for k in known
        if leaves[k] == leaf
    ]
    if same:
        near = [max(same, key=lambda k: difflib.SequenceMatcher(None, name, k).ratio())]
    return f", did you mean {near[0]}?" if near else ""
