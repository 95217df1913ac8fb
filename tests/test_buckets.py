# SPDX-License-Identifier: Apache-2.0
"""Runs and files in a bucket, against gcp-storage-emulator on this machine."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from test_checkpoint import _abstract, _assert_same, _error, _params, _state
from test_config import ROOT
from test_train import Process, config_for, tensorboard, unet_of, write_pipeline

from di_star_jax import log, train
from di_star_jax.checks import check_workdir
from di_star_jax.errors import UserError
from di_star_jax.storage import buckets, checkpoint
from di_star_jax.storage.workdir import Workdir


def small(step):
    """A state of few files."""
    return {name: {"w": jnp.full((4,), float(step))} for name in ("generator", "ema")}


def uploads(bucket, below):
    """[(object, bytes)] of all uploads below a path of the bucket."""
    marker = "name=" + below.replace("/", "%2F")
    sent = [(path, size) for method, path, size in bucket.log if method in ("POST", "PUT")]
    return [
        (path.partition("name=")[2].partition("&")[0].replace("%2F", "/"), size)
        for path, size in sent
        if marker in path
    ]


def test_a_folder_is_put_whole_and_fetched_once_a_version(bucket, tmp_path):
    url = f"{bucket.url}/folder/out"
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "w.safetensors").write_bytes(bytes(6_000_000))
    (tmp_path / "out" / "config.json").write_text("{}")
    assert not buckets.committed(url)
    buckets.upload(tmp_path / "out", url)
    assert buckets.committed(url)
    here = buckets.fetch(url, ["*.json"])
    assert (here / "config.json").read_text() == "{}" and not (here / "unet").exists()
    assert buckets.fetch(url) == here and (here / "unet/w.safetensors").stat().st_size == 6_000_000
    bucket.forget()
    assert buckets.fetch(f"{url}/") and not any("alt=media" in path for _, path, _ in bucket.log)
    (tmp_path / "out" / "config.json").write_text('{"a": 1}')
    (tmp_path / "out" / "unet" / "w.safetensors").unlink()
    buckets.upload(tmp_path / "out", url)
    again = buckets.fetch(url)
    assert again != here and (again / "config.json").read_text() == '{"a": 1}'
    assert set(buckets.listing(url)) == {"config.json", "di_star_jax.json"}
    assert buckets.fetch(f"{url}/config.json").read_text() == '{"a": 1}'


@pytest.mark.case("faults 1")
def test_nothing_foreign_in_a_bucket_is_overwritten(bucket, tmp_path):
    url = f"{bucket.url}/foreign/out"
    (tmp_path / "a.json").write_text("{}")
    buckets.upload(tmp_path, url)
    buckets.write_text(f"{url}/notes.md", "mine")
    assert "it holds notes.md" in _error(buckets.upload, tmp_path, url)
    assert buckets.read_text(f"{url}/notes.md").text == "mine"
    buckets.remove(f"{url}/notes.md")
    buckets.upload(tmp_path, url)
    buckets.write_text(f"{url}/a.json", '{"edited": true}')
    assert "it holds a.json" in _error(buckets.upload, tmp_path, url)


def test_an_upload_that_was_cut_short_is_not_whole_and_can_be_done_again(
    bucket, tmp_path, monkeypatch
):
    url = f"{bucket.url}/cut/out"
    for name in "abc":
        (tmp_path / f"{name}.json").write_text("1")
    buckets.upload(tmp_path, url)
    for name in "abc":
        (tmp_path / f"{name}.json").write_text("2")
    usual = buckets.put

    def put(file, to):
        if file.name == "b.json":
            raise KeyboardInterrupt
        usual(file, to)

    monkeypatch.setattr(buckets, "put", put)
    with pytest.raises(KeyboardInterrupt):
        buckets.upload(tmp_path, url)
    assert not buckets.committed(url)
    monkeypatch.undo()
    buckets.upload(tmp_path, url)
    assert buckets.committed(url) and buckets.read_text(f"{url}/b.json").text == "2"


def test_a_small_object_is_written_only_in_the_place_of_the_generation_that_was_read(bucket):
    url = f"{bucket.url}/lock/lock.json"
    assert buckets.read_text(url) is None
    first = buckets.write_text(url, "a", "0")
    assert first and buckets.write_text(url, "b", "0") is None
    assert buckets.read_text(url) == ("a", first)
    second = buckets.write_text(url, "b", first)
    assert second and buckets.write_text(url, "c", first) is None
    assert buckets.write_text(url, "b", first) == second, "an answer that was lost is asked again"
    buckets.remove(url, url)
    assert buckets.read_text(url) is None


def test_the_emulator_itself_ignores_conditions():
    """So the tests' server adds them; the day that this fails, it need not."""
    from gcp_storage_emulator.handlers import objects

    assert "ifGenerationMatch" not in inspect.getsource(objects)


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://host/x", "begins with ftp://, expected gs://, s3:// or a local path"),
        ("gs://bkt/lr[5e-7]", "cannot be read back; give a path without"),
        ("gs://bkt/a#1", "cannot be read back"),
        ("gs:///x", "names no bucket, expected gs://BUCKET/PATH"),
        ("gs://bkt//x", "has an empty part"),
        ("gs://bkt/../x", "has an empty part, or a part . or .."),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(url, message):
    assert message in _error(buckets.check_url, url)
    assert message in _error(check_workdir, url)


