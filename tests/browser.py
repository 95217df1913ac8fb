# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that is driven as a person does: clicks, keys and looks.

By its debugging protocol over two pipes (--remote-debugging-pipe), for which Python needs nothing.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0  # seconds; a dialog of the page's would keep it silent for ever
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8}


class Browser:
    """To be used with `with`. Args: folder, for its profile."""

    def __init__(self, folder):
        to_it, self._to = os.pipe()
        self._from, from_it = os.pipe()
        # It reads from 3 and writes to 4.
        wired = f'exec "$@" 3<&{to_it} 4>&{from_it}'
        options = [*_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", wired, "bash", PROGRAM, *options],
            pass_fds=(to_it, from_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._waiting = b""
        self._count = 0
        self._session = None
        (page,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def __call__(self, method, **params):
        """What a method of the protocol answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self._waiting:
            assert select.select([self._from], [], [], _PATIENCE)[0], "the browser does not answer"
            read = os.read(self._from, 2**20)
            assert read, "the browser is gone"
            self._waiting += read
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        self("Page.navigate", url=url)

    def value(self, script):
        """What an expression has in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script, seconds=60.0):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"not in {seconds} s: {script}; " + self.value(
                "document.body.innerText"
            )
            time.sleep(0.02)

    def press(self, key):
        text = key if len(key) == 1 else ""
        code = _CODES.get(key, ord(key.upper()) if text else 0)
        for kind in ("keyDown", "keyUp"):
            said = {"text": text} if text and kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **said)

    def click(self, selector):
        """With the mouse, in the middle of what is there."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1}
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def resize(self, width, height, *, is_phone=False, scheme="light"):
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )
        self("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file):
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))
