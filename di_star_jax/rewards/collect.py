# SPDX-License-Identifier: Apache-2.0
"""Asks which of two pictures of a caption you like better; a reward is trained on the answers.

    di-star evaluate --checkpoint=runs/shapes --prompts=prompts.txt --num_prompts=300 --samples=2 \\
        --metrics=saturation --out=runs/drawn              # two pictures of each of 300 prompts
    di-star collect --samples=runs/drawn --out=runs/taste  # a page on this machine; Ctrl-C ends it
    di-star reward --config=reward:shapes --config.data.pairs=runs/taste --workdir=runs/reward

Pictures come from a folder that `sample` (with --num=2 or more) or `evaluate` has left. Open the
address that is printed; on another machine, after `ssh -L 8765:127.0.0.1:8765 MACHINE`. A click or
an arrow key chooses; about 200 choices make a reward. Each is in --out at once: pairs.csv, with the
columns caption, image_0, image_1 and label (0, 1 or tie, which is better), and the pictures. The
same command goes on with the pairs that are left.
"""

import contextlib
import http.server
import json
import secrets
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

from absl import flags

from di_star_jax.command import run as run_command
from di_star_jax.errors import UserError
from di_star_jax.rewards.collection import (
    Collection,
    Pair,
    named,
    opened,
    pairs_of,
    read_samples,
)
from di_star_jax.storage import buckets

