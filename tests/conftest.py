# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test; set before jax is imported."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported
# Compiling is most of what the tests do; without LLVM's slow passes it takes half as long.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_optimization_level=0",
    ]
)

# What one process has compiled the other finds, and so does a later run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"


# Those that take longest, first: the last file to begin should be a short one.
LONGEST = """
    train benchmark hosts readme step evaluate objectives launch single by_hand main convert
    adapters export fields plan lora wheel clip_rewards remat reward_run sd15 optimum hub
    preference unet shapes
"""


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))


def pytest_collection_finish():
    """What has been imported is no garbage, and there is a lot of it to look through for some."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # tracing makes so many objects that all were looked at often


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n N a file's tests go to one process: what they share is made once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


class Bucket:
    """gs://bkt, served on this machine. Attribute: log, of requests: (method, path, bytes)."""

    url = "gs://bkt"

    def __init__(self, folder, port):
        self._log = folder / "requests"
        self._failing = folder / "failing"
        script = Path(__file__).parent / "bucket_server.py"
        command = [sys.executable, str(script), str(port), str(self._log), str(self._failing)]
        with (folder / "said").open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)
        while socket.socket().connect_ex(("localhost", port)):
            assert self.process.poll() is None, (folder / "said").read_text()
            time.sleep(0.05)

    @property
    def log(self):
        lines = (line.split(" ") for line in self._log.read_text().splitlines())
        return [(method, path, int(size)) for method, path, size in lines]

    def forget(self):
        """Empties the log."""
        os.truncate(self._log, 0)

    def fail(self, seconds):
        """Half of the answers, from now on and for so long."""
        self._failing.write_text(str(time.time() + seconds))


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
    """A bucket for all tests of a process; each takes a folder of its own there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    served = Bucket(tmp_path_factory.mktemp("bucket"), port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield served
    served.process.send_signal(signal.SIGTERM)
    served.process.wait()
