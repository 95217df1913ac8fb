# SPDX-License-Identifier: Apache-2.0
"""What is read from buckets and left in them, against servers on this machine: moto's of S3, and
gcp-storage-emulator.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import test_evaluate
from moto.server import ThreadedMotoServer
from PIL import Image
from test_convert import _error
from test_evaluate import random_model, results_of, trained
from test_train import UNET, config_for, write_pipeline

from di_star_jax import benchmark, checks, convert, drawing, models
from di_star_jax.cost import plan
from di_star_jax.errors import UserError
from di_star_jax.pipelines import adapters, single
from di_star_jax.pipelines.folder import load_model
from di_star_jax.prompts import source
from di_star_jax.rewards import custom
from di_star_jax.storage import buckets, checkpoint, files, folders

PIXELS = {"data.resolution": 64, "decode.resolution": 64}  # what a config may ask for
command, defined_flags = test_evaluate.command, test_evaluate.defined_flags
compiled_once = test_evaluate.compiled_once


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder with generator/, reward/ and prompts.txt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "init", random_model)
        return write_pipeline(tmp_path_factory.mktemp("local") / "pipeline")


def put(here, url):
    """As `gcloud storage cp -r` or `aws s3 cp --recursive`: this project's own is what is tried."""
    fs = buckets._connect(url)
    for path in Path(here).rglob("*"):
        if path.is_file():
            fs.put_file(str(path), f"{url}/{path.relative_to(here).as_posix()}")


@pytest.fixture(scope="module")
def s3(environment, folder):
    """Address of a bucket of S3 with a pipeline in it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    environment.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    buckets._connect("s3://bkt").mkdir("bkt")
    put(folder, "s3://bkt/pipeline")
    yield "s3://bkt"
    server.stop()


@pytest.fixture(scope="module")
def gs(environment, bucket, folder):
    """Address of a folder in a bucket of GCS with a pipeline and a run in it."""
    url = f"{bucket.url}/remote"
    put(folder, f"{url}/pipeline")
    metadata = {
        "denoiser_config": UNET,
        "reference": f"{url}/pipeline",
        "initial": f"{url}/pipeline/generator",
        "generator_timesteps": [399],
        "weights": {"pickscore": f"{url}/pipeline/reward"},
    }
    with checkpoint.Checkpoints(f"{url}/run/checkpoints", keep=1) as store:
        store.save(2, {"ema": trained(folder)}, metadata)
    return url


def same(tree, other):
    return jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == b).all(), tree, other))


def contents(folder):
    """{name: bytes}, but for texts that name the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("README.md", folders.MARKER)
    }


# Read.


def test_weights_prompts_and_configs_of_a_bucket_are_those_of_the_folder(s3, folder, tmp_path):
    ours = load_model(folders.resolve(f"{s3}/pipeline/generator")).params
    assert same(ours, load_model(folder / "generator").params)
    there = source.load(f"{s3}/pipeline/prompts.txt", tmp_path / "there")
    here = source.load(folder / "prompts.txt", tmp_path / "here")
    assert (list(there), there.digest) == (list(here), here.digest)
    config = config_for(
        folder,
        **{
            **PIXELS,
            "weights.reference": f"{s3}/pipeline",
            "weights.generator": f"{s3}/pipeline/generator",
            "weights.pickscore": f"{s3}/pipeline/reward",
            "weights.reward_tokenizer": f"{s3}/pipeline/tokenizer",
            "data.prompts": f"{s3}/pipeline/prompts.txt",
        },
    )
    checks.check(config, 8)
    assert plan.known_models(config) == plan.known_models(config_for(folder))


def test_what_was_fetched_is_fetched_again_only_when_it_has_changed(s3):
    def weights_of():
        return folders.weight_files(folders.resolve(f"{s3}/pipeline/reward"))[0][0]

    first = weights_of()
    assert weights_of() == first and weights_of().stat().st_ino == first.stat().st_ino
    assert not list(folders.resolve_tokenizer(f"{s3}/pipeline/vae").rglob("*.safetensors"))
    fs = buckets._connect(s3)
    fs.pipe_file(f"{s3}/changing/prompts.txt", b"one\n")
    assert buckets.fetch(f"{s3}/changing/prompts.txt").read_text() == "one\n"
    fs.pipe_file(f"{s3}/changing/prompts.txt", b"two\n")
    assert buckets.fetch(f"{s3}/changing/prompts.txt").read_text() == "two\n"


