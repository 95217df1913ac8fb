# SPDX-License-Identifier: Apache-2.0
"""What a user can mend, said in one line."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line that says what was given, what is expected and how to
    fix it.
    """


def exit_on_user_error(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, ending with one line on stderr and exit code 2 where the user erred."""

    def wrapped(*args):
        try:
            return function(*args)
        except UserError as error:
            # A config file's own error comes with its traceback: the last line says it.
            line = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # of `di-star ... | head`, which has seen enough
            os._exit(0)

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
