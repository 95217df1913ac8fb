# SPDX-License-Identifier: Apache-2.0
"""A run that goes on with other devices or processes: the same prompts, draws and values."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_hosts import free_port, start, state_of
from test_train import write_pipeline

from di_star_jax import sharding
from di_star_jax.storage import checkpoint

# Runs of the same three steps one after the other, each in its workdir and up to its step.
RUN = """
import json, os, pathlib, sys
from di_star_jax import assembly, hosts, train
hosts.connect(os.environ)
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv.pop())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from test_train import config_for
folder, *runs = sys.argv[1:]
seen, plain = [], assembly.Parts.tokenize
assembly.Parts.tokenize = lambda parts, texts: seen.append(list(texts)) or plain(parts, texts)
for run in runs:
    workdir, steps = run.split(":")
    changes = {"objective.name": "kl", "assistant.sharing": "x_t", "eval.prompts": ""}
    changes |= {"assistant.warmup_steps": 0, "train.save_every": 100, "train.steps": int(steps)}
    changes |= {"mesh.fsdp": min(4, jax.device_count())}
    train.run(config_for(pathlib.Path(folder), **changes), workdir)
    pathlib.Path(workdir, f"seen_{jax.process_index()}.json").write_text(json.dumps(seen))
    seen.clear()
"""

COMPILED = Path(__file__).parent / ".pytest_cache" / "compiled"


def run(folder, *runs, devices, processes=1):
    port = free_port() if processes > 1 else None
    each = [
        start(RUN, (folder, *runs, COMPILED), devices=devices, port=port, index=i)
        for i in range(processes)
    ]
    for process in each:
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(pipeline, workdir of three steps by 8 devices, workdir of one step)."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    straight, first = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("first")
    run(folder, f"{straight}:3", f"{first}:1", devices=8)
    return folder, straight, first


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("devices, processes", [(4, 1), (2, 1), (1, 1), (4, 2)])
def test_a_run_goes_on_alike_with_other_devices_and_processes(begun, tmp_path, devices, processes):
    folder, straight, first = begun
    workdir = shutil.copytree(first, tmp_path / "run")
    run(folder, f"{workdir}:3", devices=devices, processes=processes)

    whole = json.loads((straight / "seen_0.json").read_text())
    parts = [json.loads((workdir / f"seen_{i}.json").read_text()) for i in range(processes)]
    assert [sum(each, []) for each in zip(*parts)] == whole[1:]

    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    ours, theirs = state_of(workdir, mesh), state_of(straight, mesh)
    assert int(ours.step) == int(theirs.step) == 3
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3]
    for a, b in zip(lines(workdir), lines(straight)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.long
def test_a_run_goes_on_to_the_very_same_state_with_the_same_devices(begun, tmp_path):
    folder, straight, first = begun
    workdir = shutil.copytree(first, tmp_path / "run")
    run(folder, f"{workdir}:3", devices=8)
    assert lines(workdir) == lines(straight)
    mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    ours, theirs = state_of(workdir, mesh), state_of(straight, mesh)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(a, b)
    with contextlib.closing(checkpoint.existing(workdir)) as store:
        assert store.latest_step() == 3
