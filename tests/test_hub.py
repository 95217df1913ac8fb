# SPDX-License-Identifier: Apache-2.0
"""`convert --push_to_hub`, beside a stand-in for the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import test_export

from di_star_jax import convert, train
from di_star_jax.errors import UserError
from di_star_jax.storage import hub

NAME = "me/aligned"
reference, workdir_of = test_export.reference, test_export.workdir_of  # fixtures


@pytest.fixture
def server():
    with hub_server.serving() as served:
        yield served


@pytest.fixture
def environment(server, tmp_path):
    """Of a command whose Hub is the stand-in, and whose token it knows."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": server.address,
        "HF_TOKEN": hub_server.TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "JAX_PLATFORMS": "cpu",
    }


def run(environment, *flags, **changed):
    env = {name: value for name, value in (environment | changed).items() if value is not None}
    command = [sys.executable, "-m", "di_star_jax.convert", *flags]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def flags_for(workdir, output, *more):
    return ["--to=diffusers", f"--input={workdir}", f"--output={output}", *more]


def test_an_export_is_on_the_hub_file_by_file_and_private(
    server,
    environment,
    workdir_of,
    tmp_path,
):
    out = tmp_path / "out"
    done = run(environment, *flags_for(workdir_of(test_export.ONE), out, f"--push_to_hub={NAME}"))
    assert done.returncode == 0, done.stderr
    assert f"pushed to {server.address}/{NAME}, which is private" in done.stdout
    repository = server.repositories[NAME]
    written = content(out)
    assert written.pop("di_star_jax.json")
    assert repository.visibility == "private" and repository.files == written
    card = repository.files["README.md"].decode()
    assert f'from_pretrained("{NAME}")' in card and "comfyui.json" in repository.files
    assert str(tmp_path) not in card and str(tmp_path) not in written["about.json"].decode()


@pytest.mark.slow
def test_a_public_repository_is_made_where_it_is_asked_for_and_else_not_written_to(
    server,
    environment,
    workdir_of,
    tmp_path,
):
    flags = flags_for(workdir_of(test_export.ONE), tmp_path / "out", f"--push_to_hub={NAME}")
    done = run(environment, *flags, "--public")
    assert done.returncode == 0 and "which is public" in done.stdout, done.stderr
    assert server.repositories[NAME].visibility == "public"
    server.repositories[NAME].files.clear()
    done = run(environment, *flags)
    assert done.returncode == 2 and "is on the Hub and public" in done.stderr
    assert server.repositories[NAME].files == {}


def test_what_fails_on_the_way_is_one_line_and_the_export_stays(
    server,
    environment,
    workdir_of,
    tmp_path,
):
    server.failing = ("/api/repos/create",)
    out = tmp_path / "out"
    done = run(environment, *flags_for(workdir_of(test_export.ONE), out, f"--push_to_hub={NAME}"))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "don't have the rights" in done.stderr and f"`hf upload {NAME} {out}`" in done.stderr
    assert f"wrote {out}" in done.stdout and (out / "unet").is_dir()


# Before the work.


def test_without_a_token_nothing_is_begun(server, environment, workdir_of, tmp_path):
    flags = flags_for(workdir_of(test_export.ONE), tmp_path / "out", f"--push_to_hub={NAME}")
    done = run(environment, *flags, HF_TOKEN=None)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "`hf auth login`" in done.stderr
    assert not (tmp_path / "out").exists() and server.asked == []


@pytest.fixture
def here(server, monkeypatch):
    """The stand-in as the Hub of this process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    return server


def refusal(call, *args, **kw) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["aligned", "me/a/b", "me/", "me/a b", "me/a..b", "-me/a"])
def test_a_name_that_the_hub_does_not_take_is_refused(here, name):
    message = refusal(hub.check, name)
    assert f"--push_to_hub={name}" in message and "expected OWNER/NAME" in message
    assert here.asked == []


def test_what_cannot_be_pushed_is_refused_before_it_is_made(here, monkeypatch):
    assert "--to=orbax" in refusal(convert._check_push, NAME, "orbax", "out")
    assert "gs://b/out" in refusal(convert._check_push, NAME, "single", "gs://b/out")
    convert._check_push(NAME, "single", "out.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(hub.check, NAME)


# The upload.


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "w.safetensors").write_bytes(b"weights")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path / "out"


def test_a_files_card_is_the_repositorys(here, folder):
    files = {"README.md": folder / "README.md", "x.safetensors": folder / "unet/w.safetensors"}
    hub.push(NAME, folder / "unet/w.safetensors", files)
    assert here.repositories[NAME].files == {
        "README.md": b"---\nlicense: mit\n---\n",
        "x.safetensors": b"weights",
    }


@pytest.mark.parametrize("step", ["/lfs/", "/commit/", "/preupload/", "/api/models/me/aligned"])
def test_a_step_that_is_refused_is_named(here, folder, step):
    here.failing = (step,)
    message = refusal(hub.push, NAME, folder)
    assert f"could not push to {NAME}" in message and "403" in message
    assert (folder / "unet" / "w.safetensors").read_bytes() == b"weights"


def test_a_wrong_token_and_a_network_that_is_gone_are_named(here, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "401" in refusal(hub.push, NAME, folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in refusal(hub.push, NAME, folder)


def test_a_run_never_pushes():
    source = Path(train.__file__).parent.glob("**/*.py")
    users = {path.name for path in source if "hub.push" in path.read_text(encoding="utf-8")}
    assert users == {"convert.py"}
