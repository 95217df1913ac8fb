# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process, and once as a user runs it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from test_config import ROOT

import di_star_jax
from di_star_jax import __main__, errors, hosts, main, pictures, sample
from di_star_jax import command as commands
from di_star_jax.errors import UserError
from di_star_jax.prompts.tokens import Tokenizer
from di_star_jax.shapes import oracle, scenes, tokenizer

SDXL, DRY = "--config=configs/sdxl.py", "--config.dry_run=True"


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        argv = ["main", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for the overrides
        monkeypatch.delitem(
            sys.modules, "config_config", raising=False
        )  # it would load the next file over the last
        monkeypatch.chdir(ROOT)
        code = 0
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                commands.command(main.main)(errors.exit_on_user_error(commands.parse)(argv))
            except SystemExit as stop:
                code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.case("first hour 25", "first hour 11")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [SDXL, DRY, "--config.trian.steps=3"],
            "unknown config field trian.steps, did you mean train.steps?",
        ),
        (
            [SDXL, DRY, "--config.batch_size=3"],
            "unknown config field batch_size, did you mean data.batch_size?",
        ),
        (
            [SDXL, DRY, "--config.compute.remat_unet=none"],
            "unknown config field compute.remat_unet, now called compute.remat_denoiser",
        ),
        (
            [SDXL, DRY, "--config.eval.num_per_prompt=8"],
            "unknown config field eval.num_per_prompt, now called eval.samples",
        ),
        (
            [SDXL, DRY, "--config.optim.bb2=3"],
            "unknown config field optim.bb2, did you mean optim.b2?",
        ),
        (
            [SDXL, DRY, "--config.data.batch_size=many"],
            "--config.data.batch_size=many: expected an integer",
        ),
        (
            [SDXL, DRY, "--config.data=3"],
            "--config.data is a section, not a field; set one of data.batch_size",
        ),
        ([SDXL, DRY, "--config.train.steps=1e3"], "--config.train.steps=1e3: expected an integer"),
        ([SDXL, "--config.dry_run=maybe"], "--config.dry_run=maybe: expected True or False"),
        ([SDXL, "--train.steps=500"], "unknown flag --train.steps, did you mean --config.train."),
        ([SDXL, DRY, "--config.reward.brightness=1"], "is --config.reward.custom=FILE:FUNCTION"),
        ([SDXL + ":di_str", DRY], "unknown preset 'di_str', did you mean di_star or di_star_l2"),
        (
            ["--config=shpes"],
            "one of pixart, reward, sd15, sdxl, sdxl_lora, shapes, shapes_pixart (--config=pixart",
        ),
        ([SDXL, "--workdir"], "--workdir without a value; write --name=value"),
        (
            [SDXL, DRY, "--config.data.batch_size=6"],
            "data.batch_size=6 is not divisible by the 16 devices of mesh data=1 x fsdp=16; use "
            "16, or give several",
        ),
        ([SDXL, DRY, "surplus"], "got 'surplus', expected flags only"),
        ([SDXL + ":nothing", DRY], "unknown preset 'nothing', expected one of di_star, di_star_l2"),
        ([SDXL, "--config.mesh.fsdp=8"], "no --workdir"),
        ([SDXL, "--workdir=s3://bucket/run"], "checkpoints to no bucket but gs://"),
        ([SDXL, "--workdri=x"], "unknown flag --workdri, did you mean workdir?"),
        (["--config=configs/nowhere.py"], "no config file configs/nowhere.py"),
        (["--config.seed=3"], "--config.seed without --config"),
        ([], "no --config"),
    ],
)
def test_what_is_typed_wrong_ends_with_one_line_and_exit_code_2(command, arguments, message):
    code, _, stderr = command(*arguments)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(:", "invalid syntax"),
        ("import nothere", "No module named 'nothere'"),
        ("x = 1", "a config file defines get_config()"),
    ],
)
def test_a_broken_config_file_is_named_in_one_line(command, tmp_path, content, message):
    file = tmp_path / "broken.py"
    file.write_text(content)
    code, _, stderr = command(f"--config={file}", DRY)
    assert code == 2
    assert stderr.startswith(f"error: {file}: ") and stderr.count("\n") == 1 and message in stderr