ENOUGH = 200  # choices, about, that make a reward
_HOSTS = ("127.0.0.1", "localhost")
_LABELS = {"first": "0", "second": "1", "tie": "tie"}
_ACTS = (*_LABELS, "skip", "undo")
_LONGEST = 1000  # bytes of a request's body
_PATIENCE = 30.0  # seconds that a connection may be silent
# The page holds all its parts, asks nobody else, and stands in nobody's frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(http.server.ThreadingHTTPServer):
    """Serves the page to this machine alone. To be used with `with`.

    Args: collection, to add to; port, 0 for a free one. Raises: UserError for a port that cannot
      be had.

    Attributes: lock, of the collection. url. token: what the page has, and another website has not.
    """

    def __init__(self, collection: Collection, port: int):
        self.collection = collection
        self.lock = threading.Lock()
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UserError(
                f"--port={port} cannot be had ({error.strerror}); give another, or 0 for a free one"
            ) from None
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *of: object) -> None:
        """Says what is wrong here, and not that a browser has closed its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*of)


class _Refused(Exception):
    """What a request is answered that cannot be served. Args: status; text."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = _PATIENCE

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is for what the user needs to know."""

    def _answer(self, respond: Callable[[], tuple[bytes, str]]) -> None:
        status, kind = HTTPStatus.OK, "application/json"
        try:
            if not _is_here(self.headers.get("Host", "")):
                raise _Refused(HTTPStatus.FORBIDDEN, "this page is served to this machine alone")
            content, kind = respond()
        except _Refused as refused:
            status, text = refused.args
            content = _json({"error": text})
        except OSError as error:  # such as a full disk
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            content = _json({"error": f"not kept: {error.strerror or error}"})
        self._send(status, content, kind)

    def _send(
        self,
        status: HTTPStatus,
        content: bytes,
        kind: str,
    ) -> None:
        self.send_response(status)
        lasting = kind == "image/png"  # its name is its content's
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "private, max-age=86400, immutable" if lasting else "no-store",
        }
        for name, value in (headers | _HEADERS).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _get(self) -> tuple[bytes, str]:
        path = self.path.partition("?")[0]
        if path == "/":
            return _page(self.server.token), "text/html; charset=utf-8"
        with self.server.lock:
            if path == "/state":
                return _json(state_of(self.server.collection)), "application/json"
            file = self.server.collection.picture(path.removeprefix("/"))
        if file is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return file.read_bytes(), "image/png"

    def _post(self) -> tuple[bytes, str]:
        if not secrets.compare_digest(
            self.headers.get("X-Token", "").encode(), self.server.token.encode()
        ):
            raise _Refused(HTTPStatus.FORBIDDEN, "the page is of an earlier start; load it again")
        act, turn = _asked(self._body())
        with self.server.lock:
            collection = self.server.collection
            if turn != collection.turn or (act != "undo" and not collection.coming()):
                raise _Refused(HTTPStatus.CONFLICT, "another page was faster")
            _do(collection, act)
            return _json(state_of(collection)), "application/json"

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > _LONGEST:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected {_LONGEST} bytes at most"
            )
        return self.rfile.read(int(length))


def _is_here(host: str) -> bool:
    """Whether a request was made to this machine by name: a website whose own name leads here, by
    its DNS, sends that.
    """
    name, _, port = host.partition(":")
    return name in _HOSTS and (not port or port.isdecimal())


def _asked(body: bytes) -> tuple[str, int]:
    """(act, turn). Raises: _Refused."""
    try:
        asked = json.loads(body)
        act, turn = asked["act"], asked["turn"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Refused(HTTPStatus.BAD_REQUEST, "expected {act, turn} as JSON") from None
    if act not in _ACTS or not isinstance(turn, int):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"expected act to be one of {', '.join(_ACTS)}")
    return act, turn


def _do(collection: Collection, act: str) -> None:
    if act in _LABELS:
        collection.choose(_LABELS[act])
    elif act == "skip":
        collection.skip()
    else:
        collection.undo()


def state_of(collection: Collection) -> dict:
    """What the page shows."""
    pairs = collection.coming()
    labels = [choice.label for choice in collection.choices]
    return {
        "turn": collection.turn,
        "caption": pairs[0].caption if pairs else None,
        "pictures": _urls(pairs[:1]),
        "next": _urls(pairs[1:]),
        "judged": len(labels),
        "total": collection.total,
        "enough": ENOUGH,
        "skipped": len(collection.skipped),
        "can_undo": collection.can_undo,
        "counts": {name: labels.count(label) for name, label in _LABELS.items()},
    }


def _urls(pairs: list[Pair]) -> list[str]:
    return [f"/{name}" for pair in pairs for name in (pair.image_0, pair.image_1)]


def _json(content: dict) -> bytes:
    return json.dumps(content).encode("utf-8")


def _page(token: str) -> bytes:
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return page.replace("__TOKEN__", token, 1).encode("utf-8")


# Not by log.say, which would take the accelerator from a run that trains meanwhile.
def _say(text: str) -> None:
    print(text, flush=True)


def _summary(collection: Collection, out: str) -> str:
    """What was done, and what comes next, in one line."""
    count = len(collection.choices)
    done = f"{count} of {collection.total} pairs judged in {out}"
    if not count:
        return f"{done}; the same command goes on"
    pairs = f"--config.data.pairs={shlex.quote(out)}"
    return (
        f"{done}; next: di-star reward --config=reward:shapes {pairs} --workdir=runs/reward   # of "
        "larger pictures --config=reward"
    )


def _serve_until_interrupted(server: Server) -> None:
    """Ctrl-C is the way to end here, and no accident: not what `command` does at it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of nohup
        signal.signal(signal.SIGINT, _interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    args = flags.FLAGS
    samples = buckets.local(args.samples)
    _say(f"reading the pictures of {args.samples}")
    pictures = named(read_samples(samples))
    pairs = pairs_of(pictures, args.seed)
    with (
        opened(args.out, pictures, pairs) as collection,
        Server(collection, args.port) as server,
    ):
        _say(
            f"{len(collection.choices)} of {collection.total} pairs judged, about {ENOUGH} make a "
            f"reward; open {server.url} in a browser, Ctrl-C here ends"
        )
        _serve_until_interrupted(server)
        with server.lock:  # a choice is kept to its end
            _say(_summary(collection, args.out))


if __name__ == "__main__":
    flags.DEFINE_string(
        "samples",
        None,
        "Folder of pictures, as `sample` or `evaluate` leaves it; here or in a bucket.",
    )
    flags.DEFINE_string("out", None, "Folder for the choices, new or one to go on with.")
    flags.DEFINE_integer(
        "port",
        8765,
        "Port of the page; 0 takes a free one.",
        lower_bound=0,
        upper_bound=65535,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the pairs' order and of their sides.")
    flags.mark_flags_as_required(["samples", "out"])
    run_command(main)
