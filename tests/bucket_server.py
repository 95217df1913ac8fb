# SPDX-License-Identifier: Apache-2.0
"""A bucket's server on this machine, for tests: gcp-storage-emulator, with a log of requests.

    python tests/bucket_server.py PORT LOG [FAILING]

A line of LOG per request: method, path, bytes of its body. Until the time that the file FAILING
holds, every other answer is 503.

The emulator ignores conditions on generations. Added here is what the service documents: 412 where
another generation than ifGenerationMatch is there (0: none), 304 where that of ifGenerationNotMatch
is, and the generation in a header of what is downloaded.
"""

import functools
import itertools
import os
import sys
import time
from http import HTTPStatus, server
from pathlib import Path

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import HANDLERS, RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bkt"


def insert(request, response, storage, *args):
    """An upload, only where the generation is the one that is asked for."""
    wanted = request.query.get("ifGenerationMatch")
    if wanted:
        try:
            now = storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])
        except NotFound:
            now = {"generation": "0"}
        if now["generation"] != wanted[0]:
            _ = request.data  # else the client finds its connection cut
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    objects.insert(request, response, storage, *args)


def get(request, response, storage, *args):
    """An object or its content, with its generation."""
    try:
        now = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = now["generation"]
        if request.query.get("ifGenerationNotMatch") == [now["generation"]]:
            response.status = HTTPStatus.NOT_MODIFIED
            return
    except NotFound:
        pass
    objects.get(request, response, storage, *args)


class Handler(RequestHandler):
    count = itertools.count()
    log = failing = None

    def parse_request(self):
        if not super().parse_request():
            return False
        size = self.headers.get("Content-Length") or 0
        self.log.write(f"{self.command} {self.path} {size}\n")
        self.log.flush()
        if self._fails():
            self.rfile.read(int(size))
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return False
        return True

    def _fails(self):
        if not self.failing or not os.path.exists(self.failing):
            return False
        until = float(Path(self.failing).read_text() or 0)
        return time.time() < until and next(self.count) % 2 == 1


def main(port: str, log: str, failing: str = "") -> None:
    for _, handlers in HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = {objects.insert: insert, objects.get: get}.get(handler, handler)
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    Handler.failing = failing
    at = ("localhost", int(port))
    with Path(log).open("a", encoding="utf-8") as Handler.log:
        server.HTTPServer(at, functools.partial(Handler, storage)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
