# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hub on this machine, of what an upload asks it for.

    with serving() as hub: ...

Repositories are made, files are announced, those of weights are put as Git LFS objects, and a
commit names all of them: the addresses that huggingface_hub calls without xet.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http import server

TOKEN = "hf_test"


class Hub:
    """What a stand-in holds. address: of it. repositories: by name, as of `Repository`.

    allowed: whether its token may write. failing: parts of paths that are answered with 403.
    asked: "METHOD /path" of all requests.
    """

    def __init__(self):
        self.address = ""
        self.repositories = {}
        self.failing = ()
        self.asked = []
        self.objects = {}  # of LFS, by sha256


class Repository:
    """visibility: private or public. files: {path: content} of the last commit."""

    def __init__(self, visibility):
        self.visibility = visibility
        self.files = {}


class _Handler(server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args):
        pass

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refused(self, path):
        """Whether a request is answered with an error, which it is then."""
        self.hub.asked.append(f"{self.command} {path}")
        if any(part in path for part in self.hub.failing):
            self._answer({"error": "You don't have the rights to do this"}, 403)
            return True
        if not path.startswith("/lfs/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
            return True
        return False

    def do_GET(self):
        path = self.path.partition("?")[0]
        if self._refused(path):
            return
        name = path.removeprefix("/api/models/").removesuffix("/revision/main")
        if name not in self.hub.repositories:
            self._answer({"error": "Repository not found"}, 404)
            return
        private = self.hub.repositories[name].visibility == "private"
        self._answer({"id": name, "private": private, "sha": "0" * 40, "siblings": []})

    def do_PUT(self):
        content = self._body()
        if self._refused(self.path):
            return
        digest = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == digest
        self.hub.objects[digest] = content
        self._answer({})

    def do_POST(self):
        content = self._body()
        path = self.path.partition("?")[0]
        if self._refused(path):
            return
        if path.endswith("/commit/main"):
            self._commit(path, [json.loads(line) for line in content.splitlines()])
            return
        asked = json.loads(content)
        if path == "/api/repos/create":
            self._create(asked)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            self._answer({"files": [self._announced(file) for file in asked["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"objects": [self._object(each) for each in asked["objects"]]})
        else:
            self._answer({"error": f"the stand-in has no {path}"}, 404)

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            self._answer(answer | {"error": "You already created this model repo"}, 409)
            return
        self.hub.repositories[name] = Repository(asked["visibility"])
        self._answer(answer)

    def _announced(self, file):
        mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _object(self, asked):
        upload = {"href": f"{self.hub.address}/lfs/{asked['oid']}", "header": {}}
        return asked | {"actions": {"upload": upload}}

    def _commit(self, path, lines):
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        files = self.hub.repositories[name].files
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = {"commitOid": "0" * 40, "commitUrl": f"{self.hub.address}/{name}/commit/0"}
        self._answer(commit)


@contextlib.contextmanager
def serving():
    """A `Hub` that answers until the end."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        hub.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield hub
        http.shutdown()
