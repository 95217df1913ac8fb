# SPDX-License-Identifier: Apache-2.0
"""Two real processes with four CPU devices each, over loopback, against one process with eight."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from test_config import ROOT
from test_train import UNET, write_pipeline

from di_star_jax import assembly, errors, hosts, sharding, step
from di_star_jax.pipelines import folder as pipeline
from di_star_jax.storage import checkpoint

# A run of two steps as `main` makes it, that notes how many prompts this process tokenises at a
# time.
RUN = """
import json, os, pathlib, sys
from di_star_jax import assembly, hosts, train
hosts.connect(os.environ)
import jax
from test_train import config_for
seen, plain = [], assembly.Parts.tokenize
assembly.Parts.tokenize = lambda parts, texts: seen.append(list(texts)) or plain(parts, texts)
folder, workdir = map(pathlib.Path, sys.argv[1:3])
changes = {"objective.name": "kl", "assistant.sharing": "x_t"}
changes |= {"assistant.warmup_steps": 0, "train.steps": 2, "train.save_every": 2, "mesh.fsdp": 4}
if "scored" not in sys.argv:
    changes["eval.prompts"] = ""
train.run(config_for(folder, **changes), str(workdir))
(workdir / f"seen_{jax.process_index()}.json").write_text(json.dumps(seen))
"""
# Two processes meet; then the second dies and the first waits for it.
DEATH = """
import os, time
from di_star_jax import hosts
hosts.SILENCE = 10
hosts.connect(os.environ)
import jax
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("met")
print("met", flush=True)
if jax.process_index() == 1:
    os._exit(1)