def test_overrides_and_presets_reach_the_dry_run(command, monkeypatch):
    seen = []
    monkeypatch.setattr("di_star_jax.cost.plan.make", lambda c, n, kind: seen.append((c, n)))
    monkeypatch.setattr("di_star_jax.cost.report.describe", lambda plan: ["the plan"])
    code, stdout, _ = command(SDXL + ":sim", DRY, "--config.data.batch_size=32")
    assert (code, stdout) == (0, "the plan\n")
    ((got, devices),) = seen
    assert (got.data.batch_size, got.reward.pickscore, devices) == (32, 0.0, jax.device_count())


@pytest.mark.case("first hour 21")
@pytest.mark.parametrize(
    "given, first, last",
    [
        (
            ["--topology=v5e:8x16"],
            "slice: v5e 8x16, 128 chips (v5litepod-128)\nmesh: data=8 x fsdp=16 x context=1 over "
            "128 devices (TPU v5 lite)\nbatch: 128 images of 1024 pixels a step, 1 on a device\n",
            "on v5e: 8.70 of 16.91 GB, fits\n",
        ),
        pytest.param(
            ["--topology=2xv5e:4x4"],
            "slices: 2 of v5e 4x4, each 16 chips (v5litepod-16); only gradients cross the network "
            "between them\nmesh: data=2 x fsdp=16 x context=1 over 32 devices (TPU v5 lite)\n",
            "on v5e: 22.98 of 16.91 GB, does not fit\nto fit v5e: compute.microbatches=2 "
            "(-8.2 GB); then 14.7 of 16.9 GB\n",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--topology=tpu7x:2x2x2"],
            "slice: tpu7x 2x2x2, 8 chips, 2 devices each (tpu7x-16)\nmesh: data=1 x fsdp=16 x "
            "context=1 over 16 devices (TPU7x)\n",
            "on tpu7x: 42.02 of 102.01 GB, fits\n",
            marks=pytest.mark.long,
        ),
        (
            ["--topology=rtx4090:1", "--config.mesh.fsdp=1", "--config.data.batch_size=1"],
            "mesh: data=1 x fsdp=1 x context=1 over 1 device (NVIDIA GeForce RTX 4090)\n",
            "on RTX 4090: 92.33 of 25.23 GB, does not fit\nto fit RTX 4090: "
            "data.cache=./text_cache (-1.6 GB), lora.rank=64 (-70.1 GB); then 20.6 of 25.2 GB\n",
        ),
        pytest.param(
            ["--chips=128"],
            "mesh: data=8 x fsdp=16 x context=1 over 128 devices (of any kind)\n",
            "v6e 0.16, tpu7x 0.13, A100\n  0.48, H100 and H200 0.15, RTX 4090 0.91\n",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_dry_run_plans_for_the_slice_that_is_named(command, given, first, last):
    code, stdout, _ = command(SDXL, DRY, *given)
    assert code == 0 and stdout.startswith(first) and stdout.endswith(last), stdout


@pytest.mark.case("first hour 21")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([DRY, "--chips=24"], "mesh data=-1 x fsdp=16 does not make up the 24 devices"),
        ([DRY, "--chips=8"], "mesh data=-1 x fsdp=16 does not make up the 8 devices"),
        ([DRY, "--topology=v5litepod-128"], "expected a generation (v4, v5e, v5p, v6e, tpu7x)"),
        ([DRY, "--topology=v5e:2x2x4"], "topology='v5e:2x2x4', expected a generation"),
        ([DRY, "--topology=h100:9"], "expected how many of one host's GPUs, 1 to 8, e.g. h100:1"),
        ([DRY, "--topology=h100:8"], "make up the 8 devices; set mesh.data=-1 and mesh.fsdp to 1"),
        ([DRY, "--topology=v5e:4x4", "--chips=16"], "--chips with --topology: give one"),
        (
            [DRY, "--topology=2xv5e:2x4", "--config.data.batch_size=16"],
            "mesh fsdp=16 x context=1 does not fit in a slice of 8 devices, of which there are 2",
        ),
        (["--topology=v5e:4x4", "--workdir=x"], "--topology=v5e:4x4 is what a dry run plans for"),
        ([DRY, "--chips=0"], "--chips=0: expected"),
    ],
)
def test_a_slice_that_cannot_be_planned_for_is_refused_in_one_line(command, arguments, message):
    code, _, stderr = command(SDXL, *arguments)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and message in stderr


def test_a_run_starts_only_after_the_check(command, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("di_star_jax.train.run", lambda c, workdir, given: started.append(workdir))
    (tmp_path / "weights").mkdir()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = [
        SDXL,
        f"--workdir={tmp_path}",
        "--config.mesh.fsdp=8",
        f"--config.data.prompts={tmp_path}/prompts.txt",
    ]
    assert command(*arguments)[0] == 2 and not started  # weights.generator is not there
    assert command(*arguments, f"--config.weights.generator={tmp_path}/weights")[0] == 0
    assert started == [str(tmp_path)]


@pytest.mark.parametrize(
    "env, variable",
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}, "SLURM_NTASKS"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": ""}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}, None),
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
            "MEGASCALE_NUM_SLICES",
        ),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "TPU_PROCESS_ADDRESSES"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "1"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_several_hosts_are_recognised_by_their_launcher(env, variable):
    assert hosts.launcher(env) == variable


def test_a_process_that_srun_did_not_start_does_not_train_alone():
    with pytest.raises(
        UserError, match="SLURM_NTASKS=4, but srun did not start this process; use srun"
    ):
        hosts.launcher({"SLURM_NTASKS": "4"})


def test_a_launcher_whose_other_processes_are_missing_is_refused(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: given.update(kw))
    with pytest.raises(
        UserError,
        match="TPU_WORKER_HOSTNAMES=a,b says that there are several processes, but only this",
    ):
        hosts.connect(
            {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        )
    assert (given["num_processes"], given["process_id"]) == (2, 0)


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476"}
TWO = {"JAX_NUM_PROCESSES": "2"}
WORKERS = {"TPU_WORKER_HOSTNAMES": "a,b"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "a-0:8080"}
STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, (None, None, None)),
        (ADDRESS | TWO | {"JAX_PROCESS_ID": "1"}, ("10.0.0.1:8476", 2, 1)),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, ("10.0.0.1:8476", 1, 0)),
        (STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}, (None, None, None)),
        (WORKERS | {"TPU_WORKER_ID": "1"}, ("a:8482", 2, 1)),
        (WORKERS | {"TPU_WORKER_ID": "1", "JAX_COORDINATOR_PORT": "99"}, ("a:99", 2, 1)),
        # JAX reads the addresses first.
        (
            WORKERS | {"TPU_PROCESS_ADDRESSES": "c:8471,d:8471,e:8471", "TPU_WORKER_ID": "2"},
            ("c:8482", 3, 2),
        ),
        (
            WORKERS | SLICES | {"TPU_WORKER_ID": "1", "MEGASCALE_SLICE_ID": "1"},
            ("a-0:8482", 4, 3),
        ),
        # Two slices of one host each.
        (
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"}
            | SLICES,
            ("a-0:8482", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, (None, None, None)),
    ],
)
def test_a_process_is_told_its_place_by_its_launcher(env, expected):
    assert hosts.group(env) == expected


