# SPDX-License-Identifier: Apache-2.0
"""Two real processes with four CPU devices each, over loopback, against one process with eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_config import ROOT
from test_train import UNET, write_pipeline

from di_star_jax import assembly, sharding, step
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
folder, workdir = map(pathlib.Path, sys.argv[1:])
changes = {"objective.name": "kl", "assistant.sharing": "x_t"}
changes |= {"assistant.warmup_steps": 0, "train.steps": 2, "train.save_every": 2, "mesh.fsdp": 4}
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(workdir of a run by two processes, workdir of the same run by one)."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    port = free_port()
    for processes in (
        [start(RUN, (folder, two), devices=4, port=port, index=i) for i in range(2)],
        [start(RUN, (folder, one), devices=8)],
    ):
        for process in processes:
            out, _ = process.communicate(timeout=500)
            assert process.returncode == 0, out[-3000:]
    return two, one


def state_of(workdir, mesh):
    unet = pipeline.abstract_model(UNET)
    settings = step.AdamW(
        lr_warmup_steps=10, b1=0.0, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=10.0
    )
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
    two, one = runs
    parts = [json.loads((two / f"seen_{i}.json").read_text()) for i in range(2)]
    whole = json.loads((one / "seen_0.json").read_text())
    held_out = whole.pop(0)  # which all processes score together
    assert [part.pop(0) for part in parts] == [held_out, held_out]
    assert [a + b for a, b in zip(*parts)] == whole
    assert all(len(texts) == 4 for part in parts for texts in part)


@pytest.mark.slow
def test_two_processes_score_their_generator_as_one_does(runs):
    two, one = (json.loads((run / "before_after.json").read_text()) for run in runs)
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-4, abs=1e-6)
    assert one["before"] != one["after"]


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


@pytest.mark.slow
@pytest.mark.case("first hour 7")
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
    assert [process.returncode for process in both] == [143, 143], said
    with checkpoint.existing(workdir) as store:
        saved = store.latest_step()
    assert f"stopped at step {saved}; the same command goes on" in said[0]


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