def test_what_is_not_there_is_one_line(bucket):
    assert "nothing at gs://bkt/no/such" in _error(buckets.fetch, f"{bucket.url}/no/such")
    for call in (
        lambda: buckets.fetch("gs://nobucket/x"),
        lambda: buckets.read_text("gs://nobucket/x"),
        lambda: buckets.write_text("gs://nobucket/x", "a"),
        lambda: buckets.reach("gs://nobucket/x"),
        lambda: Workdir("gs://nobucket/run"),
        lambda: checkpoint.existing("gs://nobucket/run"),
    ):
        assert "there is no bucket gs://nobucket; make it first" in _error(call)
    assert "no folder gs://bkt/no/run" in _error(checkpoint.existing, f"{bucket.url}/no/run")


def python(code, *arguments, **env):
    """Runs a script as a user's command. Returns: (exit code, stdout and stderr, seconds)."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


READ = """
import sys
from di_star_jax.errors import exit_on_user_error
from di_star_jax.storage.workdir import Workdir
exit_on_user_error(Workdir)(sys.argv[1])
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "address, message",
    [
        ("http://localhost:9", "cannot be written (no answer in 14 s); check the network"),
        ("", "no credentials were found: log in with `gcloud auth"),  # the service itself
    ],
)
def test_a_dead_server_and_missing_credentials_are_one_line_within_thirty_seconds(
    address, message, tmp_path
):
    env = {"STORAGE_EMULATOR_HOST": address, "HOME": str(tmp_path)}
    code, said, seconds = python(READ, "gs://bkt/run", **env)
    assert code == 2 and len(said.splitlines()) == 1 and message in said, said
    assert seconds < 30


MISSING = """
import sys
sys.modules["gcsfs"] = sys.modules["s3fs"] = None
from di_star_jax.storage import buckets
from di_star_jax.errors import exit_on_user_error
exit_on_user_error(buckets.check_url)(sys.argv[1])
"""


@pytest.mark.parametrize("url, extra", [("gs://bkt/x", "gcs"), ("s3://bkt/x", "s3")])
def test_a_missing_extra_is_one_line_that_installs_it(url, extra):
    code, said, _ = python(MISSING, url)
    assert code == 2 and said.strip().endswith(f"pip install 'di_star_jax[{extra}]'"), said


# Checkpoints.


def test_checkpoints_in_a_bucket_come_back_bit_for_bit_and_only_the_newest_stay(bucket):
    url = f"{bucket.url}/states/checkpoints"
    with checkpoint.Checkpoints(url, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step) if step < 3 else _state(3), {"reference": "folder"})
    with checkpoint.existing(f"{bucket.url}/states") as checkpoints:
        assert checkpoints.latest_step() == 3 and checkpoints.steps() == [2, 3]
        _assert_same(checkpoints.restore(3, _abstract(_state(3))), _state(3))
        _assert_same(checkpoints.restore_item(3, "ema", _abstract(_params(5))), _params(5))
        assert checkpoints.metadata(3) == {"reference": "folder"}
        assert "has no 'reward', it has ['assistant'" in _error(
            checkpoints.restore_item, 3, "reward", _abstract(_params(0))
        )