def test_a_reward_of_ones_own_may_lie_in_a_bucket(s3):
    code = b"def bright(images):\n    return images.mean((1, 2, 3))\n"
    buckets._connect(s3).pipe_file(f"{s3}/my.py", code)
    found = custom.entry(f"{s3}/my.py:bright", 16).load(None, None)
    assert found.reward({}, np.ones((2, 16, 16, 3), np.float32), None).tolist() == [1, 1]


@pytest.fixture
def file(s3, folder, tmp_path):
    """Address of the pipeline in one file, float32."""
    single.from_folder(folder, tmp_path / "all.safetensors", dtype="float32")
    url = f"{s3}/files/all.safetensors"
    buckets._connect(url).put_file(str(tmp_path / "all.safetensors"), url)
    return url


def test_a_single_file_in_a_bucket_stands_for_its_folder(file, folder):
    loaded = drawing.load(file, "ema", reference=str(folder))
    expected = load_model(folder / "unet").params
    assert same(loaded.models["denoiser"].params, expected) and not drawing.is_run(file)
    config = config_for(folder, **{"weights.generator": file})
    single.with_folders(config)
    assert same(load_model(Path(config.weights.generator) / "unet").params, expected)


def test_a_bad_single_file_in_a_bucket_is_named_by_its_address(s3, folder, tmp_path):
    np_file = tmp_path / "lora.safetensors"
    tensors = {"lora_unet_x.lora_up.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(tensors, np_file)
    fs = buckets._connect(s3)
    fs.put_file(str(np_file), f"{s3}/files/lora.safetensors")
    fs.pipe_file(f"{s3}/files/cut.safetensors", np_file.read_bytes()[:-5])
    for name, said in (("cut", "download it again"), ("none", "nothing at")):
        url = f"{s3}/files/{name}.safetensors"
        for call in (single.as_folder, adapters.is_file):
            message = _error(call, url)
            assert said in message and url in message and str(files.user_cache()) not in message
    url = f"{s3}/files/lora.safetensors"
    assert adapters.is_file(url) and "is a LoRA file" in _error(single.as_folder, url, str(folder))
    message = _error(single.with_folders, config_for(folder, **{"weights.generator": url}))
    assert f"{url} has adapters of another network" in message


# Written.


def test_an_export_in_a_bucket_is_that_of_the_disk_and_replaces_only_its_own(s3, folder, tmp_path):
    def export(of, output):
        generator, reference = f"{of}/generator", str(of)
        return convert.to_diffusers(
            generator, "ema", output, step=None, dtype="float32", reference=reference
        )

    export(folder, tmp_path / "export")
    usage = export(f"{s3}/pipeline", f"{s3}/export")
    assert usage.startswith(f"# first: aws s3 cp --recursive {s3}/export export\n")
    assert 'from_pretrained("export"' in usage
    assert buckets.committed(f"{s3}/export")
    assert contents(buckets.fetch(f"{s3}/export")) == contents(tmp_path / "export")
    export(f"{s3}/pipeline", f"{s3}/export")  # in place of the first
    fs = buckets._connect(s3)
    fs.pipe_file(f"{s3}/export/notes.md", b"mine")
    before = buckets.listing(f"{s3}/export")
    error = _error(export, f"{s3}/pipeline", f"{s3}/export")
    assert "holds notes.md" in error and "nothing is overwritten" in error
    assert buckets.listing(f"{s3}/export") == before
    error = _error(export, f"{s3}/pipeline", f"{s3}/pipeline")
    assert "nothing is overwritten" in error
    assert not list((files.user_cache() / "outputs").iterdir()), "staging folders are gone"


def write_samples(folder):
    """As `sample` leaves them."""
    folder.mkdir()
    for i in range(4):
        colours = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(colours).save(folder / f"{i:04d}.png")
    (folder / "prompts.json").write_text(json.dumps({f"{i:04d}.png": f"a {i}" for i in range(4)}))
    return folder


def test_an_evaluation_of_a_bucket_in_a_bucket_goes_on_from_another_machine(
    s3, command, tmp_path, monkeypatch
):
    pictures = write_samples(tmp_path / "pictures")
    put(pictures, f"{s3}/pictures")
    out = f"{s3}/evaluations/one"
    remote = [f"--images={s3}/pictures", f"--out={out}"]
    code, printed, error = command(*remote, "--metrics=saturation")
    assert code == 0, error
    assert f"in {out}" in printed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    buckets._fetched.cache_clear()
    code, _, error = command(*remote, "--metrics=contrast")
    assert code == 0, error
    here = [f"--images={pictures}", f"--out={tmp_path / 'here'}"]
    code, _, error = command(*here, "--metrics=saturation,contrast", f"--baseline={out}")
    assert code == 0, error
    there = results_of(buckets.fetch(out))
    assert {*there["metrics"]} == {"saturation", "contrast"}
    found = results_of(tmp_path / "here")
    assert found["comparison"]["folder"] == "one"
    for name, numbers in there["metrics"].items():
        assert numbers["mean"] == found["metrics"][name]["mean"], name
    assert there["settings"]["images"] == f"{s3}/pictures"
    buckets._connect(s3).pipe_file(f"{out}/notes.md", b"mine")
    code, _, error = command(*remote, "--metrics=saturation,contrast")
    assert code == 2 and "holds notes.md" in error


@pytest.mark.long
def test_an_evaluation_of_a_run_in_a_bucket_has_the_numbers_of_the_disk(
    gs, command, folder, tmp_path
):
    metadata = {"denoiser_config": UNET, "reference": str(folder), "generator_timesteps": [399]}
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as store:
        store.save(2, {"ema": trained(folder)}, metadata)
    common = ["--metrics=saturation", "--batch_size=8"]
    code, _, error = command(
        *common,
        f"--checkpoint={tmp_path / 'run'}",
        f"--prompts={folder / 'prompts.txt'}",
        f"--out={tmp_path / 'here'}",
    )
    assert code == 0, error
    code, _, error = command(
        *common,
        f"--checkpoint={gs}/run",
        f"--prompts={gs}/pipeline/prompts.txt",
        f"--out={gs}/evaluation",
    )
    assert code == 0, error
    there, here = results_of(buckets.fetch(f"{gs}/evaluation")), results_of(tmp_path / "here")
    assert there["metrics"] == here["metrics"] and there["name"] == "run (ema)"
    assert there["settings"]["checkpoint"] == f"{gs}/run"
    kept = buckets.fetch(f"{gs}/evaluation") / "images"
    assert contents(kept) == contents(tmp_path / "here" / "images")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_converted_there_and_back(gs, folder):
    convert.to_diffusers(
        f"{gs}/run", "ema", f"{gs}/export", step=None, dtype="float32", reference=None
    )
    exported = load_model(folders.resolve(f"{gs}/export/unet")).params
    assert same(exported, trained(folder))
    assert same(drawing.load(f"{gs}/run", "ema").models["denoiser"].params, exported)
    initial = drawing.load(f"{gs}/run", "initial").models["denoiser"].params
    assert same(initial, load_model(folder / "generator").params)
    convert.to_orbax(f"{gs}/export", f"{gs}/orbax")
    convert.to_diffusers(
        f"{gs}/orbax/0", "denoiser", f"{gs}/again", step=None, dtype="float32", reference=None
    )
    again = load_model(folders.resolve(f"{gs}/again/unet")).params
    assert same(again, exported)
    assert "not empty" in _error(convert.to_orbax, f"{gs}/export", f"{gs}/orbax")


@pytest.mark.long
def test_sample_draws_a_run_in_a_bucket_into_a_bucket(gs, tmp_path):
    flags = [f"--checkpoint={gs}/run", "--prompt=a red circle", "--num=2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for out in (f"{gs}/samples", tmp_path / "samples"):
        done = subprocess.run(
            [sys.executable, "-m", "di_star_jax.sample", *flags, f"--out={out}"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    there = buckets.fetch(f"{gs}/samples")
    assert contents(there) == contents(tmp_path / "samples")
    assert {"0000.png", "0001.png", "grid.png", "prompts.json"} == {*contents(there)}


def test_a_benchmark_leaves_its_result_in_a_bucket(s3):
    file = benchmark._json_file(f"{s3}/results/one.json")
    benchmark._write(file, {"seconds": 1})
    assert json.loads(buckets.fetch(f"{s3}/results/one.json").read_text()) == {"seconds": 1}
    assert "no bucket" in _error(benchmark._json_file, "s3://nobody/one.json")


# Bad input.


@pytest.mark.parametrize(
    "given, words",
    [
        ("--images=az://bkt/pictures", "az://bkt/pictures begins with az://, expected gs://"),
        ("--images=gs:/bkt/pictures", "one slash behind gs:, expected gs://BUCKET/PATH"),
        ("--images=s3://bkt/none", "nothing at s3://bkt/none"),
        ("--images=s3://nobody/pictures", "there is no bucket s3://nobody"),
        ("--prompts=s3://bkt/none.txt", "nothing at s3://bkt/none.txt"),
        ("--prompts=az://bkt/prompts.txt", "begins with az://"),
        ("--baseline=s3://bkt/none", "nothing at s3://bkt/none"),
        ("--out=s3://bkt/a[1]", "has [ ] in it"),
        ("--out=gs:/bkt/out", "one slash behind gs:"),
        ("--out=http://bkt/out", "begins with http://"),
        ("--out=s3://nobody/out", "there is no bucket s3://nobody"),
        ("--out=s3://bkt/pipeline", "nothing is overwritten"),
    ],
)
def test_an_evaluation_refuses_an_address_in_one_line(s3, command, tmp_path, given, words):
    pictures = write_samples(tmp_path / "pictures")
    (tmp_path / "prompts.txt").write_text("".join(f"a {i}\n" for i in range(4)))
    arguments = {
        "images": pictures,
        "prompts": tmp_path / "prompts.txt",
        "out": tmp_path / "out",
        "metrics": "saturation",
    }
    arguments |= [given.removeprefix("--").split("=", 1)]
    began = time.monotonic()
    code, _, error = command(*(f"--{name}={value}" for name, value in arguments.items()))
    assert code == 2 and words in error, error
    assert error.count("\n") == 1 and time.monotonic() - began < 30


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("weights.reference", "s3://bkt/none", "weights.reference=s3://bkt/none: no such folder"),
        ("weights.generator", "s3://nobody/x", "there is no bucket s3://nobody"),
        ("weights.pickscore", "http://host/x", "begins with http://"),
        ("weights.pickscore", "s3://bkt/x[1]", "has [ ] in it"),
        ("data.prompts", "s3://bkt/none.txt", "data.prompts=s3://bkt/none.txt: no such file"),
        ("data.prompts", "az://bkt/prompts.txt", "begins with az://"),
    ],
)
def test_a_run_refuses_an_address_before_it_begins(s3, folder, name, value, words):
    assert words in _error(checks.check, config_for(folder, **PIXELS, **{name: value}), 8)


@pytest.mark.parametrize("path", ["gs:/bkt/x", "s3:/bkt/x"])
def test_an_address_with_one_slash_is_no_folder_of_this_machine(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: checks.check_workdir(path),
        lambda: convert.to_orbax(".", path),
        lambda: folders.check_output(path),
        lambda: folders.resolve(path),
        lambda: benchmark._json_file(path),
    ):
        assert "one slash behind" in _error(use)
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_sought_in_s3(s3, folder):
    put(folder / "tokenizer", f"{s3}/run/checkpoints/1")
    error = _error(drawing.load, f"{s3}/run", "ema")
    assert "Orbax writes checkpoints to no bucket but gs://" in error


def closed_port():
    """One that has a number in it which servers refuse by."""
    ports = range(40100, 40200)
    return next(port for port in ports if socket.socket().connect_ex(("localhost", port)))


def lines_of(process):
    """(exit code, lines on stderr) of a command."""
    error = process.communicate(timeout=60)[1]
    return process.returncode, error.splitlines()


@pytest.mark.long
def test_a_dead_server_and_missing_credentials_are_one_line_in_half_a_minute(tmp_path):
    closed = f"http://localhost:{closed_port()}"
    key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    cases = {
        "gs": ("gs://bkt/run", {"STORAGE_EMULATOR_HOST": closed}, "check the network"),
        "s3": ("s3://bkt/x", {"AWS_ENDPOINT_URL": closed, **key}, "check the network"),
        "none": ("s3://bkt/x", {"AWS_ENDPOINT_URL": closed}, "set AWS_ACCESS_KEY_ID"),
    }
    started = {}
    began = time.monotonic()
    for name, (address, more, _) in cases.items():
        environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        environment |= {"HOME": str(tmp_path), **more}
        started[name] = subprocess.Popen(
            [
                *(sys.executable, "-m", "di_star_jax.convert", "--to=diffusers"),
                *(f"--input={address}", f"--output={tmp_path / 'out'}"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
    for name, process in started.items():
        code, lines = lines_of(process)
        assert code == 2 and len(lines) == 1, (name, lines)
        assert cases[name][2] in lines[0], (name, lines)
        assert time.monotonic() - began < 40, name  # with the start of three interpreters
    assert not (tmp_path / "out").exists()


def test_an_unfinished_evaluation_goes_on_from_the_copy_of_this_machine(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"{s3}/going/on"
    message = "s3://bkt/going/on/half is not yet whole"
    with pytest.raises(UserError, match=message), buckets.continued_folder(url) as folder:
        (folder / "half").write_text("1")
        raise UserError(f"{folder / 'half'} is not yet whole")
    assert not buckets.listing(url)
    with buckets.continued_folder(url) as folder:
        assert (folder / "half").read_text() == "1"
    shutil.rmtree(tmp_path / "di_star_jax")
    with buckets.continued_folder(url) as folder:
        assert (folder / "half").read_text() == "1"
        (folder / "half").write_text("2")
    assert (buckets.fetch(url) / "half").read_text() == "2"
