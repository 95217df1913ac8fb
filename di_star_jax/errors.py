# SPDX-License-Identifier: Apache-2.0
"""What a user can mend, said in one line."""

import difflib
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
    from absl import flags  # here, since launch scripts use this file without absl

    def wrapped(*args):
        try:
            return function(*args)
        except (UserError, flags.Error) as error:
            # absl reports a config file's own error with its traceback: the last line says it.
            line = re.sub(r"^[\w.]*Error: ", "", str(error).strip().splitlines()[-1])
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return wrapped


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


def command(main: Callable[[], None]) -> Callable[[list[str]], None]:
    """`main` as absl calls it, with what is left of the command line, which must be nothing.

    Quiets the libraries' information lines: Orbax has one for every file.
    """
    from absl import logging

    def checked(argv):
        logging.set_verbosity(logging.WARNING)
        if argv[1:]:
            raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
        main()

    return exit_on_user_error(checked)


def run(main: Callable[[], None], parse: Callable[[list[str]], list[str]] | None = None) -> None:
    """Runs a command: absl's flags, then `main`, which reads them.

    Args: parse, in place of absl's own parser.
    """
    from absl import app, flags

    app.run(command(main), flags_parser=exit_on_user_error(parse or flags.FLAGS))


def suggest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?" where a known dotted name is near, else ""."""
    last = name.rsplit(".", 1)[-1]
    leaves = {k: k.rsplit(".", 1)[-1] for k in known}
    same = [k for k in known if leaves[k] == last]
    near = difflib.get_close_matches(name, known, 1, 0.6) or [
        k
        for leaf in difflib.get_close_matches(last, leaves.values(), 1, 0.7)
        for k in known
        if leaves[k] == leaf
    ]
    if same:
        near = [max(same, key=lambda k: difflib.SequenceMatcher(None, name, k).ratio())]
    return f", did you mean {near[0]}?" if near else ""