def test_a_save_writes_each_byte_once(bucket):
    url = f"{bucket.url}/bytes/checkpoints"
    state = {"generator": {"w": jax.random.normal(jax.random.key(0), (512, 512))}}
    with checkpoint.Checkpoints(url, keep=2) as checkpoints:
        bucket.forget()
        checkpoints.save(1, state, {})
        checkpoints.wait()
    sent = uploads(bucket, "bytes/checkpoints/1/")
    need = state["generator"]["w"].nbytes
    data = [(name, size) for name, size in sent if size > need / 100]
    assert 0.8 * need < sum(size for _, size in data) < 1.05 * need
    assert max(Counter(name for name, _ in data).values()) == 1
    assert sum(size for _, size in sent) < 1.1 * need
    assert not any(word in path for _, path, _ in bucket.log for word in ("rewriteTo", "copyTo"))


@pytest.mark.case("faults 29")
def test_a_save_that_was_killed_in_a_bucket_is_removed_and_one_copied_by_hand_is_not(bucket):
    url = f"{bucket.url}/killed/checkpoints"
    with checkpoint.Checkpoints(url, keep=3) as checkpoints:
        for step in (5, 6, 7):
            checkpoints.save(step, small(step), {})
    buckets.remove(f"{url}/6/{checkpoint._COMMITTED}", f"{url}/7/{checkpoint._COMMITTED}")
    buckets.remove(f"{url}/7/{checkpoint._SAVED}")  # written at the end, but for the other
    buckets.write_text(f"{url}/9/file", "a stranger")
    buckets.write_text(f"{url}/9/{checkpoint._COMMITTED}", "committed")
    with checkpoint.Checkpoints(url, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 5
        checkpoints.tidy(("generator", "ema"))
        assert checkpoints.latest_step() == 5
        there = {name.partition("/")[0] for name in buckets.listing(url)}
        assert there == {"5", "6", "9.set-aside"}
        checkpoints.save(7, small(1), {})
    with checkpoint.existing(url) as checkpoints:
        _assert_same(checkpoints.restore(7, _abstract(small(1))), small(1))


@pytest.mark.slow
def test_a_server_that_fails_half_of_its_answers_for_ten_seconds_is_survived(bucket, tmp_path):
    url = f"{bucket.url}/failing"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("{}")
    bucket.fail(10)
    with checkpoint.Checkpoints(f"{url}/checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, _state(1), {"reference": "folder"})
    buckets.upload(tmp_path / "out", f"{url}/out")
    bucket.fail(10)
    with checkpoint.existing(url) as checkpoints:
        _assert_same(checkpoints.restore(1, _abstract(_state(1))), _state(1))
    assert (buckets.fetch(f"{url}/out") / "a.json").read_text() == "{}"
    bucket.fail(0)


QUIET = """
import sys, jax, jax.numpy as jnp
from absl import logging
logging.set_verbosity(logging.WARNING)
from di_star_jax import hosts
from di_star_jax.storage import checkpoint
from di_star_jax.storage.workdir import Workdir
with Workdir(sys.argv[1]) as workdir:
    hosts.keep_compiled(workdir.at("compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    w = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
    with checkpoint.Checkpoints(workdir.at("checkpoints"), keep=1) as checkpoints:
        checkpoints.tidy(("generator",))
        checkpoints.save(1, {"generator": {"w": w}}, {})
    (workdir.folder / "config.json").write_text("{}")
"""


def test_libraries_say_nothing_of_credentials_and_kinds_and_programs_are_kept_in_the_bucket(bucket):
    url = f"{bucket.url}/quiet"
    env = {"JAX_COMPILATION_CACHE_DIR": "", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": ""}
    code, said, _ = python(QUIET, url, **env)
    assert (code, said) == (0, "")
    there = buckets.listing(url)
    assert "config.json" in there and any(name.startswith("compiled/") for name in there)


# A run's place.


def test_small_files_are_copied_as_they_change_and_fetched_when_a_run_goes_on(bucket, monkeypatch):
    url = f"{bucket.url}/small/run"
    with Workdir(url) as workdir:
        first = workdir.folder
        writer = log.Writer(first, written=workdir.push_sometimes)
        with writer:
            writer.scalars(1, {"a": 1.0})
            assert len(buckets.read_text(f"{url}/metrics.jsonl").text.splitlines()) == 1
            writer.scalars(2, {"a": 2.0})
            assert len(buckets.read_text(f"{url}/metrics.jsonl").text.splitlines()) == 1, "so soon"
            workdir.push()
            assert len(buckets.read_text(f"{url}/metrics.jsonl").text.splitlines()) == 2
        (first / "config.json").write_text("{}")
    assert not first.exists()
    buckets.write_text(f"{url}/.tried-by-another-process", "tried")
    bucket.forget()
    with Workdir(url) as workdir:
        assert (workdir.folder / "config.json").read_text() == "{}"
        assert not list(workdir.folder.glob(".*"))
        with log.Writer(workdir.folder, first_step=1):
            pass
    assert not [name for name, _ in uploads(bucket, "small/run/config.json")], "it has not changed"
    assert json.loads(buckets.read_text(f"{url}/metrics.jsonl").text) == {"step": 1, "a": 1.0}


def test_a_copy_that_fails_in_the_middle_is_said_and_made_later(bucket, monkeypatch, capsys):
    with Workdir(f"{bucket.url}/later/run") as workdir:
        (workdir.folder / "config.json").write_text("{}")

        def put(file, url):
            raise UserError("no server")

        monkeypatch.setattr(buckets, "put", put)
        workdir.push_sometimes()
        assert capsys.readouterr().out == "warning: no server\n"
        monkeypatch.undo()
    assert buckets.read_text(f"{bucket.url}/later/run/config.json").text == "{}"


# A whole run.


@pytest.mark.long
@pytest.mark.case("faults 29", "faults 30", "faults 32")
def test_a_run_in_a_bucket_that_is_killed_in_a_save_goes_on_to_the_same_state(bucket, tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    straight = tmp_path / "straight"
    train.run(config_for(folder), str(straight))

    url = f"{bucket.url}/runs/killed"
    bucket.forget()
    run = Process(folder, url)
    while not any("runs%2Fkilled%2Fcheckpoints%2F4%2F" in path for _, path, _ in bucket.log):
        time.sleep(0.02)
    run.send(signal.SIGKILL)
    code, said = run.end()
    assert code == -signal.SIGKILL, said
    with checkpoint.existing(url) as store:
        assert store.latest_step() == 2
    lines = buckets.read_text(f"{url}/metrics.jsonl").text
    buckets.write_text(f"{url}/metrics.jsonl", lines + '\0\0\0\n\n{"a": 1}\n{"step": 4, "los')

    run = Process(folder, url)
    code, said = run.end()
    assert code == 0, said
    assert "continuing at step 2" in said and "what a killed save left; removed" in said
    assert f"exported {url}/diffusers" in said and "pictures of the same noise" in said
    assert "redentials" not in said and "bucket type" not in said
    for name in ("generator", "assistant", "ema"):
        _assert_same(unet_of(url, 4, name), unet_of(straight, 4, name))
    kept, whole = (
        [json.loads(line) for line in text.splitlines()]
        for text in (
            buckets.read_text(f"{url}/metrics.jsonl").text,
            (straight / "metrics.jsonl").read_text(),
        )
    )
    assert [line["step"] for line in kept if "assistant/loss" in line] == [1, 2, 3, 4]
    losses = [[one.get("assistant/loss") for one in lines] for lines in (kept, whole)]
    assert [x for x in losses[0] if x] == [x for x in losses[1] if x]
    assert buckets.committed(f"{url}/diffusers")
    events = buckets.fetch(url, ["events*"])
    found = tensorboard(events)
    assert [k for k, _ in found["assistant/lr"]] == [1, 2, 3, 4]
    bucket.forget()
    code, said = Process(folder, url).end()
    assert code == 0 and "finished: all 4 steps are done, in gs://bkt/runs/killed" in said
    for results in ("checkpoints/", "diffusers/"):
        assert not uploads(bucket, f"runs/killed/{results}"), "all was there"
