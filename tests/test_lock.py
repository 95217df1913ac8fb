# SPDX-License-Identifier: Apache-2.0
"""One job at a time in a workdir, on a disk and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_config import ROOT
from test_hosts import free_port

from di_star_jax import lock
from di_star_jax.errors import UserError

HOLD = """
import sys, time
from di_star_jax import lock
lock.RENEWAL = 0.2
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
# As another machine sees it, which does not see the holder's process.
ELSEWHERE = "from di_star_jax import lock\nlock._machine = lambda: 'another'\nlock.LIMIT = 3.0\n"


def holder(workdir, before=""):
    """A process that holds a workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", before + HOLD, str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


def until_held(process):
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "held\n":
            return said
    raise AssertionError(process.stderr.read())


@pytest.fixture
def running(tmp_path):
    process = holder(tmp_path)
    until_held(process)
    yield process
    process.kill()
    process.wait()


@pytest.mark.case("faults 28")
def test_a_second_job_is_refused_and_told_who_holds_the_workdir(tmp_path, running):
    said = f"in use by another job: host .*, pid {running.pid}, since 20"
    with pytest.raises(UserError, match=said), lock.held(tmp_path):
        pass
    assert running.poll() is None and (tmp_path / lock.FILE).exists()


@pytest.mark.case("faults 28")
def test_a_killed_jobs_workdir_is_taken_over_at_once_and_left_without_a_file(
    tmp_path, running, capsys
):
    running.send_signal(signal.SIGKILL)
    running.wait()
    began = time.time()
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert time.time() - began < 10 and not (tmp_path / lock.FILE).exists()
    assert "takes over from a job that has died: host" in capsys.readouterr().out


@pytest.mark.case("faults 28")
def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path):
    mine = lock._myself()
    (tmp_path / lock.FILE).write_text(lock._text(mine | {"started": "1", "token": "old"}))
    with lock.held(tmp_path):
        pass


@pytest.mark.case("faults 28")
def test_a_file_that_is_not_whole_is_taken_over_after_a_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LIMIT", 0.2)
    monkeypatch.setattr(lock, "_SETTLED", 0.1)
    for content in ("", "[]", "\0\0"):
        (tmp_path / lock.FILE).write_text(content)
        with lock.held(tmp_path):
            pass


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The address of a bucket on a server of this machine."""
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    script = ROOT / "tests" / "bucket_server.py"
    server = subprocess.Popen([sys.executable, str(script), str(port), str(log)])
    usual = {name: os.environ.get(name) for name in ("STORAGE_EMULATOR_HOST",)}
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://localhost:{port}"
    for _ in range(100):
        if log.exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    yield "gs://bkt"
    server.kill()
    server.wait()
    for name, value in usual.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.case("faults 28")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_on_another_machine_a_job_that_lives_is_refused_and_one_that_died_waited_for(
    tmp_path, request, where
):
    workdir = tmp_path if where == "disk" else f"{request.getfixturevalue('bucket')}/run"
    first = holder(workdir)
    until_held(first)
    try:
        second = holder(workdir, ELSEWHERE)
        out, error = second.communicate(timeout=30)
        assert "UserError" in error and f"pid {first.pid}" in error and "held" not in out
    finally:
        first.kill()
        first.wait()
    third = holder(workdir, ELSEWHERE)
    said = until_held(third)
    third.kill()
    third.wait()
    assert said[0].startswith("waiting up to 3 s to see whether another job still uses")
    assert said[1].startswith("takes over from a job that has died: host")


@pytest.mark.slow
@pytest.mark.case("faults 28")
def test_of_two_that_take_over_in_a_bucket_one_has_it(bucket):
    dead = holder(f"{bucket}/raced")
    until_held(dead)
    dead.kill()
    dead.wait()
    both = [holder(f"{bucket}/raced") for _ in range(2)]
    time.sleep(12)
    ended = [process for process in both if process.poll() is not None]
    for process in both:
        process.kill()
        process.wait()
    assert len(ended) == 1 and "in use by another job" in ended[0].stderr.read()


@pytest.mark.case("faults 28")
def test_a_holder_whose_workdir_was_taken_meanwhile_ends(tmp_path, running):
    other = lock._myself() | {"token": "another", "host": "elsewhere"}
    (tmp_path / lock.FILE).write_text(lock._text(other))
    assert running.wait(timeout=10) == 2
    assert "another job has taken" in running.stderr.read()
    assert json.loads((tmp_path / lock.FILE).read_text())["token"] == "another"
