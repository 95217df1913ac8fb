# SPDX-License-Identifier: Apache-2.0
"""A command: its flags, its help, and how it ends."""

import inspect
import os
import re
import select
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from di_star_jax import config
from di_star_jax.errors import DONE, INTERRUPTED, UserError, exit_on_user_error, suggest
from di_star_jax.hosts import keep_compiled

_GRACE = 3.0  # seconds for `with` blocks to end in
_HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")


def run(main: Callable[[], None]) -> None:
    """Runs a command: absl's flags, then `main`, which reads them.

    A user's mistake ends it with one line and exit code 2, Ctrl-C with one line and 130. What it
    compiles is kept for the next start of any command.
    """
    from absl import app

    leave_at_interrupt()
    try:
        app.run(command(main), flags_parser=exit_on_user_error(parse))
    except KeyboardInterrupt:
        leave()


def command(main: Callable[[], None]) -> Callable[[list[str]], None]:
    """`main` as absl calls it, with what is left of the command line, which must be nothing.

    Quiets the libraries' information lines: Orbax has one for every file.
    """
    from absl import logging

    def checked(argv):
        logging.set_verbosity(logging.WARNING)
        if argv[1:]:
            raise UserError(f"got {argv[1]!r}, expected flags only; write --name=value")
        keep_compiled()
        main()

    return exit_on_user_error(checked)


# Ctrl-C.


def leave() -> NoReturn:
    """Ends the process with one line.

    At once: the threads of a compiler that is still at work crash in an orderly exit.
    """
    print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def leave_at_interrupt() -> None:
    """Lets Ctrl-C end the process even while a compiler runs, which does not see it for minutes.

    The first leaves `with` blocks a moment to end in, a second does not wait. Where a handler of
    somebody else's is in place, as during a run, nothing is done.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while os.read(read, 1) != bytes([signal.SIGINT]) or not _is_ours():
            pass
        select.select([read], [], [], _GRACE)
        leave()

    threading.Thread(target=watch, daemon=True).start()


def _is_ours() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Flags.


def parse(argv: list[str]) -> list[str]:
    """absl's flags in our words. Returns: what is left of the command line.

    Prints the help and exits where it is asked for. Raises: UserError.
    """
    from absl import flags

    if any(arg in _HELP for arg in argv[1:]):
        print(help_text(argv))
        sys.exit(DONE)
    if takes_config():
        argv = config.with_file(argv)
        sys.argv = list(argv)  # where ml_collections looks for the fields
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown(error.flagname, config.given(argv))) from None
    except flags.Error as error:
        raise UserError(_mistake(str(error), config.given(argv))) from None


def takes_config() -> bool:
    """Whether --config is a file whose fields are flags too."""
    from absl import flags

    return "config" in flags.FLAGS and hasattr(type(flags.FLAGS["config"]), "override_values")


def _unknown(name: str, spec: str | None) -> str:
    from absl import flags

    if takes_config():
        known = config.fields(config.load_config(*(spec or "sdxl").split(":", 1)))
        field = suggest(name, list(known)).removeprefix(", did you mean ").removesuffix("?")
        if "." in name and field:
            return f"unknown flag --{name}, did you mean --config.{field}?"
    return f"unknown flag --{name}{suggest(name, list(flags.FLAGS)) or '; --help lists all'}"


def _mistake(text: str, spec: str | None) -> str:
    """absl's message in our words. Args: text; spec, of --config."""
    missing = _missing()
    if "must have a value other than None" in text and missing:
        return "; ".join(f"no --{name}, {_small(what)}" for name, what in missing.items())
    no_value = re.match(r"Missing value for flag -*(\S+)", text)
    if no_value:
        return f"--{no_value.group(1).rstrip('.')} without a value; write --name=value"
    found = re.match(r"flag --([^=\s]+)=(.*?): ", text, re.DOTALL)
    if not found:
        return text
    name, value = found.groups()
    if name.startswith("config."):
        what = config.expected(spec or "sdxl", name.removeprefix("config."))
        return f"--{name}={value}: expected {what}"
    return f"--{name}={value}: expected {_expected(name, value)}"


def _small(sentence: str) -> str:
    """A sentence as a part of one."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")


def _missing() -> dict[str, str]:
    """{name: its help} of flags that must be given and are not."""
    from absl import flags

    return {
        name: plain(flags.FLAGS[name].help)
        for name in flags.FLAGS
        if flags.FLAGS[name].value is None
        and any("other than None" in check.message for check in flags.FLAGS[name].validators)
    }


def _expected(name: str, value: str) -> str:
    """What a flag takes, in words."""
    from absl import flags

    if name not in flags.FLAGS:
        return "another value"
    parser = flags.FLAGS[name].parser
    choices = getattr(parser, "enum_values", None)
    if choices:
        return f"one of {', '.join(choices)}{suggest(value, choices)}"
    if parser.flag_type() == "bool":
        return "true or false"
    return parser.syntactic_help or parser.flag_type()


# Help.


def help_text(argv: list[str]) -> str:
    """What the command is, its flags, and with --config presets and fields."""
    from absl import flags

    main = sys.modules["__main__"]
    lines = [inspect.cleandoc(main.__doc__ or ""), "", "flags:"]
    for name in own_flags():
        lines += _flag_lines(flags.FLAGS[name])
    spec = config.given(argv)
    if spec is None and takes_config():
        lines += ["", "--config=shapes --help lists the presets and fields of a config."]
    elif spec is not None:
        lines += ["", config.describe(*spec.split(":", 1))]
    return "\n".join(lines)


def own_flags() -> list[str]:
    """Names of the flags that this package defines, in order; absl and others have theirs."""
    from absl import flags

    of_modules = flags.FLAGS.flags_by_module_dict()
    ours = [sys.argv[0], *(name for name in of_modules if name.startswith("di_star_jax"))]
    return [flag.name for module in ours for flag in of_modules.get(module, [])]


def _flag_lines(flag: Any) -> list[str]:
    choices = getattr(flag.parser, "enum_values", None)
    takes = f" One of {', '.join(choices)}." if choices else ""
    default = "" if flag.default in (None, [], "") else f" Default: {_printed(flag.default)}."
    indent = " " * 6
    text = textwrap.wrap(
        plain(flag.help) + takes + default, 92, initial_indent=indent, subsequent_indent=indent
    )
    return [f"  --{flag.name}", *text]


def plain(text: str) -> str:
    """A flag's help without what absl adds to it for lists and choices."""
    return re.sub(r"^<[^>]*>: |;\s*repeat this option to specify a list of values", "", text)


def _printed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