multihost_utils.sync_global_devices("never")
"""


def start(script, arguments, *, devices, port=None, index=None):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    if port:
        env |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def runs_by_two_and_one(tmp_path_factory, *scored):
    """(workdir of a run by two processes, workdir of the same run by one)."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    port = free_port()
    for processes in (
        [start(RUN, (folder, two, *scored), devices=4, port=port, index=i) for i in range(2)],
        [start(RUN, (folder, one, *scored), devices=8)],
    ):
        for process in processes:
            out, _ = process.communicate(timeout=500)
            assert process.returncode == 0, out[-3000:]
    return two, one


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return runs_by_two_and_one(tmp_path_factory)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Runs that score held-out prompts before and after."""
    return runs_by_two_and_one(tmp_path_factory, "scored")


def prompts_seen(workdirs):
    """(of both processes, of the one)."""
    two, one = workdirs
    parts = [json.loads((two / f"seen_{i}.json").read_text()) for i in range(2)]
    return parts, json.loads((one / "seen_0.json").read_text())


def state_of(workdir, mesh):
    unet = pipeline.abstract_model(UNET)
    settings = step.AdamW(lr_warmup_steps=10, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.01)
    optimizers = step.Optimizers(step.adamw(1e-4, settings), step.adamw(1e-4, settings))
    abstract = assembly.abstract_state(unet, optimizers, mesh)
    store = checkpoint.existing(workdir)
    state = store.restore(store.latest_step(), abstract)
    store.close()
    return state


@pytest.mark.slow
def test_two_processes_make_the_step_of_one_and_their_checkpoint_restores_anywhere(runs):
    meshes = [sharding.make_mesh(1, 1, devices=jax.devices()[:1]), sharding.make_mesh(2, 2, 2)]
    states = [state_of(workdir, mesh) for workdir, mesh in zip(runs, meshes)]
    assert int(states[0].step) == 2
    start_of = pipeline.load_model(
        runs[0] / "diffusers" / "unet"
    ).params  # the average of after the step
    for a, b in zip(*(jax.tree.leaves(state) for state in states)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
    for a, b in zip(jax.tree.leaves(states[0].ema), jax.tree.leaves(start_of)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_each_process_reads_its_own_prompts_only(runs):
    parts, whole = prompts_seen(runs)
    assert [a + b for a, b in zip(*parts)] == whole
    assert all(len(texts) == 4 for part in parts for texts in part)


@pytest.mark.long
def test_two_processes_score_their_generator_as_one_does(scored):
    two, one = (json.loads((run / "before_after.json").read_text()) for run in scored)
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-4, abs=1e-6)
    assert one["before"] != one["after"]
    parts, whole = prompts_seen(scored)
    held_out = whole.pop(0)  # which all processes score together
    assert [part.pop(0) for part in parts] == [held_out, held_out]
    assert [a + b for a, b in zip(*parts)] == whole


# As RUN, for ever.
ENDLESS = """
import os, pathlib, sys
from di_star_jax import hosts, train
hosts.connect(os.environ)
from test_train import config_for
folder, workdir = map(pathlib.Path, sys.argv[1:])
changes = {"objective.name": "kl", "assistant.sharing": "x_t", "eval.prompts": "", "mesh.fsdp": 4}
changes |= {"assistant.warmup_steps": 0, "train.steps": 100_000, "train.save_every": 100_000}
train.run(config_for(folder, **changes), str(workdir))
"""


@pytest.mark.long
@pytest.mark.case("first hour 7", "faults 27")
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    folder, workdir = write_pipeline(tmp_path / "pipeline"), tmp_path / "run"
    port = free_port()
    both = [start(ENDLESS, (folder, workdir), devices=4, port=port, index=i) for i in range(2)]
    try:
        for line in both[0].stdout:
            if line.startswith("step "):
                break
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [75, 75], said
    with checkpoint.existing(workdir) as store:
        saved = store.latest_step()
    assert f"stopped at step {saved}; the same command goes on" in said[0]


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends_within_a_minute():
    port = free_port()
    first, second = (start(DEATH, (), devices=1, port=port, index=i) for i in range(2))
    assert second.wait(timeout=120) == 1
    died = time.time()
    try:
        out, _ = first.communicate(timeout=90)
    finally:
        first.kill()
    assert "met" in out and first.returncode != 0
    assert time.time() - died < 40  # hosts.SILENCE is 10 here, and 30 in a run


# Two processes that nobody told of each other but the variables of a launcher.
MEET = """
import os
from di_star_jax import hosts
hosts.connect(os.environ)
import jax
print(jax.process_index(), "of", jax.process_count(), flush=True)
"""


def launched(script, *each, **common):
    """Processes with the variables of a launcher. Returns: of each (exit code, what it printed)."""
    common |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | common | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for variables in each
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out) for process, out in zip(processes, said)]


def test_two_slices_of_one_host_each_meet_by_what_gke_sets():
    common = {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    slices = [{"MEGASCALE_SLICE_ID": str(i)} for i in range(2)]
    assert launched(MEET, *slices, **common) == [(0, "0 of 2\n"), (0, "1 of 2\n")]


# As on a TPU: its devices are there, and JAX has found them.
ON_TPU = """
import os
from di_star_jax import hosts
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
hosts.tpus_here = lambda env: True
del os.environ["TPU_SKIP_MDS_QUERY"]  # which JAX sets where it finds none
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of each host: its path begins with the host's number."""

    endpoints = "127.0.0.1,127.0.0.1"

    def do_GET(self):  # noqa: N802, the library's name
        _, number, *_, key = self.path.split("/")
        values = {"agent-worker-number": number, "worker-network-endpoints": self.endpoints}
        self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
        self.end_headers()
        self.wfile.write(values.get(key, "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    """The address of a metadata server."""
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def test_hosts_of_a_tpu_meet_by_its_metadata_alone(metadata):
    both = [{"GCE_METADATA_IP": f"{metadata}/{i}"} for i in range(2)]
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    assert launched(ON_TPU + MEET, *both, **port) == [(0, "0 of 2\n"), (0, "1 of 2\n")]


def test_the_only_host_of_a_tpu_runs_alone(metadata, monkeypatch):
    monkeypatch.setattr(hosts, "tpus_here", lambda env: True)
    env = {"GCE_METADATA_IP": f"{metadata}/0"}
    assert hosts.is_one_of_several(env)
    monkeypatch.setattr(Metadata, "endpoints", "127.0.0.1")
    assert not hosts.is_one_of_several(env)
    assert not hosts.is_one_of_several({"GCE_METADATA_IP": "localhost:1"})


HURRIED = "from di_star_jax import hosts\nhosts.PATIENCE, hosts.HURRY = 2, 0.5\n"


@pytest.mark.case("faults 23")
@pytest.mark.parametrize(
    "address, index, cause",
    [
        ("localhost:1", 1, "nothing answers at localhost:1; start process 0 there"),
        ("nowhere.invalid:8476", 1, "no machine is called nowhere.invalid; check the name"),
        ("localhost:{port}", 0, "not all have come to the first one; see the others' logs"),
    ],
)
def test_processes_that_do_not_meet_end_with_one_line_in_the_time_that_is_said(
    address, index, cause
):
    env = {
        "JAX_COORDINATOR_ADDRESS": address.format(port=free_port()),
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    began = time.time()
    [(code, said)] = launched(HURRIED + MEET, env)
    assert code == errors.LOST and time.time() - began < 30
    waits, error = said.splitlines()
    assert waits.startswith("waiting for the other processes at ") and "up to 2 s" in waits
    assert error.startswith("error: the 2 processes of this run did not meet within 2 s")
    assert cause in error