@pytest.mark.case("faults 23")
@pytest.mark.parametrize(
    "env, message",
    [
        ({"SLURM_NTASKS": ""}, "SLURM_NTASKS='', expected a whole number from 1"),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS='two', expected a whole number"),
        (ADDRESS, "needs JAX_NUM_PROCESSES and JAX_PROCESS_ID beside it"),
        (ADDRESS | TWO, "needs JAX_PROCESS_ID beside it"),
        (
            ADDRESS | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "PROCESSES='two', expected",
        ),
        (ADDRESS | TWO | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1', expected"),
        (ADDRESS | TWO | {"JAX_PROCESS_ID": "2"}, "process 2 of 2: expected 0 to 1"),
        (
            {"JAX_COORDINATOR_ADDRESS": "10.0.0.1", "JAX_PROCESS_ID": "0"} | TWO,
            "address is '10.0.0.1', expected HOST:PORT",
        ),
        (TWO | {"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=2 needs JAX_COORDINATOR_ADDRESS"),
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID=1 needs JAX_COORDINATOR_ADDRESS beside it"),
        ({"JAX_LOCAL_DEVICE_IDS": "0;1"}, "JAX_LOCAL_DEVICE_IDS=0;1, expected numbers"),
        (STEP, "SLURM_NTASKS=2 needs SLURM_PROCID and SLURM_LOCALID beside it"),
        (STEP | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, "SLURM_PROCID=2, expected 0 to 1"),
        (WORKERS, "TPU_WORKER_HOSTNAMES=a,b needs TPU_WORKER_ID beside it"),
        (WORKERS | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2, expected 0 to 1"),
        (WORKERS | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID"),
        ({"TPU_WORKER_ID": "1"}, "TPU_WORKER_ID=1 needs TPU_WORKER_HOSTNAMES beside it"),
        (
            SLICES | WORKERS | {"TPU_WORKER_ID": "0"},
            "MEGASCALE_NUM_SLICES=2 needs MEGASCALE_SLICE_ID beside it",
        ),
        (
            SLICES | WORKERS | {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "2"},
            "MEGASCALE_SLICE_ID=2, expected 0 to 1",
        ),
        (SLICES | {"MEGASCALE_SLICE_ID": "1"}, "needs TPU_WORKER_HOSTNAMES and TPU_WORKER_ID"),
        ({"MEGASCALE_SLICE_ID": "1"}, "MEGASCALE_SLICE_ID=1 needs MEGASCALE_NUM_SLICES"),
        ({"MEGASCALE_NUM_SLICES": "many"}, "MEGASCALE_NUM_SLICES='many', expected"),
    ],
)
def test_variables_that_do_not_make_up_a_run_are_refused_in_one_line(env, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        hosts.connect(env)
    assert "\n" not in str(error.value)


CACHED = """
import sys
from di_star_jax import hosts
hosts.keep_compiled()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((7, 7)))
print(sum(name == "/jax/compilation_cache/cache_hits" for name in hits), "hits")
"""


def in_a_process(code, **env):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | env
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.case("first hour 8")
def test_what_one_process_has_compiled_another_finds_also_where_the_folder_was_moved(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert "0 hits" in in_a_process(CACHED, XDG_CACHE_HOME=str(first)).stdout
    assert list((first / "di_star_jax" / "compiled").iterdir())
    first.rename(second)
    assert "0 hits" not in in_a_process(CACHED, XDG_CACHE_HOME=str(second)).stdout
    elsewhere = tmp_path / "elsewhere"
    in_a_process(CACHED, XDG_CACHE_HOME=str(first), JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert not first.exists()


@pytest.mark.case("first hour 8")
def test_a_cache_that_cannot_be_written_is_said_and_not_used(tmp_path):
    (tmp_path / "di_star_jax").touch()  # where its folder would be
    done = in_a_process(CACHED, XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr.startswith("what is compiled is not kept for the next start: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.long
def test_dry_run_as_a_user_types_it_exits_without_error_and_prints_the_plan():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "di_star_jax.main", SDXL, DRY],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2,567,463,684 denoiser" in done.stdout


def test_an_error_as_a_user_meets_it_is_one_line_without_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "di_star_jax.main", SDXL, DRY, "--config.trian.steps=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown config field trian.steps, did you mean train.steps?\n"


def typed(*arguments, cwd=ROOT, python=(), **env):
    """A command as a user types it, in a process of its own."""
    return subprocess.run(
        [sys.executable, *python, "-m", "di_star_jax", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.case("first hour 25")
def test_no_field_is_suggested_for_its_section_alone():
    known = ["reward.hpsv2", "reward.pickscore"]
    assert errors.suggest("reward.brightness", known) == ""
    assert errors.suggest("reward.hpsv", known) == ", did you mean reward.hpsv2?"


@pytest.mark.case("first hour 25")
def test_the_config_may_come_after_its_fields(command, monkeypatch):
    seen = []
    monkeypatch.setattr("di_star_jax.cost.plan.make", lambda c, n, kind: seen.append(c))
    monkeypatch.setattr("di_star_jax.cost.report.describe", lambda plan: ["the plan"])
    assert command("--config.seed=7", DRY, SDXL)[0] == 0
    assert command("--config.seed", "8", "--config", "sdxl:sim", "--config.dry_run")[0] == 0
    assert [(c.seed, c.reward.pickscore) for c in seen] == [(7, 100.0), (8, 0.0)]


@pytest.mark.case("first hour 11")
def test_a_config_is_found_by_name_from_any_folder(tmp_path):
    done = typed("train", "--config=shapes:sim", DRY, cwd=tmp_path)
    assert done.returncode == 0 and "parameters:" in done.stdout, done.stderr
    done = typed("train", "--config=configs/shapes.py", DRY, cwd=tmp_path)
    assert done.returncode == 2 and f"no config file configs/shapes.py in {tmp_path}" in done.stderr


@pytest.mark.case("first hour 13")
def test_the_commands_are_listed_and_a_wrong_one_is_refused_with_the_nearest():
    listed = typed()
    assert listed.returncode == 0
    for name in __main__.COMMANDS:
        assert f"\n  {name} " in listed.stdout
    assert typed("--help").stdout == typed("-h").stdout == listed.stdout
    assert typed("--version").stdout == f"{di_star_jax.__version__}\n"
    wrong = typed("evalate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unknown command 'evalate', did you mean evaluate?\n"


# Each takes 3 s.
_LEVELS = {"train": (), "evaluate": ()}
_LEVELS |= dict.fromkeys(("sample", "convert", "benchmark"), pytest.mark.slow)


@pytest.mark.case("first hour 13")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=_LEVELS.get(name, pytest.mark.long)) for name in __main__.COMMANDS],
)
def test_help_lists_all_flags_of_a_command_in_plain_sentences(name):
    done = typed(name, "-h")
    assert (done.returncode, done.stderr) == (0, "")
    module = ROOT / "di_star_jax" / f"{__main__.COMMANDS[name][0].replace('.', '/')}.py"
    source = module.read_text()
    if name == "evaluate":
        source += (ROOT / "di_star_jax" / "sample.py").read_text().split("if __name__")[0]
    defined = re.findall(r"(?:flags\.DEFINE_\w+|config_file)\(\s*\"(\w+)\"", source)
    assert defined and re.findall(r"^  --(\w+)$", done.stdout, re.MULTILINE)
    assert set(defined) <= set(re.findall(r"^  --(\w+)$", done.stdout, re.MULTILINE))
    assert "repeat this option" not in done.stdout and not re.search(r"^ +Of ", done.stdout, re.M)


@pytest.mark.case("first hour 13")
def test_help_with_a_config_lists_its_presets_and_fields():
    stdout = typed("train", "--config=shapes", "--help").stdout
    assert "\n  sim " in stdout and "reward.pickscore=0.0" in stdout
    assert "--config.train.steps=200\n      generator updates" in stdout


@pytest.mark.case("first hour 14", "first hour 15")
def test_nobody_is_told_of_a_tpu_or_a_pytorch_that_is_not_there(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import di_star_jax, os; print(os.environ.get('JAX_PLATFORMS'))\n"
        "import jax; jax.devices(); from transformers import CLIPTokenizer"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TF_"))}
    env["PYTHONPATH"] = str(ROOT)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    platforms = "cpu" if importlib.util.find_spec("libtpu") else None
    assert (done.stdout, done.stderr) == (f"{platforms}\n", "")
    done = subprocess.run(run, env=env | {"JAX_PLATFORMS": ""}, capture_output=True, text=True)
    assert done.stdout == "\n"  # what the user has set stays


@pytest.mark.parametrize("name", ["main", "sample", "evaluate", "convert", "benchmark"])
@pytest.mark.case("first hour 6")
def test_a_python_without_jax_is_told_to_activate_the_environment(name):
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"di_star_jax.{name}"],  # -S: no installed packages
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no jax; activate the environment" in done.stderr


# One device, as `typed`; programs that are compiled in half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def interrupted(*arguments, at, env):
    """(exit code, stderr, seconds) of a command that gets Ctrl-C once it has printed `at`.

    Args: at, or "" for when it has begun to import jax.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "di_star_jax", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    try:
        if at:
            assert next(line for line in process.stdout if at in line)
        while not at and "jaxlib" not in maps.read_text("utf-8"):
            assert process.poll() is None
        time.sleep(0.3)
        began = time.time()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr, time.time() - began


@pytest.mark.case("first hour 7")
@pytest.mark.parametrize(  # importing to compiling
    "at", ["", pytest.param("no --checkpoint", marks=pytest.mark.long), "drawing"]
)
def test_ctrl_c_ends_a_command_with_one_line(tmp_path, at):
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty")}
    code, stderr, seconds = interrupted("sample", f"--out={tmp_path}/out", at=at, env=env)
    assert (code, stderr) == (130, "stopped by Ctrl-C\n")
    assert seconds < 15


@pytest.mark.long
@pytest.mark.case("first hour 17", "first hour 28")
def test_sample_alone_draws_a_grid_by_the_shipped_generator_and_says_what_next(tmp_path):
    done = typed("sample", "--num=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "next: di-star train" in done.stdout
    of = json.loads((tmp_path / "samples" / "prompts.json").read_text())
    names = sorted(path.name for path in (tmp_path / "samples").glob("0*.png"))
    assert list(of) == names and len(names) == 6
    captions = (sample.SHIPPED / "prompts_held_out.txt").read_text().splitlines()
    assert list(of.values()) == captions[:6]
    seen = [np.asarray(Image.open(tmp_path / "samples" / name)) / 255 for name in names]

    def right(captions):
        pairs = zip(captions, seen, strict=True)
        found = [oracle.attributes(scenes.parse(caption), image) for caption, image in pairs]
        return np.sum(found, axis=0)[0] / np.sum(found, axis=0)[1]

    assert right(of.values()) > 0.5 > right(captions[1:7])


@pytest.mark.case("first hour 18")
def test_sample_says_which_words_its_generator_never_saw():
    shapes = Tokenizer(sample.SHIPPED / "tokenizer")
    texts = ["two red elephants", "a blue circle in paris"]
    assert tokenizer.unknown_words(shapes, texts) == ["elephants", "in", "paris"]
    assert tokenizer.unknown_words(shapes, ["Two Red circles on a gray background"]) == []


@pytest.mark.case("first hour 18", "first hour 25")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out={}/file"], "--out={}/file is a file, expected a folder; give another name"),
        pytest.param(["--out={}/file/x"], "cannot make --out={}/file/x", marks=pytest.mark.slow),
        pytest.param(["--checkpoint=x"], "no --prompt; give what to draw", marks=pytest.mark.slow),
        (["--sampler=eular"], "--sampler=eular: expected one of ddim, dpm_solver_pp, euler, few"),
    ],
)
def test_sample_refuses_what_it_cannot_do_before_it_reads_anything(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    done = typed("sample", *(argument.format(tmp_path) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and message.format(tmp_path) in done.stderr


@pytest.mark.case("first hour 25")
def test_all_flags_that_are_missing_are_named_at_once():
    done = typed("convert", "--to=orbax")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no --input, ") and "; no --output, " in done.stderr


def test_a_grid_has_a_row_for_each_prompt_and_shows_small_pictures_larger():
    images = np.zeros((4, 64, 64, 3), np.float32)
    images[2:] = 1.0
    grid = pictures.captioned_grid(images, ["one", "two"], width=300)
    assert grid[16:272, 16:272].max() == 128  # a gray square of 256 pixels
    row = 256 + 44 + 16
    assert (grid[16 + 256 + 5 : 16 + row - 16, 16:272] < 128).any()  # its caption
    assert grid[16 + row : 16 + row + 256, 16:272].min() == 255
